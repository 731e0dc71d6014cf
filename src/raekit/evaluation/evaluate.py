"""One pass of a stream of images through metrics, and the references that the metrics compare with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raekit.data.images import UnreadableImage
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.data.sources import open_source
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import FeatureNetwork, Images
from raekit.evaluation.metrics import Accumulator
from raekit.moments import Moments

# Called after each batch with the number of images that this process has done.
Progress = Callable[[int], None]


# Images at once where nothing is trained; no score depends on it.
BATCH = 64


def images_of(batches: Iterable[Batch], world: World) -> Iterator[Images]:
    """Real images, as a loader gives them, on this process's device."""
    for batch in batches:
        batch = batch.to(world.device)
        yield Images(batch.pixels(), batch.labels, indices=batch.positions)


class StoredImages:
    """Images that were saved, such as samples, as a stream of `evaluation.chunks`.

    `source` is any address of `data.sources`, of which all images are taken as they are: they are square, and
    of the size of the first; others are centre-cropped to it. UserError if the first is not square, or, when its turn
    comes, if one is unreadable.
    """

    def __init__(self, source: str, batch_size: int = BATCH, workers: int = 0):
        try:
            width, height = open_source(source, "all")[0][0].size
        except UnreadableImage as error:
            raise UserError(f"data source {source!r}: unreadable image {error}") from None
        if width != height:
            raise UserError(f"data source {source!r}: its images are {width} x {height}; crop them to squares first")
        data = DataConfig(source=source, split="all", image_size=width, workers=workers, max_unreadable=0)
        self.loader, self.batch_size = Loader(data, seed=0), batch_size

    @property
    def count(self) -> int:
        return len(self.loader)

    @property
    def image_size(self) -> int:
        return self.loader.config.image_size

    @property
    def source(self) -> str:
        return self.loader.config.source

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        return images_of(self.loader.read(batches_of(chunks, self.batch_size), world), world)

    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}


def batches_of(chunks: Iterable[range], size: int) -> Iterator[range]:
    """At most `size` numbers at once, none of two chunks."""
    return (chunk[first : first + size] for chunk in chunks for first in range(0, len(chunk), size))


@torch.no_grad()
def evaluate(
    stream: Iterable[Images],
    accumulators: Sequence[Accumulator],
    world: World,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Score the images of `stream`, each process its own share, and return {metric: value} on every process.

    Features are computed once for all metrics that share a network. An accumulator serves one evaluation.
    UserError if no process has an image.
    """
    for batch in _counted(stream, world, progress):
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
def reference_moments(
    stream: Iterable[Images], network: FeatureNetwork, world: World, progress: Progress | None = None
) -> Moments:
    """The moments of the features of all processes' images: what a Frechet distance is taken from."""
    moments = Moments(network.width)
    for batch in _counted(stream, world, progress):
        moments.update(batch.features(network))
    return moments.reduce(world)


@torch.no_grad()
def feature_bank(
    stream: Iterable[Images], network: FeatureNetwork, world: World, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """The features (N, width) float32 and labels (N,) of all processes' images, in the order of ranks.

    Every process has all of them, on its device, for `NearestNeighbours` to search. `Moments(network.width)`
    updated with the features are the moments of the same images without a second pass.
    """
    features, labels = [torch.empty(0, network.width)], [torch.empty(0, dtype=torch.int64)]
    for batch in _counted(stream, world, progress):
        features.append(batch.features(network).cpu())
        labels.append(batch.labels.cpu())
    shares = world.gather(torch.cat(features)), world.gather(torch.cat(labels))
    return torch.cat(shares[0]).to(world.device), torch.cat(shares[1]).to(world.device)


def _counted(stream: Iterable[Images], world: World, progress: Progress | None) -> Iterator[Images]:
    """Pass the batches on, report progress after each, and refuse a stream that is empty on all processes."""
    done = 0
    for batch in stream:
        yield batch
        done += len(batch)
        if progress:
            progress(done)
    if not world.any(done > 0):
        raise UserError("there are no images to evaluate")
