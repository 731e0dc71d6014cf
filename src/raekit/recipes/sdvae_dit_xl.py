"""Stage 2 on ImageNet 256: plain DiT-XL on the latents of an SD-VAE, the baseline that RAE is set against.

Reproduces:     FID 7.13 unguided after 80 epochs (paper, table 2); with a wide head, 11.70 (table 10)
Prepare:        pip install 'raekit[vae]'
Command:        torchrun --nproc-per-node 8 -m raekit -- train sdvae_dit_xl --data.source folder:imagenet
Cost:           80 epochs, 675 M parameters
Last verified:  never at this scale, for want of ImageNet and GPUs; the autoencoder agrees with diffusers.

Which weights of the SD-VAE were used is not published. Latents are the posterior's mean, where others draw from it.
They have 4096 dimensions, so that the noise schedule is not shifted.
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
