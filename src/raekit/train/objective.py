"""What a stage hands to the trainer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from raekit.errors import UserError
from raekit.train.optim import OptimConfig, learning_rate

Metrics = dict[str, Tensor]


class TrainingBatch(Protocol):
    """What the trainer has to know of a batch."""

    def __len__(self) -> int: ...
    def to(self, device: torch.device) -> Self: ...
    def split(self, size: int) -> list[Self]: ...


@dataclass(kw_only=True)
class Objective:
    """A module and the loss that trains it.

    `loss(batch, step)` returns the mean loss of a (micro-)batch and detached metrics to log. All its
    randomness is addressed by the batch's positions, so that it depends on neither the number of processes
    nor the size of the micro-batches. `blocks` are the module's repeated units: compiled and distributed
    one by one; `convolutions` are those of its linear layers that stand for convolutions, as patch embeddings do
    (`build_optimizer`). `monitor()` is a context that watches the module's forward passes, and gives what it saw; of
    that the largest is logged. The objective is active from step `start` on; its schedule counts from there, or from
    `schedule_start`. `ema` lists decays, and `averages` holds a copy of the module for each.
    """

    name: str
    module: nn.Module
    loss: Callable[[Any, int], tuple[Tensor, Metrics]]
    optim: OptimConfig
    blocks: Sequence[nn.Module] = ()
    convolutions: Sequence[nn.Module] = ()
    ema: tuple[float, ...] = ()
    monitor: Callable[[], AbstractContextManager[Metrics]] | None = None
    start: int = 0
    schedule_start: int | None = None
    averages: dict[float, nn.Module] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for decay in self.ema:
            if not 0 <= decay < 1:
                raise UserError(f"ema: {decay} must be at least 0 and below 1")

    def learning_rate(self, step: int) -> float:
        """The rate of the training's step `step`, counted from 0."""
        return learning_rate(self.optim, step - (self.start if self.schedule_start is None else self.schedule_start))

    @property
    def averaged(self) -> nn.Module:
        """The module to use for evaluation: the first average, or the trained module if there is none."""
        return self.averages[self.ema[0]] if self.ema else self.module


@dataclass(frozen=True, kw_only=True)
class Periodic:
    """`call(step)`, every `every` steps and after the last; its scalars are logged under `name`, with its time."""

    name: str = "evaluation"
    every: int
    call: Callable[[int], dict[str, float]]
