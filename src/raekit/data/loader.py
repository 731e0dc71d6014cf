"""Load batches of images, in an order that depends only on the seed and the number of images seen."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import count
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from raekit.config import Operation, Place, check_sizes, configclass
from raekit.data.images import UnreadableImage, log_once, reduced, warn_of_unreadable
from raekit.data.sources import in_words, open_source
from raekit.data.sources.base import Source, Split, parse_address
from raekit.data.transforms import center_window, random_window, random_window_side
from raekit.data.workers import MAX_WORKERS, load_parts
from raekit.distributed import World
from raekit.errors import UserError, whole_number
from raekit.randomness import numpy_generator

Resize = Literal["fast", "exact"]


@configclass
class DataConfig:
    """The images to load.

    Attributes:
        source: The address of the dataset, such as folder:DIR (docs/data.md).
        split: The part of the dataset: `train`, `heldout` or `all`.
        splits: The names of the folders or archives that are the splits, `train=NAME,heldout=NAME`, if not the usual
            names.
        image_size: The side of the square images, in pixels.
        crop: How the training stream crops an image to a square.
        flip: Whether the training stream mirrors half of the images at random.
        resize: How the training stream scales images. `exact` gives the pixels of ADM's crop. `fast` gives values
            within one level of these, or within a few levels for large JPEGs, which it decodes at a reduced size.
            Evaluations and statistics always use `exact`.
        workers: The number of processes that decode images. 0: decode in the main process.
        max_unreadable: The fraction of the images, from 0 to 1, that may be unreadable. Loading fails above this
            fraction. The unreadable images of all processes count.
    """

    source: Operation[Place] = "emoji"  # a run compares the images themselves (`stages.inputs`)
    split: Split = "train"
    splits: str = ""
    image_size: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    resize: Resize = "fast"
    workers: Operation[int] = 0
    max_unreadable: Operation[float] = 0.01

    def __post_init__(self):
        check_sizes("data", image_size=self.image_size)
        whole_number("data.workers", self.workers, 0, MAX_WORKERS)
        if not 0 <= self.max_unreadable <= 1:
            raise UserError(f"data.max_unreadable must be between 0 and 1, not {self.max_unreadable}")
        parse_address(self.address)
        if self.splits and not parse_address(self.address).splits:
            raise UserError(f"data.splits: {self.splits!r} must be train=NAME, heldout=NAME, or both with a comma")

    @property
    def address(self) -> str:
        """The address of the dataset with the names of its splits."""
        return f"{self.source}?{self.splits}" if self.splits else self.source

    def tolerated(self, items: int) -> int:
        """Return how many of the `items` of a source may be unreadable."""
        return max(min(int(self.max_unreadable * items), items - 1), 0)


class Rows:
    """Base of dataclasses whose tensors have one row for each sample. One of the tensors is `positions`."""

    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`. The positions stay on the CPU, where they address random numbers."""
        asynchronous = torch.device(device).type != "cpu"  # nothing would wait for an asynchronous copy to the CPU
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "positions"}  # type: ignore[arg-type]
        moved = {name: tensor.to(device, non_blocking=asynchronous) for name, tensor in rest.items()}
        return replace(self, **moved)  # type: ignore[type-var]

    def split(self, size: int) -> list[Self]:
        """Split into parts of at most `size` samples, in order."""
        parts = zip(*(getattr(self, f.name).split(size) for f in fields(self)), strict=True)  # type: ignore[arg-type]
        return [type(self)(*part) for part in parts]


