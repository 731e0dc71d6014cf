import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from raekit.errors import UserError
from raekit.flow.path import (
    TIME_CAP,
    exact,
    interpolate,
    sample_times,
    shift,
    shift_factor,
    similarity,
    to_data,
    to_velocity,
    velocity,
)

TIMES = st.floats(0, 1)
VALUES = st.floats(-100, 100)


def test_time_convention():
    x, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    assert torch.equal(interpolate(x, noise, torch.zeros(2)), x)
    assert torch.equal(interpolate(x, noise, torch.ones(2)), noise)
    assert torch.equal(velocity(x, noise), noise - x)
    # The velocity is the derivative by t: following it raises the noise.
    t, dt = torch.full((2,), 0.3), 0.1
    step = interpolate(x, noise, t) + dt * velocity(x, noise)
    assert torch.allclose(step, interpolate(x, noise, t + dt), atol=1e-6)


def test_velocity_from_a_velocity_prediction_is_itself():
    x_t, v = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(to_velocity(x_t, v, torch.tensor([0.0, 0.5]), "velocity"), v)


def test_velocity_from_predicted_data():
    x, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0.05, 0.2, 0.7, 1.0])
    x_t = interpolate(x, noise, t)
    assert torch.allclose(to_velocity(x_t, x, t, "data"), velocity(x, noise), atol=1e-5)
    # Below the floor it is the velocity scaled down, by t / 0.05, and not a division by nothing.
    low = torch.tensor([0.0, 0.01, 0.025, 0.04])
    expected = velocity(x, noise) * low[:, None] / 0.05
    assert torch.allclose(to_velocity(interpolate(x, noise, low), x, low, "data"), expected, atol=1e-5)


def test_each_sample_has_its_own_time():
    x, noise = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    assert torch.equal(interpolate(x, noise, torch.tensor([0.25, 0.75]))[:, 0, 0, 0], torch.tensor([0.25, 0.75]))


@given(x=VALUES, noise=VALUES, t=TIMES)
def test_a_velocity_points_to_its_data(x: float, noise: float, t: float):
    data, eps, time = (torch.tensor([value], dtype=torch.float64) for value in (x, noise, t))
    x_t, v = interpolate(data, eps, time), velocity(data, eps)
    assert to_data(x_t, v, t).item() == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "alpha"),
    [
        ((384, 16, 16), 4.8990),
        ((768, 16, 16), 6.9282),
        ((1024, 16, 16), 8.0),
        ((768, 32, 32), 13.8564),
        ((4, 32, 32), 1.0),
    ],
)
def test_shift_factor_of_published_settings(shape: tuple[int, ...], alpha: float):
    assert round(shift_factor(shape), 4) == alpha


def test_shift_factor_below_the_base():
    assert shift_factor((4, 8, 8)) == 0.25


def test_shift_base_must_be_positive():
    with pytest.raises(UserError, match="shift_base: 0 must be positive"):
        shift_factor((4, 8, 8), base=0)


@given(t=TIMES, alpha=st.floats(0.1, 20))
def test_shift_keeps_its_ends_and_inverts(t: float, alpha: float):
    times = torch.tensor([0.0, t, 1.0], dtype=torch.float64)
    shifted = shift(times, alpha)
    assert shifted[0] == 0
    assert shifted[2] == pytest.approx(1, abs=1e-15)
    assert shift(shifted, 1 / alpha)[1].item() == pytest.approx(t, abs=1e-12)
    assert (shifted[1] >= t - 1e-12) if alpha >= 1 else (shifted[1] <= t + 1e-12)


@given(low=TIMES, high=TIMES, alpha=st.floats(0.1, 20))
def test_shift_is_monotonic(low: float, high: float, alpha: float):
    a, b = shift(torch.tensor(sorted((low, high)), dtype=torch.float64), alpha)
    assert a <= b


def uniforms(n: int = 200_000) -> torch.Tensor:
    """Evenly spread over (0, 1), so that percentiles are exact and moments nearly."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_uniform_times():
    times = sample_times(uniforms(), "uniform", alpha=1.0)
    assert times.max() <= TIME_CAP
    assert times.mean().item() == pytest.approx(TIME_CAP / 2, abs=1e-6)
    assert times.var().item() == pytest.approx(TIME_CAP**2 / 12, rel=1e-4)


def test_logit_normal_times_follow_the_truncated_law():
    times = sample_times(uniforms(), "logit-normal", alpha=1.0).numpy()
    assert times.max() <= TIME_CAP
    mass = stats.norm.cdf(math.log(TIME_CAP / (1 - TIME_CAP)))
    assert 1 - mass == pytest.approx(2.5e-12, rel=0.2)  # so little is cut off: 6.9 standard deviations
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        expected = 1 / (1 + math.exp(-stats.norm.ppf(share * mass)))
        assert np.quantile(times, share) == pytest.approx(expected, abs=1e-4)
    assert sample_times(torch.tensor([1 - 1e-15], dtype=torch.float64), "logit-normal", 1.0) <= TIME_CAP
    logits = np.log(times / (1 - times))
    assert logits.mean() == pytest.approx(0, abs=1e-6)
    assert logits.std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("law", "median"), [("uniform", TIME_CAP / 2), ("logit-normal", 0.5)])
@pytest.mark.parametrize(("alpha", "shifted"), [(6.9282, 0.874), (13.8564, 0.933)])
def test_median_of_shifted_times(law, median: float, alpha: float, shifted: float):
    times = sample_times(uniforms(), law, alpha)
    assert times.median().item() == pytest.approx(shift(torch.tensor(median), alpha).item(), abs=1e-4)
    assert times.median().item() == pytest.approx(shifted, abs=1e-3)


@pytest.mark.parametrize("law", ["uniform", "logit-normal"])
def test_extreme_uniforms_give_times_in_range(law):
    times = sample_times(torch.tensor([0.0, 1 - 2**-24]), law, alpha=6.9282)
    assert times.dtype == torch.float32
    assert times.isfinite().all()
    assert times.min() >= 0
    assert times.max() <= shift(torch.tensor(TIME_CAP), 6.9282)


def test_similarity_is_the_expected_cosine_on_the_path():
    x, noise = torch.randn(2, 1, 400_000, dtype=torch.float64)
    for t, s in ((1.0, 0.9), (0.3, 0.6), (1.0, 0.0)):
        a, b = (interpolate(x, noise, torch.tensor([time], dtype=torch.float64)) for time in (t, s))
        assert similarity(t, s) == pytest.approx(torch.cosine_similarity(a, b).item(), abs=0.01)
    assert similarity(0.4, 0.4) == pytest.approx(1)


def test_unknown_choices_are_refused():
    x, t = torch.zeros(2, 3), torch.zeros(2)
    for call in (lambda: to_velocity(x, x, t, "noise"), lambda: exact(x, x, "noise")):  # type: ignore[arg-type]
        with pytest.raises(UserError, match="prediction: 'noise' is none of velocity, data"):
            call()
    with pytest.raises(UserError, match="time_law: 'beta' is none of uniform, logit-normal"):
        sample_times(t, "beta", 1.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="alpha: -1 must be positive"):
        sample_times(t, "uniform", -1)
    with pytest.raises(UserError, match=r"latent_shape: \(16, 768, 16, 16\) has too many dimensions"):
        shift_factor((16, 768, 16, 16))
