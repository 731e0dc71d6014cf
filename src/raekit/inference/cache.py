"""A data source's latents on disk: writing the cache that stage 2 trains from."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raekit import __version__
from raekit.config import configclass, differences, to_dict
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.data.sources.base import Split
from raekit.distributed import World
from raekit.errors import UserError
from raekit.inference.shards import (
    ShardInfo,
    encoder_fingerprint,
    read_info,
    read_infos,
    shard_paths,
    statistics_fingerprint,
    write_shard,
)
from raekit.models.latent_space import LatentSpace
from raekit.progress import Progress, silent

Storage = Literal["fp32", "bf16", "int8"]
DTYPES: dict[Storage, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@configclass
class CacheInfo(ShardInfo):
    """What a shard of a data source's latents is of: its `images`, among the `items` of the `split` of a `source`.

    With `flipped` each image is there mirrored as well. `precision` is what the encoder computed in. `error` is the
    root mean square of what storing as `dtype` did to the latents, whose own is `rms`.
    """

    kind: Literal["source"] = "source"
    source: str
    split: Split
    items: int
    classes: tuple[str, ...]
    flipped: bool
    precision: Literal["fp32", "bf16"]
    dtype: Storage
    images: int
    error: float
    rms: float


def pack(latents: Tensor, dtype: Storage) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) as `dtype`, and the scale to multiply them by: (B, 1, h, w), a token's, for int8; else 1."""
    if dtype != "int8":
        return latents.to(DTYPES[dtype]), latents.new_ones(len(latents), 1, 1, 1)
    scale = latents.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (latents / scale).round().to(torch.int8), scale


def unpack(stored: Tensor, scale: Tensor) -> Tensor:
    """The latents that `pack` took, as nearly as they are stored, float32."""
    return stored.float() * scale


