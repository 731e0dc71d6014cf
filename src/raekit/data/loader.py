"""Batches of images, in an order that is a function of (seed, images seen) alone."""

import logging
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import count
from typing import Literal, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raekit.config import configclass
from raekit.data.images import UnreadableImage
from raekit.data.sources import open_source
from raekit.data.sources.base import Source, Split
from raekit.data.transforms import center_crop, flip, random_crop
from raekit.distributed import World
from raekit.errors import UserError
from raekit.randomness import numpy_generator

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@configclass
class DataConfig:
    """Images to load.

    `source` is an address for `open_source`; `crop` and `flip` (with probability one half) are for the
    training stream; `workers` is the number of processes that decode (0: none but this one);
    `max_unreadable` is the share of the source that may be unreadable before it is an error.
    """

    source: str = "emoji"
    split: Split = "train"
    image_size: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    workers: int = 0
    max_unreadable: float = 0.01

    def __post_init__(self):
        if self.image_size < 1:
            raise UserError(f"data.image_size must be at least 1, not {self.image_size}")
        if self.workers < 0:
            raise UserError(f"data.workers must be at least 0, not {self.workers}")
        if not 0 <= self.max_unreadable <= 1:
            raise UserError(f"data.max_unreadable must be a share between 0 and 1, not {self.max_unreadable}")

    def tolerated(self, items: int) -> int:
        """How many of a source's `items` may be unreadable."""
        return min(int(self.max_unreadable * items), items - 1)


class Rows:
    """The methods of a dataclass of tensors that have a row for each sample; one is their `positions`."""

    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str) -> Self:
        """The same on `device`. The positions stay: they address random numbers, for which the host reads them."""
        asynchronous = torch.device(device).type != "cpu"  # towards the CPU, nothing would wait for the copy
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "positions"}  # type: ignore[arg-type]
        moved = {name: tensor.to(device, non_blocking=asynchronous) for name, tensor in rest.items()}
        return replace(self, **moved)  # type: ignore[type-var]

    def split(self, size: int) -> list[Self]:
        """Parts of at most `size` samples, in order."""
        parts = zip(*(getattr(self, f.name).split(size) for f in fields(self)), strict=True)  # type: ignore[arg-type]
        return [type(self)(*part) for part in parts]


@dataclass(frozen=True)
class Batch(Rows):
    """images uint8 (B, 3, S, S); labels int64 (B,), -1 without a label; positions int64 (B,).

    A position counts images in the training stream; in one pass it is the item's index in the source.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor

    def pixels(self) -> Tensor:
        """Images as float32 (B, 3, S, S) in [0, 1]."""
        return self.images.float() / 255


class Loader:
    """Batches from one source. `unreadable` maps the name of each image that failed so far to the reason."""

    def __init__(self, config: DataConfig, seed: int):
        self.config, self.seed = config, seed
        self.source = open_source(config.source, config.split)
        self.unreadable: dict[str, str] = {}
        self._tolerated = config.tolerated(len(self))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def stream(self, start: int, batch_size: int, world: World) -> Iterator[Batch]:
        """Yield this rank's contiguous share of each batch, endlessly, after the first `start` images.

        Each epoch is a permutation of the source, and each position has its own random crop and flip, so the
        samples do not depend on `batch_size` (that of all ranks together), the world or the workers. In place
        of an unreadable image comes the next readable one of the source.

        Raises UserError if the ranks cannot share a batch equally, or too many images are unreadable.
        """
        reader = _Reader(self.source, self.config, self.seed, attempts=self._tolerated + 1)
        return self._batches(reader, stream_shares(start, batch_size, world), world)

    def once(self, batch_size: int, world: World) -> Iterator[Batch]:
        """Yield batches of one pass over the source, in its order, centre-cropped: ranks take them in turn.

        Every readable image comes exactly once over all ranks; the last batch is short. `batch_size` is that of one
        rank. Raises UserError if it is not positive, or too many images are unreadable.
        """
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} must be at least 1")
        firsts = range(world.rank * batch_size, len(self), world.size * batch_size)
        batches = self.read((range(first, min(first + batch_size, len(self))) for first in firsts), world)
        return (batch for batch in batches if len(batch))

    def read(self, parts: Iterable[range], world: World) -> Iterator[Batch]:
        """Yield the readable ones of each of `parts`, which are items of the source, centre-cropped.

        Raises UserError if too many images are unreadable.
        """
        return self._batches(_Reader(self.source, self.config, seed=None, attempts=1), parts, world)

    def _batches(self, reader: "_Reader", parts: Iterable[range], world: World) -> Iterator[Batch]:
        for images, labels, read, unreadable in load_parts(reader, parts, self.config.workers, world):
            self._report(unreadable)
            yield Batch(images, labels, read)

    def _report(self, unreadable: dict[str, str]) -> None:
        for name, reason in unreadable.items():
            if name not in self.unreadable:
                _log.warning("unreadable image %s: %s", name, reason)
        self.unreadable |= unreadable
        if len(self.unreadable) > self._tolerated:
            names = ", ".join(list(self.unreadable)[:5])
            share = f"{len(self.unreadable)} of {len(self)} images"
            raise UserError(
                f"data source {self.source.name!r}: {share} are unreadable, more than the "
                f"max_unreadable={self.config.max_unreadable:g} of them; repair or remove {names}"
            )


def load_parts(reader: Dataset[_T], parts: Iterable[range], workers: int, world: World) -> Iterator[_T]:
    """Yield `reader[part]` for each of `parts`, read ahead by so many `workers` (0: none but this process)."""
    loaded = DataLoader(
        reader,
        batch_size=None,  # `parts` are whole batches
        sampler=parts,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    yield from loaded


def stream_shares(start: int, batch_size: int, world: World) -> Iterator[range]:
    """This rank's contiguous share of the positions of each batch of the training stream, endlessly."""
    share = _share(batch_size, world)
    return (range(first, first + share) for first in count(start + world.rank * share, batch_size))


