import itertools
import math
import sys
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from raekit.cli.sampling import SamplingOptions
from raekit.errors import UserError
from raekit.flow.guidance import Guidance, pieces, with_interval_ends
from raekit.flow.path import interpolate, shift, shift_factor, velocity
from raekit.flow.solvers import (
    SOLVERS,
    SolverName,
    ab2,
    abm,
    dopri5,
    euler,
    euler_maruyama,
    evaluated,
    heun,
    time_grid,
)

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


def test_the_grid_for_few_steps_has_more_times_near_both_ends():
    times = time_grid(20, 1.0, "few")
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert times == pytest.approx([1 - t for t in reversed(times)], abs=1e-6)
    steps = [a - b for a, b in itertools.pairwise(times)]
    assert steps[:10] == sorted(steps[:10])
    assert steps[10] / steps[0] == pytest.approx(0.55**2 / (0.05 * 1.05), rel=0.3)  # the ratio of their densities
    assert time_grid(20, ALPHA, "few") == pytest.approx(shift(torch.tensor(times), ALPHA).tolist())
    assert time_grid(1, ALPHA, "few") == [1.0, 0.0]


@pytest.mark.parametrize(("grid", "evaluations"), [("full", 50), ("few", 50), ("published", 49)])
@pytest.mark.parametrize(
    ("solver", "per_step"), [("euler", 1), ("heun", 2), ("ab2", 1), ("abm", 1), ("euler-maruyama", 1)]
)
def test_evaluations(grid, evaluations: int, solver, per_step: int):
    seen = []

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    x, times = torch.zeros(1), time_grid(50, ALPHA, grid)
    if solver == "euler-maruyama":
        euler_maruyama(field, x, times, lambda step: x)
    else:
        SOLVERS[solver](field, x, times)
    assert len(seen) == evaluations * per_step
    assert seen[0] == 1.0
    assert set(seen) == set(evaluated(solver, times))


@pytest.mark.parametrize("name", [*SOLVERS, "euler-maruyama"])
def test_evaluated_has_every_time_at_which_a_solver_evaluates(name: SolverName):
    seen: set[float] = set()

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.add(t)
        return torch.zeros_like(x)

    x, times = torch.zeros(1, 2), time_grid(4, ALPHA)
    if name == "euler-maruyama":
        euler_maruyama(field, x, times, lambda step: torch.zeros_like(x))
    else:
        SOLVERS[name](field, x, times)
    assert seen == set(evaluated(name, times))


def test_every_solver_has_a_name_and_an_option():
    names = {*get_args(SolverName)}
    assert {*SOLVERS, "dopri5", "euler-maruyama"} == names
    option, _ = get_args(get_type_hints(SamplingOptions)["solver"])
    assert {*get_args(option)} == names


@pytest.mark.parametrize(("grid", "steps"), [("full", 0), ("published", 1), ("full", -3)])
def test_too_few_steps(grid, steps: int):
    with pytest.raises(UserError, match=f"steps: {steps} is too few for a {grid} grid"):
        time_grid(steps, 1.0, grid)


def solve(solver, field, start: float, steps: int) -> float:
    return solver(field, torch.tensor([start], dtype=torch.float64), time_grid(steps, 2.0)).item()


