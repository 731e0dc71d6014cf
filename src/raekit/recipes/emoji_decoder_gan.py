"""Stage 1 on the built-in emoji with a discriminator: emoji_decoder, with a hinge GAN on builtin:vit-tiny and LPIPS.

Reproduces:     nothing yet
Command:        raekit train emoji_decoder_gan --train.compile
                (offline: --perceptual.weights FILE, or --perceptual None)
Size:           4.8 M parameters, discriminator 1.5 M
Memory:         0.3 GiB, and LPIPS
Cost:           about twice emoji_decoder per step, once the discriminator trains
Last verified:  2026-11-27, a trial of 200 steps from the built-in decoder's weights: the discriminator did not tell
                reconstructions from images (hinge loss 1.00 at learning rates of 2e-4 and 2e-3), perhaps because
                they are nearly equal in the features of builtin:vit-tiny
"""

from dataclasses import replace

from raekit.models.discriminator import DiscriminatorConfig
from raekit.recipes import emoji_decoder
from raekit.stages.decoder_losses import AdversarialConfig, PerceptualConfig
from raekit.stages.reconstruction import ReconstructionConfig
from raekit.training.optim import OptimConfig


def config() -> ReconstructionConfig:
    steps = emoji_decoder.STEPS
    return replace(
        emoji_decoder.config(),
        # Late, because at this size VGG16 takes more time than all other parts together.
        perceptual=PerceptualConfig(weight=0.3, start=3 * steps // 4),
        # As published, except for the backbone, which is available offline. Both starts are at the same fractions of
        # the training as in the published 16 epochs.
        adversarial=AdversarialConfig(
            discriminator=DiscriminatorConfig(backbone="builtin:vit-tiny", blocks=(1, 3, 5)),
            discriminator_start=6 * steps // 16,
            start=8 * steps // 16,
            optim=OptimConfig(
                lr=2e-4, final_lr=2e-5, warmup_steps=0, decay="cosine", decay_end=steps, betas=(0.5, 0.9), clip=0.0
            ),
        ),
    )