def cache_latents(
    autoencoder: LatentSpace,
    model: str,
    data: DataConfig,
    out: Path,
    *,
    dtype: Storage = "bf16",
    batch_size: int = 64,
    shard_size: int = 512,
    verify: bool = False,
    world: World,
    progress: Progress = silent,
) -> list[CacheInfo]:
    """Write the whitened latents of the source of `data`, in both orientations if it flips, as shards in `out`.

    Called by all processes, which share the shards; each holds one in memory. Those that are there are kept; with
    `verify` only if their checksums are right. A shard is the same for any number of processes or interruptions.
    Returns what the shards say of themselves. UserError if the folder holds other latents.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise UserError(f"{name}: {value} must be at least 1")
    check_crop(data)
    loader = Loader(data, seed=0)
    parts = list(_chunks(range(len(loader)), shard_size))
    places = shard_paths(out, len(parts))
    about = CacheInfo(
        version=__version__,
        model=model,
        encoder=encoder_fingerprint(autoencoder),
        statistics=statistics_fingerprint(autoencoder),
        image_size=data.image_size,
        shard=0,
        shards=len(parts),
        source=data.source,
        split=data.split,
        items=len(loader),
        classes=loader.classes,
        flipped=data.flip,
        precision="bf16" if autoencoder.encoder_dtype == torch.bfloat16 else "fp32",
        dtype=dtype,
        images=0,
        error=0.0,
        rms=0.0,
    )
    looked = [k for k in range(world.rank, len(parts), world.size) if not _is_there(places[k], about, verify)]
    missing = sorted(k for found in world.gather(looked) for k in found)
    mine = missing[world.rank :: world.size]
    batches = loader.read((chunk for k in mine for chunk in _chunks(parts[k], batch_size)), world)
    done = len(loader) - sum(len(parts[k]) for k in missing)
    for k in mine:
        rows: list[_Encoded] = []
        for chunk in _chunks(parts[k], batch_size):
            rows.append(_encode(autoencoder, next(batches).to(world.device), dtype, data.flip))
            done = min(done + len(chunk) * world.size, len(loader))
            progress("encode", done, len(loader))
        tensors = {name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors}
        numbers = tensors["latents"].numel() or 1
        error, rms = (math.sqrt(sum(r.squares[i] for r in rows) / numbers) for i in range(2))
        if not math.isfinite(rms):
            raise UserError(f"{data.source}: not all of its latents are finite; encode with --precision fp32")
        info = replace(about, shard=k, images=len(tensors["labels"]), error=error, rms=rms)
        write_shard(places[k], info, tensors)
    world.barrier()
    return list(read_infos(out, CacheInfo).values())


def relative_error(infos: Sequence[CacheInfo]) -> float:
    """The norm of what storing did to all latents, as a share of theirs."""
    error = sum(info.images * info.error**2 for info in infos)
    squares = sum(info.images * info.rms**2 for info in infos)
    return math.sqrt(error / squares) if squares else 0.0


def check_crop(data: DataConfig) -> None:
    if data.crop != "center":
        raise UserError(f"data.crop: {data.crop}, but cached latents are those of centre-cropped images")


def _chunks(part: range, size: int) -> Iterator[range]:
    return (part[first : first + size] for first in range(0, len(part), size))


def settings_of(info: CacheInfo) -> CacheInfo:
    """What the shards of one cache have in common, and two calls that make the same."""
    return replace(info, version="", model="", shard=0, images=0, error=0.0, rms=0.0)


def _is_there(place: Path, about: CacheInfo, verify: bool) -> bool:
    """Whether the shard need not be made; UserError if it is one of other latents."""
    if not place.is_file():
        return False
    there = read_info(place, CacheInfo)
    if changed := list(differences(to_dict(settings_of(there)), to_dict(settings_of(about)))):
        raise UserError(f"{place.parent}: holds other latents:\n  " + "\n  ".join(changed) + "\nGive another folder")
    return not verify or _is_sound(map_shard(place))


def map_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard, mapped: what is not touched is not read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and make the cache again") from None


def _is_sound(shard: dict[str, Tensor]) -> bool:
    rows = zip(shard["latents"].flatten(0, 1), shard["scale"].flatten(0, 1), strict=True)
    return [checksum(*row) for row in rows] == shard["checksums"].flatten().tolist()


def checksum(*tensors: Tensor) -> int:
    """The sum of the bytes, taken as integers of 64 bits where they divide into such: as fast as memory is read."""
    total = 0
    for tensor in tensors:
        octets = tensor.reshape(-1).view(torch.uint8)
        total += int(octets.view(torch.int64 if len(octets) % 8 == 0 else torch.uint8).sum(dtype=torch.int64))
    return (total + 2**63) % 2**64 - 2**63


@dataclass(frozen=True)
class _Encoded:
    """The tensors of some of a shard's images, and the sums of squares of the error in their latents, and of these."""

    tensors: dict[str, Tensor]
    squares: tuple[float, float]


@torch.no_grad()
def _encode(autoencoder: LatentSpace, batch: Batch, dtype: Storage, flip: bool) -> _Encoded:
    pixels = batch.pixels()
    views = [pixels, pixels.flip(-1)] if flip else [pixels]
    if len(batch):
        exact = torch.stack([autoencoder.encode(view) for view in views], 1).flatten(0, 1)
    else:  # none of them was readable
        exact = torch.empty(0, *autoencoder.latent_shape, device=pixels.device)
    stored, scale = pack(exact, dtype)
    squares = _squares(unpack(stored, scale) - exact), _squares(exact)
    stored, scale = stored.cpu().contiguous(), scale.cpu()
    shape = len(batch), len(views)
    checksums = [checksum(*row) for row in zip(stored, scale, strict=True)]
    tensors = {
        "latents": stored.unflatten(0, shape),
        "scale": scale.unflatten(0, shape),
        "checksums": torch.tensor(checksums, dtype=torch.int64).view(shape),
        "labels": batch.labels.cpu(),
        "positions": batch.positions,
    }
    return _Encoded(tensors, squares)


def _squares(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
