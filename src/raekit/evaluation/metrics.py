"""Streaming metrics: each sees batches one by one, and processes meet once, at the end."""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import FeatureNetwork, Images, check_width, named
from raekit.evaluation.frechet import Gaussian, frechet_distance
from raekit.evaluation.intervals import GROUPS, LEAST, jackknife, wilson_interval
from raekit.moments import Moments

log = logging.getLogger(__name__)

_BLOCK = 65_536  # rows of the bank compared at once: bounds the memory of a search

# What the field calls the Frechet distances in Inception's features.
_FRECHET_NAMES = {"inception": "fid", "inception_spatial": "sfid", "clean_inception": "clean_fid"}


class Accumulator(Protocol):
    """A metric of a stream of batches."""

    def update(self, batch: Images, /) -> None: ...

    def reduce(self, world: World, /) -> None:
        """Bring the processes together, in place; called once, after the last batch."""

    def result(self) -> dict[str, float]: ...


def frechet_name(network: FeatureNetwork) -> str:
    return _FRECHET_NAMES.get(network.name, f"fd_{network.name}")


class FrechetDistance:
    """Frechet distance of the images from `reference`, in the features of `network`.

    Reported as `name`, by default `fid`, `sfid` and `clean_fid` for the parts of Inception that these names
    mean, and `fd_` and the network's name for any other.

    With `intervals` also `NAME_low` and `NAME_high`, a 95 % interval by the jackknife over GROUPS groups of images, and
    `NAME_bias`, by how much the distance is expected to exceed that of infinitely many images. It keeps the moments
    of each group, and needs the images' indices.
    """

    def __init__(
        self, network: FeatureNetwork, reference: Moments | Gaussian, name: str | None = None, intervals: bool = False
    ):
        check_width("reference", reference.dim, network)
        self.network, self.reference = network, Gaussian.of(reference)
        self.name = name or frechet_name(network)
        self.moments = Moments(network.width)
        self.groups = [Moments(network.width) for _ in range(GROUPS)] if intervals else []

    def update(self, batch: Images) -> None:
        features = batch.features(self.network)
        self.moments.update(features)
        if self.groups:
            if batch.indices is None:
                raise ValueError("an interval needs the images' indices")
            of_group = (batch.indices % GROUPS).to(features.device)
            for number, group in enumerate(self.groups):
                group.update(features[of_group == number])

    def reduce(self, world: World) -> None:
        for moments in (self.moments, *self.groups):
            moments.reduce(world)

    def result(self) -> dict[str, float]:
        distance = frechet_distance(self.moments, self.reference)
        if not self.groups:
            return {self.name: distance}
        if self.moments.count < LEAST:
            raise UserError(f"an interval needs at least {LEAST} images, and there are {self.moments.count}")
        rests = [self.moments.without(group) for group in self.groups]
        interval = jackknife(distance, [frechet_distance(rest, self.reference, quiet=True) for rest in rests])
        return {self.name: distance} | {f"{self.name}_{part}": value for part, value in interval._asdict().items()}


class FrechetRatio:
    """How many times as far from their references the images are as other real images, in several networks.

    `baselines` are the moments of those real images, such as held-out ones, one for each of `distances`. Each
    distance is reported, and its ratio to the baseline's as `fdr_` and its name; their mean is `fdrK` for K
    networks, as FDr6 (Yang et al., 2026, arXiv 2604.28190).
    """

    def __init__(self, distances: Sequence[FrechetDistance], baselines: Sequence[Moments | Gaussian]):
        self.distances = distances
        self.baselines = [frechet_distance(b, d.reference) for d, b in zip(distances, baselines, strict=True)]
        for distance, baseline in zip(distances, self.baselines, strict=True):
            if not baseline > 0:
                raise UserError(
                    f"{distance.name}: the baseline's distance from the reference is {baseline:g}, and nothing can be "
                    "compared with it: take other real images than the reference's own"
                )

    def update(self, batch: Images) -> None:
        for distance in self.distances:
            distance.update(batch)

    def reduce(self, world: World) -> None:
        for distance in self.distances:
            distance.reduce(world)

    def result(self) -> dict[str, float]:
        found = {name: value for distance in self.distances for name, value in distance.result().items()}
        ratios = {
            f"fdr_{distance.name.removeprefix('fd_')}": found[distance.name] / baseline
            for distance, baseline in zip(self.distances, self.baselines, strict=True)
        }
        return {**found, **ratios, f"fdr{len(ratios)}": sum(ratios.values()) / len(ratios)}


