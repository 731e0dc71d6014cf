"""Where scalars go: always metrics.jsonl, TensorBoard as well if it is wanted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from raekit.errors import UserError
from raekit.files import whole


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl, each with its `step`; a torn last line is left out."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the process was killed while it wrote this line
    return records


def steps_to(records: Sequence[Mapping[str, float]], metric: str, target: float) -> float | None:
    """The steps after which the logged `metric` first was `target` or less, between records by a straight line.

    None if it never was; UserError, naming what is on record, if there is no such metric.
    """
    curve = [(record["step"], record[metric]) for record in records if metric in record]
    if not curve:
        known = sorted({name for record in records for name in record} - {"step"})
        raise UserError(f"{metric}: not on record; there are {', '.join(known) or 'no metrics'}")
    before = None
    for step, value in curve:
        if value <= target:
            if before is None:
                return step
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


class Tracker:
    """Logs of one run. Opened at `step`, it drops the records of later steps, which will be written again.

    `resumed` has the names of what is on record for `step` itself.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool = False) -> None:
        self.run = run
        kept = [record for record in read_metrics(run) if record["step"] <= step]
        self.resumed = {name for record in kept if record["step"] == step for name in record}
        with whole(run / "metrics.jsonl") as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append a record; UserError if the disk is full."""
        path = self.run / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"{path}: could not be written ({error.strerror})") from None
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
