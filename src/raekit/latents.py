"""Latents on disk: whitened, in shards of safetensors that say what they are of."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raekit import __version__
from raekit.config import configclass, from_dict, to_dict
from raekit.data.images import find_images
from raekit.data.transforms import Fit
from raekit.errors import UserError
from raekit.files import whole
from raekit.inference import read_image
from raekit.models.autoencoder import Autoencoder
from raekit.pictures import from_pil
from raekit.progress import Report, silent
from raekit.weights import fingerprint, read_weights

_KEY = "raekit"  # of the metadata


@configclass
class LatentsInfo:
    """What a shard is of.

    `images` names them in order. `model` is the autoencoder as it was named, `weights` and `statistics` the
    fingerprints of its state and of its whitening, `image_size` and `fit` how the images became squares.
    `inputs` tells whether the same call would write the same again; `shard` counts from 0.
    """

    version: str
    model: str
    weights: str
    statistics: str
    image_size: int
    fit: Fit
    inputs: str
    shard: int
    shards: int
    images: tuple[str, ...]


@dataclass(frozen=True)
class Latents:
    """Whitened latents (N, C, h, w) of `info.images`."""

    latents: Tensor
    info: LatentsInfo


def statistics_fingerprint(autoencoder: Autoencoder) -> str:
    """What `LatentsInfo.statistics` is for this autoencoder: latents of another are not for its decoder."""
    return fingerprint({"mean": autoencoder.mean, "var": autoencoder.var})


def encode_files(
    autoencoder: Autoencoder,
    model: str,
    paths: Sequence[Path],
    out: Path,
    *,
    fit: Fit = "crop",
    batch_size: int = 32,
    shard_size: int = 512,
    progress: Report = silent,
) -> tuple[int, list[str]]:
    """Write the whitened latents of the images that `paths` mean (`find_images`), at the autoencoder's image size.

    `out` is a .safetensors file, or a folder for shards of `shard_size` images, which is what the memory must
    hold; shards that are there and would become the same are left alone. Returns the number of images encoded,
    and the messages of those that could not be read. UserError if there are too many for one file, or the folder
    holds other shards.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise UserError(f"{name}: {value} must be at least 1")
    images = list(find_images(paths))
    single = out.suffix.lower() == ".safetensors"
    if single and len(images) > shard_size:
        raise UserError(
            f"{out}: {len(images)} images are more than shard_size = {shard_size}; give a folder for shards"
        )
    parts = [images[first : first + shard_size] for first in range(0, len(images), shard_size)]
    places = [out] if single else [out / f"latents-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if not single and (others := set(out.glob("latents-*.safetensors")) - set(places)):
        raise UserError(f"{out}: holds shards of other latents ({min(others).name}); give another folder")
    weights = fingerprint(autoencoder.state_dict(), to_dict(autoencoder.config))
    statistics = statistics_fingerprint(autoencoder)
    unreadable: list[str] = []
    done = encoded = 0
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        inputs = _digest(part, weights, fit)
        names = tuple(map(str, part))
        if place.is_file() and (there := _info(place)).inputs == inputs and there.images == names:
            encoded += len(part)
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
                weights=weights,
                statistics=statistics,
                image_size=autoencoder.image_size,
                fit=fit,
                inputs=inputs,
                shard=number,
                shards=len(parts),
                images=tuple(map(str, read)),
            )
            whole_shard = torch.cat(latents) if latents else torch.empty(0, *autoencoder.latent_shape)
            with whole(place) as partial:
                save_file({"latents": whole_shard}, partial, {_KEY: json.dumps(to_dict(info))})
            encoded += len(read)
        done += len(part)
        progress("encode", done, len(images))
    return encoded, unreadable


def read_latents(path: Path | str) -> Iterator[Latents]:
    """Yield the shards that `raekit encode` wrote to the file or folder `path`, in order, one in memory at a time.

    UserError if there are none, one is damaged, or they are not those of one encoding.
    """
    path = Path(path)
    shards = sorted(path.glob("latents-*.safetensors")) if path.is_dir() else [path]
    infos = [_info(shard) for shard in shards]
    if [(info.shard, info.shards) for info in infos] != [(i, len(shards)) for i in range(len(shards))] or not shards:
        wanted = infos[0].shards if infos else 1
        raise UserError(f"{path}: holds {len(shards)} of {wanted} shards of latents; encode into an empty folder again")
    if len({(info.weights, info.image_size, info.fit) for info in infos}) > 1:
        raise UserError(f"{path}: holds latents of different models or sizes; encode into an empty folder again")
    for shard, info in zip(shards, infos, strict=True):
        latents = read_weights(shard).get("latents")
        if latents is None or latents.ndim != 4 or len(latents) != len(info.images):
            raise UserError(
                f"{shard}: needs `latents` (N, C, h, w) of its {len(info.images)} images; encode them again"
            )
        yield Latents(latents, info)


def _info(path: Path) -> LatentsInfo:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        values = json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or no file of latents ({error}); encode the images again") from None
    if values is None:
        raise UserError(f"{path}: was not written by `raekit encode`; its metadata has no {_KEY!r}")
    return from_dict(LatentsInfo, values, path)


def _digest(images: Sequence[Path], *settings: object) -> str:
    """Of the files' contents as their sizes and times tell, and the settings."""
    digest = blake2b(repr(settings).encode(), digest_size=8)
    for image in images:
        status = image.stat() if image.is_file() else None
        digest.update(os.fsencode(image.resolve()) + repr(status and (status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
