"""Choose the number of threads on a machine that other processes use too."""

import time
from collections.abc import Callable

import torch

MOST = torch.get_num_threads()
"""The number of threads that torch starts with: the cores, or OMP_NUM_THREADS."""
SECONDS = 0.15
"""How long each number of threads is tried. It must cover several turns of the scheduler."""


def fit_threads(rate: Callable[[int], float] | None = None) -> int:
    """Set torch's number of threads to the fastest one at present, and return it.

    Every operation waits for its slowest thread. If another process keeps a core busy, two threads on two cores can be
    many times slower than one thread. The number of threads changes results by rounding.

    Args:
        rate: Returns the speed of a number of threads, in any unit. Default: it is measured on a small network.
    """
    rate = rate or _rate
    candidates = [MOST]
    while candidates[-1] > 1:
        candidates.append(candidates[-1] // 2)
    best = max(candidates, key=rate)
    torch.set_num_threads(best)
    return best


def _rate(threads: int) -> float:
    """Return how often a second a small block of layers runs with this number of threads."""
    torch.set_num_threads(threads)
    x = torch.ones(256, 192)
    first, second = torch.ones(192, 768), torch.ones(768, 192)
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + SECONDS:
        x = torch.nn.functional.gelu(x @ first) @ second * 1e-5
        count += 1
    return count / (time.perf_counter() - start)
