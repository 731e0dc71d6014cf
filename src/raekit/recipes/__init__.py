"""The recipes, one module each, whose name is the name of the recipe.

To make a variant of a recipe, apply `dataclasses.replace` to its `config()`.
"""

import importlib
import pkgutil
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from raekit.config import from_dict, to_dict
from raekit.distributed import World, plain_tensors, world
from raekit.errors import UserError, did_you_mean
from raekit.extensions import failed, run_file
from raekit.inference.cache import cache_latents
from raekit.models.autoencoder import load_autoencoder
from raekit.progress import Progress, silent
from raekit.stages import run as stages
from raekit.stages.generation import GenerationConfig
from raekit.stages.record import STAGES, StageConfig
from raekit.training.trainer import Report


class Purpose(StrEnum):
    """What a recipe is for, in the order of listing."""

    START = "Start here: built-in images, or your own with --data.source folder:DIR, on a CPU"
    PHOTOS = "Your own photos at 256 pixels: start from published models, on one GPU"
    RECONSTRUCT = "Stage 1 on ImageNet: a decoder for a pretrained encoder, on GPUs"
    GENERATE = "Stage 2 on ImageNet: a denoiser, on GPUs"


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

    @property
    def size(self) -> str:
        """The number of trained parameters, as its docstring says."""
        return self._line("Size")

    @property
    def memory(self) -> str:
        """The memory that training takes, as its docstring says."""
        return self._line("Memory")

    @property
    def cost(self) -> str:
        """What the training costs, as its docstring says."""
        return self._line("Cost")

    def _line(self, name: str) -> str:
        """Return an entry of the docstring. Its further lines are indented."""
        found = re.search(rf"^{name}:(.*(?:\n +.*)*)", self.about, re.MULTILINE)
        if not found:
            raise UserError(f"{self.path}: the docstring of a recipe needs the line {name!r}, as other recipes have it")
        return " ".join(found[1].split())

    @property
    def purpose(self) -> Purpose:
        """What the recipe is for."""
        if self.config.data.source == "emoji":
            return Purpose.START
        if self.config.data.source == "folder:photos":
            return Purpose.PHOTOS
        return Purpose.GENERATE if self.config.stage == "generation" else Purpose.RECONSTRUCT


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Recipe:
    """Return a recipe.

    Args:
        name: Name of a recipe of this package, or the path of a Python file (.py) with a function `config()` that
            returns the config of a stage. The file is run.

    Raises:
        UserError: If there is no such recipe (the message lists all recipes), or if the file fails.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in names():
        hint = did_you_mean(name, names()) or (
            f"choose from: {', '.join(names())}; or give a file FILE.py with a function config()"
        )
        raise UserError(f"recipe {name!r}: no such recipe; {hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Recipe(name, module.__doc__ or "", module.config(), Path(str(module.__file__)))


def _from_file(path: Path) -> Recipe:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `raekit recipes NAME > {path.name}` writes one to start from")
    module = run_file(path)
    if not callable(getattr(module, "config", None)):
        raise UserError(f"{path}: has no function config(), which every recipe needs")
    try:
        config = module.config()
    except Exception as error:  # of any code that a user writes
        raise failed(path, error) from error
    if type(config) not in STAGES.values():
        raise UserError(f"{path}: config() must return the config of a stage, not {type(config).__name__}")
    return Recipe(path.stem, module.__doc__ or str(path), config, path)


def configured(recipe: str | Path | StageConfig, **overrides: Any) -> StageConfig:
    """Return the config of a recipe with other values for some of its fields. See `train` for the arguments."""
    if isinstance(recipe, str | Path):
        config = find(str(recipe)).config
    elif type(recipe) in STAGES.values():
        config = recipe
    else:
        raise UserError(
            f"train: recipe {recipe!r} must be the name of a recipe, a recipe file or the config of a stage"
        )
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
    return from_dict(type(config), values, "train")


def cache(config: GenerationConfig, progress: Progress = silent) -> None:
    """Cache the latents that a training of stage 2 reads, in float32. A complete cache is kept.

    Args:
        config: the config of the training, with `latents`.
        progress: receives the progress.
    """
    assert config.latents
    name, folder = config.autoencoder, Path(config.latents)
    cache_latents(load_autoencoder(name), name, config.data, folder, dtype="fp32", world=World(), progress=progress)


@plain_tensors()
def train(
    recipe: str | Path | StageConfig,
    run: str | Path,
    *,
    device: str | None = None,
    report: Report = lambda step, metrics: None,
    progress: Progress = silent,
    change: bool = False,
    **overrides: Any,
) -> Path:
    """Train a recipe or a config, or resume its run.

    Example: `train("emoji_decoder", "runs/decoder", train__steps=500, data__source="folder:images")`

    Args:
        recipe: the name of a recipe, the path of a recipe file (.py), or a config.
        run: the folder of the run.
        device: "cpu" or "cuda". Default: the GPU if there is one, else the CPU.
        report: receives the step and the metrics of each log record.
        progress: receives the progress of the preparation before the first step.
        change: allows changes of an existing run that are made on purpose, such as `train__steps`.
        **overrides: other values for fields of the config. A double underscore stands for a dot: `train__steps`. None
            removes an optional part.

    Returns:
        The folder RUN/artifact with the trained model.

    Raises:
        UserError: there is no such recipe or field, a value is invalid, or `run` belongs to another config.
        Stopped: a signal stopped the training. The same call resumes it.
    """
    config = configured(recipe, **overrides)
    if not isinstance(run, str | Path):
        raise UserError(f"train: run {run!r} must be the path of a folder")
    with world(device) as here:
        stages.train(config, Path(run), here, report, progress, change)
    return Path(run) / "artifact"