@pytest.mark.parametrize("times", [[1.0, 0.0], [1.0, 0.7, 0.65, 0.2, 0.0]], ids=["one step", "uneven steps"])
@pytest.mark.parametrize("solver", SOLVERS.values())
def test_straight_paths_are_exact(solver, times: list[float]):
    x, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    out = solver(lambda x_t, t: velocity(x, noise), interpolate(x, noise, torch.ones(2)), times)
    assert torch.allclose(out, x, atol=1e-6)
    back = solver(lambda x_t, t: velocity(x, noise), x, times[::-1])
    assert torch.allclose(back, noise, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_a_constant_data_prediction_is_reached_exactly(solver):
    data, noise = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        return (x - data) / t if t else noise - data  # Heun evaluates the end as well

    assert torch.allclose(solver(field, noise, time_grid(5, 2.0)), data, atol=1e-12)


def test_heun_is_exact_for_a_velocity_linear_in_time():
    # dx/dt = 2t, so x(0) = x(1) - 1, whatever the steps.
    assert solve(heun, lambda x, t: torch.full_like(x, 2 * t), 3.0, 3) == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("times", [[1.0, 0.7, 0.65, 0.2, 0.0], [0.0, 0.3, 0.35, 0.8, 1.0]], ids=["down", "up"])
def test_multistep_methods_extrapolate_over_uneven_steps(times: list[float]):
    # dx/dt = 2t. The first step of ab2 is Euler's and leaves an error of the step squared; later steps are exact.
    first = (times[1] - times[0]) ** 2

    def change(solver) -> float:
        return solver(lambda x, t: torch.full_like(x, 2 * t), torch.zeros(1, dtype=torch.float64), times).item()

    exact = times[-1] ** 2 - times[0] ** 2
    assert change(ab2) == pytest.approx(exact - first, abs=1e-12)
    assert change(abm) == pytest.approx(exact, abs=1e-12), "abm corrects the first step"


def wave(x: torch.Tensor, t: float) -> torch.Tensor:
    """dx/dt = x cos(3t), whose solution is x(0) = x(1) exp(-sin(3)/3)."""
    return x * math.cos(3 * t)


WAVE = math.exp(-math.sin(3) / 3)


@pytest.mark.parametrize("grid", ["full", "few"])
@pytest.mark.parametrize("reverse", [False, True], ids=["to data", "to noise"])
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (ab2, 2), (abm, 3)])
def test_order_of_convergence(solver, order: int, reverse: bool, grid):
    exact = 2.0 / WAVE if reverse else 2.0 * WAVE
    start = torch.tensor([2.0], dtype=torch.float64)
    errors = []
    for n in (64, 128, 256):
        times = time_grid(n, 2.0, grid)
        errors.append(abs(solver(wave, start, times[::-1] if reverse else times).item() - exact))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


M, S = 1.5, 0.5


def gaussian(x: torch.Tensor, t: float) -> torch.Tensor:
    """The exact velocity for data N(M, S^2), whose flow maps noise z to M + S z."""
    mean, variance = (1 - t) * M, (1 - t) ** 2 * S**2 + t**2
    return -M + (t - (1 - t) * S**2) / variance * (x - mean)


def mixture(x: torch.Tensor, t: float) -> torch.Tensor:
    """The exact velocity for data from a mixture of three normal distributions: their velocities, by responsibility."""
    means, deviations, shares = torch.tensor([[-1.2, 0.3, 1.5], [0.3, 0.2, 0.4], [0.3, 0.4, 0.3]], dtype=torch.float64)
    variance = (1 - t) ** 2 * deviations**2 + t**2
    distance = x[:, None] - (1 - t) * means
    responsibility = (shares.log() - variance.log() / 2 - distance**2 / (2 * variance)).softmax(1)
    return (responsibility * (-means + (t - (1 - t) * deviations**2) / variance * distance)).sum(1)


