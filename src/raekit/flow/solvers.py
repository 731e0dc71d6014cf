"""Solvers: plain functions that follow a velocity field over a grid of times."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from raekit.errors import UserError
from raekit.flow.guidance import Velocity
from raekit.flow.path import TIME_CAP, shift

Grid = Literal["full", "published"]
SolverName = Literal["euler", "heun"]


def time_grid(steps: int, alpha: float, grid: Grid = "full") -> list[float]:
    """Shifted times from 1 downwards.

    `full`: steps + 1 points that end at 0, so `steps` steps. `published`: the official sampler's `steps`
    points, so one step fewer, which stop at shift(0.001), short of the data (spec 3).
    """
    if steps < (1 if grid == "full" else 2):
        raise UserError(f"steps: {steps} is too few for a {grid} grid")
    times = torch.linspace(1, 0, steps + 1) if grid == "full" else 1 - torch.linspace(0, TIME_CAP, steps)
    return shift(times, alpha).tolist()


def euler(field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """First order: one evaluation a step."""
    for t, following in pairwise(times):
        x = x + (following - t) * field(x, t)
    return x


def heun(field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Second order: two evaluations a step (the explicit trapezoidal rule)."""
    for t, following in pairwise(times):
        step = following - t
        v = field(x, t)
        x = x + step / 2 * (v + field(x + step * v, following))
    return x


SOLVERS: dict[SolverName, Callable[[Velocity, Tensor, Sequence[float]], Tensor]] = {
    "euler": euler,
    "heun": heun,
}
