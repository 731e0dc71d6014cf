"""Batches of cached latents, for training without the encoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from raekit.data.loader import DataConfig, Rows, augmentation, item_at, load_parts, stream_shares
from raekit.distributed import World
from raekit.errors import UserError
from raekit.inference.cache import DTYPES, CacheInfo, check_crop, checksum, map_shard, settings_of, unpack
from raekit.inference.shards import encoder_fingerprint, read_infos, statistics_fingerprint
from raekit.models.latent_space import LatentSpace


@dataclass(frozen=True)
class LatentBatch(Rows):
    """Latents as they are stored (B, C, h, w) and what to multiply them by, `scale`; the rest as in a `Batch`."""

    stored: Tensor
    scale: Tensor
    labels: Tensor
    positions: Tensor

    @property
    def latents(self) -> Tensor:
        """Whitened latents (B, C, h, w), float32."""
        return unpack(self.stored, self.scale)


class LatentLoader:
    """Batches of the latents that `cache_latents` wrote to `folder`: those that a `Loader` of `config` would give.

    The images need not be there. Raises UserError if the folder holds no whole cache of `config`'s source and split
    at its image size, and flipped if it flips; or one of another encoder or other statistics than `autoencoder`'s.
    """

    def __init__(self, folder: Path, config: DataConfig, seed: int, autoencoder: LatentSpace) -> None:
        infos = read_infos(folder, CacheInfo)
        self.config, self.info = config, next(iter(infos.values()))
        _check_fit(self.info, folder, config, autoencoder)
        for path, info in infos.items():
            if settings_of(info) != settings_of(self.info):
                raise UserError(f"{path}: is of another cache than the shards beside it; make the cache again")
        self.reader = _Reader(infos, config, seed, autoencoder.latent_shape)
        absent = len(self) - len(self.reader.present)
        if absent > config.tolerated(len(self)):
            raise UserError(
                f"{folder}: {absent} of {len(self)} images were unreadable, more than the "
                f"data.max_unreadable={config.max_unreadable:g} of them; repair them and make the cache again"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    def __len__(self) -> int:
        return self.info.items

    def stream(self, start: int, batch_size: int, world: World) -> Iterator[LatentBatch]:
        """As `Loader.stream`: the same positions, labels and flips. UserError if what is read is damaged."""
        parts = stream_shares(start, batch_size, world)
        return (LatentBatch(*read) for read in load_parts(self.reader, parts, self.config.workers, world))


def _check_fit(info: CacheInfo, folder: Path, config: DataConfig, autoencoder: LatentSpace) -> None:
    check_crop(config)
    for what, cached, wanted in (
        ("encoder", info.encoder, encoder_fingerprint(autoencoder)),
        ("latent statistics", info.statistics, statistics_fingerprint(autoencoder)),
    ):
        if cached != wanted:
            raise UserError(
                f"{folder}: its latents are of another {what}: made with {info.model} ({cached}), "
                f"but this autoencoder's is {wanted}; cache this one's in another folder"
            )
    for field in ("source", "split", "image_size"):
        cached, wanted = getattr(info, field), getattr(config, field)
        if cached != wanted:
            raise UserError(f"{folder}: its latents are of data.{field} {cached}, not of {wanted}")
    if config.flip and not info.flipped:
        raise UserError(f"{folder}: holds no flipped latents, which data.flip needs; cache them with --flip")


_Read = tuple[Tensor, Tensor, Tensor, Tensor]


class _Reader(Dataset[_Read]):
    """Reads a batch, in whatever process: positions -> the fields of a `LatentBatch`.

    `present` are the items that the cache has, ascending, as many as it has rows.
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
                f"{self.paths[0].parent}: the positions of its shards are in disorder; make the cache again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shards": {}}  # a worker that is not forked maps them itself

    def __getitem__(self, positions: range) -> _Read:
        stored, scale, numbers = zip(*map(self._row, positions), strict=True)
        return torch.stack(stored), torch.stack(scale), self.labels[list(numbers)], torch.tensor(positions)

    def _row(self, position: int) -> tuple[Tensor, Tensor, int]:
        """What is stored and its scale, in the mapped file, and the number of the row."""
        item = item_at(self.seed, position, self.items)
        number = int(np.searchsorted(self.present, item)) % len(self.present)  # for a missing item, that of the next
        k = int(np.searchsorted(self.ends, number, side="right"))
        path, first = self.paths[k], int(self.ends[k - 1]) if k else 0
        if path not in self.shards:
            self.shards[path] = map_shard(path)
        place = number - first, int(augmentation(self.config, self.seed, position)[0])
        stored, scale, recorded = (self.shards[path][name][place] for name in ("latents", "scale", "checksums"))
        if checksum(stored, scale) != int(recorded):
            raise UserError(f"{path}: damaged; the same `raekit latents cache` again, with --verify, repairs it")
        return stored, scale, number


def _check_shard(path: Path, info: CacheInfo, shard: dict[str, Tensor], latent_shape: tuple[int, int, int]) -> None:
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
            raise UserError(f"{path}: needs `{name}` {value}, holds {found.get(name)}; make the cache again")
    labels = shard["labels"]
    if len(labels) and not -1 <= labels.min() <= labels.max() < max(len(info.classes), 1):
        raise UserError(f"{path}: its labels are not those of {len(info.classes)} classes; make the cache again")
