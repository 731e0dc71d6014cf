"""The best shift of the schedule grows with the square root of the latents' dimension.

Paper:  RAE v1, section 4.2 and table 4. Times are shifted by alpha = sqrt(m / 4096), where m counts all values of the
        latents, channels included. For DINOv2-B (m = 196,608), alpha = 6.93 improves the FID from 23.08 to 4.81.
Here:   Synthetic images whose distribution is known: six numbers, each near -1 or +1, are the strengths of smooth waves
        in three colours. The same images at 8 x 8, 16 x 16 and 32 x 32 pixels give latents (pixels, 2 x 2 patches) of
        m = 192, 768 and 3,072. So the content is the same, and only the redundancy grows, as in the argument behind the
        formula. Training times and sampling grid use the same shift, as in the paper. The distance to the true
        distribution is the squared Wasserstein distance of each number's distribution, plus the energy outside the
        waves. These latents do not come from an encoder, so the study does not say how redundant an encoder's are.
Cost:   about 45 minutes on one core of an Intel Xeon with AVX-512
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import raekit
from raekit.experiments.studies.engine import waves
from raekit.experiments.studies.engine.plan import Claim, Result, Run, Settings, Values
from raekit.experiments.studies.engine.shifts import shift_claims
from raekit.experiments.studies.engine.training import small_dit
from raekit.experiments.studies.engine.waves import draw_numbers, write_images
from raekit.progress import Progress
from raekit.recipes import cache, configured

SIDES = (8, 16, 32)
"""Sides of the images in pixels."""
BASES = (12288, 3072, 768, 192, 48, 12)
"""Values of `shift_base`. The shifts are 0.125 to 4 for m = 192, and 0.5 to 16 for m = 3,072."""
SEEDS = (0, 1, 2, 3)
IMAGES = 4096
EVALUATIONS = 20
STEPS = 2400


def prepare(folder: Path, quick: bool, device: str | None, progress: Progress) -> None:
    """Write the images of each size, and cache their latents."""
    numbers = draw_numbers(IMAGES, seed=0)
    for side in SIDES:
        write_images(folder / "images" / f"{side}.npz", numbers, side)
        cache(_config(side, base=1, seed=0, folder=folder, steps=2), progress)


def plan(folder: Path, quick: bool) -> list[Run]:
    """Return a run for each seed, size and shift."""
    return [
        Run(
            f"side{side}-base{base}-seed{seed}",
            {"side": side, "dimension": _dimension(side), "shift": _shift(side, base), "seed": seed},
            _config(side, base, seed, folder, steps=4 if quick else STEPS),
        )
        for seed in SEEDS[: 2 if quick else None]
        for side in SIDES[:: 2 if quick else 1]
        for base in BASES[:: 3 if quick else 1]
    ]


def _dimension(side: int) -> int:
    """Return m, the number of values of the latents."""
    return 3 * side * side


def _shift(side: int, base: int) -> float:
    return math.sqrt(_dimension(side) / base)


def _config(side: int, base: int, seed: int, folder: Path, steps: int) -> Any:
    """Return the config of a training on the images of one size."""
    config = small_dit(
        side,
        folder / "latents" / str(side),
        steps,
        seed,
        data__source=f"npz:{folder / 'images' / f'{side}.npz'}",
        shift_base=base,
        denoiser__backbone={"width": 48, "depth": 2, "heads": 2},
        denoiser__patch_size=side // 2,
        denoiser__prediction="data",
        # With a rate of 1e-2, seeds differed more than shifts.
        optim__lr=3e-3,
        optim__final_lr=3e-5,
    )
    return configured(config, ema=[0.99])


def measure(artifact: Path, settings: Settings, folder: Path) -> Values:
    """Return the distance of generated images from the true distribution, and its two parts."""
    return waves.measure(raekit.load(str(artifact)), int(settings["seed"]), EVALUATIONS, int(settings["side"]))


def judge(results: Sequence[Result], folder: Path) -> list[Claim]:
    """Compare the best shifts of the sizes."""
    return shift_claims(results, "images", "distance to the true distribution")