@dataclass(frozen=True)
class Batch(Rows):
    """A batch of images.

    Attributes:
        images: uint8 (B, 3, S, S).
        labels: int64 (B,), -1 for an image without a label.
        positions: int64 (B,). In the training stream, the number of images before this one. In a single pass, the
            index of the image in the source.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor

    def pixels(self) -> Tensor:
        """Return the images as float32 (B, 3, S, S) in [0, 1]."""
        return self.images.float() / 255


class Loader:
    """Loads batches from one source.

    Attributes:
        source: the opened source.
        unreadable: maps the name of each image that this process could not decode so far to the reason.
    """

    def __init__(self, config: DataConfig, seed: int):
        self.config, self.seed = config, seed
        self.source = open_source(config.address, config.split)
        self.unreadable: dict[str, str] = {}
        self._tolerated = config.tolerated(len(self))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def announce(self, world: World) -> None:
        """Log one line about the images, as information: only the first process, and once for each dataset."""
        if world.is_main:
            log_once(logging.INFO, "%s", in_words(self.source, self.config.address, self.config.split))

    def stream(self, start: int, batch_size: int, world: World) -> Iterator[Batch]:
        """Yield this rank's contiguous share of each training batch, without end.

        Each epoch is a permutation of the source, and each position has its own random crop and flip. The samples
        therefore do not depend on the batch size, the number of ranks or the number of workers. The next readable
        image of the source replaces an unreadable image.

        Args:
            start: the number of images to skip, such as the images seen before a resume.
            batch_size: the size of a batch over all ranks.
            world: the processes that share each batch.

        Raises:
            UserError: the batch size is not a multiple of the number of ranks, or too many images are unreadable.
        """
        reader = _Reader(self.source, self.config, self.seed, attempts=self._tolerated + 1)
        return self._batches(reader, stream_shares(start, batch_size, world), world)

    def once(self, batch_size: int, world: World, most: int | None = None) -> Iterator[Batch]:
        """Yield centre-cropped batches of a single pass over the source, in its order.

        Ranks take turns, so that together they read every readable image exactly once. The last batch may be shorter.

        Args:
            batch_size: the size of a batch on one rank.
            world: the processes that share the pass.
            most: read at most so many images, spread evenly over the source. None reads all.

        Raises:
            UserError: the batch size is not positive, or too many images are unreadable.
        """
        whole_number("batch_size", batch_size, 1)
        read = range(len(self)) if most is None else spread(len(self), most)
        firsts = range(world.rank * batch_size, len(read), world.size * batch_size)
        batches = self.read((read[first : first + batch_size] for first in firsts), world)
        return (batch for batch in batches if len(batch))

    def read(
        self, parts: Iterable[Sequence[int]], world: World, resize: Resize = "exact", complete: bool = False
    ) -> Iterator[Batch]:
        """Yield one centre-cropped batch for each group of source indices in `parts`, without unreadable images.

        With `complete`, the next readable image takes the place of an unreadable one, as in training.

        Raises:
            UserError: too many images are unreadable.
        """
        config = replace(self.config, crop="center", flip=False, resize=resize)
        attempts = self._tolerated + 1 if complete else 1
        return self._batches(_Reader(self.source, config, seed=None, attempts=attempts), parts, world)

    def _batches(self, reader: "_Reader", parts: Iterable[Sequence[int]], world: World) -> Iterator[Batch]:
        for images, labels, read, unreadable in load_parts(reader, parts, self.config.workers, world):
            self._note(unreadable, world)
            yield Batch(images, labels, read)

    def _note(self, unreadable: dict[str, str], world: World) -> None:
        if unreadable.keys() <= self.unreadable.keys():
            return
        warn_of_unreadable(unreadable, world)
        self.unreadable |= unreadable
        total = world.count_distinct(f"unreadable {self.config.address} {self.config.split}", self.unreadable)
        if total > self._tolerated:
            names = ", ".join(list(self.unreadable)[:5])
            share, most = f"{total} of {len(self)} images", self.config.max_unreadable
            limit = f"more than max_unreadable={most:g} allows" if most else "and all must be readable"
            raise UserError(
                f"data source {self.source.name!r}: {share} are unreadable, {limit}; "
                f"repair or remove them, starting with {names}"
            )


def spread(items: int, most: int) -> Sequence[int]:
    """Return the indices of `most` of so many items, spread evenly over them, or of all items."""
    return range(items) if most >= items else [k * items // most for k in range(most)]


def stream_shares(start: int, batch_size: int, world: World) -> Iterator[range]:
    """Yield the positions of this rank's share of each training batch, without end."""
    share = _share(batch_size, world)
    return (range(first, first + share) for first in count(start + world.rank * share, batch_size))


def item_at(seed: int, position: int, items: int) -> int:
    """Return the source index at `position` of the training stream. Each epoch is a permutation of the source."""
    return int(_order(seed, position // items, items)[position % items])


def augmentation(config: DataConfig, seed: int, position: int) -> tuple[bool, np.random.Generator]:
    """Return whether the image at `position` of the training stream is flipped, and the generator of its crop."""
    generator = numpy_generator(seed, "augment", position)
    return config.flip and generator.random() < 0.5, generator


def _share(batch_size: int, world: World) -> int:
    if batch_size < 1 or batch_size % world.size:
        raise UserError(f"batch size {batch_size} must be a positive multiple of {world.size}, the number of processes")
    return batch_size // world.size


_Read = tuple[Tensor, Tensor, Tensor, dict[str, str]]


class _Reader(Dataset[_Read]):
    """Reads a batch in any process: positions -> images, labels, positions, reasons by unreadable image.

    With a seed, positions belong to the training stream; without, they are source indices. Up to `attempts` images are
    tried for one position.
    """

    def __init__(self, source: Source, config: DataConfig, seed: int | None, attempts: int):
        self.source, self.config, self.seed, self.attempts = source, config, seed, attempts

    def __getitem__(self, positions: Sequence[int]) -> _Read:
        size = self.config.image_size
        images, labels, read = np.empty((len(positions), 3, size, size), np.uint8), [], []
        unreadable: dict[str, str] = {}
        for position in positions:
            item = self._item(position, unreadable)
            if item is not None:
                image, label = item
                images[len(read)] = self._square(image, position)
                labels.append(label)
                read.append(position)
        pixels = torch.from_numpy(images[: len(read)])
        numbers = torch.tensor(labels, dtype=torch.int64), torch.tensor(read, dtype=torch.int64)
        return pixels, *numbers, unreadable

    def _item(self, position: int, unreadable: dict[str, str]) -> tuple[Image.Image, int] | None:
        items, config = len(self.source), self.config
        first = position if self.seed is None else item_at(self.seed, position, items)
        short_side = random_window_side(config.image_size) if config.crop == "random" else config.image_size
        for index in range(first, first + self.attempts):
            try:
                with reduced(short_side if config.resize == "fast" else 0):
                    return self.source[index % items]
            except UnreadableImage as error:
                unreadable[error.path] = error.reason
        return None

    def _square(self, image: Image.Image, position: int) -> np.ndarray:
        """Return the pixels of an image as uint8 (3, S, S)."""
        config, mirrored, window = self.config, False, None
        if self.seed is not None and (config.flip or config.crop == "random"):
            mirrored, generator = augmentation(config, self.seed, position)
            if config.crop == "random":
                window = random_window(image, config.image_size, generator)
        window = window or center_window(image, config.image_size)
        pixels = window.fast() if config.resize == "fast" else np.asarray(window.exact()).transpose(2, 0, 1)
        return pixels[..., ::-1] if mirrored else pixels


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, items: int) -> np.ndarray:
    return numpy_generator(seed, "order", epoch).permutation(items)
