"""The record of a run: what it was started with, and what changed between its starts.

RUN/config.json and RUN/inputs.json hold the present config and inputs. RUN/history.jsonl has a line for each start.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from platform import node
from typing import Any, get_args

import torch

from raekit import __version__
from raekit.config import Change, Mark, changes, from_dict, read_json, read_lines, to_dict, to_json
from raekit.distributed import World
from raekit.errors import UserError, some
from raekit.files import check_folder, whole
from raekit.stages.classification import ClassificationConfig
from raekit.stages.compression import CompressionConfig
from raekit.stages.generation import GenerationConfig
from raekit.stages.inputs import Images, Inputs
from raekit.stages.reconstruction import ReconstructionConfig
from raekit.stages.representation import RepresentationConfig
from raekit.training.checkpoint import checkpoints, step_of
from raekit.training.throughput import peak_of

StageConfig = ClassificationConfig | RepresentationConfig | CompressionConfig | ReconstructionConfig | GenerationConfig
STAGES: dict[str, type[StageConfig]] = {kind.stage: kind for kind in get_args(StageConfig)}
_SHOWN = 20
_FOLDERS = ("checkpoints", "artifact", "milestones", "samples")


def read_config(run: Path) -> StageConfig:
    """Return the config of a run. A field that the file lacks has its default.

    Raises:
        UserError: `run` is not a run, or its config does not fit this version of raekit.
    """
    values = read_values(run)
    return from_dict(STAGES[values["stage"]], values, run / "config.json")


def read_values(run: Path) -> dict[str, Any]:
    """Return the config of a run as JSON values, also if a field does not fit this version of raekit.

    Raises:
        UserError: `run` is not a run.
    """
    path = run / "config.json"
    if not run.is_dir():
        raise UserError(f"{run}: there is no such folder; start a run with raekit train RECIPE --run")
    if not path.is_file():
        raise UserError(f"{run}: not a run, because it has no config.json; start one with raekit train RECIPE --run")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("stage") not in STAGES:
        raise UserError(f"{path}: not the config of a training; choose another --run")
    return values


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the records of RUN/history.jsonl, one for each start; UserError if a line is damaged."""
    types = {"step": int, "time": str, "raekit": str, "torch": str, "host": str, "device": str, "processes": int}

    def is_record(values: dict[str, Any]) -> bool:
        return all(isinstance(values.get(name), kind) for name, kind in types.items())

    return read_lines(run / "history.jsonl", is_record)


def is_begun(run: Path) -> bool:
    """Return whether a run has trained: it has a checkpoint or an artifact. If not, it is anyone's."""
    return bool(checkpoints(run / "checkpoints")) or (run / "artifact").is_dir()


def check_folders(run: Path) -> None:
    """Raise UserError unless each folder of a run can be written and read, or be made."""
    for folder in (run, *(run / name for name in _FOLDERS)):
        check_folder(folder)


def config_changes(run: Path, config: StageConfig) -> list[Change]:
    """Return the fields in which `config` differs from the config of the run; none if the run has not begun.

    Raises:
        UserError: The run is of another stage, has no config.json, or has a model but no checkpoint, so that a
            training would replace it.
    """
    if (run / "artifact").is_dir() and not checkpoints(run / "checkpoints"):
        more = f" (--init-from {run} starts it from this model)" if hasattr(config, "init_from") else ""
        raise UserError(
            f"{run}: has a trained model in artifact/ but no checkpoint, so a training would start at step 0 and "
            f"replace the model; choose another --run{more}, or move this one away: mv {run} {run}.old"
        )
    if not is_begun(run):
        return []
    _check_there(run, "config.json")
    before = read_config(run)
    if type(before) is not type(config):
        raise UserError(
            f"{run}: belongs to a training of stage {before.stage}, not {config.stage}; choose another --run"
        )
    return list(changes(before, config))


def input_changes(run: Path, inputs: Inputs) -> list[Change]:
    """Return how the inputs differ from the inputs of the run; none if the run has not begun.

    Raises:
        UserError: The run has no inputs.json, or its model learns other classes.
    """
    if not is_begun(run):
        return []
    _check_there(run, "inputs.json")
    before = _read_inputs(run)
    inputs = replace(inputs, data=_known(inputs.data, before.data))
    if before.labels != inputs.labels and (names := _differing(before.data.classes, inputs.data.classes)):
        raise UserError(
            f"{run}: was trained on other classes ({names}), and a run keeps its classes; undo this change, or choose "
            f"another --run (--init-from {run} starts it from this model)"
        )
    return list(changes(before, inputs))


