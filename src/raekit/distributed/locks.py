"""Locks on folders: a folder is filled by one job at a time."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from platform import node
from typing import Any

from raekit.config import read_json
from raekit.distributed import World, slurm
from raekit.errors import UserError
from raekit.files import check_folder

NAME = ".lock"


@contextmanager
def lock(folder: Path, world: World) -> Iterator[None]:
    """Hold `folder` for this job until the block ends. All processes of the job must call this function.

    The lock is the file FOLDER/.lock, which names the host and the process. Only its exclusive creation is needed, so
    locks work on shared file systems. A lock of a dead process on this host, or of an earlier start of the same SLURM
    job, is taken over. A folder that is created here and stays empty is removed.

    Args:
        folder: the folder, which is created if it does not exist.
        world: the processes of this job.

    Raises:
        UserError: another job holds the folder (the message names its host and process), or it cannot be written to.
    """
    owner, created = _owner(), not folder.exists()
    failure = world.gather(_acquire(folder, owner) if world.is_main else None)[0]
    if failure:
        raise UserError(failure)
    try:
        yield
    finally:
        if world.is_main:
            with suppress(OSError):
                if _read(folder / NAME) == owner:
                    (folder / NAME).unlink()
                if created:
                    folder.rmdir()


def holder(folder: Path) -> dict[str, Any] | None:
    """Return the `host`, `pid` and `since` of the job that holds `folder`; None if no living job holds it."""
    owner = _read(folder / NAME)
    return None if not owner or _is_dead(owner) else owner


def _acquire(folder: Path, owner: dict[str, Any]) -> str | None:
    """Create the lock file, and return why this is not possible."""
    path = folder / NAME
    try:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                other = _read(path)
            else:
                try:
                    path.write_text(json.dumps(owner), "utf-8")
                except OSError:  # a full disk
                    path.unlink()
                    raise
                return None
            if not os.path.lexists(path):  # just given back
                continue
            if not _is_dead(other):
                who = "process {pid} on {host} since {since}".format(**other) if other else "an unknown process"
                return (
                    f"{folder}: in use by {who}. Wait for that process or choose another folder; if it no longer runs, "
                    f"remove {path}"
                )
            _remove(path, other)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{folder}: cannot be written to ({error.strerror or error})"


def _owner() -> dict[str, Any]:
    return {
        "host": node(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": slurm.number(os.environ, "SLURM_RESTART_COUNT", 0),
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the owner of a lock; {} if the file has just been created or removed, or is damaged."""
    try:
        owner = read_json(path)
    except UserError:
        return {}
    types = {"host": str, "pid": int, "started": str | None, "since": str, "job": str | None, "restarts": int}
    fits = isinstance(owner, dict) and owner.keys() == types.keys()
    return owner if fits and all(isinstance(owner[key], kind) for key, kind in types.items()) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    here = _owner()
    if owner.get("job") and owner["job"] == here["job"] and owner["restarts"] < here["restarts"]:
        return True  # SLURM has started this job again, so its earlier processes have ended
    return owner.get("host") == here["host"] and _started(owner["pid"]) != owner["started"]


def _started(pid: int) -> str | None:
    """Return when a process of this host started, in any unit; None if there is no such process.

    The number of a dead process may belong to a new process, which started at another time.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # the process of another user
    return "unknown"


def _remove(path: Path, stale: dict[str, Any]) -> None:
    """Remove the lock `stale`, but not a new lock of a process that has been faster."""
    aside = path.with_name(f"{NAME}.{os.getpid()}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside) == stale:
            aside.unlink()
        else:
            aside.rename(path)
