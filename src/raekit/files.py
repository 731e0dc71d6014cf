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
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        _remove(partial)
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{path}: could not be written ({reason or error})") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
