"""Run Python files of users, such as recipes and files that register encoders."""

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from raekit.errors import UserError

VARIABLE = "RAEKIT_IMPORT"
"""The environment variable that names the files, separated as in PATH, that every command runs first."""


def run_extensions() -> None:
    """Run the files in the environment variable RAEKIT_IMPORT, for example to register encoders.

    Raises:
        UserError: A file is missing or fails.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        try:
            run_file(Path(name).expanduser())
        except UserError as error:
            raise UserError(f"{VARIABLE}: {error}") from None


def run_file(path: Path) -> ModuleType:
    """Run a Python file, and return it as a module.

    Raises:
        UserError: There is no such file, its name does not end in .py, or it fails.
    """
    if path.suffix != ".py":
        raise UserError(f"{path}: must be a Python file, FILE.py")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"raekit_extension_{path.stem}", path)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # as dataclasses and pickle need it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of any code that a user writes
        raise failed(path, error) from error
    return module


def failed(path: Path, error: Exception) -> UserError:
    """Return the error message for code of the file `path` that raised `error`."""
    if isinstance(error, UserError):
        return UserError(f"{path}: {error}")
    frames, here = traceback.extract_tb(error.__traceback__), str(path.absolute())
    lines = [frame.lineno for frame in frames if frame.filename == here]
    line = f" in line {lines[-1]}" if lines else ""
    return UserError(f"{path}: the code failed{line} ({type(error).__name__}: {error})")
