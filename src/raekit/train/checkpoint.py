"""Training state on disk, through torch's distributed checkpoint: any number of processes reads any other's."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from raekit.distributed import World
from raekit.errors import UserError


def _name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def save(folder: Path, step: int, state: dict[str, Any], keep: int, world: World) -> None:
    """Write `state` for `step` and drop all but the newest `keep` checkpoints.

    Atomic: it is written beside its final name, then renamed. If it cannot be written, UserError, and what
    was there before stays.
    """
    final, partial = folder / _name(step), folder / f"{_name(step)}.partial"
    if world.is_main:
        for torn in folder.glob("step-*.partial"):  # a process was killed while it wrote this
            shutil.rmtree(torn, ignore_errors=True)
    world.barrier()
    failure = None
    try:
        with _quietly():
            dcp.save(state, checkpoint_id=partial, no_dist=world.size == 1)
    except (CheckpointException, OSError, RuntimeError) as error:
        failure = error
    if world.any(failure is not None):
        shutil.rmtree(partial, ignore_errors=True)
        kept = checkpoints(folder)
        have = f"the newest complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise UserError(f"{final}: could not be saved ({_cause(failure)}); {have}. Free space and run the same again")
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def load(path: Path, state: dict[str, Any], world: World) -> None:
    """Read the checkpoint at `path` into `state`, in place. UserError if it is damaged."""
    try:
        with _quietly():
            dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    except (CheckpointException, Exception) as error:
        raise UserError(
            f"{path}: damaged or of another run ({_cause(error)}); "
            "remove this folder to go on from the checkpoint before it"
        ) from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warning that a world of one is what we asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: BaseException | None) -> str:
    """The root of a distributed checkpoint's nested exceptions, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        return _cause(next(iter(error.failures.values()))[0])
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
