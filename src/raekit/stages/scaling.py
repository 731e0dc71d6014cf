"""Configs of another length: steps, schedules, starts and intervals in proportion."""

import math
from pathlib import Path
from typing import TypeVar

from raekit.config import Mark, replaced
from raekit.data.sources import open_source
from raekit.errors import UserError
from raekit.inference.cache import CacheInfo
from raekit.inference.shards import read_infos
from raekit.stages.record import StageConfig

Config = TypeVar("Config", bound=StageConfig)


def for_steps(config: Config, steps: int) -> Config:
    """Return `config` with `steps` training steps.

    Every other number of steps changes by the same factor, rounded down: warm-up and decay, starts of the losses, the
    intervals of checkpoints and evaluations, and the milestones. The interval of log records and the averages of the
    weights stay.
    """
    before = config.train.steps
    config = replaced(config, Mark.STEPS, lambda number: number * steps // before)
    return replaced(config, Mark.INTERVAL, lambda number: max(number * steps // before, 1))


def steps_of(config: StageConfig, epochs: float) -> int:
    """Return the number of steps that see every image of the config's source `epochs` times.

    Raises:
        UserError: `epochs` is not a positive, finite number, or the source cannot be opened.
    """
    if not 0 < epochs < math.inf:
        raise UserError(f"--epochs: {epochs} must be positive and finite")
    if latents := getattr(config, "latents", None):
        images = next(iter(read_infos(Path(latents), CacheInfo).values())).items
    else:
        images = len(open_source(config.data.address, config.data.split))
    return max(round(epochs * images / config.train.batch_size), 1)
