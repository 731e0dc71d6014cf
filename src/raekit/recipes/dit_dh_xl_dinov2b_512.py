"""Stage 2 on ImageNet 512: DiT^DH-XL for the latents of DINOv2-B at 448 pixels, 32 x 32 tokens.

Reproduces:     FID 1.13 with auto:1.5 by a DiT^DH-S after 20 epochs (paper, table 7)
Command:        torchrun --nproc-per-node 8 -m raekit -- train dit_dh_xl_dinov2b_512 --data.source folder:imagenet
Size:           839 M parameters
Memory:         15.6 GiB of state, 5.23 GiB an image (0.21 GiB with train.checkpointing)
Cost:           400 epochs, 72 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.

The learning rate follows the schedule for 800 epochs; the training stops after 400. The time shift follows from the
latents and is 13.86. The published config for this size uses the shift for 256 pixels by mistake (RAE v1's code).
"""

from dataclasses import replace

from raekit.recipes import dit_dh_xl_dinov2b_256
from raekit.recipes.dit_dh_xl_dinov2b_256 import EPOCH
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    base = dit_dh_xl_dinov2b_256.config()
    return replace(
        base,
        data=replace(base.data, image_size=512),
        autoencoder="rae-dinov2-b-512",
        train=replace(base.train, steps=400 * EPOCH),
    )
