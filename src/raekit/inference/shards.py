"""Shards of latents on disk: safetensors files whose metadata describe their contents."""

import json
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raekit.config import configclass, from_dict, to_dict
from raekit.errors import UserError
from raekit.files import check_folder, whole
from raekit.models.latent_space import LatentSpace
from raekit.weights import fingerprint, rounded

METADATA_KEY = "raekit"
WRITERS = {"images": "raekit encode", "source": "raekit latents cache"}
"""The command that writes shards of each kind."""
REMEDIES = {
    "images": "encode the images into an empty folder again",
    "source": "run the same `raekit latents cache` command again to complete it",
}
"""How to repair incomplete or damaged shards, by their kind."""


@configclass
class ShardInfo:
    """The description that every shard of latents carries in its metadata.

    Attributes:
        kind: "images" for the latents of image files, "source" for the latents of a data source.
        version: the version of raekit that wrote the shard.
        model: the name or the folder by which the autoencoder was loaded.
        encoder: the `encoder_fingerprint` of the autoencoder.
        statistics: the `statistics_fingerprint` of the autoencoder.
        image_size: the side of the square images in pixels.
        shard: the number of this shard, from 0.
        shards: the number of all shards.
    """

    kind: str
    version: str
    model: str
    encoder: str
    statistics: str
    image_size: int
    shard: int
    shards: int


Info = TypeVar("Info", bound=ShardInfo)


def statistics_fingerprint(autoencoder: LatentSpace) -> str:
    """Return a fingerprint of the latent statistics, for `ShardInfo.statistics`.

    A decoder only fits latents that were whitened with its own statistics.
    """
    return fingerprint({"mean": autoencoder.mean, "var": autoencoder.var})


def encoder_fingerprint(autoencoder: LatentSpace) -> str:
    """Return a fingerprint of the encoder, for `ShardInfo.encoder`.

    The fingerprint covers the weights, the size and the colour normalisation of the input, and the layers that the
    latents are made from. An encoder has the same fingerprint in float32 and in bfloat16.
    """
    return fingerprint(rounded(autoencoder.encoder.state_dict()), *autoencoder.encoder_facts)


def shard_paths(folder: Path, shards: int) -> list[Path]:
    """Return the paths of `shards` shards in `folder`.

    Raises:
        UserError: if `folder` holds shards under other names.
    """
    places = [folder / f"latents-{i:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    check_folder(folder)
    if others := set(folder.glob("latents-*.safetensors")) - set(places):
        raise UserError(
            f"{folder}: holds {min(others).name}, and these images make {shards} shards: images were added or removed, "
            "or the shard size is another; give the original images and shard size, or another folder"
        )
    return places


def write_shard(path: Path, info: ShardInfo, tensors: dict[str, Tensor]) -> None:
    """Write a shard atomically."""
    with whole(path) as partial:
        save_file(tensors, partial, {METADATA_KEY: json.dumps(to_dict(info))})


def read_infos(path: Path, cls: type[Info]) -> dict[Path, Info]:
    """Return the shards of the file or folder `path` in order, each with its description.

    Raises:
        UserError: if there is no shard, or one is missing, damaged or of another kind.
    """
    shards = sorted(path.glob("latents-*.safetensors")) if path.is_dir() else [path]
    infos = {shard: read_info(shard, cls) for shard in shards}
    if not infos:
        raise UserError(f"{path}: holds no latents; give a folder that `{WRITERS[cls.kind]}` wrote")
    found = [(info.shard, info.shards) for info in infos.values()]
    if found != [(i, len(found)) for i in range(len(found))]:
        raise UserError(f"{path}: holds {len(found)} of {found[0][1]} shards of latents; {REMEDIES[cls.kind]}")
    return infos


def read_info(path: Path, cls: type[Info]) -> Info:
    """Return the description of the shard `path`.

    Raises:
        UserError: if the shard is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        values = json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or not a file of latents ({error}); {REMEDIES[cls.kind]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a file of latents; give one that `raekit encode` or `raekit latents cache` wrote")
    kind = values.get("kind")
    if kind != cls.kind and kind in [*REMEDIES]:
        raise UserError(f"{path}: holds latents of kind {kind!r}, but kind {cls.kind!r} is needed")
    return from_dict(cls, values, path)
