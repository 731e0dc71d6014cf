"""Judge a sweep of the shift for latents of several dimensions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from raekit.experiments.studies.engine.drawing import draw_pairs, plain_numbers
from raekit.experiments.studies.engine.plan import Claim, Result, Verdict, estimate, geometric, within

EXPONENT = 0.5
"""The exponent of m in the paper's formula."""
TOLERANCE = 0.15
"""How far the measured exponent may be from it."""

Distances = dict[int, dict[float, list[float]]]
"""The distances of all seeds by dimension m and shift."""


def shift_claims(results: Sequence[Result], generated: str, measured: str) -> list[Claim]:
    """Compare the best shifts of latents with the same content and different dimensions.

    Args:
        results: Runs with the settings `dimension` and `shift`, and the value `distance`.
        generated: What is judged: "images" or "latents".
        measured: What the distance is, as the label of an axis.
    """
    distances: Distances = {}
    for result in results:
        row = distances.setdefault(int(result.settings["dimension"]), {})
        row.setdefault(float(result.settings["shift"]), []).append(result.values["distance"])
    return [_growth(distances, generated, measured), _gain(distances, measured)]


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


def _best(row: dict[float, list[float]]) -> list[float]:
    """Return the best shift of each seed."""
    return [best_shift(list(row), values) for values in zip(*row.values(), strict=True)]


def _growth(distances: Distances, generated: str, measured: str) -> Claim:
    """Judge how the best shift grows with the dimension."""
    best = {m: _best(row) for m, row in distances.items()}
    dimensions = [math.log(m) for m in best]
    exponent = estimate(
        [float(np.polyfit(dimensions, np.log(of_seed), 1)[0]) for of_seed in zip(*best.values(), strict=True)]
    )
    middle = {m: geometric(values) for m, values in best.items()}
    small, large = min(best), max(best)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(xlabel="shift of the schedule", ylabel=measured, xscale="log", yscale="log")
        for place, (m, row) in enumerate(distances.items()):
            color = f"C{place}"
            for values in zip(*row.values(), strict=True):
                axes.plot(list(row), values, ".", color=color, alpha=0.6)
            label = f"m = {m:,} (geometric mean; a point for each of {len(best[m])} seeds)"
            axes.plot(list(row), [geometric(values).mean for values in row.values()], color=color, label=label)
            axes.axvspan(middle[m].low, middle[m].high, color=color, alpha=0.12)
            axes.axvline(middle[m].mean, color=color, linestyle="--", linewidth=1)
        predicted = middle[small].mean * math.sqrt(large / small)
        label = f"formula for m = {large:,}, from the best shift for m = {small:,}"
        axes.axvline(predicted, color="black", linestyle=":", label=label)
        first, last = (limit(limit(row) for row in distances.values()) for limit in (min, max))
        axes.set_xlim(first / 1.2, last * 1.2)
        ticks = [2.0**k for k in range(math.ceil(math.log2(first)), math.floor(math.log2(last)) + 1)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        plain_numbers(axes.yaxis)
        figure.legend(loc="outside lower center", ncols=2, fontsize=7)

    ends = [f"m = {m:,}" for m, row in distances.items() if {min(row), max(row)} & {*best[m]}]

    return Claim(
        name="growth",
        text="The best shift grows as the square root of the dimension m",
        paper="section 4.2: alpha = sqrt(m / 4096), so an exponent of 0.5; no sweep is printed",
        found="best shift "
        + ", ".join(f"{value} for m = {m:,}" for m, value in middle.items())
        + f": exponent {exponent}; shown if its interval lies between "
        f"{EXPONENT - TOLERANCE:g} and {EXPONENT + TOLERANCE:g}"
        + (f"; a best shift of {' and '.join(ends)} is the first or last that was tried" if ends else ""),
        # The best shift may lie beyond the ends of the list, so the exponent is then not known.
        verdict=Verdict.UNDECIDED if ends else within(exponent, EXPONENT - TOLERANCE, EXPONENT + TOLERANCE),
        draw=draw,
        caption=f"Distance of generated {generated} against the shift, for the same content in few and in many values. "
        "Dashed: the best shift (geometric mean over seeds), with its 95 % interval; dotted: the formula.",
    )


def _gain(distances: Distances, measured: str) -> Claim:
    """Judge whether the large latents gain from a shift that is scaled by the formula."""
    small, large = min(distances), max(distances)
    scaled = geometric(_best(distances[small])).mean * math.sqrt(large / small)
    before, after = (min(distances[large], key=lambda s: abs(math.log(s / wanted))) for wanted in (1.0, scaled))
    pairs = zip(distances[large][before], distances[large][after], strict=True)
    gain = geometric([one / other for one, other in pairs])

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(xlabel="shift of the schedule", ylabel=measured)
        names = [f"{before:.3g}: no shift", f"{after:.3g}: scaled by sqrt(m)"]
        draw_pairs(axes, names, [distances[large][shift] for shift in (before, after)])

    return Claim(
        name="gain",
        text="High-dimensional latents gain from the larger shift",
        paper="table 4: FID 23.08 without the shift, 4.81 with it (DiT-XL, DINOv2-B)",
        found=f"m = {large:,}: the distance at shift {before:.3g} is {gain} times the distance at shift "
        f"{after:.3g}; shown if the interval lies above 1",
        # If the scaled shift is no shift, nothing is compared.
        verdict=Verdict.UNDECIDED if before == after else within(gain, 1, math.inf),
        draw=draw,
        caption=f"Distance for m = {large:,} without a shift, and with the best shift of the small latents "
        "scaled by the formula.",
    )
