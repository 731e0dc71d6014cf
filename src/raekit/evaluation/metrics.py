"""Streaming metrics: each sees batches one by one, and processes meet once, at the end."""

import logging
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import FeatureNetwork, Images
from raekit.moments import Moments

log = logging.getLogger(__name__)

_BLOCK = 65_536  # rows of the bank compared at once: bounds the memory of a search


class Accumulator(Protocol):
    """A metric of a stream of batches."""

    def update(self, batch: Images, /) -> None: ...

    def reduce(self, world: World, /) -> None:
        """Bring the processes together, in place; called once, after the last batch."""

    def result(self) -> dict[str, float]: ...


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), for unbiased covariances.

    With factors C = F F^T the trace of the last root is the sum of the singular values of F_a^T F_b. Unlike
    the square roots of the eigenvalues of C_a C_b, these keep their accuracy near zero, so the distance is
    stable for covariances without full rank, and zero between equal ones. It is biased upwards for few
    samples: at most as many as dimensions brings a warning. NaN, with a warning, for moments not finite.
    """
    for moments in (a, b):
        if moments.count <= moments.dim:
            log.warning(
                "Frechet distance from %d samples in %d dimensions: the covariance has not full rank; "
                "take more samples",
                moments.count,
                moments.dim,
            )
    means, covariances = [m.mean.cpu() for m in (a, b)], [m.covariance.cpu() for m in (a, b)]
    if not all(x.isfinite().all() for x in (*means, *covariances)):
        log.warning("Frechet distance of features that are not finite")
        return float("nan")
    overlap = torch.linalg.svdvals(_factor(covariances[0]).T @ _factor(covariances[1])).sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return max(float((means[0] - means[1]).square().sum() + traces - 2 * overlap), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F (D, rank) with F F^T = covariance, without the directions that hold rounding errors alone."""
    floor = len(covariance) * torch.finfo(covariance.dtype).eps
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and lower.diagonal().square().min() > floor * covariance.diagonal().max():
        return lower  # full rank: a tenth of the time
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > floor * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


class FrechetDistance:
    """Frechet distance of the images from `reference`, in the features of `network`.

    Reported as `name`, by default `fd_` and the network's name; "FID" is the name of one network only.
    """

    def __init__(self, network: FeatureNetwork, reference: Moments, name: str | None = None):
        if reference.dim != network.width:
            raise UserError(
                f"the reference has {reference.dim} dimensions, the features of {network.name} have "
                f"{network.width}: compute the reference with {network.name}"
            )
        self.network, self.reference = network, reference
        self.name = name or f"fd_{network.name}"
        self.moments = Moments(network.width)

    def update(self, batch: Images) -> None:
        self.moments.update(batch.features(self.network))

    def reduce(self, world: World) -> None:
        self.moments.reduce(world)

    def result(self) -> dict[str, float]:
        return {self.name: frechet_distance(self.moments, self.reference)}


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images in [0, 1]; at most 100, by a squared error of 1e-10."""
    error = (images.double() - originals.double()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (B,) of images in [0, 1] (Wang et al., 2004; Gaussian window 11, sigma 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds

    similarity = structural_similarity_index_measure(images, originals, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)  # a tuple only for its optional outputs
    return similarity.reshape(len(images))


class PairMean:
    """The mean over images of `score(images, originals) -> (B,)`, such as `psnr` and `ssim`, as `name`."""

    def __init__(self, name: str, score: Callable[[Tensor, Tensor], Tensor]):
        self.name, self.score = name, score
        self.moments = Moments(1, diagonal=True)

    def update(self, batch: Images) -> None:
        if batch.originals is None:
            raise ValueError(f"{self.name} compares with originals, and the batch has none")
        self.moments.update(self.score(batch.images, batch.originals)[:, None])

    def reduce(self, world: World) -> None:
        self.moments.reduce(world)

    def result(self) -> dict[str, float]:
        return {self.name: float(self.moments.mean)}


class NearestNeighbours:
    """What the nearest images of a bank, usually the training set, say of the images.

    Distances are Euclidean between features scaled to unit length: from 0 (same direction) to 2.

    `knn_accuracy_NETWORK`: share of the images whose label wins the vote of their `k` nearest, a draw going
    to the class with the nearest image. Left out when the images, or the bank, have no labels.
    `nearest_distance_NETWORK`: median distance to the nearest image. Far below that of held-out images, it
    tells of memorised ones.

    The images must not be in the bank themselves. `features` (N, width) and `labels` (N,), -1 if unknown,
    come from `feature_bank`; the search runs on their device.
    """

    def __init__(self, network: FeatureNetwork, features: Tensor, labels: Tensor, k: int = 10):
        if not 1 <= k <= len(features):
            raise UserError(f"k = {k} neighbours in a bank of {len(features)} images: choose 1 <= k <= images")
        if features.shape[1] != network.width:
            raise UserError(
                f"the bank has {features.shape[1]} dimensions, the features of {network.name} have "
                f"{network.width}: compute the bank with {network.name}"
            )
        self.network, self.k = network, k
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
        accuracy = {f"knn_accuracy_{self.network.name}": float(self.votes.mean)} if self.votes.count else {}
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