@pytest.mark.parametrize("reverse", [False, True], ids=["to data", "to noise"])
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (ab2, 2), (abm, 3)])
def test_order_of_convergence_for_a_mixture_of_normal_distributions(solver, order: int, reverse: bool):
    start = torch.linspace(-2, 2, 41, dtype=torch.float64)
    ends = (0, 1) if reverse else (1, 0)

    def derivative(t: float, x: np.ndarray) -> np.ndarray:
        return mixture(torch.from_numpy(x), t).numpy()

    exact = torch.from_numpy(
        solve_ivp(derivative, ends, start.numpy(), method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
    )
    errors = []
    for steps in (64, 128, 256):
        times = [1 - i / steps for i in range(steps + 1)]
        errors.append((solver(mixture, start, times[::-1] if reverse else times) - exact).abs().mean().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


JUMPING = Guidance(scale=2, start=0.15, end=0.55)


def jumping(x: torch.Tensor, t: float, inside: bool) -> torch.Tensor:
    """A field that jumps: twice the wave inside the interval of JUMPING."""
    return (2 if inside else 1) * wave(x, t)


@pytest.mark.parametrize("reverse", [False, True], ids=["to data", "to noise"])
@pytest.mark.parametrize(("solver", "order"), [(ab2, 2), (abm, 3)])
def test_multistep_methods_keep_their_order_across_the_ends_of_an_interval(solver, order: int, reverse: bool):
    def integral(t: float) -> float:
        return math.sin(3 * t) / 3

    exact = integral(0) - integral(1) + integral(JUMPING.start) - integral(JUMPING.end)
    exact = 2.0 * math.exp(-exact if reverse else exact)
    split, joined = [], []
    for n in (40, 80, 160, 320):
        times = with_interval_ends(time_grid(n, 1.0)[:: -1 if reverse else 1], [JUMPING])
        x = torch.tensor([2.0], dtype=torch.float64)
        joined.append(abs(solver(lambda x, t: jumping(x, t, JUMPING.holds(t)), x, times).item() - exact))
        for piece, rules in pieces(times, [JUMPING]):
            x = solver(lambda x, t, inside=bool(rules): jumping(x, t, inside), x, piece)
        split.append(abs(x.item() - exact))

    def orders(errors: list[float]) -> list[float]:
        return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]

    assert orders(split) == pytest.approx([order] * 3, abs=0.3)
    assert orders(joined) == pytest.approx([1] * 3, abs=0.3), "without a new start at the jumps the order is lost"


@pytest.mark.parametrize(("solver", "tolerance"), [(euler, 0.03), (heun, 0.002), (ab2, 0.002), (abm, 0.002)])
def test_gaussian_data_is_recovered_from_noise_and_noise_from_data(solver, tolerance: float):
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    times = time_grid(200, 2.0)
    assert torch.allclose(solver(gaussian, z, times), M + S * z, atol=tolerance)
    assert torch.allclose(solver(gaussian, M + S * z, times[::-1]), z, atol=2 * tolerance)


@pytest.mark.parametrize("grid", ["full", "published"])
def test_adaptive_steps_keep_their_tolerance(grid):
    pytest.importorskip("torchdiffeq")
    times = time_grid(5, 2.0, grid)
    start, end = torch.tensor([2.0], dtype=torch.float64), times[-1]
    exact = 2.0 * math.exp((math.sin(3 * end) - math.sin(3)) / 3)
    errors, calls = [], []
    for tolerance in (1e-3, 1e-6, 1e-9):
        count = 0

        def field(x: torch.Tensor, t: float) -> torch.Tensor:
            nonlocal count
            count += 1
            assert end - 1e-6 <= t <= 1
            return wave(x, t)

        errors.append(abs(dopri5(field, start, times, tolerance, tolerance).item() - exact))
        calls.append(count)
    assert all(error < 10 * tolerance for error, tolerance in zip(errors, (1e-3, 1e-6, 1e-9), strict=True))
    assert calls[0] < calls[1] < calls[2]
    back = dopri5(wave, dopri5(wave, start, times, 1e-9, 1e-9), times[::-1], 1e-9, 1e-9)
    assert back.item() == pytest.approx(2.0, abs=1e-7)


def test_tolerances_out_of_reach_are_one_clear_error():
    pytest.importorskip("torchdiffeq")
    noise = torch.Generator().manual_seed(0)

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        return 1e8 * torch.rand(x.shape, generator=noise)

    with pytest.raises(UserError, match="no step is short enough for atol 1e-12 and rtol 1e-12; give larger"):
        dopri5(field, torch.ones(1), [1.0, 0.0], 1e-12, 1e-12)


def test_adaptive_steps_need_torchdiffeq(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(UserError, match=r"solver dopri5: torchdiffeq is not installed; pip install 'raekit\[ode\]'"):
        dopri5(wave, torch.ones(1), [1.0, 0.0])


def moments_of_sde(steps: int) -> tuple[float, float]:
    """Mean and variance of its samples for Gaussian data, exactly: the result is linear in start and noise."""
    times = time_grid(steps, 1.0)

    def response(start: float, hit: int | None) -> float:
        def noise(step: int) -> torch.Tensor:
            assert step < steps - 1, "the last step takes the mean"
            return torch.tensor([float(step == hit)], dtype=torch.float64)

        return euler_maruyama(gaussian, torch.tensor([start], dtype=torch.float64), times, noise).item()

    mean = response(0.0, None)
    parts = [response(1.0, None) - mean] + [response(0.0, step) - mean for step in range(steps - 1)]
    return mean, sum(part**2 for part in parts)


def test_sde_converges_to_the_data_in_first_order():
    results = [moments_of_sde(steps) for steps in (32, 64, 128)]
    assert all(mean == pytest.approx(M) for mean, _ in results), "the mean moves on a straight path"
    errors = [abs(variance - S**2) for _, variance in results]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)
    assert errors[-1] < 0.02


def test_the_noise_of_a_step_of_the_sde_has_the_spread_of_its_first_time():
    still = torch.zeros(1, dtype=torch.float64)
    end = euler_maruyama(lambda x, t: still, still, [1.0, 0.6, 0.0], lambda step: still + 1)
    assert end.item() == pytest.approx(math.sqrt(1.0 * 0.4) * (1 - 0.6 / 2))


def test_sde_does_not_run_backwards():
    with pytest.raises(UserError, match="solver euler-maruyama: goes from noise to data only"):
        euler_maruyama(gaussian, torch.zeros(1), [0.0, 1.0], lambda step: torch.zeros(1))
