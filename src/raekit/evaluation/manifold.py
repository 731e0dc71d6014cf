"""Metrics that no sums can tell: they keep the features of all images until the end."""

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

_TILE = 4096  # rows and columns of a block of distances: 128 MiB in float64


class Kept:
    """The features of all images, in the order of the stream."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.indices: list[Tensor] = []

    def update(self, features: Tensor, indices: Tensor | None) -> None:
        self.features.append(features.cpu())
        if indices is not None:
            self.indices.append(indices.cpu())

    def gathered(self, world: World) -> Tensor:
        """Those of all processes (N, D) float32, on this one's device; needs the images' indices for an order."""
        ordered = len(self.indices) == len(self.features)
        mine = torch.cat(self.features) if self.features else torch.empty(0, 0)
        if world.size > 1 and not ordered:
            raise ValueError("this metric over several processes needs the images' indices")
        features = torch.cat([part for part in world.gather(mine) if len(part)])
        if ordered:
            numbers = torch.cat(self.indices) if self.indices else torch.empty(0, dtype=torch.int64)
            features = features[torch.cat(world.gather(numbers)).argsort(stable=True)]
        return features.to(world.device)


class Manifold:
    """The region around points that reaches from each to its k-th nearest other (Kynkäänniemi et al., 2019).

    features: (N, D), more than `k` of them; searched on their device, by blocks and in float64.
    """

    def __init__(self, features: Tensor, k: int = 3):
        if len(features) <= k:
            raise UserError(f"precision and recall need more than {k} images, and there are {len(features)}")
        self.features, self.k = features, k

    @cached_property
    def radii(self) -> Tensor:
        """(N,), squared."""
        return self.radii_of(slice(None))

    def radii_of(self, rows: slice) -> Tensor:
        """The squared radii of some of the points."""
        found = []
        for points in self.features[rows].split(_TILE):
            near = points.new_empty(len(points), 0, dtype=torch.float64)
            for others in self.features.split(_TILE):  # the point itself is one of them
                near = torch.cat([near, _squared_distances(points, others)], 1)
                near = near.topk(min(self.k + 1, near.shape[1]), largest=False).values
            found.append(near[:, self.k])
        return torch.cat(found) if found else self.features.new_empty(0, dtype=torch.float64)

    def covers(self, points: Tensor) -> Tensor:
        """Which (B,) of `points` (B, D) lie within reach of at least one of the manifold's."""
        found = []
        for part in points.split(_TILE):
            covered = torch.zeros(len(part), dtype=torch.bool, device=part.device)
            for centres, radii in zip(self.features.split(_TILE), self.radii.split(_TILE), strict=True):
                covered |= (_squared_distances(part, centres) <= radii).any(1)
            found.append(covered)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.bool, device=points.device)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) float64 between the rows of a and b; exactly 0 between equal ones."""
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.where(distances > 1e-12 * norms, 0)  # what is less is rounding


class PrecisionRecall:
    """Precision, the share of images within the manifold of `reference`, and recall, the share of the
    reference's images within theirs, as ADM's evaluator defines them (k = 3, Inception's pooled features).

    All features are kept until the end, 8 KiB an image for Inception; distances are compared in blocks.
    Both depend on the numbers of images: the literature's are those of 50,000 against 10,000. With `intervals` also
    `precision_low` and `precision_high`, Wilson's 95 % interval; recall is no share of the images.
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
            log.warning("precision and recall of features that are not finite")
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


class KernelDistance:
    """KID (Bińkowski et al., 2018): squared maximum mean discrepancy for the kernel (x . y / D + 1)^3, unbiased.

    `kid` is the mean, and `kid_std` the deviation, over `subsets` random subsets of `size` images of each side.
    `reference` holds features (N, D). The features of all images are kept until the end.
    """

    def __init__(self, network: FeatureNetwork, reference: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0):
        check_width("reference", reference.shape[1], network)
        self.network, self.reference = network, reference
        self.subsets, self.size, self.seed = subsets, size, seed
        self.kept = Kept()
        self.values = torch.empty(0)

    def update(self, batch: Images) -> None:
        self.kept.update(batch.features(self.network), batch.indices)

    def reduce(self, world: World) -> None:
        samples = self.kept.gathered(world)
        fewest = min(len(samples), len(self.reference))
        if fewest < self.size:
            raise UserError(f"KID takes subsets of {self.size} images, and there are {fewest}: take more images")
        values = [self._subset(samples, number) for number in range(self.subsets)]
        self.values = torch.tensor(values, dtype=torch.float64)

    def _subset(self, samples: Tensor, number: int) -> float:
        generator = numpy_generator(self.seed, "kid", number)

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
