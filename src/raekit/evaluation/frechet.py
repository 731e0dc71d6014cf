"""The Frechet distance between two distributions, computed from their means and covariances."""

import logging
from functools import cached_property

import torch
from torch import Tensor

from raekit.data.images import log_once
from raekit.errors import UserError
from raekit.moments import Moments

log = logging.getLogger(__name__)

_EPS = torch.finfo(torch.float64).eps
_ACCURACY = 1e-9  # relative; the largest error of the faster computation
_INDEFINITE = 1e-5  # relative; the largest negative eigenvalues that rounding to float32 can cause


class Gaussian:
    """A mean and a covariance. The factor of the covariance is computed once, at its first use.

    Args:
        mean: (D,). Kept on the CPU in float64.
        covariance: (D, D), unbiased. Kept on the CPU in float64.
        count: number of samples, if known.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, count: int | None = None):
        self.mean, self.covariance, self.count = mean.double().cpu(), covariance.double().cpu(), count

    @classmethod
    def of(cls, distribution: "Moments | Gaussian") -> "Gaussian":
        """Return `distribution` as a Gaussian."""
        if isinstance(distribution, Gaussian):
            return distribution
        return cls(distribution.mean, distribution.covariance, distribution.count)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def factor(self) -> Tensor:
        """F (D, rank) with F F^T = covariance. Directions that contain only rounding errors are left out."""
        floor = self.dim * _EPS
        lower, failed = torch.linalg.cholesky_ex(self.covariance)
        if not failed and lower.diagonal().square().min() > floor * self.covariance.diagonal().max():
            return lower  # full rank: takes a tenth of the time of eigh
        values, vectors = torch.linalg.eigh(self.covariance)
        if values[0] < -_INDEFINITE * values[-1]:
            raise UserError("the covariance has negative eigenvalues; measure the statistics again")
        kept = values > floor * values[-1]
        return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(samples: Moments | Gaussian, reference: Moments | Gaussian, *, quiet: bool = False) -> float:
    """Return the Frechet distance |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2).

    The distance is accurate for covariances without full rank, and zero between equal distributions. It is biased
    upwards for few samples.

    Args:
        samples: the first distribution. The distance is symmetric.
        reference: the second distribution. A `Gaussian` is factored once for all calls.
        quiet: do not warn if a distribution has at most as many samples as dimensions.

    Returns:
        The distance; NaN, with a warning, if the moments are not finite.

    Raises:
        UserError: a covariance has negative eigenvalues.
    """
    a, b = Gaussian.of(samples), Gaussian.of(reference)
    for part in (a, b):
        if part.count is not None and part.count <= part.dim and not quiet:
            log_once(
                logging.WARNING,
                "Frechet distance from %d samples in %d dimensions: the covariance does not have full rank; "
                "use more samples",
                part.count,
                part.dim,
            )
    if not all(x.isfinite().all() for x in (a.mean, a.covariance, b.mean, b.covariance)):
        log.warning("Frechet distance: the features are not finite, so the distance is NaN")
        return float("nan")
    rest = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    return max(rest - 2 * _overlap(a, b, rest), 0.0)


def _overlap(a: Gaussian, b: Gaussian, rest: float) -> float:
    """Return tr((C_a^1/2 C_b C_a^1/2)^1/2). The distance is `rest` minus twice this trace.

    With factors C = F F^T, the trace is the sum of the square roots of the eigenvalues of F_b^T C_a F_b. The square
    root of an eigenvalue near zero amplifies its rounding error. If the error could be too large, the trace is computed
    as the sum of the singular values of F_a^T F_b: three times slower, but accurate.
    """
    values = torch.linalg.eigvalsh(b.factor.T @ a.covariance @ b.factor).clamp(min=0)
    if len(values):
        roots, error = values.sqrt(), _EPS * values[-1]
        lost = torch.minimum(error / (2 * roots), error.sqrt()).sum()
        overlap = float(roots.sum())
        if 2 * float(lost) <= _ACCURACY * (rest - 2 * overlap):
            return overlap
    return float(torch.linalg.svdvals(a.factor.T @ b.factor).sum())