def item_at(seed: int, position: int, items: int) -> int:
    """The item of a source at `position` of the training stream, of which each epoch is a permutation."""
    return int(_order(seed, position // items, items)[position % items])


def augmentation(config: DataConfig, seed: int, position: int) -> tuple[bool, np.random.Generator]:
    """Whether the image at `position` of the training stream is flipped, and the generator of its crop."""
    generator = numpy_generator(seed, "augment", position)
    return config.flip and generator.random() < 0.5, generator


def _share(batch_size: int, world: World) -> int:
    if batch_size < 1 or batch_size % world.size:
        raise UserError(f"batch size {batch_size} cannot be shared equally by {world.size} processes")
    return batch_size // world.size


def _ignore_signals(_: int) -> None:
    """Leave it to the main process to end its workers: asked to stop, it may need another batch first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


_Read = tuple[Tensor, Tensor, Tensor, dict[str, str]]


class _Reader(Dataset[_Read]):
    """Reads a batch, in whatever process: positions -> images, labels, positions, and what was unreadable.

    With a seed it reads the training stream, where `attempts` images are tried for one position; without, the
    items themselves.
    """

    def __init__(self, source: Source, config: DataConfig, seed: int | None, attempts: int):
        self.source, self.config, self.seed, self.attempts = source, config, seed, attempts

    def __getitem__(self, positions: range) -> _Read:
        size = self.config.image_size
        images, labels, read = np.empty((len(positions), size, size, 3), np.uint8), [], []
        unreadable: dict[str, str] = {}
        for position in positions:
            item = self._item(position, unreadable)
            if item is not None:
                image, label = item
                images[len(read)] = np.asarray(self._square(image, position))
                labels.append(label)
                read.append(position)
        pixels = torch.from_numpy(images[: len(read)]).permute(0, 3, 1, 2).contiguous()
        numbers = torch.tensor(labels, dtype=torch.int64), torch.tensor(read, dtype=torch.int64)
        return pixels, *numbers, unreadable

    def _item(self, position: int, unreadable: dict[str, str]) -> tuple[Image.Image, int] | None:
        items = len(self.source)
        first = position if self.seed is None else item_at(self.seed, position, items)
        for index in range(first, first + self.attempts):
            try:
                return self.source[index % items]
            except UnreadableImage as error:
                unreadable[error.path] = error.reason
        return None

    def _square(self, image: Image.Image, position: int) -> Image.Image:
        config = self.config
        if self.seed is None or (config.crop == "center" and not config.flip):
            return center_crop(image, config.image_size)
        mirrored, generator = augmentation(config, self.seed, position)
        if config.crop == "random":
            image = random_crop(image, config.image_size, generator)
        else:
            image = center_crop(image, config.image_size)
        return flip(image) if mirrored else image


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, items: int) -> np.ndarray:
    return numpy_generator(seed, "order", epoch).permutation(items)
