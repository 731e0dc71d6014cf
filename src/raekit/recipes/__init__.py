"""What to run: one file for each recipe, found by its name.

A variant of a recipe is `dataclasses.replace` of its `config()`.
"""

import importlib
import pkgutil
from dataclasses import dataclass

from raekit.errors import UserError
from raekit.stages.run import StageConfig


@dataclass(frozen=True)
class Recipe:
    """A named configuration. `about` tells what it reproduces, its expected score, cost and last verified result."""

    name: str
    about: str
    config: StageConfig

    @property
    def summary(self) -> str:
        return self.about.strip().splitlines()[0]


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Recipe:
    """The recipe `name`; UserError, listing all, if there is none."""
    if name not in names():
        raise UserError(f"recipe {name!r}: no such recipe; there are {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Recipe(name, module.__doc__ or "", module.config())
