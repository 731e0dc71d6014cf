"""Shards of latents on disk: safetensors files that say what they hold."""

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
from raekit.weights import fingerprint

METADATA_KEY = "raekit"  # of the metadata
REMEDIES = {
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


Info = TypeVar("Info", bound=ShardInfo)


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
        save_file(tensors, partial, {METADATA_KEY: json.dumps(to_dict(info))})


def read_infos(path: Path, cls: type[Info]) -> dict[Path, Info]:
    """The shards of the file or folder `path`, in order, and what they say; UserError if one is missing."""
    shards = sorted(path.glob("latents-*.safetensors")) if path.is_dir() else [path]
    infos = {shard: read_info(shard, cls) for shard in shards}
    found = [(info.shard, info.shards) for info in infos.values()]
    if not found or found != [(i, len(found)) for i in range(len(found))]:
        wanted = found[0][1] if found else 1
        raise UserError(f"{path}: holds {len(found)} of {wanted} shards of latents; {REMEDIES[cls.kind]}")
    return infos


def read_info(path: Path, cls: type[Info]) -> Info:
    """What the shard `path` says of itself; UserError if it is damaged or of another kind."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        values = json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or no file of latents ({error}); {REMEDIES[cls.kind]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: was written neither by `raekit encode` nor by `raekit latents cache`")
    kind = values.get("kind")
    if kind != cls.kind and kind in [*REMEDIES]:
        raise UserError(f"{path}: holds latents of kind {kind!r}, needed are those of kind {cls.kind!r}")
    return from_dict(cls, values, path)
