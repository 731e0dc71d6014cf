"""Stage 1 on the built-in emoji with a discriminator: emoji_decoder, then a hinge GAN on builtin:vit-tiny, then LPIPS.

Reproduces:     docs/results/gan.md, beside emoji_decoder at equal steps
Command:        raekit train emoji_decoder_gan --train.compile
                (offline: --perceptual.weights FILE, or --perceptual None)
Cost:           55 minutes on one CPU core, half of it LPIPS
Last verified:  2026-11-23. Held-out images: PSNR 21.3 dB, LPIPS 0.274, fd_vit_tiny 0.378 (with L1 alone 22.3, 0.292,
                0.326); of generated latents 1.46 (2.10).
"""

from dataclasses import replace

from raekit.models.discriminator import DiscriminatorConfig
from raekit.recipes import emoji_decoder
from raekit.stages.reconstruction import AdversarialConfig, PerceptualConfig, ReconstructionConfig
from raekit.train.optim import OptimConfig


def config() -> ReconstructionConfig:
    base = emoji_decoder.config()
    steps = emoji_decoder.STEPS
    return replace(
        base,
        # LPIPS late, not from the start as published: at this size its VGG16 takes more time than all the rest.
        perceptual=PerceptualConfig(start=12 * steps // 16),
        # As published but for the backbone, which is the one at hand offline. The parts of the schedule are those of
        # the published 16 epochs.
        adversarial=AdversarialConfig(
            discriminator=DiscriminatorConfig(backbone="builtin:vit-tiny", blocks=(0, 1, 2)),
            discriminator_start=6 * steps // 16,
            start=8 * steps // 16,
            optim=OptimConfig(
                lr=2e-4, final_lr=2e-5, warmup_steps=0, decay="cosine", decay_end=steps, betas=(0.5, 0.9), clip=0.0
            ),
        ),
    )
