"""Draw means over seeds with their intervals."""

from collections.abc import Callable, Sequence
from typing import Any

from raekit.experiments.studies.engine.plan import Estimate, estimate


def error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return the intervals as matplotlib takes error bars: the distances of the bounds below and above the mean."""
    return [[each.mean - each.low for each in estimates], [each.high - each.mean for each in estimates]]


def draw_seeds(
    axes: Any,
    x: Sequence[float],
    rows: Sequence[Sequence[float]],
    *,
    mean: Callable[[Sequence[float]], Estimate] = estimate,
    **style: Any,
) -> None:
    """Draw a curve of means with 95 % intervals, and a faint point for each seed.

    Args:
        axes: The axes of matplotlib.
        x: The place of each mean.
        rows: For each place, the values of all seeds.
        mean: Estimates the mean of a row.
        **style: Further arguments of `axes.errorbar`.
    """
    means = [mean(row) for row in rows]
    drawn = axes.errorbar(x, [each.mean for each in means], error_bars(means), capsize=3, markersize=4, **style)
    for place, row in zip(x, rows, strict=True):
        axes.plot([place] * len(row), row, ".", color=drawn.lines[0].get_color(), alpha=0.4, markersize=4)


def draw_pairs(axes: Any, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Draw a line for each seed between its two values.

    Args:
        axes: The axes of matplotlib.
        names: What the two values belong to.
        rows: The values of all seeds, for each of the two.
    """
    for seed, values in enumerate(zip(*rows, strict=True)):
        axes.plot([0, 1], values, "o-", markersize=4, linewidth=0.8, label=f"seed {seed}")
    axes.set_xticks([0, 1], names)
    axes.set_xlim(-0.5, 1.5)
    axes.set_ylim(bottom=0)
    axes.legend()


def plain_numbers(axis: Any) -> None:
    """Write the ticks of a logarithmic axis as 0.5, 3 or 20 instead of powers of ten. Call this after drawing."""
    from matplotlib.ticker import LogLocator  # imported here because the import is slow

    low, high = axis.get_view_interval()
    axis.set_minor_locator(LogLocator(subs=(2, 3, 5) if high > 10 * low else range(2, 10)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")
