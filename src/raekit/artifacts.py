"""Shareable models: folders with `config.json` and `model.safetensors`, which is split into shards above five GB.

A model folder holds artifacts: `encoder/` (only an encoder that raekit pretrained), `autoencoder/` (decoder and latent
statistics; the encoder by name), `denoiser/` and `classifier/`. Further averages of a denoiser's weights are in
`denoiser-ema-DECAY/`. An artifact is written completely or not at all. Reading is strict: a missing, unexpected or
misshapen tensor is an error.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raekit import hub
from raekit.config import read_json, to_dict, to_json
from raekit.distributed import World
from raekit.errors import UserError, check_choice, real_number
from raekit.files import whole
from raekit.hub import find_folder
from raekit.weights import check_statistics, read_weights

STATISTICS = "statistics.safetensors"
SHARD = 5 * 10**9
"""The largest file of weights in bytes. The Hub recommends files below five GB."""
STORED = (torch.float32, torch.bfloat16, torch.float16)
"""The types that weights can be stored in."""
ARTICLES = {"encoder": "an", "autoencoder": "an", "denoiser": "a", "classifier": "a"}
REMEDIES = {
    "encoder": "give the name of an encoder",
    "autoencoder": "give a model or a run of stage 1",
    "denoiser": "give a model or a run of stage 2, which generates images",
    "classifier": "give a run that trained a classifier",
}
"""What to do where a model lacks an artifact, by its kind."""


class MissingArtifact(UserError):
    """A model has no artifact of a kind. Another error means that the artifact is damaged or the model is missing."""


class Artifact(NamedTuple):
    """An artifact on disk.

    Attributes:
        path: its folder.
        config: the configuration of the network, as JSON values.
        ema: the decay of the average that the weights are, if they are an average.
        trained_on: the address of the data source that the network was trained on, if it is known.
    """

    path: Path
    config: dict[str, Any]
    ema: float | None
    trained_on: str | None


def find(name: str | Path, kind: str, ema: float | None = None) -> Artifact:
    """Find the artifact of a model.

    Args:
        name: a model, run or Hub repository, as `find_folder` takes it.
        kind: "encoder", "autoencoder", "denoiser" or "classifier".
        ema: the decay of the average that is wanted. Default: the artifact that stands first.

    Raises:
        MissingArtifact: the model has no such artifact. The message says where it was looked for.
        UserError: there is no such model, its config is damaged, or `ema` is not a number.
    """
    ema = None if ema is None else real_number("ema", ema)
    folder = find_folder(name, kind)
    known = _places(folder, kind)
    if not known and (made := hub.published().converted(folder)):
        known = _places(made, kind)
    if known:
        return known[0] if ema is None else _average(name, known[0], kind, ema)
    others = [other for other in ARTICLES if _places(folder, other)]
    if others:
        hint = f"; it holds {' and '.join(f'{ARTICLES[other]} {other}' for other in others)}: {REMEDIES[kind]}"
    else:
        hint = "; this run has not saved one yet" if (folder / "checkpoints").is_dir() else ""
    raise MissingArtifact(f"{name}: holds no {kind} (looked for {kind}/config.json of kind {kind!r} in {folder}){hint}")


def _places(folder: Path, kind: str) -> list[Artifact]:
    """Return the artifacts of a kind in a model folder, the preferred one first."""
    return [found for path in (folder / "artifact" / kind, folder / kind, folder) if (found := _read(path, kind))]


def averages(path: Path, kind: str) -> dict[float, Artifact]:
    """Return the artifact at `path` and the further averages next to it, by the decay of each."""
    known = (_read(other, kind) for other in (path, *sorted(path.parent.glob(f"{kind}-ema-*"))))
    return {found.ema: found for found in known if found and found.ema is not None}


def _average(name: str | Path, found: Artifact, kind: str, ema: float) -> Artifact:
    known = averages(found.path, kind)
    if ema not in known:
        there = (
            f"its averages have decay {', '.join(map(str, known))}" if known else f"{found.path} does not name a decay"
        )
        raise UserError(f"{name}: has no average of decay {ema}; {there}")
    find_folder(name, known[ema].path.name)  # downloads its weights
    return known[ema]


def _read(path: Path, kind: str) -> Artifact | None:
    if not (path / "config.json").is_file():
        return None
    values = read_json(path / "config.json")
    if not isinstance(values, dict) or values.pop("kind", None) != kind:
        return None
    return Artifact(path, values, values.pop("ema", None), values.pop("trained_on", None))


def read(path: Path) -> dict[str, Tensor]:
    """Return the weights of the artifact at `path` in float32, whatever type they are stored in."""
    return {key: value.float() for key, value in read_stored(path).items()}


def read_stored(path: Path) -> dict[str, Tensor]:
    """Return the weights of the artifact at `path` in the types that they are stored in."""
    shards = sorted(path.glob("model-*.safetensors")) or [path / "model.safetensors"]
    return {key: value for shard in shards for key, value in read_weights(shard).items()}


def write(
    folder: Path,
    kind: str,
    config: object,
    module: nn.Module,
    world: World,
    *,
    dtype: torch.dtype | None = None,
    ema: float | None = None,
    trained_on: str | None = None,
    statistics: dict[str, Tensor] | None = None,
) -> None:
    """Write an artifact, and replace the one in `folder`. All processes call it; the first one writes.

    Args:
        folder: the artifact's own folder.
        kind: "encoder", "autoencoder", "denoiser" or "classifier".
        config: the configuration of the network.
        module: the network, distributed or not.
        world: the processes of this job.
        dtype: type to store floating-point weights in, one of `STORED`. Default: their own.
        ema: the decay of the average that the weights are, if they are an average.
        trained_on: the address of the data source that the network was trained on, if it is known.
        statistics: latent statistics, always stored in float32: variances span more orders of magnitude than
            float16 holds.

    Raises:
        UserError: the weights cannot be stored in `dtype`, or the artifact cannot be written.
    """
    if dtype is not None:
        check_choice("dtype", dtype, STORED)
    from raekit.distributed.sharding import full_state

    state = full_state(module, cpu=True)
    if not world.is_main:
        return
    about = {name: value for name, value in (("ema", ema), ("trained_on", trained_on)) if value is not None}
    with whole(folder, folder=True) as partial:
        partial.mkdir()
        (partial / "config.json").write_text(to_json({"kind": kind, **about, **to_dict(config)}), "utf-8")
        _write_stored(
            {k: v.to(dtype if dtype and v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()},
            partial,
        )
        if statistics:
            write_statistics(partial / STATISTICS, **statistics)


def _write_stored(state: dict[str, Tensor], folder: Path) -> None:
    """Write weights to one file, or to several with an index if they are larger than `SHARD`."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(to_json(index), "utf-8")


def write_statistics(path: Path, var: Tensor, mean: Tensor | None = None) -> None:
    """Write latent statistics, each (C, H, W), to a safetensors file. A mean of None is left out."""
    tensors = {"var": var} | ({} if mean is None else {"mean": mean})
    with whole(path) as partial:
        save_file({key: value.float().cpu().contiguous() for key, value in tensors.items()}, partial)


def read_statistics(path: Path, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
    """Read latent statistics.

    Returns:
        The mean (None if the file has none) and the variance, each of `shape`.

    Raises:
        UserError: the file holds statistics of another shape, or numbers that cannot whiten latents.
    """
    tensors = read_weights(path)
    if "var" not in tensors or any(tensor.shape != shape for tensor in tensors.values()):
        found = {key: tuple(value.shape) for key, value in tensors.items()}
        raise UserError(f"{path}: needs `var` (and `mean`) of shape {shape}, holds {found}; measure the latents again")
    mean, var = tensors.get("mean"), tensors["var"]
    try:
        check_statistics(mean, var)
    except UserError as error:
        raise UserError(f"{path}: {error}; measure the latents again") from None
    return mean, var
