"""Solvers: plain functions that follow a velocity field over a grid of times, in either direction."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from raekit.errors import UserError
from raekit.flow.guidance import Velocity
from raekit.flow.path import TIME_CAP, shift

Grid = Literal["full", "published"]
SolverName = Literal["euler", "heun", "dopri5", "euler-maruyama"]


def time_grid(steps: int, alpha: float, grid: Grid = "full") -> list[float]:
    """Shifted times from 1 downwards.

    `full`: steps + 1 points that end at 0, so `steps` steps. `published`: the official sampler's `steps`
    points, so one step fewer, which stop at shift(0.001), short of the data (spec 3).
    """
    if steps < (1 if grid == "full" else 2):
        raise UserError(f"steps: {steps} is too few for a {grid} grid")
    times = torch.linspace(1, 0, steps + 1) if grid == "full" else 1 - torch.linspace(0, TIME_CAP, steps)
    return shift(times, alpha).tolist()


def evaluated(solver: SolverName, times: Sequence[float]) -> Sequence[float]:
    """The times at which a solver evaluates the field; of the adaptive one, which chooses its own, a fine grid."""
    if solver == "dopri5":
        return torch.linspace(times[0], times[-1], 1001).tolist()
    return times if solver == "heun" else times[:-1]


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


def dopri5(field: Velocity, x: Tensor, times: Sequence[float], atol: float = 1e-6, rtol: float = 1e-3) -> Tensor:
    """Fifth order with steps of its own, of torchdiffeq; only the ends of the grid count.

    A step's error is judged over the whole batch, so a sample depends on the others up to the tolerance.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise UserError("solver dopri5: torchdiffeq is not installed; pip install 'raekit[ode]'") from None
    ends = torch.tensor([times[0], times[-1]], dtype=x.dtype, device=x.device)
    # By default it steps past the end, where there is no time any more, and interpolates.
    options = {"step_t": ends[1:]}
    path = odeint(lambda t, x: field(x, t.item()), x, ends, method="dopri5", atol=atol, rtol=rtol, options=options)
    assert isinstance(path, Tensor)
    return path[-1]


def euler_maruyama(field: Velocity, x: Tensor, times: Sequence[float], noise: Callable[[int], Tensor]) -> Tensor:
    """The reverse SDE with diffusion coefficient t, from noise to data; the last step takes the mean.

    Its drift is v - t/2 score = v + (x + (1 - t) v) / 2, which stays finite at both ends, the score being
    -noise / t. `noise(i)` gives the standard normals of step i, of x's shape.
    """
    if times[0] < times[-1]:
        raise UserError("solver euler-maruyama: goes from noise to data only; take euler, heun or dopri5")
    for i, (t, following) in enumerate(pairwise(times)):
        v = field(x, t)
        x = x + (following - t) * (v + (x + (1 - t) * v) / 2)
        if i < len(times) - 2:
            x = x + math.sqrt(t * (t - following)) * noise(i)
    return x
