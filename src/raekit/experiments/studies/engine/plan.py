"""The parts of a study: planned runs, their results, and claims with a verdict."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from raekit.progress import Progress
from raekit.recipes import StageConfig

Settings = Mapping[str, int | float | str]
Values = dict[str, Any]
"""JSON values that were measured on a trained model."""


@dataclass(frozen=True)
class Run:
    """A planned training.

    Attributes:
        name: The folder of the run, below the folder of the runs.
        settings: What distinguishes the run from the others, with its seed.
        config: The config of the training.
    """

    name: str
    settings: Settings
    config: StageConfig


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        settings: The settings of the run.
        values: The values that were measured on the trained model.
    """

    settings: Settings
    values: Values


class Verdict(StrEnum):
    """What a study says about a claim."""

    SHOWN = "shown here"
    NOT_SHOWN = "not shown here"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what the runs say about it.

    Attributes:
        name: Name of the files of the figure.
        text: The claim in one sentence.
        paper: The number of the paper, and where it stands.
        found: The number that was measured here, with the interval that decides.
        verdict: The verdict.
        draw: Draws the figure, given an empty matplotlib figure.
        caption: What the figure shows.
    """

    name: str
    text: str
    paper: str
    found: str
    verdict: Verdict
    draw: Callable[[Any], None]
    caption: str


class Study(Protocol):
    """The functions of the module of a study."""

    __doc__: str | None

    def prepare(self, folder: Path, quick: bool, device: str | None, progress: Progress) -> None:
        """Make the images and cached latents that all runs share, in `folder`. Finished parts are kept."""
        ...

    def plan(self, folder: Path, quick: bool) -> list[Run]:
        """Return the runs, which read the images and the latents in `folder`."""
        ...

    def measure(self, artifact: Path, settings: Settings, folder: Path) -> Values:
        """Measure the trained model in `artifact`. The same model gives the same values."""
        ...

    def judge(self, results: Sequence[Result], folder: Path) -> list[Claim]:
        """Return the claims with their verdicts, given the results of all runs."""
        ...


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval.

    Attributes:
        mean: The mean.
        low: The lower bound; minus infinity for a single seed.
        high: The upper bound; infinity for a single seed.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1 to 9 degrees of freedom."""


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one to ten values from different seeds, with Student's 95 % interval."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, -math.inf, math.inf)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = _T[count - 2] * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def geometric(values: Sequence[float]) -> Estimate:
    """Return the geometric mean of positive values from different seeds, with its interval."""
    return Estimate(*map(math.exp, estimate([math.log(value) for value in values])))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Return Spearman's rank correlation of pairs of values, with its 95 % interval.

    The interval is Fisher's, with the variance 1.06 / (n - 3) of Fieller, Hartley and Pearson (1957). Up to three pairs
    decide nothing: their interval is [-1, 1].
    """
    count = len(x)
    ranks = [[sum(o < v for o in values) + sum(o == v for o in values) / 2 for v in values] for values in (x, y)]
    try:
        correlation = statistics.correlation(*ranks)
    except statistics.StatisticsError:  # all values of x or of y are equal
        correlation = 0.0
    if count < 4:
        return Estimate(correlation, -1.0, 1.0)
    largest = 1 - 6 / (count * (count**2 - 1))  # between a perfect order and one with two neighbours exchanged
    middle = math.atanh(max(-largest, min(correlation, largest)))
    half = 1.96 * math.sqrt(1.06 / (count - 3))
    return Estimate(correlation, min(correlation, math.tanh(middle - half)), max(correlation, math.tanh(middle + half)))


def within(value: Estimate, low: float, high: float) -> Verdict:
    """Return whether a value lies between two bounds: undecided if its interval contains a finite one of them."""
    if any(value.low <= bound <= value.high for bound in (low, high) if math.isfinite(bound)):
        return Verdict.UNDECIDED
    return Verdict.SHOWN if low <= value.low and value.high <= high else Verdict.NOT_SHOWN


def at_least(needed: int, verdicts: Sequence[Verdict]) -> Verdict:
    """Return whether at least `needed` of some statements are shown."""
    shown, undecided = verdicts.count(Verdict.SHOWN), verdicts.count(Verdict.UNDECIDED)
    if shown >= needed:
        return Verdict.SHOWN
    return Verdict.UNDECIDED if shown + undecided >= needed else Verdict.NOT_SHOWN
