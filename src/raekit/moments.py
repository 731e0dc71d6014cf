"""Compute the exact mean and covariance of a stream in one pass, over any number of batches and processes."""

from typing import Self

import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError


class Moments:
    """The count, mean and scatter matrix of the vectors seen so far, in float64.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979). It uses deviations from the mean, so a
    large mean costs no precision. The sums are on the device of the first batch.

    Attributes:
        dim: the length of a vector.
        diagonal: whether only the variance of each element is kept, and no covariance.
        count: the number of vectors.
        mean: (dim,).
        scatter: the sum of products of deviations from the mean, (dim, dim), or (dim,) if `diagonal`.
    """

    def __init__(self, dim: int, *, diagonal: bool = False):
        self.dim, self.diagonal = dim, diagonal
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros((dim,) if diagonal else (dim, dim), dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add a batch (B, ...) of vectors. Each vector is flattened to `dim` elements."""
        rows = values.detach().flatten(1).to(torch.float64)
        if rows.shape[1] != self.dim:
            raise ValueError(f"vectors have {rows.shape[1]} elements, expected {self.dim}")
        if not len(rows):
            return
        if not self.count:
            self.mean, self.scatter = self.mean.to(rows.device), self.scatter.to(rows.device, copy=True)
        rows = rows.to(self.mean.device)
        mean = rows.mean(0)
        delta, share = mean - self.mean, len(rows) / (self.count + len(rows))
        rows = rows - mean
        # In place: with few rows of many features, reading and writing the scatter matrix takes most of the time.
        if self.diagonal:
            self.scatter.add_(rows.square().sum(0)).addcmul_(delta, delta, value=self.count * share)
        else:
            self.scatter.addmm_(rows.T, rows).addr_(delta, delta, alpha=self.count * share)
        self.mean = self.mean + delta * share
        self.count += len(rows)

    def without(self, part: Self) -> Self:
        """Return the moments without the vectors in `part`. They must be among the vectors seen."""
        if part.count >= self.count:
            raise ValueError(f"cannot remove {part.count} of {self.count} samples; at least one must remain")
        rest = type(self)(self.dim, diagonal=self.diagonal)
        rest.count = self.count - part.count
        mean = part.mean.to(self.mean.device)
        rest.mean = self.mean + (self.mean - mean) * (part.count / rest.count)
        between = self._outer(mean - rest.mean) * (part.count * rest.count / self.count)
        rest.scatter = self.scatter - part.scatter.to(self.mean.device) - between
        return rest

    def reduce(self, world: World) -> Self:
        """Replace the moments in place by the moments over all processes, and return them. Call it once, at the end."""
        if world.size == 1:
            return self
        total = int(world.sum(torch.tensor(self.count)))
        mean = world.sum(self.mean.to(world.device) * (self.count / max(total, 1)))
        between = self._outer(self.mean.to(world.device) - mean) * self.count
        self.count, self.mean, self.scatter = total, mean, world.sum(self.scatter.to(world.device) + between)
        return self

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (dim, dim): the scatter divided by count - 1.

        Raises:
            UserError: there are fewer than two samples.
        """
        if self.diagonal:
            raise ValueError("diagonal moments have no covariance")
        if self.count < 2:
            raise UserError(f"a covariance needs at least two samples, but there are {self.count}; give more images")
        return self.scatter / (self.count - 1)

    @property
    def variance(self) -> Tensor:
        """The population variance (dim,): the scatter divided by count.

        Raises:
            UserError: there are no samples.
        """
        if not self.count:
            raise UserError("a variance needs at least one sample, but there are none")
        return (self.scatter if self.diagonal else self.scatter.diagonal()) / self.count

    def _outer(self, delta: Tensor) -> Tensor:
        return delta.square() if self.diagonal else torch.outer(delta, delta)
