"""Intervals of scores: how much a score varies between sets of equally many images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

GROUPS = 20
"""Number of jackknife groups. Image i belongs to group i % GROUPS, and each subset leaves one group out."""

LEAST = 2 * GROUPS
"""The smallest number of images for an interval."""

_T = 2.0930240544082634  # 97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Interval(NamedTuple):
    """A 95 % interval of a score.

    Attributes:
        low: lower bound.
        high: upper bound.
        bias: expected excess of the score over the score of infinitely many images.
    """

    low: float
    high: float
    bias: float


def jackknife(score: float, subsets: Sequence[float]) -> Interval:
    """Return the jackknife interval and bias of a score (Quenouille, 1956; Tukey, 1958).

    The score must be a smooth function of the images' distribution. The bias is assumed to fall as one over the number
    of images.

    Args:
        score: the score of all images.
        subsets: the GROUPS scores without one group of images each.
    """
    mean = sum(subsets) / GROUPS
    spread = math.sqrt((GROUPS - 1) / GROUPS * sum((value - mean) ** 2 for value in subsets))
    return Interval(max(score - _T * spread, 0.0), score + _T * spread, (GROUPS - 1) * (mean - score))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the bounds of the 95 % confidence interval of the share `successes / trials` (Wilson, 1927)."""
    share, spread = successes / trials, _Z * _Z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)
