"""The interface between a stage and a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raekit.progress import Progress
from raekit.stages.inputs import Inputs
from raekit.training.objective import Objective, Periodic


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The parts of a training run.

    Attributes:
        objectives: The modules to train, with their losses.
        inputs: `inputs()` describes what the training reads. It takes seconds for large datasets.
        batches: `batches(start)` returns the stream of batches after `start` images.
        export: `export(folder)` writes the artifact with the present (averaged) weights.
        prepare: `prepare(progress)` does the work before the first step, such as measuring latent statistics. A dry
            run skips this work.
        periodics: Calls between training steps.
    """

    objectives: Sequence[Objective]
    inputs: Callable[[], Inputs]
    batches: Callable[[int], Iterator[Any]]
    export: Callable[[Path], None]
    prepare: Callable[[Progress], None] = lambda progress: None
    periodics: Sequence[Periodic] = ()
