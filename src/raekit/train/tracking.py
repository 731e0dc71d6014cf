"""Logging of scalars to metrics.jsonl and, optionally, to TensorBoard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from raekit.errors import UserError
from raekit.files import whole


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read the records of a run's metrics.jsonl, each with its `step`; an incomplete last line is skipped."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the process was killed while it wrote this line
    return records


def steps_to(records: Sequence[Mapping[str, float]], metric: str, target: float) -> float | None:
    """Return after how many steps the logged `metric` first reached `target` or less.

    The curve between two records is a straight line, so that the result may be fractional. None means that the metric
    never reached `target`.

    Raises:
        UserError: If no record has this metric. The message lists the metrics that exist.
    """
    curve = [(record["step"], record[metric]) for record in records if metric in record]
    if not curve:
        known = sorted({name for record in records for name in record} - {"step"})
        raise UserError(f"{metric}: no such metric in the records; choose from: {', '.join(known) or 'none'}")
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
    """The logs of one run.

    A tracker that starts at `step` deletes the records of later steps, because the resumed run writes them again.

    Attributes:
        resumed: Names of the values that metrics.jsonl already has for `step`.
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
        """Append a record.

        Raises:
            UserError: If metrics.jsonl cannot be written, for example because the disk is full.
        """
        path = self.run / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: could not be written ({error.strerror}); check the disk and run the same command again"
            ) from None
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
