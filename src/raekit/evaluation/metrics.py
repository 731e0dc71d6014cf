"""Streaming metrics: each metric receives batch after batch, and processes exchange results once, at the end."""

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
from raekit.randomness import numpy_generator

SPLIT = 5000
"""Images in a split of the Inception Score."""

_TOGETHER = 1000  # features that are divided into groups at once: each group costs a pass over its scatter matrix
_BLOCK = 65_536  # rows of the bank that are compared at once, which limits the memory of a search

FDR6 = {
    "inception": 1.68,
    "convnextv2": 56.87,
    "dinov2_cls": 14.19,
    "mae_cls": 0.04,
    "siglip2_pool": 0.60,
    "clip_cls": 5.60,
}
"""The networks of FDr6, and the published Frechet distances between ImageNet's validation and training images in their
features (Yang et al., 2026, arXiv 2604.28190)."""

# The usual names of the Frechet distances in Inception's features.
_FRECHET_NAMES = {"inception": "fid", "inception_spatial": "sfid", "clean_inception": "clean_fid"}


class Accumulator(Protocol):
    """A metric that is computed over a stream of batches.

    `raekit evaluate` first stores the features of all networks, and scores batches that have no images. So a metric of
    pixels needs a `FeatureNetwork`, whose features may be a single number.
    """

    def update(self, batch: Images, /) -> None:
        """Add a batch."""

    def reduce(self, world: World, /) -> None:
        """Combine the state of all processes, in place. Called once, after the last batch."""

    def result(self) -> dict[str, float]:
        """Return {metric: value}. Called after `reduce`."""
        ...


def frechet_name(network: FeatureNetwork) -> str:
    """Return the reported name of the Frechet distance in the features of `network`."""
    return _FRECHET_NAMES.get(network.name, f"fd_{network.name}")


class FrechetDistance:
    """Frechet distance between the images and `reference`, in the features of `network`.

    Args:
        network: the network whose features are compared.
        reference: the moments of the real images.
        name: name of the metric. Default: `fid`, `sfid` or `clean_fid` for Inception, otherwise `fd_NETWORK`.
        intervals: also report `NAME_low` and `NAME_high`, a 95 % interval by the jackknife over GROUPS groups of
            images, and `NAME_bias`, the expected excess over the distance of infinitely many images. This needs memory
            for the moments of each group.
    """

    def __init__(
        self, network: FeatureNetwork, reference: Moments | Gaussian, name: str | None = None, intervals: bool = False
    ):
        check_width("reference", reference.dim, network)
        self.network, self.reference = network, Gaussian.of(reference)
        self.name = name or frechet_name(network)
        self.moments = Moments(network.width)
        self.groups = [Moments(network.width) for _ in range(GROUPS)] if intervals else []
        self.waiting: list[tuple[Tensor, Tensor]] = []  # features that no group has yet, and the number of the group

    def update(self, batch: Images) -> None:
        features = batch.features(self.network)
        self.moments.update(features)
        if self.groups:
            self.waiting.append((features, (batch.indices % GROUPS).to(features.device)))
            if sum(len(rows) for rows, _ in self.waiting) >= _TOGETHER:
                self._divide()

    def _divide(self) -> None:
        """Add the waiting features to their groups."""
        if self.waiting:
            features, of_group = map(torch.cat, zip(*self.waiting, strict=True))
            for number, group in enumerate(self.groups):
                group.update(features[of_group == number])
        self.waiting = []

    def reduce(self, world: World) -> None:
        self._divide()
        for moments in (self.moments, *self.groups):
            moments.reduce(world)

    def result(self) -> dict[str, float]:
        distance = frechet_distance(self.moments, self.reference)
        if not self.groups:
            return {self.name: distance}
        if self.moments.count < LEAST:
            raise UserError(
                f"an interval needs at least {LEAST} images, and there are {self.moments.count}; add images"
            )
        rests = map(self.moments.without, self.groups)  # one matrix at a time
        interval = jackknife(distance, [frechet_distance(rest, self.reference, quiet=True) for rest in rests])
        return {self.name: distance} | {f"{self.name}_{part}": value for part, value in interval._asdict().items()}


