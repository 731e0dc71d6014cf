"""Files and folders that are there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from raekit.errors import UserError


def check_file(path: Path, suffix: str | None = None) -> None:
    """UserError if no file can be written to `path`, or it does not end in `suffix`: to say so before the work."""
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{path}: the file to write must end in {suffix}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file to write")
    _check_parents(path)


def check_folder(path: Path) -> None:
    """UserError if `path` cannot be a folder to fill: to say so before the work."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give a folder to write to")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    if above := next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), None):
        raise UserError(f"{path}: cannot be written, as {above} is a file")


@contextmanager
def whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a place beside `path` to write a file or a `folder` to, and move it to `path` at the end.

    Until then what was at `path` stays, also if the process is killed. UserError, naming `path`, if the disk
    refuses, or a folder is where a file is to be. The folder of `path` is made.
    """
    (check_folder if folder else check_file)(path)
    # A folder of its own, since what writes there may leave temporary files of other names when it is killed.
    work = path.with_name(path.name + ".partial")
    old = work / "old" / path.name
    try:
        if old.is_dir() and not path.exists():  # killed between the two moves below
            old.replace(path)
        _remove(work)
        work.mkdir(parents=True)
        yield work / path.name
        # For all whom the umask lets read: safetensors writes files for their owner alone.
        mode = work.stat().st_mode & 0o666
        for written in (work / path.name, *(work / path.name).rglob("*")):
            if written.is_file():
                written.chmod(mode)
        if path.is_dir():  # which nothing can take the place of
            old.parent.mkdir()
            path.replace(old)
        (work / path.name).replace(path)
        _remove(work)
    except (OSError, SafetensorError) as error:
        _remove(work)
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{path}: could not be written ({reason or error})") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
