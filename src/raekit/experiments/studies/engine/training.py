"""The short trainings that studies are made of."""

from pathlib import Path
from typing import Any

from raekit.recipes import StageConfig, configured


def small_dit(side: int, latents: Path, steps: int, seed: int, **overrides: Any) -> StageConfig:
    """Return the config of a short training of a plain DiT on the pixels of images, without classes and averages.

    Args:
        side: Side of the images in pixels.
        latents: Folder of the cached pixels.
        steps: Steps of the training.
        seed: Seed of the training.
        **overrides: Further fields, as in `raekit.recipes.train`.
    """
    return configured(
        "emoji_dit_dh",
        data__split="all",
        data__image_size=side,
        autoencoder=f"pixels@{side}",
        latents=str(latents),
        conditional=False,
        time_law="uniform",
        denoiser__head=None,
        denoiser__allow_narrow=True,
        train__steps=steps,
        train__precision="fp32",
        train__seed=seed,
        optim__lr=1e-2,
        optim__final_lr=1e-4,
        optim__warmup_steps=min(50, steps - 1),
        optim__decay_end=steps,
        ema=[],
        heldout=None,
        samples=None,
        **overrides,
    )
