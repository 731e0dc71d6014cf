"""The interface between a stage and the trainer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from raekit.errors import UserError
from raekit.training.optim import OptimConfig, learning_rate

Metrics = dict[str, Tensor]


class TrainingBatch(Protocol):
    """The methods of a batch that the trainer calls."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return the batch on `device`."""
        ...

    def split(self, size: int) -> list[Self]:
        """Split the batch into micro-batches of `size` samples."""
        ...


@dataclass(kw_only=True)
class Objective:
    """A module and the loss that trains it.

    Attributes:
        name: Prefix of the logged metrics.
        module: The trained module.
        loss: `loss(batch, step)` returns the mean loss of a (micro-)batch, and metrics to log. Its random
            numbers must depend only on the positions of the samples, so that they are the same for any number of
            processes and any micro-batch size.
        optim: Optimizer and learning rate schedule.
        blocks: Repeated parts of the module, which are compiled and sharded one by one.
        convolutions: Linear layers that act as convolutions, for example patch embeddings (`build_optimizer`).
        ema: Decays of the exponential moving averages of the weights, each at least 0 and below 1.
        monitor: `monitor()` returns a context manager that observes the module's forward passes and yields metrics.
            Their largest values are logged.
        start: First training step in which the objective is trained.
        schedule_start: Training step from which the learning rate schedule counts; None means `start`.
        averages: One averaged copy of the module per decay in `ema`.
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
        """Return the learning rate in training step `step`, counted from 0."""
        return learning_rate(self.optim, step - (self.start if self.schedule_start is None else self.schedule_start))

    @property
    def averaged(self) -> nn.Module:
        """The module for evaluation: the average of the first decay, or the trained module if there are no averages."""
        return self.averages[self.ema[0]] if self.ema else self.module


@dataclass(frozen=True, kw_only=True)
class Periodic:
    """A call between training steps, such as an evaluation.

    Attributes:
        name: Prefix of the logged metrics.
        every: Number of steps between two calls. The call also runs after the last step.
        call: `call(step)` returns values and pictures to log. The trainer also logs the time that the call takes.
    """

    name: str = "evaluation"
    every: int
    call: Callable[[int], Mapping[str, float | Image]]
