import itertools
import math

import pytest
import torch

from raekit.errors import UserError
from raekit.flow.path import interpolate, shift_factor, velocity
from raekit.flow.solvers import SOLVERS, euler, heun, time_grid

ALPHA = shift_factor((768, 16, 16))


def test_full_grid():
    times = time_grid(50, ALPHA)
    assert len(times) == 51
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("shape", "last"), [((768, 16, 16), 0.00689), ((768, 32, 32), 0.01368)])
def test_published_grid_stops_short_of_the_data(shape: tuple[int, ...], last: float):
    times = time_grid(50, shift_factor(shape), "published")
    assert len(times) == 50
    assert times[0] == 1.0
    assert round(times[-1], 5) == last


def test_last_evaluation_of_the_published_grid():
    assert round(time_grid(50, ALPHA, "published")[-2], 4) == 0.1315


def test_grid_without_shift_is_even():
    assert time_grid(4, 1.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert time_grid(3, 1.0, "published") == pytest.approx([1, 0.5005, 0.001], abs=1e-7)


@pytest.mark.parametrize(("grid", "evaluations"), [("full", 50), ("published", 49)])
@pytest.mark.parametrize(("solver", "per_step"), [("euler", 1), ("heun", 2)])
def test_number_of_evaluations(grid, evaluations: int, solver, per_step: int):
    seen = []

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    SOLVERS[solver](field, torch.zeros(1), time_grid(50, ALPHA, grid))
    assert len(seen) == evaluations * per_step
    assert seen[0] == 1.0


@pytest.mark.parametrize(("grid", "steps"), [("full", 0), ("published", 1), ("full", -3)])
def test_too_few_steps(grid, steps: int):
    with pytest.raises(UserError, match=f"steps: {steps} is too few for a {grid} grid"):
        time_grid(steps, 1.0, grid)


def solve(solver, field, start: float, steps: int) -> float:
    return solver(field, torch.tensor([start], dtype=torch.float64), time_grid(steps, 2.0)).item()


@pytest.mark.parametrize("solver", [euler, heun])
def test_straight_paths_are_exact_in_one_step(solver):
    x, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    out = solver(lambda x_t, t: velocity(x, noise), interpolate(x, noise, torch.ones(2)), [1.0, 0.0])
    assert torch.allclose(out, x, atol=1e-6)


def test_heun_is_exact_for_a_velocity_linear_in_time():
    # dx/dt = 2t, so x(0) = x(1) - 1, whatever the steps.
    assert solve(heun, lambda x, t: torch.full_like(x, 2 * t), 3.0, 3) == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(solver, order: int):
    # dx/dt = x cos(3t), whose solution is x(0) = x(1) exp(-sin(3)/3).
    exact = 2.0 * math.exp(-math.sin(3) / 3)
    errors = [abs(solve(solver, lambda x, t: x * math.cos(3 * t), 2.0, n) - exact) for n in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "tolerance"), [(euler, 0.03), (heun, 0.002)])
def test_gaussian_data_is_recovered_from_noise(solver, tolerance: float):
    # For data N(m, s^2) the exact velocity is known, and its flow maps noise z to m + s z.
    m, s = 1.5, 0.5
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        mean, variance = (1 - t) * m, (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (x - mean)

    out = solver(field, z, time_grid(200, 2.0))
    assert torch.allclose(out, m + s * z, atol=tolerance)
