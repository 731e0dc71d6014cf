"""Curves as the coordinates of a drawing, for a template that writes SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
"""Steps and values, in order of the steps."""

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 352, 8, 176
"""The edges of the plot inside the drawing."""
MOST_POINTS = 300
"""The most points of a drawn curve."""
_NOISY = 60
"""A curve of more points is drawn pale, with its moving mean."""


@dataclass(frozen=True)
class Curve:
    """A drawn curve.

    Attributes:
        name: Its name in the legend.
        line: The points of the curve, as the `points` of an SVG polyline.
        mean: The points of its moving mean; "" for a curve of few points.
        dots: The points of a curve so short that each is drawn as a dot.
        last: The last value.
    """

    name: str
    line: str
    mean: str
    dots: list[tuple[float, float]]
    last: float


@dataclass(frozen=True)
class Chart:
    """A drawing of curves over the same steps.

    Attributes:
        title: The title.
        curves: The curves.
        across: The ticks of the steps, each with its x coordinate and label.
        up: The ticks of the values, each with its y coordinate and label.
        marks: The x coordinates of vertical lines.
    """

    title: str
    curves: list[Curve]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    marks: list[float]


def draw(title: str, series: Mapping[str, Points], marks: Sequence[float] = (), zero: bool = False) -> Chart | None:
    """Return the drawing of `series`, or None if no series has a finite value.

    The scale leaves out the highest 2 % of the values of a long series, such as the first losses.

    Args:
        title: The title of the drawing.
        series: The points of each curve.
        marks: Steps at which a vertical line is drawn.
        zero: Start the scale of the values at zero.
    """
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    thin = {name: _thinned(points) for name, points in finite.items() if points}
    if not thin:
        return None
    first, last = min(points[0][0] for points in thin.values()), max(points[-1][0] for points in thin.values())
    low = 0.0 if zero else min(y for points in thin.values() for _, y in points)
    high = max(_most(points) for points in thin.values())
    if high <= low:  # a flat line in the middle
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (step - first) / ((last - first) or 1), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    def line(points: Points) -> str:
        return " ".join(f"{x(step)},{y(value)}" for step, value in points)

    curves = [
        Curve(
            name=name,
            line=line(points),
            mean=line(_smooth(points)) if len(points) > _NOISY else "",
            dots=[(x(step), y(value)) for step, value in points] if len(points) <= 30 else [],
            last=finite[name][-1][1],
        )
        for name, points in thin.items()
    ]
    return Chart(
        title=title,
        curves=curves,
        across=[(x(tick), short(tick)) for tick in ticks(first, last, 5) if tick == int(tick)],
        up=[(y(tick), short(tick)) for tick in ticks(low, high, 4)],
        marks=[x(step) for step in marks if first <= step <= last],
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: float) -> str:
    """Return a number in a few characters, such as 12k or 0.001."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}"


def _thinned(points: Points) -> Points:
    """Return the means of at most MOST_POINTS groups of points."""
    size = math.ceil(len(points) / MOST_POINTS)
    return [_mean(points[i : i + size]) for i in range(0, len(points), size)]


def _smooth(points: Points) -> Points:
    """Return the moving mean over a fifteenth of the points; near the ends over fewer."""
    half = len(points) // 30
    reach = [min(half, i, len(points) - 1 - i) for i in range(len(points))]
    return [_mean(points[i - r : i + r + 1]) for i, r in enumerate(reach)]


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _most(points: Points) -> float:
    """Return the top of the scale for a curve: its 98th percentile, or the largest value of a short curve."""
    values = sorted(value for _, value in points)
    return values[math.ceil(0.98 * len(values)) - 1]
