"""Studies of the paper's claims, one module for each. To add a study, write a module that follows `engine.plan.Study`.

The docstring of a study says what the paper claims and where, how the study checks it, and what the study costs.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from raekit.distributed import World
from raekit.distributed.locks import lock
from raekit.errors import UserError, did_you_mean
from raekit.experiments.studies.engine import execution
from raekit.experiments.studies.engine.plan import Claim, Study
from raekit.experiments.studies.engine.report import write_report
from raekit.files import check_folder
from raekit.progress import Progress, silent


@dataclass(frozen=True)
class Found:
    """A study by its name.

    Attributes:
        name: Name of the study and of its module.
        about: The docstring of the module.
        study: The module.
    """

    name: str
    about: str
    study: Study

    @property
    def summary(self) -> str:
        """The claim, in one line."""
        return self.about.strip().splitlines()[0]

    @property
    def cost(self) -> str:
        """The time that the study takes, as its docstring says."""
        return next(line.partition(":")[2].strip() for line in self.about.splitlines() if line.startswith("Cost:"))


def names() -> list[str]:
    """Return the names of all studies."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def find(name: str) -> Found:
    """Return a study.

    Raises:
        UserError: There is no such study. The message lists all studies.
    """
    if name not in names():
        hint = did_you_mean(name, names()) or f"choose from: {', '.join(names())}"
        raise UserError(f"study {name!r}: no such study; {hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Found(name, module.__doc__ or "", module)  # type: ignore[arg-type]


def run_study(
    name: str,
    out: Path,
    *,
    quick: bool = False,
    only: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> list[Claim] | int:
    """Run a study in the folder `out`, or resume it. Finished runs are kept.

    With the results of all runs, `out` gets study.json, study.md, and a figure (PNG and SVG) for each claim.

    Args:
        name: Name of the study.
        out: Folder of the study.
        quick: Run a short trial of the machinery. Its numbers say nothing about the claims.
        only: Do only part K of N of the runs, written "K/N". The parts may run at the same time, on machines that share
            `out`. The last part that ends writes the report.
        device: "cpu" or "cuda". Default: the GPU if there is one, else the CPU.
        progress: Receives the progress.

    Returns:
        The claims with their verdicts; or the number of runs that are not finished, if other parts have to do them.

    Raises:
        UserError: There is no such study, or `out` has results of other settings.
        Stopped: A signal stopped a training. The same call resumes the study.
    """
    found = find(name)
    check_folder(out)
    runs = found.study.plan(out, quick)
    mine = runs if only is None else execution.share(only, runs)
    found.study.prepare(out, quick, device, progress)
    for number, run in enumerate(mine, 1):
        execution.finish(found.study, run, out, device, progress, f"run {number} of {len(mine)}, {run.name}")
    if left := sum(not execution.is_finished(run, out) for run in runs):
        return left
    with lock(out, World()):  # two parts may end at the same moment
        claims = found.study.judge([execution.result(run, out) for run in runs], out)
        write_report(name, found.about, quick, runs, claims, out)
    return claims
