"""Files and folders that are there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from raekit.errors import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` to write a file or a folder to, and move it to `path` at the end.

    Until then what was at `path` stays, also if the process is killed. UserError, naming `path`, if the disk
    refuses. The folder of `path` is made.
    """
    # A folder of its own, since what writes there may leave temporary files of other names when it is killed.
    work = path.with_name(path.name + ".partial")
    try:
        _remove(work)
        work.mkdir(parents=True)
        yield work / path.name
        if path.is_dir():
            shutil.rmtree(path)
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
