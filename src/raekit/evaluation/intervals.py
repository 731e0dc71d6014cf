"""How far a score would move with other images of the same number."""

import math
from collections.abc import Sequence
from typing import NamedTuple

GROUPS = 20
"""Image i belongs to group i modulo this; each subset leaves one group out."""

LEAST = 2 * GROUPS
"""Images that an interval needs."""

_T = 2.0930240544082634  # 97.5 % point of Student's t with GROUPS - 1 degrees of freedom
_Z = 1.959963984540054  # and of the normal distribution


class Interval(NamedTuple):
    """95 %, and by how much the score is expected to lie above that of infinitely many images."""

    low: float
    high: float
    bias: float


def jackknife(score: float, subsets: Sequence[float]) -> Interval:
    """Of a smooth function of the images' distribution, from its values without each of the GROUPS groups
    (Quenouille, 1956; Tukey, 1958). The bias assumes that it falls as one over the number of images."""
    mean = sum(subsets) / GROUPS
    spread = math.sqrt((GROUPS - 1) / GROUPS * sum((value - mean) ** 2 for value in subsets))
    return Interval(max(score - _T * spread, 0.0), score + _T * spread, (GROUPS - 1) * (mean - score))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927)."""
    share, spread = successes / trials, _Z * _Z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)
