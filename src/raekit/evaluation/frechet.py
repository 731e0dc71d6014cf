"""The Frechet distance between distributions that are told by their mean and covariance."""

import logging
from functools import cached_property

import torch
from torch import Tensor

from raekit.errors import UserError
from raekit.moments import Moments

log = logging.getLogger(__name__)

_EPS = torch.finfo(torch.float64).eps
_ACCURACY = 1e-9  # relative; what a distance may lose by the faster way of computing it
_INDEFINITE = 1e-5  # relative; negative eigenvalues that float32 statistics may have


class Gaussian:
    """A mean (D,) and an unbiased covariance (D, D) in float64, on the CPU; `count` samples, None if not known.

    One that is compared with many others, as a reference is, is factored once.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, count: int | None = None):
        self.mean, self.covariance, self.count = mean.double().cpu(), covariance.double().cpu(), count

    @classmethod
    def of(cls, distribution: "Moments | Gaussian") -> "Gaussian":
        if isinstance(distribution, Gaussian):
            return distribution
        return cls(distribution.mean, distribution.covariance, distribution.count)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def factor(self) -> Tensor:
        """F (D, rank) with F F^T = covariance, without the directions that hold rounding errors alone."""
        floor = self.dim * _EPS
        lower, failed = torch.linalg.cholesky_ex(self.covariance)
        if not failed and lower.diagonal().square().min() > floor * self.covariance.diagonal().max():
            return lower  # full rank: a tenth of the time
        values, vectors = torch.linalg.eigh(self.covariance)
        if values[0] < -_INDEFINITE * values[-1]:
            raise UserError("the covariance has negative eigenvalues, so it is none: measure the statistics again")
        kept = values > floor * values[-1]
        return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(samples: Moments | Gaussian, reference: Moments | Gaussian, *, quiet: bool = False) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), for unbiased covariances.

    Stable for covariances without full rank, and zero between equal ones. It is biased upwards for few
    samples: at most as many as dimensions brings a warning, unless it is `quiet`. NaN, with a warning, for moments
    not finite.

    Symmetric in its arguments; a `Gaussian` given as `reference` is factored once for all calls.
    """
    a, b = Gaussian.of(samples), Gaussian.of(reference)
    for part in (a, b):
        if part.count is not None and part.count <= part.dim and not quiet:
            log.warning(
                "Frechet distance from %d samples in %d dimensions: the covariance has not full rank; "
                "take more samples",
                part.count,
                part.dim,
            )
    if not all(x.isfinite().all() for x in (a.mean, a.covariance, b.mean, b.covariance)):
        log.warning("Frechet distance of features that are not finite")
        return float("nan")
    rest = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    return max(rest - 2 * _overlap(a, b, rest), 0.0)


def _overlap(a: Gaussian, b: Gaussian, rest: float) -> float:
    """tr((C_a^1/2 C_b C_a^1/2)^1/2), whose double is to be subtracted from `rest`.

    With factors C = F F^T it is the sum of the roots of the eigenvalues of F_b^T C_a F_b. A rounding error
    grows in the root of an eigenvalue near zero, so where the roots may have lost too much, it is computed as
    the sum of the singular values of F_a^T F_b, in three times the time and without such a loss.
    """
    values = torch.linalg.eigvalsh(b.factor.T @ a.covariance @ b.factor).clamp(min=0)
    if len(values):
        roots, error = values.sqrt(), _EPS * values[-1]
        lost = torch.minimum(error / (2 * roots), error.sqrt()).sum()
        overlap = float(roots.sum())
        if 2 * float(lost) <= _ACCURACY * (rest - 2 * overlap):
            return overlap
    return float(torch.linalg.svdvals(a.factor.T @ b.factor).sum())
