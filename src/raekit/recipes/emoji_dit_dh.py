"""Stage 2 on the built-in emoji: a small DiT^DH, class-conditional over the nine emoji groups.

Reproduces:     src/raekit/assets/emoji/denoiser
"""

from raekit.data.loader import DataConfig
from raekit.models.denoiser import TransformerConfig
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.train.optim import OptimConfig
from raekit.train.trainer import TrainConfig

STEPS = 3000


def config() -> GenerationConfig:
    return GenerationConfig(
        data=DataConfig(source="emoji", image_size=64),
        autoencoder="builtin:emoji",
        denoiser=DenoiserSize(
            backbone=TransformerConfig(width=192, depth=7, heads=4),
            head=TransformerConfig(width=256, depth=2, heads=4),
            qk_norm=True,
            # As RAE v2: the head is no wider than a token, which leaves a velocity, noise and all, little room.
            prediction="data",
        ),
        time_law="logit-normal",
        train=TrainConfig(steps=STEPS, batch_size=64, checkpoint_every=250),
        optim=OptimConfig(
            lr=8e-4,
            final_lr=2e-5,
            warmup_steps=100,
            warmup_from_zero=True,
            decay="cosine",
            decay_end=STEPS,
        ),
        # The published 0.9995 would average over half of this run.
        ema=(0.998,),
    )