class InceptionScore:
    """The Inception Score as ADM's evaluator computes it, of the logits of Inception without their bias.

    exp of the mean divergence of a class distribution from the mean one, over `split_size` images at a time in
    the order of the stream, then averaged: at 50,000 images ten splits, as in the literature.
    """

    def __init__(self, logits: FeatureNetwork, split_size: int = 5000):
        self.network, self.split_size = logits, split_size
        self.done, self.numbered = 0, True
        # For each split: the number of images, the sum of p and the sum of p log p.
        self.splits: dict[int, tuple[int, Tensor, Tensor]] = {}

    def update(self, batch: Images) -> None:
        log_p = batch.features(self.network).double().log_softmax(1).cpu()
        indices = torch.arange(self.done, self.done + len(batch)) if batch.indices is None else batch.indices.cpu()
        self.numbered &= batch.indices is not None
        self.done += len(batch)
        of_split = indices // self.split_size
        for split in of_split.unique().tolist():
            rows = log_p[of_split == split]
            p = rows.exp()
            self._add(split, (len(rows), p.sum(0), (p * rows).sum()))

    def reduce(self, world: World) -> None:
        if world.size > 1 and not self.numbered:
            raise ValueError("the Inception Score over several processes needs the images' indices")
        everyone = world.gather(self.splits)
        self.splits = {}
        for splits in everyone:
            for split, sums in splits.items():
                self._add(split, sums)

    def _add(self, split: int, sums: tuple[int, Tensor, Tensor]) -> None:
        if split in self.splits:
            count, p, p_log_p = self.splits[split]
            sums = (count + sums[0], p + sums[1], p_log_p + sums[2])
        self.splits[split] = sums

    def result(self) -> dict[str, float]:
        scores = []
        for _, (count, p, p_log_p) in sorted(self.splits.items()):
            mean = p / count
            scores.append((p_log_p / count - torch.xlogy(mean, mean).sum()).exp())
        return {named("inception_score", self.network): float(torch.stack(scores).mean())}


class NearestNeighbours:
    """What the nearest images of a bank, usually the training set, say of the images.

    Distances are Euclidean between features scaled to unit length: from 0 (same direction) to 2.

    `knn_accuracy_NETWORK`: share of the images whose label wins the vote of their `k` nearest, a draw going
    to the class with the nearest image. Left out when the images, or the bank, have no labels.
    `nearest_distance_NETWORK`: median distance to the nearest image. Far below that of held-out images, it
    tells of memorised ones.

    The images must not be in the bank themselves. `features` (N, width) and `labels` (N,), -1 if unknown,
    come from `feature_bank`; the search runs on their device. With `intervals` also `knn_accuracy_NETWORK_low` and
    `_high`, Wilson's 95 % interval.
    """

    def __init__(self, network: FeatureNetwork, features: Tensor, labels: Tensor, k: int = 10, intervals: bool = False):
        if not 1 <= k <= len(features):
            raise UserError(f"k = {k} neighbours in a bank of {len(features)} images: choose 1 <= k <= images")
        check_width("bank", features.shape[1], network)
        self.network, self.k, self.intervals = network, k, intervals
        self.bank, self.labels = _unit(features), labels.to(features.device)
        self.labelled = bool((labels >= 0).all())
        self.votes = Moments(1, diagonal=True)  # of 1 where the vote gives the label, else 0
        self.distances: list[Tensor] = []

    def update(self, batch: Images) -> None:
        queries = _unit(batch.features(self.network)).to(self.bank.device)
        distances, index = nearest(queries, self.bank, self.k)
        self.distances.append(distances[:, 0].cpu())
        near = self.labels[index]
        # Votes for the class of each neighbour, in the order of distance: argmax takes the first of equals.
        winner = (near[:, :, None] == near[:, None, :]).sum(2).argmax(1, keepdim=True)
        labels = batch.labels.to(near.device)
        hits = near.gather(1, winner).squeeze(1) == labels
        if self.labelled:
            self.votes.update(hits[labels >= 0, None])

    def reduce(self, world: World) -> None:
        self.votes.reduce(world)
        mine = torch.cat(self.distances) if self.distances else torch.empty(0, dtype=torch.float64)
        self.distances = world.gather(mine)

    def result(self) -> dict[str, float]:
        accuracy, name = {}, f"knn_accuracy_{self.network.name}"
        if self.votes.count:
            accuracy[name] = float(self.votes.mean)
            if self.intervals:
                low, high = wilson_interval(round(accuracy[name] * self.votes.count), self.votes.count)
                accuracy |= {f"{name}_low": low, f"{name}_high": high}
        median = float(torch.cat(self.distances).quantile(0.5))
        return {**accuracy, f"nearest_distance_{self.network.name}": median}


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances, ascending, and indices (B, k) of the rows of `bank` (N, D) nearest to `queries` (B, D).

    All vectors have unit length. The bank is searched in blocks by float32 products; the distances of what
    is found are computed from differences in float64, so that a duplicate is at exactly 0.
    """
    products = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), _BLOCK):
        block = bank[start : start + _BLOCK]
        found, rows = (queries @ block.T).topk(min(k, len(block)))
        products, index = torch.cat([products, found], 1), torch.cat([index, rows + start], 1)
        products, best = products.topk(min(k, products.shape[1]))
        index = index.gather(1, best)
    distances, order = (queries[:, None].double() - bank[index].double()).norm(dim=2).sort(dim=1, stable=True)
    return distances, index.gather(1, order)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.double(), dim=1).float()
