"""The images that are evaluated: saved, real, generated, reconstructed, or decoded from noise."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from raekit import randomness
from raekit.data.images import UnreadableImage
from raekit.data.loader import DataConfig, Loader
from raekit.data.sources import open_source
from raekit.data.sources.base import Source, Split
from raekit.data.sources.folders import Files
from raekit.data.sources.zip_tar import Archived
from raekit.distributed import World
from raekit.errors import MAX_COUNT, UserError, whole_number
from raekit.evaluation.features import Images, PairScore
from raekit.evaluation.labels import Labels, draw_labels
from raekit.evaluation.streaming import BATCH, images_of
from raekit.flow.sampling import Sampling, check_sampling
from raekit.inference.generation import generate
from raekit.inference.model import Model, reconstruct
from raekit.models.latent_space import LatentSpace
from raekit.weights import fingerprint

CHUNK = 250
"""Images whose features are stored in one file. A killed evaluation repeats at most one chunk on each process."""


class Stream(Protocol):
    """Images to evaluate. Each image is a function of its number."""

    @property
    def count(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty if they have none."""
        ...

    @property
    def source(self) -> str | None:
        """The address that the images are read from; None if a model makes them from noise."""
        ...

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        """Yield the images with the numbers in `chunks`, in order. No batch reaches from one chunk into the next."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return everything that determines the images, except the content of `source`."""
        ...


class StoredImages:
    """Saved images, such as samples.

    Args:
        source: the address of a data source. All its images are taken as they are, and must be squares of one size.
        batch_size: images at once.
        workers: processes that decode images.
        world: the processes, which share the check of the sizes. Default: this process.

    Raises:
        UserError: the first image is unreadable or not square, or another image of a folder or an archive has another
            size. An image of another source fails when it is read.
    """

    def __init__(self, source: str, batch_size: int = BATCH, workers: int = 0, world: World | None = None):
        width, height = _read(open_source(source, "all"), 0).size
        if width != height:
            raise UserError(f"data source {source!r}: its images are {width} x {height}; crop them to squares first")
        self.images = RealImages(source, "all", width, batch_size, workers)
        self.images.loader.source = checked = _OneSize(self.images.loader.source, width)
        checked.check_headers(world or World())
        self.count, self.image_size, self.source = self.images.count, width, source
        self.classes = self.images.classes

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        return self.images.batches(chunks, world)

    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.images.batch_size}


class _OneSize:
    """A data source whose images must be squares of `size` pixels."""

    def __init__(self, source: Source, size: int):
        self.source, self.size = source, size
        self.name, self.classes, self.labels = source.name, source.classes, source.labels
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.source[index]
        if image.size != (self.size, self.size):
            raise UserError(
                f"data source {self.name!r}: {image.info.get('name', f'image {index}')} is {image.width} x "
                f"{image.height}, and the first image is {self.size} x {self.size}; evaluate images of one size"
            )
        return image, label

    def check_headers(self, world: World) -> None:
        """Check all images of a folder or an archive by their headers. The processes share the work.

        Raises:
            UserError: an image is unreadable or has another size. All processes name the first one.
        """
        if isinstance(self.source, Files | Archived):
            numbers = range(world.rank, len(self), world.size)
            first = min(world.gather(next((i for i in numbers if not self._fits(self.source, i)), len(self))))
            if first < len(self):
                _read(self, first)

    def _fits(self, source: Files | Archived, index: int) -> bool:
        try:
            return source.stored_size(index) == (self.size, self.size)
        except UnreadableImage:
            return False


def _read(source: Source, index: int) -> Image.Image:
    """Return an image; UserError if it is unreadable."""
    try:
        return source[index][0]
    except UnreadableImage as error:
        raise UserError(f"data source {source.name!r}: unreadable image {error}") from None


class RealImages:
    """The images of a split of a data source, centre-cropped to `image_size`.

    All must be readable, or a share of up to `max_unreadable` is not; others then take their place.
    """

    def __init__(
        self,
        source: str,
        split: Split,
        image_size: int,
        batch_size: int = BATCH,
        workers: int = 0,
        max_unreadable: float = 0.0,
    ):
        data = DataConfig(
            source=source, split=split, image_size=image_size, workers=workers, max_unreadable=max_unreadable
        )
        self.loader, self.batch_size = Loader(data, seed=0), chunk_batch(batch_size)
        self.count, self.image_size, self.source = len(self.loader), image_size, source
        self.classes = self.loader.classes
        self.split: Split = split

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        return images_of(self.loader.read(batches_of(chunks, self.batch_size), world, complete=True), world)

    def settings(self) -> dict[str, Any]:
        return {"split": self.split, "batch_size": self.batch_size}


