"""Stage 2 on ImageNet 256: DiT^DH-L for the latents of DINOv2-B.

Reproduces:     no figure is published for this size in the paper
Command:        torchrun --nproc-per-node 8 -m raekit -- train dit_dh_l_dinov2b_256 --data.source folder:imagenet
Size:           622 M parameters
Memory:         11.6 GiB of state, 0.77 GiB an image (0.05 GiB with train.checkpointing)
Cost:           80 epochs, 2.5 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.

The learning rate follows the schedule for 800 epochs; the training stops after 80.
"""

from dataclasses import replace

from raekit.models.denoiser_config import SIZES
from raekit.recipes import dit_dh_xl_dinov2b_256
from raekit.recipes.dit_dh_xl_dinov2b_256 import EPOCH
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    base = dit_dh_xl_dinov2b_256.config()
    denoiser = replace(base.denoiser, backbone=SIZES["L"])
    return replace(base, denoiser=denoiser, train=replace(base.train, steps=80 * EPOCH))
