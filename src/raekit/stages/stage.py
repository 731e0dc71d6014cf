"""What a stage is, and how a run of one goes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raekit.progress import Progress
from raekit.train.objective import Objective, Periodic


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training: its objectives, its stream of batches from a number of images seen, and what it leaves.

    `prepare(progress)` does what must precede training and is not part of it (a dry run leaves it out);
    `export(folder)` writes the artifact of the present (averaged) weights.
    """

    objectives: Sequence[Objective]
    batches: Callable[[int], Iterator[Any]]
    export: Callable[[Path], None]
    prepare: Callable[[Progress], None] = lambda progress: None
    periodics: Sequence[Periodic] = ()
