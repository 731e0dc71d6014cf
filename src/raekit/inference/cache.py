"""Caching the latents of a data source on disk, so that stage 2 trains without the encoder."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raekit import __version__
from raekit.config import configclass, differences, to_dict
from raekit.data.loader import Batch, DataConfig, Loader, Resize
from raekit.data.sources import absolute, listing
from raekit.data.sources.base import Split
from raekit.distributed import World
from raekit.errors import UserError, whole_number
from raekit.files import check_space, sweep
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
    """The description of a shard with the latents of a data source.

    Attributes:
        source: the address of the data source, with an absolute path.
        split: the split of the data source.
        items: the number of images in the split.
        classes: the class names of the data source.
        names: digest of the names of the files (`listing`); None if the source has no files here.
        sizes: digest of the sizes of the files.
        resize: how the images were scaled, as in `DataConfig`.
        flipped: whether the shard also holds the latents of each mirrored image.
        precision: the precision in which the encoder computed the latents.
        dtype: the format in which the latents are stored.
        images: the number of images in this shard. Unreadable images are left out.
        error: the root mean square of the difference between the stored and the computed latents.
        rms: the root mean square of the computed latents.
    """

    kind: Literal["source"] = "source"
    source: str
    split: Split
    items: int
    classes: tuple[str, ...]
    names: str | None
    sizes: str | None
    resize: Resize
    flipped: bool
    precision: Literal["fp32", "bf16"]
    dtype: Storage
    images: int
    error: float
    rms: float


def pack(latents: Tensor, dtype: Storage) -> tuple[Tensor, Tensor]:
    """Convert latents to the format in which they are stored.

    Args:
        latents: the latents (B, C, h, w), float32.
        dtype: the format to convert to.

    Returns:
        The converted latents (B, C, h, w), and the scale by which `unpack` multiplies them: (B, 1, h, w) for int8,
        with one value for each token, or ones of shape (B, 1, 1, 1) for the other formats.
    """
    if dtype != "int8":
        return latents.to(DTYPES[dtype]), latents.new_ones(len(latents), 1, 1, 1)
    scale = latents.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (latents / scale).round().to(torch.int8), scale


def unpack(stored: Tensor, scale: Tensor) -> Tensor:
    """Return stored latents as float32, the inverse of `pack` up to rounding."""
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
    """Write the whitened latents of a data source as shards.

    All processes must call this function. They divide the shards among them, and each process holds one shard in
    memory. Existing shards are kept. The contents of a shard do not depend on the number of processes or on
    interruptions.

    Args:
        autoencoder: the autoencoder whose encoder and latent statistics to use.
        model: the name or the folder of the autoencoder, recorded in the shards.
        data: the data source. With `data.flip`, the latents of each mirrored image are written too.
        out: the folder for the shards.
        dtype: the format in which to store the latents.
        batch_size: the number of images to encode at once.
        shard_size: the number of images in a shard.
        verify: whether to read existing shards and to write those with wrong checksums again.
        world: this process and its device.
        progress: receives the progress.

    Returns:
        The descriptions of all shards, in order.

    Raises:
        UserError: if the folder holds other latents, or the latents are not finite.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        whole_number(name, value, 1)
    check_crop(data)
    loader = Loader(data, seed=0)
    loader.announce(world)
    names, sizes = listing(data.address) or (None, None)
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
        source=absolute(data.address),
        split=data.split,
        items=len(loader),
        classes=loader.classes,
        names=names,
        sizes=sizes,
        resize=data.resize,
        flipped=data.flip,
        precision="bf16" if autoencoder.encoder_dtype == torch.bfloat16 else "fp32",
        dtype=dtype,
        images=0,
        error=0.0,
        rms=0.0,
    )
    looked = [k for k in range(world.rank, len(parts), world.size) if not _is_there(places[k], about, verify)]
    if world.is_main:
        sweep(out)
    missing = sorted(k for found in world.gather(looked) for k in found)
    each = sum(t.nbytes for t in pack(torch.zeros(1, *autoencoder.latent_shape, device="cpu"), dtype)) * (1 + data.flip)
    check_space(out, each * sum(len(parts[k]) for k in missing), "give another folder or a smaller dtype")
    mine = missing[world.rank :: world.size]
    chunks = (chunk for k in mine for chunk in _chunks(parts[k], batch_size))
    batches = loader.read(chunks, world, data.resize)  # the pixels of the training stream
    done = len(loader) - sum(len(parts[k]) for k in missing)
    for k in mine:
        rows: list[tuple[dict[str, Tensor], float, float]] = []
        for chunk in _chunks(parts[k], batch_size):
            rows.append(_encode(autoencoder, next(batches).to(world.device), dtype, data.flip))
            done = min(done + len(chunk) * world.size, len(loader))
            progress("encode", done, len(loader))
        parts_of, errors, squares = zip(*rows, strict=True)
        tensors = {name: torch.cat([part[name] for part in parts_of]) for name in parts_of[0]}
        numbers = tensors["latents"].numel() or 1
        error, rms = (math.sqrt(sum(each) / numbers) for each in (errors, squares))
        if not math.isfinite(rms):
            raise UserError(f"{data.source}: some of its latents are not finite; encode with --precision fp32")
        info = replace(about, shard=k, images=len(tensors["labels"]), error=error, rms=rms)
        write_shard(places[k], info, tensors)
    world.barrier()
    return list(read_infos(out, CacheInfo).values())