class Samples:
    """Images that a model generates.

    Args:
        model: the denoiser and its autoencoder.
        count: number of samples.
        sampling: how to sample.
        seed: seed of the noise and of the labels.
        labels: how the classes of the samples are drawn.
        of_reference: number of images of each class in the reference, for labels in these proportions.
        batch_size: images at once.
        must_be_finite: whether a sample whose values are not finite is an error, as in `generate`.

    Raises:
        UserError: the model does not allow this sampling, or the labels cannot be drawn.
    """

    source = None

    def __init__(
        self,
        model: Model,
        count: int,
        sampling: Sampling,
        *,
        seed: int = 0,
        labels: Labels = "balanced",
        of_reference: Sequence[int] | None = None,
        batch_size: int = BATCH,
        must_be_finite: bool = True,
    ):
        count = whole_number("count", count, 1, MAX_COUNT)
        classes = model.denoiser.config.num_classes
        self.model, self.count, self.sampling, self.must_be_finite = model, count, sampling, must_be_finite
        self.classes = model.denoiser.config.class_names
        self.seed, self.kind, self.batch_size = seed, labels if classes else None, chunk_batch(batch_size)
        self.labels = draw_labels(labels, classes, count, seed, of_reference) if classes else None
        check_sampling(sampling, model.denoiser, self.labels is not None)

    @property
    def image_size(self) -> int:
        return self.model.autoencoder.image_size

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        for chunk in chunks:
            for batch in generate(
                self.model,
                self.labels,
                count=None if self.labels else self.count,
                seed=self.seed,
                sampling=self.sampling,
                batch_size=self.batch_size,
                world=World(device=world.device),
                indices=chunk,
                must_be_finite=self.must_be_finite,
            ):
                yield Images(batch.images, batch.labels, batch.indices)

    def share(self, world: World) -> Iterator[Images]:
        """Yield this process's share of all images, in batches."""
        firsts = range(world.rank * self.batch_size, self.count, world.size * self.batch_size)
        return self.batches([range(first, min(first + self.batch_size, self.count)) for first in firsts], world)

    def settings(self) -> dict[str, Any]:
        sampling = self.sampling
        chosen = {name: value for name, value in vars(sampling).items() if name not in ("guidance", "weak")}
        if sampling.solver != "dopri5":
            chosen = {name: value for name, value in chosen.items() if name not in ("atol", "rtol")}
        models = {"autoencoder": self.model.autoencoder, "denoiser": self.model.denoiser, "weak": sampling.weak}
        return {
            "seed": self.seed,
            "labels": self.kind,
            "drawn_labels": fingerprint({}, self.labels),
            "precision": "bf16" if self.model.denoiser.dtype == torch.bfloat16 else "fp32",
            "sampling": {"guidance": "+".join(map(str, sampling.guidance)) or None, **chosen},
            "weights": {n: fingerprint(m.state_dict(), m.config) for n, m in models.items() if m is not None},
            "batch_size": self.batch_size,
        }


class Reconstructions:
    """Reconstructions of the images of a data source by an autoencoder.

    Args:
        autoencoder: the autoencoder.
        source: the address of the originals.
        split: the split of the source.
        scores: {name: (images, originals) -> (B,)}, which compare each reconstruction with its original.
        batch_size: images at once.
        workers: processes that decode images.

    Raises:
        UserError: an image is unreadable, when it is read.
    """

    def __init__(
        self,
        autoencoder: LatentSpace,
        source: str,
        split: Split,
        scores: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
        *,
        batch_size: int = BATCH,
        workers: int = 0,
    ):
        self.autoencoder = autoencoder
        self.originals = RealImages(source, split, autoencoder.image_size, batch_size, workers)
        self.scores = {name: PairScore(name, score) for name, score in scores.items()}
        self.count, self.image_size = self.originals.count, autoencoder.image_size
        self.source, self.classes = source, self.originals.classes
        self.split: Split = split

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        for batch in self.originals.batches(chunks, world):
            yield Images(reconstruct(self.autoencoder, batch.images), batch.labels, batch.indices, batch.images)

    def settings(self) -> dict[str, Any]:
        autoencoder = fingerprint(self.autoencoder.state_dict(), self.autoencoder.config)
        return {
            "reconstructions": True,
            "weights": {"autoencoder": autoencoder},
            "batch_size": self.originals.batch_size,
        }


class DecodedNoise:
    """Standard normal noise, decoded as if it were latents: what a denoiser that has learned nothing gives."""

    source, classes = None, ()

    def __init__(self, autoencoder: LatentSpace, count: int, seed: int = 0, batch_size: int = BATCH):
        self.autoencoder, self.count, self.seed = autoencoder, count, seed
        self.batch_size, self.image_size = chunk_batch(batch_size), autoencoder.image_size

    @torch.no_grad()
    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        for numbers in batches_of(chunks, self.batch_size):
            noise = randomness.normal(self.seed, "noise baseline", numbers, self.autoencoder.latent_shape)
            images = self.autoencoder.decode(noise.to(world.device))
            yield Images(images, torch.full((len(numbers),), -1), torch.tensor(numbers))

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch_size": self.batch_size}


def batches_of(chunks: Iterable[range], size: int) -> Iterator[range]:
    """Yield at most `size` numbers at a time, never from two chunks."""
    return (chunk[first : first + size] for chunk in chunks for first in range(0, len(chunk), size))


def chunk_batch(size: int) -> int:
    """Return the batch size that is used for `size`: a batch holds at most one chunk. UserError below 1."""
    return min(whole_number("batch_size", size, 1), CHUNK)
