"""Training checkpoints on disk, in torch's distributed format: the number of processes may change between runs."""

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
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def save(folder: Path, step: int, state: dict[str, Any], keep: int, world: World) -> None:
    """Save `state` as the checkpoint of `step`, and delete all but the newest `keep` checkpoints.

    The save is atomic: the checkpoint is written under a temporary name and then renamed.

    Raises:
        UserError: If the checkpoint cannot be written. The earlier checkpoints remain.
    """
    final, partial = folder / _name(step), folder / f"{_name(step)}.partial"
    if world.is_main:
        for unfinished in folder.glob("step-*.partial"):  # left by a process that was killed while saving
            shutil.rmtree(unfinished, ignore_errors=True)
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
        raise UserError(
            f"{final}: could not be saved ({_cause(failure)}); {have}. Free disk space and run the same command again"
        )
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def load(path: Path, state: dict[str, Any], world: World) -> None:
    """Load the checkpoint at `path` into `state`, in place.

    Raises:
        UserError: If the checkpoint is damaged or does not fit `state`.
    """
    try:
        with _quietly():
            dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    except (CheckpointException, Exception) as error:
        raise UserError(
            f"{path}: damaged or from a different run ({_cause(error)}); "
            "remove this folder to resume from the previous checkpoint"
        ) from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide torch's warning that the process group is disabled, which is intended for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: BaseException | None) -> str:
    """Return the innermost cause of a distributed checkpoint's nested exceptions, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        return _cause(next(iter(error.failures.values()))[0])
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
