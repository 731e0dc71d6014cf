"""The recipes, one module each, whose name is the name of the recipe.

To make a variant of a recipe, apply `dataclasses.replace` to its `config()`.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from raekit.config import from_dict, to_dict
from raekit.distributed import world
from raekit.errors import UserError, did_you_mean
from raekit.progress import Progress, silent
from raekit.stages import run as stages
from raekit.stages.run import StageConfig
from raekit.train.trainer import Report


class Purpose(StrEnum):
    """What a recipe is for, in the order of listing."""

    START = "Start here: built-in images, or your own with --data.source folder:DIR, on a CPU"
    RECONSTRUCT = "Stage 1 on ImageNet: a decoder for a pretrained encoder, on GPUs"
    GENERATE = "Stage 2 on ImageNet: a denoiser, on GPUs"


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

    @property
    def cost(self) -> str:
        """What the training costs, as its docstring says."""
        return next(line.partition(":")[2].strip() for line in self.about.splitlines() if line.startswith("Cost:"))

    @property
    def purpose(self) -> Purpose:
        """What the recipe is for."""
        if self.config.data.source == "emoji":
            return Purpose.START
        return Purpose.GENERATE if self.config.stage == "generation" else Purpose.RECONSTRUCT


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Recipe:
    """Return the recipe `name`.

    Raises:
        UserError: If there is no such recipe. The message lists all recipes.
    """
    if name not in names():
        hint = did_you_mean(name, names()) or f"choose from: {', '.join(names())}"
        raise UserError(f"recipe {name!r}: no such recipe; {hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Recipe(name, module.__doc__ or "", module.config())


def train(
    recipe: str | StageConfig,
    run: str | Path,
    *,
    device: str | None = None,
    report: Report = lambda step, metrics: None,
    progress: Progress = silent,
    **overrides: Any,
) -> Path:
    """Train a recipe or a config, or resume its run.

    Example: `train("emoji_decoder", "runs/decoder", train__steps=500, data__source="folder:images")`

    Args:
        recipe: the name of a recipe, or a config.
        run: the folder of the run.
        device: "cpu" or "cuda". Default: the GPU if there is one, else the CPU.
        report: receives the step and the metrics of each log record.
        progress: receives the progress of the preparation before the first step.
        **overrides: other values for fields of the config. A double underscore stands for a dot: `train__steps`. None
            removes an optional part.

    Returns:
        The folder RUN/artifact with the trained model.

    Raises:
        UserError: there is no such recipe or field, a value is invalid, or `run` belongs to another config.
        KeyboardInterrupt: a signal stopped the training. The same call resumes it.
    """
    config = find(recipe).config if isinstance(recipe, str) else recipe
    values = to_dict(config)
    for name, value in overrides.items():
        *parts, field = name.split("__")
        inner = values
        for part in parts:
            if inner.get(part) is None:  # an optional part that the recipe lacks, or a mistake that from_dict reports
                inner[part] = {}
            inner = inner[part]
            if not isinstance(inner, dict):
                raise UserError(f"train: {name} is not a field, because {part} has none")
        inner[field] = value
    config = from_dict(type(config), values, "train")
    with world(device) as here:
        if not stages.train(config, Path(run), here, report, progress):
            raise KeyboardInterrupt
    return Path(run) / "artifact"
