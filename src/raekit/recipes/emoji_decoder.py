"""Stage 1 on the built-in emoji: a small decoder for builtin:vit-tiny, L1 only.

Reproduces:     src/raekit/assets/emoji/autoencoder
"""

from raekit.data.loader import DataConfig
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig
from raekit.train.optim import OptimConfig
from raekit.train.trainer import TrainConfig

STEPS = 2500


def config() -> ReconstructionConfig:
    return ReconstructionConfig(
        data=DataConfig(source="emoji", image_size=64),
        encoder="builtin:vit-tiny",
        decoder=DecoderSize(width=192, depth=6, heads=4, hidden=768, patch_size=8),
        # Half of the published 0.8: these tokens have 192 channels for 192 pixel values, and so little to spare.
        noise=0.4,
        train=TrainConfig(steps=STEPS, batch_size=32, checkpoint_every=500, compile=True),
        optim=OptimConfig(
            lr=1e-3,
            final_lr=2e-5,
            warmup_steps=100,
            warmup_from_zero=True,
            decay="cosine",
            decay_end=STEPS,
        ),
        ema=(0.995,),
    )
