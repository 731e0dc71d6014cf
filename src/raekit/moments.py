"""Mean and covariance of a stream, exact in one pass, over any number of batches and processes."""

from typing import Self

import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError


class Moments:
    """Count, mean and scatter of vectors of `dim` elements, in float64; the vectors are not kept.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which works with deviations
    from the mean and so loses no digits where the mean is large. `diagonal=True` keeps the variance of each
    element alone: dim numbers in place of dim x dim. The sums live on the device of the first batch.
    """

    def __init__(self, dim: int, *, diagonal: bool = False):
        self.dim, self.diagonal = dim, diagonal
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros((dim,) if diagonal else (dim, dim), dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add a batch (B, ...) of vectors; each is flattened to `dim` elements."""
        rows = values.detach().flatten(1).to(torch.float64)
        if rows.shape[1] != self.dim:
            raise ValueError(f"vectors of {rows.shape[1]} elements for moments of {self.dim}")
        if len(rows):
            mean = rows.mean(0)
            rows = rows - mean
            self._add(len(rows), mean, rows.square().sum(0) if self.diagonal else rows.T @ rows)

    def without(self, part: Self) -> Self:
        """The moments of all that was seen but for `part`, which was among it."""
        if part.count >= self.count:
            raise ValueError(f"{part.count} of {self.count} samples cannot be taken away")
        rest = type(self)(self.dim, diagonal=self.diagonal)
        rest.count = self.count - part.count
        mean = part.mean.to(self.mean.device)
        rest.mean = self.mean + (self.mean - mean) * (part.count / rest.count)
        between = self._outer(mean - rest.mean) * (part.count * rest.count / self.count)
        rest.scatter = self.scatter - part.scatter.to(self.mean.device) - between
        return rest

    def reduce(self, world: World) -> Self:
        """Give every process, in place, the moments of all processes together; call it once, at the end."""
        if world.size == 1:
            return self
        total = int(world.sum(torch.tensor(self.count)))
        mean = world.sum(self.mean.to(world.device) * (self.count / max(total, 1)))
        between = self._outer(self.mean.to(world.device) - mean) * self.count
        self.count, self.mean, self.scatter = total, mean, world.sum(self.scatter.to(world.device) + between)
        return self

    @property
    def covariance(self) -> Tensor:
        """(dim, dim), unbiased: divided by count - 1. UserError below two samples."""
        if self.diagonal:
            raise ValueError("diagonal moments hold no covariance")
        if self.count < 2:
            raise UserError(f"a covariance needs at least two samples, and there are {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def variance(self) -> Tensor:
        """(dim,), of the population: divided by count. UserError without samples."""
        if not self.count:
            raise UserError("a variance needs at least one sample, and there is none")
        return (self.scatter if self.diagonal else self.scatter.diagonal()) / self.count

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        mean, scatter = mean.to(self.mean.device), scatter.to(self.mean.device)
        share, delta = count / (self.count + count), mean - self.mean
        self.scatter = self.scatter + scatter + self._outer(delta) * (self.count * share)
        self.mean = self.mean + delta * share
        self.count += count

    def _outer(self, delta: Tensor) -> Tensor:
        return delta.square() if self.diagonal else torch.outer(delta, delta)
