"""A small convolutional classifier of the built-in emoji, which judges generated emoji (--features classifier:...).

Reproduces:     src/raekit/assets/emoji/classifier
Command:        raekit train emoji_classifier
                python tools/make_builtin.py classifier runs/emoji_classifier
Size:           0.8 M parameters
Memory:         0.1 GiB
Cost:           27 minutes on one busy CPU core (31 images/s)
Last verified:  2026-11-26. Accuracy on the held-out images: 59.1 % (the largest class is 16 %).

No network that generates images is trained with this classifier or with its weights, so it can judge all of them.
"""

from raekit.data.loader import DataConfig
from raekit.models.augment import AugmentConfig
from raekit.stages.classification import ClassificationConfig
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

STEPS = 800


def config() -> ClassificationConfig:
    return ClassificationConfig(
        data=DataConfig(source="emoji", image_size=64, flip=True),
        augment=AugmentConfig(cutout=0.25),
        train=TrainConfig(steps=STEPS, batch_size=64, checkpoint_every=200),
        optim=OptimConfig(
            lr=2e-3,
            final_lr=2e-5,
            warmup_steps=40,
            warmup_from_zero=True,
            decay="cosine",
            decay_end=STEPS,
            weight_decay=0.05,
        ),
        ema=(0.99,),
        score_every=200,
    )
