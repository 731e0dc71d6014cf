"""The short trainings that studies are made of."""

from pathlib import Path
from typing import Any

from raekit.data.sources.base import Split
from raekit.recipes import StageConfig, configured


def small_dit(side: int, latents: Path, steps: int, seed: int, **overrides: Any) -> StageConfig:
    """Return the config of a short training of a plain DiT on the pixels of images, without classes and averages.

    Args:
        side: Side of the images in pixels.
        latents: Folder of the cached pixels.
        steps: Steps of the training.
        seed: Seed of the training.
        **overrides: Further fields, as in `raekit.train`.
    """
    return configured(
        "emoji_dit_dh",
        autoencoder=f"pixels@{side}",
        latents=str(latents),
        conditional=False,
        time_law="uniform",
        denoiser__head=None,
        denoiser__base_depth=0,
        denoiser__allow_narrow=True,
        **({"optim__lr": 1e-2, "optim__final_lr": 1e-4} | overrides),
        **_short(steps, seed, "all", side, warmup=50),
    )


LARGER_DECODER = {"width": 256, "depth": 6, "heads": 4, "hidden": 768, "patch_size": 8}
"""Sizes of a decoder that leaves no edges between the patches after 4,500 steps, about 13 minutes on one core."""
SIDE = 32
"""Side in pixels of the emoji of the functions below. The built-in encoder gives 4 x 4 tokens of 192 channels."""


def split_of(quick: bool) -> Split:
    """Return the images to train on: the training images, or the few held-out images in a quick study."""
    return "heldout" if quick else "train"


def small_decoder(steps: int, seed: int, split: Split, **overrides: Any) -> StageConfig:
    """Return the config of a short training of a small decoder of the built-in encoder, on emoji of 32 x 32 pixels.

    Args:
        steps: Steps of the training.
        seed: Seed of the training.
        split: Images to train on.
        **overrides: Further fields, as in `raekit.train`.
    """
    return configured(
        "emoji_decoder",
        encoder_size=SIDE,
        **({"decoder": {"width": 128, "depth": 3, "heads": 4, "hidden": 256, "patch_size": 8}} | overrides),
        **_short(steps, seed, split),
    )


def small_vae(steps: int, seed: int, split: Split) -> StageConfig:
    """Return the config of a short training of a small VAE on emoji of 32 x 32 pixels, with latents of 8 x 8 x 4.

    Args:
        steps: Steps of the training.
        seed: Seed of the training.
        split: Images to train on.
    """
    return configured("emoji_vae", vae={"channels": 4, "widths": [32, 32, 64]}, **_short(steps, seed, split))


def small_denoiser(
    autoencoder: Path | str, latents: Path | None, steps: int, seed: int, split: Split, **overrides: Any
) -> StageConfig:
    """Return the config of a short training of a small, class-conditional DiT on latents with 4 x 4 tokens.

    Args:
        autoencoder: Run of `small_decoder` or of `small_vae`, or the name of a baseline.
        latents: Folder of the cached latents. None encodes the images in each step.
        steps: Steps of the training.
        seed: Seed of the training.
        split: Images to train on.
        **overrides: Further fields, as in `raekit.train`.
    """
    return configured(
        "emoji_dit_dh",
        autoencoder=str(autoencoder),
        latents=latents and str(latents),
        denoiser__backbone={"width": 192, "depth": 4, "heads": 4},
        denoiser__head=None,
        **({"denoiser__base_depth": 0} | overrides),
        **_short(steps, seed, split),
    )


def _short(steps: int, seed: int, split: Split, side: int = SIDE, warmup: int = 20) -> dict[str, Any]:
    """Return the fields that all short trainings share."""
    return {
        "data__split": split,
        "data__image_size": side,
        "train__steps": steps,
        "train__precision": "fp32",
        "train__seed": seed,
        "optim__warmup_steps": min(warmup, steps - 1),
        "optim__decay_end": steps,
        "ema": [],
        "heldout": None,
        "samples": None,
    }
