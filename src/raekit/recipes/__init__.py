"""The recipes, one module each, whose name is the name of the recipe.

To make a variant of a recipe, apply `dataclasses.replace` to its `config()`.
"""

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from raekit.errors import UserError
from raekit.stages.run import StageConfig


@dataclass(frozen=True)
class Recipe:
    """A named training config.

    Attributes:
        name: Name of the recipe and of its module.
        about: The docstring of the module: what the recipe reproduces, its cost and its last verified result.
        config: The config.
        path: The file of the module.
    """

    name: str
    about: str
    config: StageConfig
    path: Path

    @property
    def summary(self) -> str:
        return self.about.strip().splitlines()[0]


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Recipe:
    """Return a recipe.

    Args:
        name: Name of a recipe of this package, or the path of a Python file (.py) with a function `config()` that
            returns the config of a stage. The file is run, and may register encoders (`raekit.models.registry`).

    Raises:
        UserError: If there is no such recipe (the message lists all recipes), or if the file fails.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in names():
        raise UserError(
            f"recipe {name!r}: no such recipe; choose from: {', '.join(names())}; or give a file FILE.py with a "
            "function config()"
        )
    module = importlib.import_module(f"{__name__}.{name}")
    return Recipe(name, module.__doc__ or "", module.config(), Path(str(module.__file__)))


def _from_file(path: Path) -> Recipe:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `raekit recipes NAME > {path.name}` writes one to start from")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # of any code that a user writes
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = f" in line {lines[-1]}" if lines else ""
        raise UserError(f"{path}: the recipe failed{line} ({type(error).__name__}: {error})") from error
    if not isinstance(config, StageConfig):
        raise UserError(f"{path}: config() must return the config of a stage, not {type(config).__name__}")
    return Recipe(path.stem, module.__doc__ or str(path), config, path)
