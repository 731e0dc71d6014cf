"""Stage 2 on the built-in emoji: a small DiT^DH, class-conditional over the nine emoji groups.

Reproduces:     src/raekit/assets/emoji/denoiser (6.9 M parameters, seed 0)
Command:        raekit latents cache builtin:emoji --out latents --dtype fp32
                raekit train emoji_dit_dh --latents latents --train.compile
                python tools/make_builtin.py denoiser runs/emoji_dit_dh
Size:           6.9 M parameters
Memory:         0.5 GiB
Cost:           6 hours on one core (compiled, 586,000 images, 19 to 42 images/s), or 7 minutes on an H200 that four
                other processes used (1.3 million images)
Last verified:  2026-11-27, docs/results/builtin.md

The built-in weights were trained in four parts: 2,800 steps from a learning rate of 1e-3 down to 2e-5, then with
--init-from 9,000 steps from 8e-4 down, and 6,500 steps from 6e-4 down. The base output was added for the third part, on
two cores. The last part was on an H200, in bf16:

    raekit train emoji_dit_dh --init-from RUN --latents latents --train.batch-size 128 --optim.lr 6e-4 \
        --train.steps 6669 --optim.decay-end 6669 --optim.warmup-steps 300 --ema 0.999 --train.compile

This recipe is one training of about the length of the first three. On a GPU, one training from random weights is nearly
as good as the built-in one (docs/results/builtin.md):

    raekit train emoji_dit_dh --latents latents --train.batch-size 256 --optim.lr 1.5e-3 --train.steps 5190 \
        --optim.decay-end 5190 --optim.warmup-steps 500 --ema 0.999 --train.compile
"""

from raekit.data.loader import DataConfig
from raekit.models.denoiser_config import TransformerConfig
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.stages.watch import HeldoutConfig, SamplesConfig
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

STEPS = 18_000


def config() -> GenerationConfig:
    return GenerationConfig(
        data=DataConfig(source="emoji", image_size=64),
        autoencoder="builtin:emoji",
        denoiser=DenoiserSize(
            backbone=TransformerConfig(width=192, depth=6, heads=4),
            head=TransformerConfig(width=256, depth=2, heads=4),
            qk_norm=True,
            # For internal guidance.
            base_depth=2,
            # As in RAE v2. A velocity contains the noise, which takes all of the head's width; the data do not.
            prediction="data",
            # With the published 0.02, the classes have no effect for most of such a short run.
            label_std=0.5,
        ),
        time_law="logit-normal",
        train=TrainConfig(steps=STEPS, batch_size=32, checkpoint_every=200, ema_warmup=True),
        optim=OptimConfig(
            lr=1e-3,
            final_lr=2e-5,
            warmup_steps=100,
            warmup_from_zero=True,
            decay="cosine",
            decay_end=STEPS,
        ),
        ema=(0.998,),
        samples=SamplesConfig(every=1000, count=36),
        heldout=HeldoutConfig(every=500),
    )
