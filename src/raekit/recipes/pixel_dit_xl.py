"""Stage 2 on ImageNet 256: plain DiT-XL on raw pixels, in 16-pixel patches with as many values as a token of RAE.

Reproduces:     FID 51.09 unguided (paper, table 11); 30.56 with a wide head
Command:        torchrun --nproc-per-node 8 -m raekit -- train pixel_dit_xl --data.source folder:imagenet
Size:           677 M parameters
Memory:         12.6 GiB of state, 0.86 GiB an image
Cost:           80 epochs, 2.4 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs).

The number of epochs behind the figures is not published. The recipe uses 80, as the paper's other comparisons do.
"""

from dataclasses import replace

from raekit.recipes import sdvae_dit_xl
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    base = sdvae_dit_xl.config()
    return replace(base, autoencoder="pixels", denoiser=replace(base.denoiser, patch_size=16))