def _check_there(run: Path, name: str) -> None:
    """Raise UserError if the file `name` of a run that has begun is missing."""
    if not (run / name).is_file():
        raise UserError(
            f"{run}: has checkpoints but no {name}, so nothing says whether they belong to this training; put the "
            "file back (the first line of history.jsonl has its content), or choose another --run"
        )


def is_same(run: Path, config: StageConfig, inputs: Inputs) -> bool:
    """Return whether a run that has not begun was started for this training, so that its measurements still hold."""
    try:
        before = read_config(run)
        found = list(changes(_read_inputs(run), inputs))
    except UserError:
        return False
    found += changes(before, config) if type(before) is type(config) else [None]
    return all(change and change.part is Mark.OPERATION for change in found)


def _read_inputs(run: Path) -> Inputs:
    return from_dict(Inputs, read_json(run / "inputs.json"), run / "inputs.json")


def _known(images: Images, before: Images) -> Images:
    """Return `images` with the earlier value of every unknown property."""
    return replace(images, **{name: getattr(before, name) for name, value in vars(images).items() if value is None})


def _differing(before: Mapping[str, int] | None, now: Mapping[str, int] | None) -> str:
    """Return the class names that only one of two datasets has, as text; "" if there are none, or they are unknown."""
    if before is None or now is None:
        return ""
    added, removed = [name for name in now if name not in before], [name for name in before if name not in now]
    return "; ".join(f"{what}: {some(names)}" for what, names in (("new", added), ("missing", removed)) if names)


def check(run: Path, found: Sequence[Change], allowed: bool) -> None:
    """Check that a run may be continued with these changes.

    Args:
        run: The folder of the run.
        found: The changes.
        allowed: Whether fields that are changed on purpose may change (--change).

    Raises:
        UserError: A change is not possible, or not allowed. The message lists these changes.
    """
    lines = [str(change) for change in found if change.part is Mark.DEFINES]
    if not allowed:
        lines += [f"{change} (possible with --change)" for change in found if change.part is Mark.ON_PURPOSE]
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise UserError(
            "\n  ".join([f"{run}: belongs to a run with a different config:", *lines[:_SHOWN], *more])
            + "\nChoose another --run, or undo these changes. To continue with the settings of the run: "
            f"raekit train --resume {run}"
        )


def check_start(run: Path, config: StageConfig, inputs: Inputs, allowed: bool) -> list[Change]:
    """Return the changes of config and inputs since the run's last start.

    Raises:
        UserError: The changes are not allowed (`check`), or the run has trained more steps than the config has.
    """
    saved = checkpoints(run / "checkpoints")
    if saved and (step := step_of(saved[-1])) > config.train.steps:
        raise UserError(f"train.steps: {config.train.steps}, but {run} has trained {step} steps; give more")
    found = [*config_changes(run, config), *input_changes(run, inputs)]
    check(run, found, allowed)
    return found


def write(run: Path, config: StageConfig, inputs: Inputs, step: int, found: Sequence[Change], world: World) -> None:
    """Record a start of the run at `step` with these changes. The record of a run that has not begun is replaced."""
    if not world.is_main:
        return
    peak = peak_of(world.device, config.train.precision)
    record: dict[str, Any] = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "raekit": __version__,
        "torch": torch.__version__,
        "host": node(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "processes": world.size,
        "peak_tflops": peak.flops / 1e12,
        "peak_stated": peak.stated,
    }
    history = read_history(run) if is_begun(run) else []
    if history:
        record["changes"] = {change.field: [change.old, change.new] for change in found}
    else:
        record |= {"config": to_dict(config), "inputs": to_dict(inputs)}
    # The history first: if the process is killed between the files, the next start finds the same changes again.
    with whole(run / "history.jsonl") as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in [*history, record]), "utf-8")
    for name, values in (("inputs", inputs), ("config", config)):
        with whole(run / f"{name}.json") as partial:
            partial.write_text(to_json(to_dict(values)), "utf-8")
