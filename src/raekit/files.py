"""Write files and folders completely or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from safetensors import SafetensorError

from raekit.errors import UserError

PARTIAL = ".raekit-partial"
"""The ending of temporary names. What has it is deleted, so nobody else may use it."""
_LONGEST = 255 - len(PARTIAL)
"""The longest name, in bytes, that common file systems allow with the ending of a temporary folder."""
FILE_ENDINGS = frozenset(
    (
        *(".png", ".webp", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".mp4"),
        *(".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors", ".zip", ".tar"),
        *(".txt", ".json", ".csv", ".html", ".md", ".pdf"),
    )
)
"""Endings of files. A new folder does not get such a name: whoever gives it expects a file."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""The errors of a write to an open file, which do not name the file."""


def as_path(name: str, value: object) -> Path:
    """Return a path that a caller gives.

    Args:
        name: the name of the argument, for the error message.
        value: a text or a path.

    Raises:
        UserError: `value` is neither, or empty. An empty path would be the working folder.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UserError(f"{name}: {value!r} is no path; give a text such as 'out', or a pathlib.Path")
    return Path(value)


def check_file(path: Path, suffix: str | None = None) -> None:
    """Check, before any work starts, that a file can be written to `path`. Tries to write to its folder.

    Raises:
        UserError: `path` does not end in `suffix`, is a folder, is below a file, or cannot be written.
    """
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{path}: the output file must end in {suffix}")
    _check_is_file(path)
    _try(path)


def check_folder(path: Path) -> None:
    """Check, before any work starts, that a folder can be written to `path`. Tries to write to it.

    Raises:
        UserError: `path` is a file, has the name of a file, is below a file, or cannot be written or read.
    """
    _check_is_folder(path)
    if path.suffix.lower() in FILE_ENDINGS and not os.path.isdir(path):
        raise UserError(f"{path}: a folder is written here, and {path.suffix} is the ending of a file; give a folder")
    _try(path)
    entries(path)


def _check_is_file(path: Path) -> None:
    if os.path.isdir(path):  # `Path.is_dir` raises an error for too long a name
        raise UserError(f"{path}: is a folder; give the path of a file")
    _check_parents(path)


def _check_is_folder(path: Path) -> None:
    if what := _no_folder(path):
        raise UserError(f"{path}: is {what}; give the path of a folder")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    for above in path.parents:
        if what := _no_folder(above):
            raise UserError(f"{path}: cannot be written because {above} is {what}")


def _no_folder(path: Path) -> str | None:
    """Return what is at `path` if it is no folder; None if it is a folder or there is nothing."""
    if os.path.isdir(path) or not os.path.lexists(path):
        return None
    return "a file" if os.path.exists(path) else "a link to nothing"


def _try(path: Path) -> None:
    """Write a temporary file to the nearest folder that exists."""
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # fails for too long a name
        with tempfile.TemporaryFile(dir=_existing(path)):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {_remedy(error)}") from None


def _existing(path: Path) -> Path:
    """Return the nearest folder above `path` that exists, or `path` itself."""
    real = Path(os.path.realpath(path))
    return next(each for each in (real, *real.parents) if os.path.isdir(each))


def check_space(path: Path, needed: int, remedy: str) -> None:
    """Raise UserError if the disk has no room for what will be written.

    Args:
        path: the file or the folder to be written.
        needed: the number of bytes.
        remedy: what the user can do instead of freeing space, for the error message.
    """
    try:
        free = shutil.disk_usage(_existing(path)).free
    except OSError:  # not every file system tells
        return
    if free < needed:
        raise UserError(
            f"{path}: needs {needed / 2**30:,.1f} GiB, but only {free / 2**30:,.1f} GiB of its disk are free; free "
            f"some space, or {remedy}"
        )


def _remedy(error: OSError) -> str:
    return "allow it, or give another path" if isinstance(error, PermissionError) else "give another path"


def entries(folder: Path) -> list[Path]:
    """Return the paths in `folder`, in any order; [] if there is no such folder.

    Raises:
        UserError: the folder cannot be read. `Path.glob` would find nothing in it.
    """
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); {_remedy(error)}") from None


@contextmanager
def whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and move the result to `path` at the end.

    The old content of `path` stays until then, even if the process is killed. The parent folders of `path` are
    created. If `path` is a link, the result goes to where it leads.

    Args:
        path: the final place of the result.
        folder: whether the result is a folder. By default, it is a file.

    Raises:
        UserError: the result cannot be written, or `path` is a folder instead of a file or a file instead of a folder.
        Exception: something else failed, such as reading another file. The temporary path is removed.
    """
    (_check_is_folder if folder else _check_is_file)(path)
    given, path = path, Path(os.path.realpath(path))  # "." and ".." have no name
    # A separate folder, because a killed writer may leave temporary files with other names.
    work = path.with_name(_short(path.name) + PARTIAL)
    old = work / "old" / path.name
    try:
        _restore(old, path)  # if the last process was killed between the two moves below
        remove(work)
        work.mkdir(parents=True)
        yield work / path.name
        # Apply the umask: safetensors writes files that only their owner can read.
        mode = work.stat().st_mode & 0o666
        for written in (work / path.name, *(work / path.name).rglob("*")):
            if written.is_file():
                written.chmod(mode)
        if path.is_dir() and not any(path.iterdir()):  # it stays the same folder, perhaps the working folder of a shell
            for written in (work / path.name).iterdir():
                written.replace(path / written.name)
        elif path.is_dir():  # a folder cannot be replaced in one step
            old.parent.mkdir()
            path.replace(old)
            (work / path.name).replace(path)
        else:
            (work / path.name).replace(path)
        remove(work)
    except Exception as error:
        _restore(old, path)  # if the second of the two moves failed
        remove(work)
        if isinstance(error, UserError) and str(work) in str(error):  # of a `whole` within this one
            raise UserError(str(error).replace(str(work / path.name), str(given))) from None
        if not isinstance(error, SafetensorError) and not (isinstance(error, OSError) and _is_about(error, path, work)):
            raise
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{given}: could not be written ({reason or error})") from None


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`: temporary folders of files that are complete, or were never written.

    `whole` removes only the temporary folder of the path that it writes. Call this function before filling a folder
    that keeps its finished files, while no other process writes to it.

    Args:
        folder: the folder, which need not exist. Its subfolders are not searched.
    """
    for left in folder.glob(f"*{PARTIAL}"):
        if left.is_dir() and not (left / "old").exists():  # `old` may hold the only copy; `whole` moves it back
            remove(left)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file or a link, but not what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _restore(old: Path, path: Path) -> None:
    """Move the folder `old` back to `path`, unless there is something new."""
    if old.is_dir() and not path.exists():
        old.replace(path)


def _short(name: str) -> str:
    """Return a file name to which an ending can be added."""
    octets = os.fsencode(name)
    return name if len(octets) <= _LONGEST else blake2b(octets, digest_size=8).hexdigest()


def _is_about(error: OSError, *places: Path) -> bool:
    """Return whether an error comes from writing one of the files or folders `places`, or below one of them."""
    if error.filename is None:
        return error.errno in _NO_SPACE
    name = Path(os.path.abspath(os.fsdecode(error.filename)))
    return any(name.is_relative_to(place) or place.is_relative_to(name) for place in places)
