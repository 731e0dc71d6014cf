"""Shareable models: folders of `config.json` + `model.safetensors`.

A model folder holds up to three artifacts: `encoder/` (only one that raekit pretrained), `autoencoder/`
(decoder and latent statistics; the encoder by name) and `denoiser/`. Other averages of the same weights are beside
the first, in `denoiser-ema-DECAY/`. Each is written whole or not at all, and read strictly: a missing, unexpected or
misshapen tensor is an error.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from raekit.config import read_json, to_dict, to_json
from raekit.distributed import World
from raekit.errors import UserError
from raekit.files import whole
from raekit.hub import find_folder
from raekit.weights import check_statistics, read_weights

STATISTICS = "statistics.safetensors"


def find(name: str, kind: str, ema: float | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder and configuration of the artifact of `kind` in the model, run or Hub repository `name`.

    With `ema` that of the average of this decay. UserError, telling where it was looked for, if there is none.
    """
    folder = find_folder(name, kind)
    for path in (folder / "artifact" / kind, folder / kind, folder):
        if (values := _read_config(path, kind)) is None:
            continue
        if ema is not None:
            path, values = _average(name, path, kind, ema)
        values.pop("ema", None)
        return path, values
    hint = "; this run has saved none yet" if (folder / "checkpoints").is_dir() else ""
    raise UserError(f"{name}: holds no {kind} (looked for {kind}/config.json of kind {kind!r} in {folder}){hint}")


def averages(path: Path, kind: str) -> dict[float, tuple[Path, dict[str, Any]]]:
    """The artifact `path` of `kind` and those beside it, by the decays that they are averages of."""
    known = ((other, _read_config(other, kind)) for other in (path, *sorted(path.parent.glob(f"{kind}-ema-*"))))
    return {values["ema"]: (other, values) for other, values in known if values and "ema" in values}


def _average(name: str, path: Path, kind: str, ema: float) -> tuple[Path, dict[str, Any]]:
    known = averages(path, kind)
    if ema not in known:
        those = f"only of {', '.join(map(str, known))}" if known else f"{path} does not say of what decay it is"
        raise UserError(f"{name}: has no average of decay {ema}, {those}")
    return known[ema]


def _read_config(path: Path, kind: str) -> dict[str, Any] | None:
    """The configuration of the artifact `path`, with the decay that it is the average of, if it is one of `kind`."""
    if not (path / "config.json").is_file():
        return None
    values = read_json(path / "config.json")
    return values if isinstance(values, dict) and values.pop("kind", None) == kind else None


def read(path: Path) -> dict[str, Tensor]:
    """The artifact's weights in float32, whatever they are stored in."""
    return {key: value.float() for key, value in read_weights(path / "model.safetensors").items()}


def write(
    folder: Path,
    kind: str,
    config: object,
    module: nn.Module,
    world: World,
    *,
    dtype: torch.dtype | None = None,
    ema: float | None = None,
    statistics: dict[str, Tensor] | None = None,
) -> None:
    """Write one artifact, replacing the one in `folder`. Called by all processes, done by the first.

    `dtype` converts the floating-point weights, by default kept as they are; `ema` is the decay that they are an
    average of, if they are. `statistics` are not converted:
    variances span more orders of magnitude than float16 holds.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Tensor] = get_model_state_dict(module, options=options)  # type: ignore[assignment]
    if not world.is_main:
        return
    with whole(folder, folder=True) as partial:
        partial.mkdir()
        average = {} if ema is None else {"ema": ema}
        (partial / "config.json").write_text(to_json({"kind": kind, **average, **to_dict(config)}))
        save_file(
            {k: v.to(dtype if dtype and v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()},
            partial / "model.safetensors",
        )
        if statistics:
            write_statistics(partial / STATISTICS, **statistics)


def write_statistics(path: Path, var: Tensor, mean: Tensor | None = None) -> None:
    """Write latent statistics, each (C, H, W); a mean of None is left out. UserError if it cannot be written."""
    tensors = {"var": var} | ({} if mean is None else {"mean": mean})
    with whole(path) as partial:
        save_file({key: value.float().cpu().contiguous() for key, value in tensors.items()}, partial)


def read_statistics(path: Path, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
    """(mean or None, var) of latents of `shape`; UserError if they are of another."""
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
