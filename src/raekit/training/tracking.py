"""Where the values and pictures of a training go: the files of the run, TensorBoard, Weights & Biases, trackio."""

import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from textwrap import indent
from typing import Any, Literal, Protocol
from uuid import uuid4

import numpy as np
from PIL import Image

from raekit.config import read_lines
from raekit.errors import UserError
from raekit.files import whole

_log = logging.getLogger(__name__)
TrackerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "raekit"
"""Project of the runs in Weights & Biases and trackio. WANDB_PROJECT names another one for Weights & Biases."""


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read the records of a run's metrics.jsonl, each with its `step`; an incomplete last line is skipped.

    Raises:
        UserError: A line is damaged.
    """

    def is_record(values: dict[str, Any]) -> bool:
        return "step" in values and all(isinstance(value, int | float) for value in values.values())

    return read_lines(run / "metrics.jsonl", is_record, torn=True)


def steps_to(records: Sequence[Mapping[str, float]], metric: str, target: float) -> float | None:
    """Return after how many steps the logged `metric` first reached `target` or less.

    The curve between two records is a straight line, so that the result may be fractional. Values that are not finite
    are left out. None means that the metric never reached `target`.

    Raises:
        UserError: If no record has this metric. The message lists the metrics that exist.
    """
    curve = [(record["step"], record[metric]) for record in records if metric in record]
    if not curve:
        known = sorted({name for record in records for name in record} - {"step"})
        raise UserError(f"{metric}: no such metric in the records; choose from: {', '.join(known) or 'none'}")
    before = None
    for step, value in curve:
        if not math.isfinite(value):
            continue
        if value <= target:
            if before is None:
                return step
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


class Tracker(Protocol):
    """A receiver of what a training reports."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Take the config of the run. The first call after the start."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values that belong to `step`. There may be several calls for one step."""
        ...

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Take pictures that belong to `step`, by name."""
        ...

    def close(self) -> None:
        """Send or write what is left."""
        ...


class RunFiles:
    """The tracker that every run has: RUN/metrics.jsonl, and RUN/NAME/step-*.png for the pictures of a name.

    Records and pictures of steps after `step` are deleted, because the resumed run writes them again.

    Attributes:
        resumed: Names of the values that metrics.jsonl already has for `step`.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.run = run
        kept = [record for record in read_metrics(run) if record["step"] <= step]
        self.resumed = {name for record in kept if record["step"] == step for name in record}
        with whole(run / "metrics.jsonl") as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
        for number, path in pictures_of(run):
            if number > step:
                path.unlink()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append a record.

        Raises:
            UserError: If metrics.jsonl cannot be written, for example because the disk is full.
        """
        path = self.run / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: could not be written ({error.strerror}); check the disk and run the same command again"
            ) from None

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Write the pictures.

        Raises:
            UserError: If a picture cannot be written.
        """
        for name, image in images.items():
            with whole(self.run / name / f"step-{step:08d}.png") as partial:
                image.save(partial, format="PNG")


def pictures_of(run: Path) -> list[tuple[int, Path]]:
    """Return the pictures in RUN/samples with their steps, in order."""
    named = ((path.stem.removeprefix("step-"), path) for path in (run / "samples").glob("step-*.png"))
    return sorted((int(number), path) for number, path in named if number.isdecimal())


class TensorBoard:
    """Writes event files to RUN/tensorboard."""

    def __init__(self, run: Path, step: int, name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def config(self, values: Mapping[str, Any]) -> None:
        self._writer.add_text("config", indent(json.dumps(values, indent=2), "    "))  # a block of code in Markdown

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        for name, image in images.items():
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends a run to Weights & Biases, or writes it to RUN/wandb if WANDB_MODE is offline."""

    def __init__(self, run: Path, step: int, name: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=name,
            resume="allow",
            dir=str(run),
            settings=wandb.Settings(console="off", silent=True),
        )

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        self._run.log({name: self._wandb.Image(image) for name, image in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Writes a run to trackio's local database; TRACKIO_SPACE_ID names a Space of the Hub to use instead."""

    def __init__(self, run: Path, step: int, name: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        with redirect_stdout(StringIO()):
            self._run = trackio.init(PROJECT, name, resume="allow", embed=False)

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(values)  # trackio sends it with the first values

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step)

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        self._run.log({name: self._trackio.Image(image) for name, image in images.items()}, step)

    def close(self) -> None:
        with redirect_stdout(StringIO()):
            self._run.finish()


_TRACKERS: dict[str, Callable[[Path, int, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for name in names:
        if not find_spec(name):
            raise UserError(f"train.track: {name} is not installed; pip install {name}, or 'raekit[track]' for all")


class Tracking:
    """All trackers of one run: its own files, and the trackers in `names`.

    A tracker in `names` that fails is left out from then on, with one warning, and the training continues. Its run has
    the same name after every restart. The name is in RUN/tracker.json, and a run that starts at step 0 gets a new one.

    Args:
        run: The run folder.
        step: The step from which the run continues.
        names: The trackers.
        config: The config of the run, for the trackers.
    """

    def __init__(
        self, run: Path, step: int, names: Sequence[str] = (), config: Mapping[str, Any] | None = None
    ) -> None:
        self.files = RunFiles(run, step)
        self._others: dict[str, Tracker] = {}
        known = _run_name(run, step) if names else ""
        for name in names:
            with self._guarded(name):
                self._others[name] = _TRACKERS[name](run, step, known)
        self._each(lambda tracker: tracker.config(config or {}))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Give the values of a step to every tracker."""
        self.files.scalars(step, values)
        self._each(lambda tracker: tracker.scalars(step, values))

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Give the pictures of a step to every tracker."""
        self.files.images(step, images)
        self._each(lambda tracker: tracker.images(step, images))

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._others.items()):
            with self._guarded(name):
                call(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Turn a failure of a tracker into a warning, and leave out the tracker from now on."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the trackers' own packages
                yield
        except Exception as error:  # any code of another package
            self._others.pop(name, None)
            _log.warning("%s failed and gets no more values (%s: %s)", name, type(error).__name__, error)


def _run_name(run: Path, step: int) -> str:
    """Return the name of the run in its trackers, from RUN/tracker.json if the run continues."""
    path = run / "tracker.json"
    if not step or not path.is_file():
        folder = re.sub(r"[^\w.-]+", "-", run.absolute().name)[:50]  # a name that is valid everywhere
        with whole(path) as partial:
            partial.write_text(json.dumps({"run": f"{folder}-{uuid4().hex[:8]}"}) + "\n")
    return json.loads(path.read_text())["run"]
