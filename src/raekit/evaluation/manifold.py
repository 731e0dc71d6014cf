"""Metrics that keep the features of all images until the end: precision, recall and KID."""

import logging
from functools import cached_property

import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import FeatureNetwork, Images, check_width, named
from raekit.evaluation.intervals import wilson_interval
from raekit.randomness import numpy_generator

log = logging.getLogger(__name__)

TILE = 4096
"""The rows and columns of a block of distances, which takes 128 MiB in float64."""


class Kept:
    """Collects the features of all images, in the order of the stream."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.indices: list[Tensor] = []

    def update(self, features: Tensor, indices: Tensor) -> None:
        self.features.append(features.cpu())
        self.indices.append(indices.cpu())

    def gathered(self, world: World) -> Tensor:
        """Return the features (N, D) float32 of all processes, on this process's device."""
        mine = torch.cat(self.features) if self.features else torch.empty(0, 0)
        numbers = torch.cat(self.indices) if self.indices else torch.empty(0, dtype=torch.int64)
        features = torch.cat([part for part in world.gather(mine) if len(part)])
        return features[torch.cat(world.gather(numbers)).argsort(stable=True)].to(world.device)


class Manifold:
    """The union of balls around points, each as large as the distance to the k-th nearest other point.

    Kynkäänniemi et al., 2019. Distances are computed on the device of the features, in blocks and in float64.

    Args:
        features: the points (N, D), with N > `k`.
        k: the neighbour that a ball reaches.

    Raises:
        UserError: at most `k` points.
    """

    def __init__(self, features: Tensor, k: int = 3):
        if len(features) <= k:
            raise UserError(
                f"precision and recall need more than {k} images, and there are {len(features)}; add images"
            )
        self.features, self.k = features, k

    @cached_property
    def radii(self) -> Tensor:
        """The squared radii (N,) of the balls."""
        return self.radii_of(slice(None))

    def radii_of(self, rows: slice) -> Tensor:
        """Return the squared radii of some of the points."""
        found = []
        for points in self.features[rows].split(TILE):
            near = points.new_empty(len(points), 0, dtype=torch.float64)
            for others in self.features.split(TILE):  # they include the point itself
                near = torch.cat([near, squared_distances(points, others)], 1)
                near = near.topk(min(self.k + 1, near.shape[1]), largest=False).values
            found.append(near[:, self.k])
        return torch.cat(found) if found else self.features.new_empty(0, dtype=torch.float64)

    def covers(self, points: Tensor) -> Tensor:
        """Return a mask (B,) of the `points` (B, D) that lie in at least one ball."""
        found = []
        for part in points.split(TILE):
            covered = torch.zeros(len(part), dtype=torch.bool, device=part.device)
            for centres, radii in zip(self.features.split(TILE), self.radii.split(TILE), strict=True):
                covered |= (squared_distances(part, centres) <= radii).any(1)
            found.append(covered)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.bool, device=points.device)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances (M, N) float64 between the rows of a and b; exactly 0 between equal rows."""
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.where(distances > 1e-12 * norms, 0)  # smaller values are rounding errors


class PrecisionRecall:
    """Precision and recall, as defined by ADM's evaluator (k = 3, Inception's pooled features).

    Precision is the share of images in the manifold of the reference. Recall is the share of the reference's images in
    the manifold of the images. Both depend on the numbers of images: the literature compares 50,000 images with 10,000.
    All features are kept until the end, 8 KiB per image for Inception.

    Args:
        network: the network whose features are compared.
        reference: the manifold of the real images.
        intervals: also report `precision_low` and `precision_high`, Wilson's 95 % interval. Recall has no interval,
            because it is not a share of the images.
    """

    def __init__(self, network: FeatureNetwork, reference: Manifold, intervals: bool = False):
        check_width("reference", reference.features.shape[1], network)
        self.network, self.reference, self.intervals = network, reference, intervals
        self.count = 0
        self.kept = Kept()
        self.values = [float("nan")] * 2

    def update(self, batch: Images) -> None:
        self.kept.update(batch.features(self.network), batch.indices)

    def reduce(self, world: World) -> None:
        samples = Manifold(self.kept.gathered(world), self.reference.k)
        if not (samples.features.isfinite().all() and self.reference.features.isfinite().all()):
            log.warning("precision and recall: the features are not finite, so both are NaN")
            return
        share = slice(world.rank, None, world.size)
        radii = torch.empty(len(samples.features), dtype=torch.float64, device=samples.features.device)
        for rank, part in enumerate(world.gather(samples.radii_of(share).cpu())):
            radii[rank :: world.size] = part.to(radii.device)
        samples.radii = radii
        self.values, self.count = [], len(samples.features)
        for inside, points in (self.reference, samples.features), (samples, self.reference.features):
            covered = inside.covers(points[share].to(inside.features.device)).sum()
            self.values.append(float(world.sum(covered.cpu().double())) / len(points))

    def result(self) -> dict[str, float]:
        names = [named(name, self.network) for name in ("precision", "recall")]
        results = dict(zip(names, self.values, strict=True))
        if self.intervals and self.count:
            low, high = wilson_interval(round(self.values[0] * self.count), self.count)
            results |= {f"{names[0]}_low": low, f"{names[0]}_high": high}
        return results


KID_SIZE = 1000
"""Images in a subset of KID."""


class KernelDistance:
    """KID (Bińkowski et al., 2018): unbiased squared maximum mean discrepancy for the kernel (x . y / D + 1)^3.

    `kid` is the mean over random subsets, and `kid_std` the standard deviation. All features are kept until the end.

    Args:
        network: the network whose features are compared.
        reference: features (N, D) of the real images.
        subsets: number of subsets.
        size: number of images, and of real images, in each subset.
    """

    def __init__(self, network: FeatureNetwork, reference: Tensor, subsets: int = 100, size: int = KID_SIZE):
        check_width("reference", reference.shape[1], network)
        self.network, self.reference = network, reference
        self.subsets, self.size = subsets, size
        self.kept = Kept()
        self.values = torch.empty(0)

    def update(self, batch: Images) -> None:
        self.kept.update(batch.features(self.network), batch.indices)

    def reduce(self, world: World) -> None:
        samples = self.kept.gathered(world)
        fewest = min(len(samples), len(self.reference))
        if fewest < self.size:
            raise UserError(f"KID uses subsets of {self.size} images, and there are {fewest}; use more images")
        values = [self._subset(samples, number) for number in range(self.subsets)]
        self.values = torch.tensor(values, dtype=torch.float64)

    def _subset(self, samples: Tensor, number: int) -> float:
        generator = numpy_generator(0, "kid", number)

        def drawn(features: Tensor) -> Tensor:
            rows = torch.from_numpy(generator.choice(len(features), self.size, replace=False))
            return features[rows.to(features.device)].to(samples.device, torch.float64)

        x, y = drawn(samples), drawn(self.reference)

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return (a @ b.T / a.shape[1] + 1) ** 3

        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
        return float(within / (self.size * (self.size - 1)) - 2 * kernel(x, y).mean())

    def result(self) -> dict[str, float]:
        name = named("kid", self.network)
        return {name: float(self.values.mean()), f"{name}_std": float(self.values.std(correction=0))}