class FrechetRatio:
    """Frechet distances in several networks, relative to the distances of other real images.

    Reports each distance, its ratio to the distance of the real images as `fdr_NETWORK`, and the mean ratio.

    Args:
        distances: the distances of the images, one for each network.
        baselines: for each distance, the moments of other real images, such as held-out images, or their distance.
        name: name of the mean ratio.

    Raises:
        UserError: the distance of the other real images is not positive.
    """

    def __init__(
        self,
        distances: Sequence[FrechetDistance],
        baselines: Sequence[Moments | Gaussian | float],
        name: str = "fdr_mean",
    ):
        self.distances, self.name = distances, name
        self.baselines = [
            baseline if isinstance(baseline, float | int) else frechet_distance(baseline, distance.reference)
            for distance, baseline in zip(distances, baselines, strict=True)
        ]
        for distance, baseline in zip(distances, self.baselines, strict=True):
            if not baseline > 0:
                raise UserError(
                    f"{distance.name}: the baseline's distance from the reference is {baseline:g}, so there is no "
                    "ratio to it; use other real images than the images of the reference"
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
        return {**found, **ratios, self.name: sum(ratios.values()) / len(ratios)}


class InceptionScore:
    """The Inception Score, as computed by ADM's evaluator.

    The score of a split is the exponential of the mean divergence between the class distribution of an image and the
    mean class distribution. The result is the mean over splits.

    Args:
        logits: Inception's logits without the bias.
        count: number of images. They are divided into splits in an order that is drawn from a fixed seed. ADM's
            evaluator keeps their order, in which the score of images sorted by classes is too low.
        split_size: images in a split. The default gives ten splits for 50,000 images, as in the literature. The last
            split may be shorter.
    """

    def __init__(self, logits: FeatureNetwork, count: int, split_size: int = SPLIT):
        self.network, self.split_size = logits, split_size
        self.order = torch.from_numpy(numpy_generator(0, "splits", 0).permutation(count))
        # For each split: the number of images, the sum of p and the sum of p log p.
        self.splits: dict[int, tuple[int, Tensor, Tensor]] = {}

    def update(self, batch: Images) -> None:
        log_p = batch.features(self.network).double().log_softmax(1).cpu()
        of_split = self.order[batch.indices.cpu()] // self.split_size
        for split in of_split.unique().tolist():
            rows = log_p[of_split == split]
            p = rows.exp()
            self._add(split, (len(rows), p.sum(0), (p * rows).sum()))

    def reduce(self, world: World) -> None:
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


class ClassAccuracy:
    """The share of images that a classifier gives their label, as `class_accuracy_NAME`. Left out without labels.

    Args:
        logits: the class logits of a classifier of the same classes as the images.
        name: name of the classifier.
        intervals: also report `class_accuracy_NAME_low` and `_high`, Wilson's 95 % interval.
    """

    def __init__(self, logits: FeatureNetwork, name: str, intervals: bool = False):
        self.logits, self.name, self.intervals = logits, f"class_accuracy_{name}", intervals
        self.hits = Moments(1, diagonal=True)  # 1 for an image that gets its label, otherwise 0

    def update(self, batch: Images) -> None:
        guesses = batch.features(self.logits).argmax(1)
        labels = batch.labels.to(guesses.device)
        self.hits.update((guesses == labels)[labels >= 0, None])

    def reduce(self, world: World) -> None:
        self.hits.reduce(world)

    def result(self) -> dict[str, float]:
        return _accuracy(self.name, self.hits, self.intervals)


def _accuracy(name: str, hits: Moments, intervals: bool) -> dict[str, float]:
    """Return {name: the share of hits} and, if wanted, Wilson's interval; {} without any image."""
    if not hits.count:
        return {}
    share = float(hits.mean)
    if not intervals:
        return {name: share}
    low, high = wilson_interval(round(share * hits.count), hits.count)
    return {name: share, f"{name}_low": low, f"{name}_high": high}


class NearestNeighbours:
    """Compares images with their nearest neighbours in a bank of images, usually the training set.

    Reports two metrics:

    - `knn_accuracy_NETWORK`: the share of images whose label wins the vote of their `k` nearest neighbours. In a tie
      the class with the nearest image wins. Left out if the images or the bank have no labels.
    - `nearest_distance_NETWORK`: the median distance to the nearest neighbour. A value far below the value of held-out
      images is a sign of memorised images.

    Distances are Euclidean between features of unit length: from 0 (same direction) to 2. The search runs on the device
    of the bank. The bank must not contain the images.

    Args:
        network: the network whose features are compared.
        features: features (N, width) of the bank, from `feature_bank`.
        labels: labels (N,) of the bank; -1 if unknown.
        k: number of neighbours that vote.
        intervals: also report `knn_accuracy_NETWORK_low` and `_high`, Wilson's 95 % interval.

    Raises:
        UserError: the bank has fewer than `k` images, or was not made with `network`.
    """

    def __init__(self, network: FeatureNetwork, features: Tensor, labels: Tensor, k: int = 10, intervals: bool = False):
        if not 1 <= k <= len(features):
            raise UserError(
                f"k = {k} neighbours in a bank of {len(features)} images; choose k from 1 to {len(features)}"
            )
        check_width("bank", features.shape[1], network)
        self.network, self.k, self.intervals = network, k, intervals
        self.bank, self.labels = _unit(features), labels.to(features.device)
        self.labelled = bool((labels >= 0).all())
        self.votes = Moments(1, diagonal=True)  # 1 if the vote gives the label, otherwise 0
        self.distances: list[Tensor] = []

    def update(self, batch: Images) -> None:
        queries = _unit(batch.features(self.network)).to(self.bank.device)
        distances, index = nearest(queries, self.bank, self.k)
        self.distances.append(distances[:, 0].cpu())
        near = self.labels[index]
        # Votes for the class of each neighbour, in order of distance. In a tie argmax takes the first class.
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
        accuracy = _accuracy(f"knn_accuracy_{self.network.name}", self.votes, self.intervals)
        median = float(torch.cat(self.distances).quantile(0.5))
        return {**accuracy, f"nearest_distance_{self.network.name}": median}


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the distances and indices (B, k) of the rows of `bank` (N, D) that are nearest to `queries` (B, D).

    All vectors must have unit length. The search uses float32 products of blocks. The distances of the rows found are
    computed from differences in float64, so that a duplicate has distance 0 exactly. Distances ascend in each row.
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
    parts = [F.normalize(part.double(), dim=1).float() for part in features.split(_BLOCK)]
    return torch.cat(parts)
