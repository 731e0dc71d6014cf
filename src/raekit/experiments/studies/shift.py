"""The best shift of the schedule grows with the square root of the latents' dimension.

Paper:  RAE v1, section 4.2 and table 4. Times are shifted by alpha = sqrt(m / 4096), where m counts all values of the
        latents, channels included. For DINOv2-B (m = 196,608), alpha = 6.93 improves the FID from 23.08 to 4.81.
Here:   Synthetic images whose distribution is known: six numbers, each near -1 or +1, are the strengths of smooth waves
        in three colours. The same images at 8 x 8, 16 x 16 and 32 x 32 pixels give latents (pixels, 2 x 2 patches) of
        m = 192, 768 and 3,072. So the content is the same, and only the redundancy grows, as in the argument behind the
        formula. Training times and sampling grid use the same shift, as in the paper. The distance to the true
        distribution is the squared Wasserstein distance of each number's distribution, plus the energy outside the
        waves. These latents do not come from an encoder, so the study does not say how redundant an encoder's are.
Cost:   about 10 minutes on one core of an Intel Xeon with AVX-512
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import raekit
from raekit.experiments.studies.engine.drawing import plain_numbers
from raekit.experiments.studies.engine.plan import (
    Claim,
    Result,
    Run,
    Settings,
    Values,
    Verdict,
    estimate,
    geometric,
    within,
)
from raekit.experiments.studies.engine.training import small_dit
from raekit.experiments.studies.engine.waves import distance, draw_numbers, images
from raekit.files import whole
from raekit.progress import Progress
from raekit.recipes import cache

SIDES = (8, 16, 32)
"""Sides of the images in pixels."""
BASES = (12288, 3072, 768, 192, 48, 12, 3)
"""Values of `shift_base`. The shifts are 0.125 to 8 for m = 192, and 0.5 to 32 for m = 3,072."""
SEEDS = (0, 1, 2, 3)
IMAGES = 4096
SAMPLES = 1024
STEPS = 20
EXPONENT = 0.5
"""The exponent of m in the paper's formula."""
TOLERANCE = 0.15
"""How far the measured exponent may be from it."""


def prepare(folder: Path, quick: bool, progress: Progress) -> None:
    """Write the images of each size, and cache their latents."""
    numbers = draw_numbers(IMAGES, seed=0)
    for side in SIDES:
        path = folder / "images" / f"{side}.npz"
        if not path.is_file():
            with whole(path) as partial, partial.open("wb") as file:
                np.savez(file, arr_0=images(numbers, side))
        cache(_config(side, base=1, seed=0, folder=folder, steps=2), progress)


def plan(folder: Path, quick: bool) -> list[Run]:
    """Return a run for each seed, size and shift."""
    return [
        Run(
            f"side{side}-base{base}-seed{seed}",
            {"side": side, "dimension": _dimension(side), "shift": _shift(side, base), "seed": seed},
            _config(side, base, seed, folder, steps=4 if quick else 400),
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
    return small_dit(
        side,
        folder / "latents" / str(side),
        steps,
        seed,
        data__source=f"npz:{folder / 'images' / f'{side}.npz'}",
        shift_base=base,
        denoiser__backbone={"width": 48, "depth": 2, "heads": 2},
        denoiser__patch_size=side // 2,
        denoiser__prediction="data",
    )


def measure(artifact: Path, settings: Settings, folder: Path) -> Values:
    """Return the distance of generated images from the true distribution, and its two parts."""
    stream = raekit.generate(
        raekit.load(str(artifact)),
        count=SAMPLES,
        seed=int(settings["seed"]),
        sampling=raekit.Sampling(steps=STEPS),
        batch_size=256,
    )
    pixels = np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in stream])
    numbers, rest = distance(pixels, int(settings["side"]))
    return {"distance": numbers + rest, "numbers": numbers, "rest": rest}


Distances = dict[int, dict[float, list[float]]]
"""The distances of all seeds by side and shift."""


def judge(results: Sequence[Result], folder: Path) -> list[Claim]:
    """Compare the best shifts of the sizes."""
    distances: Distances = {}
    for result in results:
        row = distances.setdefault(int(result.settings["side"]), {})
        row.setdefault(float(result.settings["shift"]), []).append(result.values["distance"])
    return [_growth(distances), _gain(distances)]


def best_shift(shifts: Sequence[float], values: Sequence[float]) -> float:
    """Return the shift with the smallest distance, from a parabola through the best shift and its two neighbours.

    The parabola is fitted to the logarithms of both. A best shift at the end of the list is returned as it is.
    """
    best = int(np.argmin(values))
    if best in (0, len(shifts) - 1):
        return shifts[best]
    x, y = (np.log(np.asarray(part[best - 1 : best + 2])) for part in (shifts, values))
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(shifts[best] * math.exp(-b / (2 * a)))


