"""Pretrain the built-in encoder (builtin:vit-tiny) on the built-in emoji, as a masked autoencoder.

Reproduces:     src/raekit/assets/vit-tiny
"""

from raekit.data.loader import DataConfig
from raekit.models.encoders import ViTConfig
from raekit.stages.representation import RepresentationConfig
from raekit.train.optim import OptimConfig
from raekit.train.trainer import TrainConfig

STEPS = 3000


def config() -> RepresentationConfig:
    return RepresentationConfig(
        data=DataConfig(source="emoji", image_size=64, crop="random", flip=True),
        encoder=ViTConfig(image_size=64, patch_size=8, width=192, depth=6, heads=3),
        train=TrainConfig(steps=STEPS, batch_size=64, checkpoint_every=500, log_every=50),
        optim=OptimConfig(
            lr=1e-3,
            final_lr=1e-5,
            warmup_steps=100,
            warmup_from_zero=True,
            decay="cosine",
            decay_end=STEPS,
            weight_decay=0.05,
        ),
        ema=(0.998,),
    )