def relative_error(infos: Sequence[CacheInfo]) -> float:
    """Return the norm of the storage error over all shards, divided by the norm of the latents."""
    error = sum(info.images * info.error**2 for info in infos)
    squares = sum(info.images * info.rms**2 for info in infos)
    return math.sqrt(error / squares) if squares else 0.0


def check_crop(data: DataConfig) -> None:
    """Raise UserError unless the images are centre-cropped."""
    if data.crop != "center":
        raise UserError(
            f"data.crop: {data.crop} does not work with cached latents, which come from centre-cropped images; set it "
            "to center"
        )


def _chunks(part: range, size: int) -> Iterator[range]:
    return (part[first : first + size] for first in range(0, len(part), size))


def settings_of(info: CacheInfo) -> CacheInfo:
    """Return `info` with all fields reset that may differ between the shards of one cache."""
    return replace(info, version="", model="", shard=0, images=0, error=0.0, rms=0.0)


def _is_there(place: Path, about: CacheInfo, verify: bool) -> bool:
    """Return whether the shard exists and, with `verify`, is sound; UserError if it holds other latents."""
    if not place.is_file():
        return False
    there = read_info(place, CacheInfo)
    if changed := list(differences(to_dict(settings_of(there)), to_dict(settings_of(about)))):
        raise UserError(f"{place.parent}: holds other latents:\n  " + "\n  ".join(changed) + "\nGive another folder")
    return not verify or _is_sound(map_shard(place))


def map_shard(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a shard as memory maps, which are read from disk only on access."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and make the cache again") from None


def _is_sound(shard: dict[str, Tensor]) -> bool:
    """Return whether all checksums of a shard are right."""
    rows = zip(shard["latents"].flatten(0, 1), shard["scale"].flatten(0, 1), strict=True)
    return [checksum(*row) for row in rows] == shard["checksums"].flatten().tolist()


def checksum(*tensors: Tensor) -> int:
    """Return a 64-bit checksum of the bytes of tensors.

    The bytes of a tensor are summed as 64-bit integers if their number is divisible by 8, and one by one if not. The
    sum of 64-bit integers is as fast as reading the memory.
    """
    total = 0
    for tensor in tensors:
        octets = tensor.reshape(-1).view(torch.uint8)
        total += int(octets.view(torch.int64 if len(octets) % 8 == 0 else torch.uint8).sum(dtype=torch.int64))
    return (total + 2**63) % 2**64 - 2**63


@torch.no_grad()
def _encode(
    autoencoder: LatentSpace, batch: Batch, dtype: Storage, flip: bool
) -> tuple[dict[str, Tensor], float, float]:
    """Return the tensors to store, and the sums of squares of the storage error and of the latents."""
    pixels = batch.pixels()
    views = [pixels, pixels.flip(-1)] if flip else [pixels]
    if len(batch):
        exact = torch.stack([autoencoder.encode(view) for view in views], 1).flatten(0, 1)
    else:  # no image of the batch was readable
        exact = torch.empty(0, *autoencoder.latent_shape, device=pixels.device)
    stored, scale = pack(exact, dtype)
    error, squares = _squares(unpack(stored, scale) - exact), _squares(exact)
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
    return tensors, error, squares


def _squares(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