def _growth(distances: Distances) -> Claim:
    """Judge how the best shift grows with the dimension."""
    best = {
        side: [best_shift(list(row), values) for values in zip(*row.values(), strict=True)]
        for side, row in distances.items()
    }
    dimensions = [math.log(_dimension(side)) for side in best]
    exponent = estimate(
        [float(np.polyfit(dimensions, np.log(of_seed), 1)[0]) for of_seed in zip(*best.values(), strict=True)]
    )
    middle = {side: geometric(values) for side, values in best.items()}
    small, large = min(best), max(best)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(
            xlabel="shift of the schedule", ylabel="distance to the true distribution", xscale="log", yscale="log"
        )
        for place, (side, row) in enumerate(distances.items()):
            color = f"C{place}"
            for values in zip(*row.values(), strict=True):
                axes.plot(list(row), values, ".", color=color, alpha=0.6)
            label = f"m = {_dimension(side):,} (geometric mean; a point for each of {len(best[side])} seeds)"
            axes.plot(list(row), [geometric(values).mean for values in row.values()], color=color, label=label)
            axes.axvspan(middle[side].low, middle[side].high, color=color, alpha=0.12)
            axes.axvline(middle[side].mean, color=color, linestyle="--", linewidth=1)
        predicted = middle[small].mean * math.sqrt(_dimension(large) / _dimension(small))
        label = f"formula for m = {_dimension(large):,}, from the best shift for m = {_dimension(small):,}"
        axes.axvline(predicted, color="black", linestyle=":", label=label)
        axes.set_xlim(min(distances[small]) / 1.2, max(distances[large]) * 1.2)
        ticks = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        plain_numbers(axes.yaxis)
        figure.legend(loc="outside lower center", ncols=2, fontsize=7)

    ends = [f"m = {_dimension(side):,}" for side, row in distances.items() if {min(row), max(row)} & {*best[side]}]

    return Claim(
        name="growth",
        text="The best shift grows as the square root of the dimension m",
        paper="section 4.2: alpha = sqrt(m / 4096), so an exponent of 0.5; no sweep is printed",
        found="best shift "
        + ", ".join(f"{value} for m = {_dimension(side):,}" for side, value in middle.items())
        + f": exponent {exponent}; shown if its interval lies between "
        f"{EXPONENT - TOLERANCE:g} and {EXPONENT + TOLERANCE:g}"
        + (f"; a best shift of {' and '.join(ends)} is the first or last that was tried" if ends else ""),
        # The best shift may lie beyond the ends of the list, so the exponent is then not known.
        verdict=Verdict.UNDECIDED if ends else within(exponent, EXPONENT - TOLERANCE, EXPONENT + TOLERANCE),
        draw=draw,
        caption="Distance of generated images against the shift, for the same content in few and in many values. "
        "Dashed: the best shift (geometric mean over seeds), with its 95 % interval; dotted: the formula.",
    )


def _gain(distances: Distances) -> Claim:
    """Judge whether the large latents gain from a shift that is scaled by the formula."""
    small, large = min(distances), max(distances)
    best = geometric([best_shift(list(distances[small]), v) for v in zip(*distances[small].values(), strict=True)])
    scaled = best.mean * math.sqrt(_dimension(large) / _dimension(small))
    before, after = (min(distances[large], key=lambda s: abs(math.log(s / wanted))) for wanted in (1.0, scaled))
    pairs = zip(distances[large][before], distances[large][after], strict=True)
    gain = geometric([one / other for one, other in pairs])

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(xlabel="shift of the schedule", ylabel="distance to the true distribution")
        for seed, values in enumerate(zip(distances[large][before], distances[large][after], strict=True)):
            axes.plot([0, 1], values, "o-", markersize=4, linewidth=0.8, label=f"seed {seed}")
        axes.set_xticks([0, 1], [f"{before:.3g}: no shift", f"{after:.3g}: scaled by sqrt(m)"])
        axes.set_xlim(-0.5, 1.5)
        axes.set_ylim(bottom=0)
        axes.legend()

    return Claim(
        name="gain",
        text="High-dimensional latents gain from the larger shift",
        paper="table 4: FID 23.08 without the shift, 4.81 with it (DiT-XL, DINOv2-B)",
        found=f"m = {_dimension(large):,}: the distance at shift {before:.3g} is {gain} times the distance at shift "
        f"{after:.3g}; shown if the interval lies above 1",
        verdict=within(gain, 1, math.inf),
        draw=draw,
        caption=f"Distance for m = {_dimension(large):,} without a shift, and with the best shift of the small latents "
        "scaled by the formula.",
    )
