"""Whitened latents of image files: writing them to disk and reading them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from raekit import __version__
from raekit.config import configclass
from raekit.data.images import find_images, read_image, real_path
from raekit.data.transforms import Fit
from raekit.errors import UserError, whole_number
from raekit.files import as_path, check_file, sweep
from raekit.inference.shards import (
    REMEDIES,
    ShardInfo,
    encoder_fingerprint,
    read_info,
    read_infos,
    shard_paths,
    statistics_fingerprint,
    write_shard,
)
from raekit.models.latent_space import LatentSpace
from raekit.pictures import from_pil
from raekit.progress import Progress, silent
from raekit.weights import read_weights


@configclass
class LatentsInfo(ShardInfo):
    """The description of a shard with the latents of image files.

    Attributes:
        fit: how the images were made square.
        inputs: a digest of the image files and the settings. A shard with the same digest need not be written again.
        images: the absolute paths of the images, in the order of their latents.
    """

    kind: Literal["images"] = "images"
    fit: Fit
    inputs: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class Latents:
    """The latents of one shard.

    Attributes:
        latents: the whitened latents (N, C, h, w) of `info.images`.
        info: the description of the shard.
    """

    latents: Tensor
    info: LatentsInfo


def encode_files(
    autoencoder: LatentSpace,
    model: str,
    paths: Sequence[Path],
    out: Path,
    *,
    fit: Fit = "crop",
    batch_size: int = 32,
    shard_size: int = 512,
    progress: Progress = silent,
) -> tuple[int, list[str]]:
    """Write the whitened latents of image files.

    An existing shard is kept if its images and the settings have not changed. Images may be added if the number of
    shards stays the same, but the latents of images that are not given are never replaced.

    Args:
        autoencoder: the autoencoder whose encoder and latent statistics to use.
        model: the name or the folder of the autoencoder, recorded in the shards.
        paths: image files, and folders to search for images (`find_images`).
        out: a .safetensors file, or a folder for shards.
        fit: how to make an image square.
        batch_size: the number of images to encode at once.
        shard_size: the number of images in a shard. One shard is held in memory until it is written.
        progress: receives the progress.

    Returns:
        The number of images in the shards, and an error message for each image that could not be read.

    Raises:
        UserError: if there are too many images for one file, or the folder holds other shards or latents of other
            images.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        whole_number(name, value, 1)
    images = list(find_images(paths))
    single = out.suffix.lower() == ".safetensors"
    if single:
        check_file(out)
    if single and len(images) > shard_size:
        raise UserError(
            f"{out}: {len(images)} images are more than shard_size = {shard_size}; give a folder for shards"
        )
    parts = [images[first : first + shard_size] for first in range(0, len(images), shard_size)]
    places = [out] if single else shard_paths(out, len(parts))
    if not single:
        _check_images(out, places, images)
        sweep(out)
    encoder = encoder_fingerprint(autoencoder)
    statistics = statistics_fingerprint(autoencoder)
    unreadable: list[str] = []
    empty: dict[Path, LatentsInfo] = {}
    done = encoded = 0
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        inputs = _digest(part, encoder, statistics, autoencoder.encoder_dtype, autoencoder.image_size, fit)
        names = tuple(map(os.path.abspath, part))
        if place.is_file() and (there := read_info(place, LatentsInfo)).inputs == inputs and there.images == names:
            encoded += len(part)
            progress("encode", done + len(part), len(images))
        else:
            read: list[Path] = []
            latents: list[Tensor] = []
            for first in range(0, len(part), batch_size):
                pixels: list[Tensor] = []
                for image in part[first : first + batch_size]:
                    try:
                        pixels.append(from_pil(read_image(image, autoencoder.image_size, fit)))
                        read.append(image)
                    except UserError as error:
                        unreadable.append(str(error))
                if pixels:
                    latents.append(
                        autoencoder.encode(torch.stack(pixels).to(autoencoder.var.device)).cpu().contiguous()
                    )
                progress("encode", done + min(first + batch_size, len(part)), len(images))
            info = LatentsInfo(
                version=__version__,
                model=model,
                encoder=encoder,
                statistics=statistics,
                image_size=autoencoder.image_size,
                fit=fit,
                inputs=inputs,
                shard=number,
                shards=len(parts),
                images=tuple(map(os.path.abspath, read)),
            )
            if latents:
                write_shard(place, info, {"latents": torch.cat(latents)})
            else:
                empty[place] = info
            encoded += len(read)
        done += len(part)
    for place, info in empty.items():  # no other shard counts without them
        if encoded:
            write_shard(place, info, {"latents": torch.empty(0, *autoencoder.latent_shape)})
    return encoded, unreadable


def read_latents(path: Path | str) -> Iterator[Latents]:
    """Yield the shards that `raekit encode` wrote to the file or folder `path`, in order.

    Each shard is read only when the iterator reaches it.

    Raises:
        UserError: if there is no shard, a shard is missing or damaged, or the shards come from different models or
            settings.
    """
    infos = read_infos(as_path("path", path), LatentsInfo)
    if len({(info.encoder, info.statistics, info.image_size, info.fit) for info in infos.values()}) > 1:
        raise UserError(f"{path}: holds latents of different models or sizes; {REMEDIES['images']}")
    for shard, info in infos.items():
        latents = read_weights(shard).get("latents")
        if latents is None or latents.ndim != 4 or len(latents) != len(info.images):
            raise UserError(
                f"{shard}: must hold `latents` (N, C, h, w) of its N = {len(info.images)} images; encode them again"
            )
        yield Latents(latents, info)


def _check_images(folder: Path, shards: Sequence[Path], images: Sequence[Path]) -> None:
    """Raise UserError if one of the shards, which would be replaced, holds latents of images that are not given."""
    given = set(map(os.path.abspath, images))
    for shard in filter(Path.is_file, shards):
        if others := [image for image in read_info(shard, LatentsInfo).images if os.path.abspath(image) not in given]:
            raise UserError(f"{folder}: holds latents of other images, such as {others[0]}; give another folder")


def _digest(images: Sequence[Path], *settings: object) -> str:
    """Return a digest of the settings and of the path, size and modification time of each file."""
    digest = blake2b(repr(settings).encode(), digest_size=8)
    for image in images:
        status = image.stat() if image.is_file() else None
        digest.update(os.fsencode(real_path(image)) + repr(status and (status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
