"""Solvers of the sampling ODE and SDE: plain functions that follow a velocity field over a grid of times.

The grid may fall (noise to data) or rise (data to noise). Times follow `flow.path`: 0 is data, 1 is noise.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from raekit.errors import UserError
from raekit.flow.guidance import Velocity
from raekit.flow.path import TIME_CAP, shift

Grid = Literal["full", "few", "published", "diffusers"]
SolverName = Literal["euler", "heun", "dopri5", "ab2", "abm", "euler-maruyama"]
FEW_MARGIN = 0.05
"""How far beyond 0 and 1 the logistic curve of the grid `few` ends. Smaller values move times towards both ends."""


def time_grid(steps: int, alpha: float, grid: Grid = "full") -> list[float]:
    """Return falling times from 1, shifted by `alpha`.

    Args:
        steps: at least 1, or 2 with `published`.
        alpha: the shift factor of training (`flow.path.shift_factor`).
        grid: `full` has steps + 1 even times, before the shift, and ends at 0. `few` also has steps + 1 times, closer
            together near both ends, where the velocity of the built-in model changes fastest: for ab2 and abm with few
            steps (docs/results/solvers.md). `published` has the official sampler's `steps` times, so one
            solver step fewer, and ends at shift(0.001), short of the data (RAE v1). `diffusers` has the steps + 1
            times of diffusers' RAEDiTPipeline: even times from 1 to shift(0.001), shifted, and then 0. So the last
            step is long: from 0.0458 for 50 steps and alpha 6.93.

    Raises:
        UserError: there are too few steps.
    """
    if steps < (2 if grid == "published" else 1):
        raise UserError(f"steps: {steps} is too few for a {grid} grid")
    if grid == "published":
        return shift(1 - _even(0, TIME_CAP, steps), alpha).tolist()
    if grid == "diffusers":
        last = shift(_even(1 - TIME_CAP, 1, 1), alpha).item()
        return [*shift(_even(1, last, steps), alpha).tolist(), 0.0]
    even = _even(1, 0, steps + 1)
    return shift(_crowded_at_ends(even) if grid == "few" else even, alpha).tolist()


def _even(first: float, last: float, count: int) -> Tensor:
    """Return `count` even times from `first` to `last`, float32 on the CPU whatever the defaults of torch are."""
    return torch.linspace(first, last, count, dtype=torch.float32, device="cpu")


def _crowded_at_ends(even: Tensor) -> Tensor:
    """Move even times on [0, 1] to where their number per unit of time is proportional to 1 / ((t + m) (1 + m - t))."""
    m = FEW_MARGIN
    logistic = (math.log((1 + m) / m) * (2 * even.double() - 1)).sigmoid()
    return ((1 + 2 * m) * logistic - m).float().clamp(0, 1)


def evaluated(solver: SolverName, times: Sequence[float]) -> Sequence[float]:
    """Return the times at which a solver evaluates the field.

    dopri5 chooses its own times; for dopri5 the result is a fine grid between the ends.
    """
    if solver == "dopri5":
        return _even(times[0], times[-1], 1001).tolist()
    return times if solver == "heun" else times[:-1]


def euler(field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Solve with Euler's method: first order, one evaluation a step."""
    for t, following in pairwise(times):
        x = x + (following - t) * field(x, t)
    return x


def heun(field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Solve with Heun's method, the explicit trapezoidal rule: second order, two evaluations a step."""
    for t, following in pairwise(times):
        step = following - t
        v = field(x, t)
        x = x + step / 2 * (v + field(x + step * v, following))
    return x


def ab2(field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Solve with the two-step Adams-Bashforth method for variable steps: second order, one evaluation a step.

    The first step is Euler's. Later steps extrapolate the velocity along the line through the last two evaluations.
    """
    return _adams(field, x, times, corrected=False)


def abm(field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Solve with Adams-Bashforth-Moulton, a predictor and a corrector: third order, one evaluation a step.

    `ab2` predicts the next state. The velocity evaluated there serves twice: the corrector repeats the last step with
    the parabola through the last three evaluations, and the next step starts from the corrected state. So the
    corrector costs no evaluation, as in UniPC (arXiv 2302.04867). The last step has no corrector.
    """
    return _adams(field, x, times, corrected=True)


def _adams(field: Velocity, x: Tensor, times: Sequence[float], corrected: bool) -> Tensor:
    slope = torch.zeros_like(x)  # of the velocity over time, between the last two evaluations
    last: tuple[float, Tensor] | None = None
    step, step_before = 0.0, math.inf
    for t, following in pairwise(times):
        v = field(x, t)
        if last is not None:
            predicted, slope = slope, (v - last[1]) / (t - last[0])
            if corrected:
                x = x + step**2 * (1 / 2 - step / (6 * (step + step_before))) * (slope - predicted)
            step_before = step
        step, last = following - t, (t, v)
        x = x + step * v + step**2 / 2 * slope
    return x


def dopri5(field: Velocity, x: Tensor, times: Sequence[float], atol: float = 1e-6, rtol: float = 1e-3) -> Tensor:
    """Solve with torchdiffeq's dopri5: fifth order, adaptive steps. Only the ends of `times` count.

    The error of a step is judged over the complete batch, so a sample depends on its batch up to the tolerance.

    Raises:
        UserError: torchdiffeq is not installed, or no step is short enough for the tolerances.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise UserError("solver dopri5: torchdiffeq is not installed; pip install 'raekit[ode]'") from None
    ends = torch.tensor([times[0], times[-1]], dtype=x.dtype, device=x.device)
    # By default torchdiffeq steps past the end, where the field is not defined, and interpolates.
    options = {"step_t": ends[1:]}
    try:
        path = odeint(lambda t, x: field(x, t.item()), x, ends, method="dopri5", atol=atol, rtol=rtol, options=options)
    except AssertionError as error:  # torchdiffeq's own error
        if "underflow in dt" not in str(error):
            raise
        raise UserError(
            f"solver dopri5: no step is short enough for atol {atol:g} and rtol {rtol:g}; give larger tolerances, or "
            "weaker guidance"
        ) from None
    assert isinstance(path, Tensor)
    return path[-1]


def euler_maruyama(field: Velocity, x: Tensor, times: Sequence[float], noise: Callable[[int], Tensor]) -> Tensor:
    """Solve the reverse SDE with diffusion coefficient t, from noise to data. The last step adds no noise.

    The drift is v - t/2 score = v + (x + (1 - t) v) / 2, which is finite at both ends because the score is -noise / t.

    Args:
        noise: returns the standard normals of step i, in the shape of x.

    Raises:
        UserError: `times` rise.
    """
    if times[0] < times[-1]:
        raise UserError("solver euler-maruyama: goes from noise to data only; take another solver")
    for i, (t, following) in enumerate(pairwise(times)):
        v = field(x, t)
        x = x + (following - t) * (v + (x + (1 - t) * v) / 2)
        if i < len(times) - 2:
            x = x + math.sqrt(t * (t - following)) * noise(i)
    return x


SOLVERS: Mapping[SolverName, Callable[[Velocity, Tensor, Sequence[float]], Tensor]] = {
    "euler": euler,
    "heun": heun,
    "ab2": ab2,
    "abm": abm,
}
"""The solvers that need only a field, a state and a grid. dopri5 also needs tolerances, euler-maruyama also noise."""
MULTISTEP: Collection[SolverName] = ("ab2", "abm")
"""The solvers that combine several evaluations, and so need a field without jumps (`guidance.pieces`)."""
