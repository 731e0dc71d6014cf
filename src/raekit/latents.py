"""Latents on disk: whitened, in shards of safetensors that say what they are of."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raekit import __version__
from raekit.config import configclass, from_dict, to_dict
from raekit.data.images import find_images
from raekit.data.transforms import Fit
from raekit.errors import UserError
from raekit.files import check_file, check_folder, whole
from raekit.inference import read_image
from raekit.models.latent_space import LatentSpace
from raekit.pictures import from_pil
from raekit.progress import Report, silent
from raekit.weights import fingerprint, read_weights

_KEY = "raekit"  # of the metadata
_REMEDIES = {
    "images": "encode the images into an empty folder again",
    "source": "the same `raekit latents cache` again completes it",
}
"""What to do about faulty shards, by their kind."""


@configclass
class ShardInfo:
    """What every shard of latents says of itself.

    `model` is the autoencoder as it was named, `encoder` and `statistics` are `encoder_fingerprint` and
    `statistics_fingerprint`; the images were squares of `image_size`. `shard` counts from 0.
    """

    kind: str
    version: str
    model: str
    encoder: str
    statistics: str
    image_size: int
    shard: int
    shards: int


@configclass
class LatentsInfo(ShardInfo):
    """What a shard of images' latents is of.

    `images` names them in order, `fit` is how they became squares. `inputs` tells whether the same call would write
    the same again.
    """

    kind: Literal["images"] = "images"
    fit: Fit
    inputs: str
    images: tuple[str, ...]


Info = TypeVar("Info", bound=ShardInfo)


@dataclass(frozen=True)
class Latents:
    """Whitened latents (N, C, h, w) of `info.images`."""

    latents: Tensor
    info: LatentsInfo


def statistics_fingerprint(autoencoder: LatentSpace) -> str:
    """What `LatentsInfo.statistics` is for this autoencoder: latents of another are not for its decoder."""
    return fingerprint({"mean": autoencoder.mean, "var": autoencoder.var})


def encoder_fingerprint(autoencoder: LatentSpace) -> str:
    """What `ShardInfo.encoder` is: of the weights, the input's size and colours, and the layers.

    The same whether the encoder computes in float32 or in bfloat16.
    """
    state = autoencoder.encoder.state_dict()
    weights = {key: w.bfloat16() if w.is_floating_point() else w for key, w in state.items()}
    return fingerprint(weights, *autoencoder.encoder_facts)


def shard_paths(folder: Path, shards: int) -> list[Path]:
    """Where the shards of latents go; UserError if `folder` holds any that are not among them."""
    places = [folder / f"latents-{i:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    check_folder(folder)
    if others := set(folder.glob("latents-*.safetensors")) - set(places):
        raise UserError(
            f"{folder}: holds shards of other latents, or of another size ({min(others).name}); give the same "
            "shard size again, or another folder"
        )
    return places


def write_shard(path: Path, info: ShardInfo, tensors: dict[str, Tensor]) -> None:
    """Write a shard, whole or not at all."""
    with whole(path) as partial:
        save_file(tensors, partial, {_KEY: json.dumps(to_dict(info))})


def encode_files(
    autoencoder: LatentSpace,
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
    if single:
        check_file(out)
    elif out.suffix.lower() in (".pt", ".pth", ".npz", ".npy", ".bin"):
        raise UserError(f"{out}: must be a .safetensors file, or a folder for shards")
    if single and len(images) > shard_size:
        raise UserError(
            f"{out}: {len(images)} images are more than shard_size = {shard_size}; give a folder for shards"
        )
    parts = [images[first : first + shard_size] for first in range(0, len(images), shard_size)]
    places = [out] if single else shard_paths(out, len(parts))
    encoder = encoder_fingerprint(autoencoder)
    statistics = statistics_fingerprint(autoencoder)
    unreadable: list[str] = []
    done = encoded = 0
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        inputs = _digest(part, encoder, statistics, autoencoder.image_size, fit)
        names = tuple(map(str, part))
        if place.is_file() and (there := read_info(place, LatentsInfo)).inputs == inputs and there.images == names:
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
                encoder=encoder,
                statistics=statistics,
                image_size=autoencoder.image_size,
                fit=fit,
                inputs=inputs,
                shard=number,
                shards=len(parts),
                images=tuple(map(str, read)),
            )
            if not images or len(unreadable) == len(images):
                break  # nothing to write: none of the images could be read
            whole_shard = torch.cat(latents) if latents else torch.empty(0, *autoencoder.latent_shape)
            write_shard(place, info, {"latents": whole_shard})
            encoded += len(read)
        done += len(part)
        progress("encode", done, len(images))
    return encoded, unreadable


def read_latents(path: Path | str) -> Iterator[Latents]:
    """Yield the shards that `raekit encode` wrote to the file or folder `path`, in order, one in memory at a time.

    UserError if there are none, one is damaged, or they are not those of one encoding.
    """
    infos = read_infos(Path(path), LatentsInfo)
    if len({(info.encoder, info.statistics, info.image_size, info.fit) for info in infos.values()}) > 1:
        raise UserError(f"{path}: holds latents of different models or sizes; {_REMEDIES['images']}")
    for shard, info in infos.items():
        latents = read_weights(shard).get("latents")
        if latents is None or latents.ndim != 4 or len(latents) != len(info.images):
            raise UserError(
                f"{shard}: needs `latents` (N, C, h, w) of its {len(info.images)} images; encode them again"
            )
        yield Latents(latents, info)


def read_infos(path: Path, cls: type[Info]) -> dict[Path, Info]:
    """The shards of the file or folder `path`, in order, and what they say; UserError if one is missing."""
    shards = sorted(path.glob("latents-*.safetensors")) if path.is_dir() else [path]
    infos = {shard: read_info(shard, cls) for shard in shards}
    found = [(info.shard, info.shards) for info in infos.values()]
    if not found or found != [(i, len(found)) for i in range(len(found))]:
        wanted = found[0][1] if found else 1
        raise UserError(f"{path}: holds {len(found)} of {wanted} shards of latents; {_REMEDIES[cls.kind]}")
    return infos


def read_info(path: Path, cls: type[Info]) -> Info:
    """What the shard `path` says of itself; UserError if it is damaged or of another kind."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        values = json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or no file of latents ({error}); {_REMEDIES[cls.kind]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: was written neither by `raekit encode` nor by `raekit latents cache`")
    kind = values.get("kind")
    if kind != cls.kind and kind in [*_REMEDIES]:
        raise UserError(f"{path}: holds latents of kind {kind!r}, needed are those of kind {cls.kind!r}")
    return from_dict(cls, values, path)


def _digest(images: Sequence[Path], *settings: object) -> str:
    """Of the files' contents as their sizes and times tell, and the settings."""
    digest = blake2b(repr(settings).encode(), digest_size=8)
    for image in images:
        status = image.stat() if image.is_file() else None
        digest.update(os.fsencode(image.resolve()) + repr(status and (status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
