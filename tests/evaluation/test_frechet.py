"""The Frechet distance of distributions. `test_metrics.py` tests the metric of images."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from raekit.errors import UserError
from raekit.evaluation import frechet
from raekit.evaluation.frechet import Gaussian, frechet_distance
from raekit.moments import Moments


def moments(rows: Tensor) -> Moments:
    result = Moments(rows.shape[1])
    result.update(rows)
    return result


def gaussian(mean: Tensor, covariance: Tensor, count: int = 10_000) -> Moments:
    result = Moments(len(mean))
    result.count, result.mean, result.scatter = count, mean.double(), covariance.double() * (count - 1)
    return result


def rows(count: int, dim: int, seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(count, rank or dim, generator=generator, dtype=torch.float64) @ mixing + seed


@pytest.mark.parametrize("dim", [3, 64])
def test_frechet_distance_agrees_with_sqrtm(dim):
    a, b = moments(rows(400, dim, 1)), moments(rows(500, dim, 2))
    root = np.trace(scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_of_diagonal_gaussians():
    deviations = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    a, b = (gaussian(m, s.square().diag()) for m, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("rank", [None, 5])
def test_frechet_distance_is_zero_on_itself(rank, scale):
    a = moments(scale * rows(300, 40, 1, rank))
    assert 0 <= frechet_distance(a, a) < 1e-11 * a.covariance.trace()


def test_frechet_distance_of_covariances_without_full_rank():
    """Both distributions lie in a plane, where they have full rank. An isometry changes no distance."""
    flat_a, flat_b = rows(300, 8, 1), rows(300, 8, 2)
    plane = torch.linalg.qr(rows(100, 8, 3))[0].T
    expected = frechet_distance(moments(flat_a), moments(flat_b))
    assert frechet_distance(moments(flat_a @ plane), moments(flat_b @ plane)) == pytest.approx(expected, rel=1e-10)
    # Distributions in orthogonal subspaces do not overlap: only the traces remain.
    a, b = (gaussian(torch.zeros(4), torch.tensor(d).diag()) for d in ([1.0, 2, 0, 0], [0.0, 0, 3, 4]))
    assert frechet_distance(a, b) == pytest.approx(10, rel=1e-12)


def test_few_samples_bring_a_warning(caplog):
    a, b = moments(rows(41, 40, 1)), moments(rows(40, 40, 2))
    assert frechet_distance(a, a) >= 0
    assert not caplog.records
    assert math.isfinite(frechet_distance(a, b))
    assert "40 samples in 40 dimensions" in caplog.text


def test_features_that_are_not_finite_give_nan_and_a_warning(caplog):
    bad = rows(100, 4, 1)
    bad[3, 2] = math.nan
    assert math.isnan(frechet_distance(moments(bad), moments(rows(100, 4, 2))))
    assert "not finite" in caplog.text


def test_frechet_distance_of_the_reference_case(golden):
    case = np.load(golden("metrics_on_features.npz"))
    a, b = (moments(torch.from_numpy(case[key])) for key in "AB")
    assert frechet_distance(a, b) == pytest.approx(float(case["fid_A_B"]), rel=1e-6)


def test_a_nearly_singular_covariance_loses_no_digits():
    """The faster computation detects a loss of digits. Without a loss both computations agree."""
    a, b = rows(2000, 30, 1), rows(3000, 30, 2)
    steep = torch.logspace(0, -9, 30, dtype=torch.float64)
    deviations = steep * (0.5 + torch.rand(2, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    axes = torch.linalg.qr(rows(30, 30, 3))[0]
    gaussians = [gaussian(torch.zeros(30), axes @ s.square().diag() @ axes.T) for s in deviations]
    expected = (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(*gaussians) == pytest.approx(float(expected), rel=1e-9)
    fast = frechet_distance(moments(a), moments(b))
    assert fast == pytest.approx(by_singular_values(moments(a), moments(b)), rel=1e-12)


def by_singular_values(a: Moments, b: Moments) -> float:
    x, y = Gaussian.of(a), Gaussian.of(b)
    overlap = torch.linalg.svdvals(x.factor.T @ y.factor).sum()
    return float((x.mean - y.mean).square().sum() + x.covariance.trace() + y.covariance.trace() - 2 * overlap)


def test_a_reference_is_factored_once_and_samples_not_at_all(monkeypatch):
    calls = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(frechet.torch.linalg, "cholesky_ex", lambda x: calls.append(x) or cholesky(x))
    reference = Gaussian.of(moments(rows(400, 8, 1)))
    for seed in (2, 3):
        frechet_distance(moments(rows(400, 8, seed)), reference)
    assert len(calls) == 1
    assert calls[0] is reference.covariance


def test_an_unknown_number_of_samples_brings_no_warning(caplog):
    a = moments(rows(30, 40, 1))
    frechet_distance(moments(rows(60, 40, 2)), Gaussian(a.mean, a.covariance))
    assert not caplog.records


def test_a_matrix_with_negative_eigenvalues_is_rejected():
    indefinite = Gaussian(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(UserError, match="negative eigenvalues"):
        frechet_distance(gaussian(torch.zeros(2), torch.eye(2)), indefinite)
