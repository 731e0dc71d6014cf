"""Run a plan: train, measure, and keep each result, so that an interrupted study resumes."""

import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from raekit.config import Mark, read_json, replaced, to_dict, to_json
from raekit.errors import UserError
from raekit.experiments.studies.engine.plan import Result, Run, Study, Values
from raekit.files import whole
from raekit.progress import Progress
from raekit.recipes import StageConfig, train


def share(only: str, runs: Sequence[Run]) -> Sequence[Run]:
    """Return the runs of part `only`, written K/N: every N-th run, from the K-th on.

    Raises:
        UserError: `only` is not K/N with K from 1 to N.
    """
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", only)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--only: {only!r} must be K/N with K from 1 to N, such as 3/8")
    return runs[part - 1 :: parts]


def finish(study: Study, run: Run, folder: Path, device: str | None, progress: Progress, what: str) -> None:
    """Train and measure a run, unless its result is there. The result is kept in FOLDER/runs/NAME/result.json.

    Raises:
        UserError: The folder of the run has the result of another config.
        Stopped: A signal stopped the training.
    """
    if is_finished(run, folder):
        return
    place = folder / "runs" / run.name
    artifact = _train(run.config, place, device, progress, what)
    values = study.measure(artifact, run.settings, folder)
    with whole(place / "result.json") as partial:
        partial.write_text(to_json({"config": _digest(run.config), "values": values}))


def train_shared(config: StageConfig, place: Path, device: str | None, progress: Progress, what: str) -> None:
    """Train a model that several runs share, in the folder `place`. A finished training is kept.

    Raises:
        UserError: Another part of the study is training the model, or `place` has a model of another config.
        Stopped: A signal stopped the training.
    """
    finished = place / "finished.json"
    if not _is_of(finished, config):
        _train(config, place, device, progress, what)
        with whole(finished) as partial:
            partial.write_text(to_json({"config": _digest(config)}))


def _train(config: StageConfig, place: Path, device: str | None, progress: Progress, what: str) -> Path:
    """Train a config and report each logged step. Return the folder of the trained model."""

    def report(step: int, values: dict[str, float]) -> None:
        loss = next((f"loss {value:.4f}" for name, value in values.items() if name.endswith("/loss")), "")
        progress(what, step, config.train.steps, loss, config.train.batch_size)

    return train(config, place, device=device, report=report, progress=progress)


def is_finished(run: Run, folder: Path) -> bool:
    """Return whether a run has a result.

    Raises:
        UserError: The result belongs to another config.
    """
    return _is_of(folder / "runs" / run.name / "result.json", run.config)


def _is_of(path: Path, config: StageConfig) -> bool:
    """Return whether the file that a finished training leaves exists.

    Raises:
        UserError: The training had another config.
    """
    if not path.is_file():
        return False
    if read_json(path).get("config") != _digest(config):
        raise UserError(f"{path}: was made with other settings; choose another --out, or remove {path.parent}")
    return True


def result(run: Run, folder: Path) -> Result:
    """Return the result of a finished run."""
    values: Values = read_json(folder / "runs" / run.name / "result.json")["values"]
    return Result(run.settings, values)


def _digest(config: StageConfig) -> str:
    """Return 16 hexadecimal digits that identify the config, apart from the places of its inputs."""
    values = to_dict(replaced(config, Mark.PLACE, lambda place: ""))
    return blake2b(to_json(values).encode(), digest_size=8).hexdigest()
