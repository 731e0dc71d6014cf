"""Stage 2 on ImageNet 256: plain DiT-XL on raw pixels, in patches of 16 that have as many dimensions as RAE's tokens.

Reproduces:     FID 51.09 unguided (paper, table 11); with a wide head, 30.56
Command:        torchrun --nproc-per-node 8 -m raekit -- train pixel_dit_xl --data.source folder:imagenet
Cost:           80 epochs, 677 M parameters
Last verified:  never at this scale, for want of ImageNet and GPUs.

The number of epochs of the figures is not published; taken to be that of the paper's other comparisons.
"""

from dataclasses import replace

from raekit.recipes import sdvae_dit_xl
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    base = sdvae_dit_xl.config()
    return replace(base, autoencoder="pixels", denoiser=replace(base.denoiser, patch_size=16))
