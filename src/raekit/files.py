"""Write files and folders completely or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from raekit.errors import UserError


def check_file(path: Path, suffix: str | None = None) -> None:
    """Check, before any work starts, that a file can be written to `path`.

    Raises:
        UserError: `path` does not end in `suffix`, is a folder, or is below a file.
    """
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{path}: the output file must end in {suffix}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the path of a file")
    _check_parents(path)


def check_folder(path: Path) -> None:
    """Check, before any work starts, that a folder can be written to `path`.

    Raises:
        UserError: `path` is a file or is below a file.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give the path of a folder")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    if above := next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), None):
        raise UserError(f"{path}: cannot be written because {above} is a file")


@contextmanager
def whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and move the result to `path` at the end.

    The old content of `path` stays until then, even if the process is killed. The parent folders of `path` are
    created.

    Args:
        path: the final place of the result.
        folder: whether the result is a folder. By default, it is a file.

    Raises:
        UserError: the result cannot be written, or `path` is a folder instead of a file or a file instead of a folder.
    """
    (check_folder if folder else check_file)(path)
    # A separate folder, because a killed writer may leave temporary files with other names.
    work = path.with_name(path.name + ".partial")
    old = work / "old" / path.name
    try:
        if old.is_dir() and not path.exists():  # the last process was killed between the two moves below
            old.replace(path)
        _remove(work)
        work.mkdir(parents=True)
        yield work / path.name
        # Apply the umask: safetensors writes files that only their owner can read.
        mode = work.stat().st_mode & 0o666
        for written in (work / path.name, *(work / path.name).rglob("*")):
            if written.is_file():
                written.chmod(mode)
        if path.is_dir():  # a folder cannot be replaced in one step
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
