"""Batches of cached latents, for training without the encoder."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from raekit.data.images import log_once
from raekit.data.loader import DataConfig, Rows, augmentation, item_at, stream_shares
from raekit.data.sources import absolute, is_copy
from raekit.data.workers import load_parts
from raekit.distributed import World
from raekit.errors import UserError
from raekit.inference.cache import DTYPES, CacheInfo, check_crop, checksum, map_shard, settings_of, unpack
from raekit.inference.shards import encoder_fingerprint, read_infos, statistics_fingerprint
from raekit.models.latent_space import LatentSpace


@dataclass(frozen=True)
class LatentBatch(Rows):
    """A batch of cached latents.

    Attributes:
        stored: the latents (B, C, h, w) in the format in which the cache stores them.
        scale: the scale by which `unpack` multiplies the stored latents.
        labels: the class id (B,) of each image; -1 for an image without a class.
        positions: the positions (B,) in the stream.
    """

    stored: Tensor
    scale: Tensor
    labels: Tensor
    positions: Tensor

    @property
    def latents(self) -> Tensor:
        """Whitened latents (B, C, h, w), float32."""
        return unpack(self.stored, self.scale)


class LatentLoader:
    """A loader of the latents that `cache_latents` wrote.

    The stream has the same positions, labels and flips as the stream of a `Loader` with the same config and seed. The
    images themselves are not read.

    Args:
        folder: the folder of the cache.
        config: the data source that the cache was made from.
        seed: the seed of the order and the flips.
        autoencoder: the autoencoder that the latents must fit.

    Raises:
        UserError: if the cache is incomplete, or was made with a different encoder, statistics, image size, source,
            split or `resize`, or without the flipped images that `config.flip` needs.
    """

    def __init__(self, folder: Path, config: DataConfig, seed: int, autoencoder: LatentSpace) -> None:
        infos = read_infos(folder, CacheInfo)
        self.config, self.info = config, next(iter(infos.values()))
        _check_fit(self.info, folder, config, autoencoder)
        for path, info in infos.items():
            if settings_of(info) != settings_of(self.info):
                raise UserError(
                    f"{path}: belongs to another cache than the other shards in its folder; make the cache again"
                )
        self.reader = _Reader(infos, config, seed, autoencoder.latent_shape)
        absent = len(self) - len(self.reader.present)
        if absent > config.tolerated(len(self)):
            raise UserError(
                f"{folder}: {absent} of {len(self)} images were unreadable, more than "
                f"data.max_unreadable={config.max_unreadable:g} allows; repair the images and cache them in "
                "another folder"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    def __len__(self) -> int:
        return self.info.items

    def announce(self, world: World) -> None:
        """Log one line about the latents, as `Loader.announce` does about images."""
        if world.is_main:
            log_once(logging.INFO, "%s", f"{self.config.address}: {len(self):,} images from cached latents")

    def stream(self, start: int, batch_size: int, world: World) -> Iterator[LatentBatch]:
        """Yield the batches of this process, starting at position `start`, as `Loader.stream` does.

        Raises:
            UserError: if stored latents are damaged.
        """
        parts = stream_shares(start, batch_size, world)
        return (LatentBatch(*read) for read in load_parts(self.reader, parts, self.config.workers, world))


def _check_fit(info: CacheInfo, folder: Path, config: DataConfig, autoencoder: LatentSpace) -> None:
    """Raise UserError unless the cache was made for this config and this autoencoder."""
    check_crop(config)
    for what, cached, wanted in (
        ("a different encoder", info.encoder, encoder_fingerprint(autoencoder)),
        ("different latent statistics", info.statistics, statistics_fingerprint(autoencoder)),
    ):
        if cached != wanted:
            raise UserError(
                f"{folder}: its latents were made with {what}: {info.model} has {cached}, but this "
                f"autoencoder has {wanted}; cache the latents of this autoencoder in another folder"
            )
    source = absolute(config.address)
    if source != info.source and is_copy(info.source, (info.names, info.sizes), source):
        source = info.source
    for field, wanted in (
        ("source", source),
        ("split", config.split),
        ("image_size", config.image_size),
        ("resize", config.resize),
    ):
        cached = getattr(info, field)
        if cached != wanted:
            raise UserError(
                f"{folder}: its latents were made with data.{field} {cached}, but the config has {wanted}; make "
                "another cache or change the config"
            )
    if config.flip and not info.flipped:
        raise UserError(f"{folder}: holds no flipped latents, which data.flip needs; cache them with --flip")


_Read = tuple[Tensor, Tensor, Tensor, Tensor]


class _Reader(Dataset[_Read]):
    """A dataset that maps the positions of a batch to the fields of a `LatentBatch`, also in worker processes.

    Attributes:
        present: for each row of the cache, the number of its image in the data source, in ascending order.
    """

    def __init__(
        self, infos: dict[Path, CacheInfo], config: DataConfig, seed: int, latent_shape: tuple[int, int, int]
    ) -> None:
        self.config, self.seed, self.paths = config, seed, list(infos)
        self.shards = {path: map_shard(path) for path in infos}
        for path, info in infos.items():
            _check_shard(path, info, self.shards[path], latent_shape)
        self.items = next(iter(infos.values())).items
        self.present = torch.cat([shard["positions"] for shard in self.shards.values()]).numpy()
        self.labels = torch.cat([shard["labels"] for shard in self.shards.values()])
        self.ends = np.cumsum([info.images for info in infos.values()])
        if not len(self.present) or (np.diff(self.present) <= 0).any() or self.present[-1] >= self.items:
            raise UserError(
                f"{self.paths[0].parent}: the positions of its shards are out of order; make the cache again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shards": {}}  # a worker process that is not forked maps the files itself

    def __getitem__(self, positions: range) -> _Read:
        stored, scale, numbers = zip(*map(self._row, positions), strict=True)
        return torch.stack(stored), torch.stack(scale), self.labels[list(numbers)], torch.tensor(positions)

    def _row(self, position: int) -> tuple[Tensor, Tensor, int]:
        """Return the stored latents, their scale and the row number for a position in the stream."""
        item = item_at(self.seed, position, self.items)
        number = int(np.searchsorted(self.present, item)) % len(self.present)  # a missing item takes the next row
        k = int(np.searchsorted(self.ends, number, side="right"))
        path, first = self.paths[k], int(self.ends[k - 1]) if k else 0
        if path not in self.shards:
            self.shards[path] = map_shard(path)
        place = number - first, int(augmentation(self.config, self.seed, position)[0])
        stored, scale, recorded = (self.shards[path][name][place] for name in ("latents", "scale", "checksums"))
        if checksum(stored, scale) != int(recorded):
            raise UserError(f"{path}: damaged; run `raekit latents cache` again with --verify to repair it")
        return stored, scale, number


def _check_shard(path: Path, info: CacheInfo, shard: dict[str, Tensor], latent_shape: tuple[int, int, int]) -> None:
    """Raise UserError unless the tensors of a shard have the dtypes, shapes and labels that its description says."""
    channels, *grid = latent_shape
    rows = (info.images, 2 if info.flipped else 1)
    wanted = {
        "latents": (DTYPES[info.dtype], (*rows, channels, *grid)),
        "scale": (torch.float32, (*rows, 1, *(grid if info.dtype == "int8" else (1, 1)))),
        "checksums": (torch.int64, rows),
        "labels": (torch.int64, rows[:1]),
        "positions": (torch.int64, rows[:1]),
    }
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in shard.items()}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{path}: `{name}` must have dtype and shape {value}, not {found.get(name)}; make the cache again"
            )
    labels = shard["labels"]
    if len(labels) and not -1 <= labels.min() <= labels.max() < max(len(info.classes), 1):
        raise UserError(f"{path}: its labels do not fit its {len(info.classes)} classes; make the cache again")
