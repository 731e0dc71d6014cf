"""One pass over a stream of images: metrics, moments, or the features themselves."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from raekit.data.loader import Batch
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import FeatureNetwork, Images
from raekit.evaluation.metrics import Accumulator
from raekit.moments import Moments

Done = Callable[[int], None]
"""Called after each batch with the number of images that this process has done."""

BATCH = 64
"""Images in a batch where nothing is trained. No score depends on it."""


def images_of(batches: Iterable[Batch], world: World) -> Iterator[Images]:
    """Yield the batches of a loader as images to score, on this process's device."""
    for batch in batches:
        batch = batch.to(world.device)
        yield Images(batch.pixels(), batch.labels, batch.positions)


@torch.no_grad()
def score_stream(
    stream: Iterable[Images], accumulators: Sequence[Accumulator], world: World, done: Done | None = None
) -> dict[str, float]:
    """Score a stream of images. Features are computed once for all metrics that share a network.

    Args:
        stream: this process's share of the images.
        accumulators: the metrics. Each serves one call.
        world: the processes that share the images.
        done: called after each batch.

    Returns:
        {metric: value}, the same on every process.

    Raises:
        UserError: no process has an image.
    """
    for batch in _counted(stream, world, done):
        for accumulator in accumulators:
            accumulator.update(batch)
    results: dict[str, float] = {}
    for accumulator in accumulators:
        accumulator.reduce(world)
        values = accumulator.result()
        if taken := results.keys() & values.keys():
            raise ValueError(f"two metrics report {', '.join(sorted(taken))}: give one another name")
        results |= values
    return results


@torch.no_grad()
def reference_moments(stream: Iterable[Images], network: FeatureNetwork, world: World) -> Moments:
    """Return the moments of the features of all processes' images, which a Frechet distance needs."""
    moments = Moments(network.width)
    for batch in _counted(stream, world, None):
        moments.update(batch.features(network))
    return moments.reduce(world)


@torch.no_grad()
def feature_bank(
    stream: Iterable[Images], network: FeatureNetwork, world: World, done: Done | None = None
) -> tuple[Tensor, Tensor]:
    """Return the features and labels of all processes' images, for `NearestNeighbours` to search.

    Returns:
        Features (N, width) float32 and labels (N,), in the order of ranks, on every process's device.
    """
    features, labels = [torch.empty(0, network.width)], [torch.empty(0, dtype=torch.int64)]
    for batch in _counted(stream, world, done):
        features.append(batch.features(network).cpu())
        labels.append(batch.labels.cpu())
    shares = world.gather(torch.cat(features)), world.gather(torch.cat(labels))
    return torch.cat(shares[0]).to(world.device), torch.cat(shares[1]).to(world.device)


def _counted(stream: Iterable[Images], world: World, done: Done | None) -> Iterator[Images]:
    count = 0
    for batch in stream:
        yield batch
        count += len(batch)
        if done:
            done(count)
    if not world.any(count > 0):
        raise UserError("there are no images to evaluate")
