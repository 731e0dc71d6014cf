"""Stage 2 on ImageNet 256: plain DiT-XL on the latents of an SD-VAE, the baseline that the paper compares with RAE.

Reproduces:     FID 7.13 unguided after 80 epochs (paper, table 2); 11.70 with a wide head (table 10)
Prepare:        pip install '.[vae]' in a clone
Command:        torchrun --nproc-per-node 8 -m raekit -- train sdvae_dit_xl --data.source folder:imagenet
Size:           675 M parameters
Memory:         12.6 GiB of state, 0.81 GiB an image (0.04 GiB with train.checkpointing)
Cost:           80 epochs, 2.4 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs); the autoencoder agrees with diffusers.

The paper does not say which SD-VAE weights it uses. The latents are the mean of the posterior, where other codes draw a
sample from it. The latents have 4096 dimensions, so that the noise schedule is not shifted.
"""

from dataclasses import replace

from raekit.recipes import dit_xl_dinov2s
from raekit.recipes.dit_dh_xl_dinov2b_256 import EPOCH
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    base = dit_xl_dinov2s.config()
    return replace(
        base,
        autoencoder="vae:stabilityai/sd-vae-ft-ema",
        denoiser=replace(base.denoiser, patch_size=2),
        train=replace(base.train, steps=80 * EPOCH),
    )
