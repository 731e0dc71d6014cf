"""The recipes, one module each, whose name is the name of the recipe.

To make a variant of a recipe, apply `dataclasses.replace` to its `config()`.
"""

import importlib
import pkgutil
from dataclasses import dataclass

from raekit.errors import UserError
from raekit.stages.run import StageConfig


@dataclass(frozen=True)
class Recipe:
    """A named training config.

    Attributes:
        name: Name of the recipe and of its module.
        about: The docstring of the module: what the recipe reproduces, its cost and its last verified result.
        config: The config.
    """

    name: str
    about: str
    config: StageConfig

    @property
    def summary(self) -> str:
        return self.about.strip().splitlines()[0]


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Recipe:
    """Return the recipe `name`.

    Raises:
        UserError: If there is no such recipe. The message lists all recipes.
    """
    if name not in names():
        raise UserError(f"recipe {name!r}: no such recipe; choose from: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Recipe(name, module.__doc__ or "", module.config())
