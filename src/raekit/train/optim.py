"""AdamW, and learning rates as functions of the step."""

import math
from collections.abc import Iterable
from typing import Literal

from torch import nn, optim

from raekit.config import configclass
from raekit.errors import UserError


@configclass
class OptimConfig:
    """AdamW and its schedule, counted in optimizer steps.

    The rate is `lr` during `warmup_steps` (or climbs to it by lr / warmup_steps a step, `warmup_from_zero`),
    then goes to `final_lr` at step `decay_end` along `decay`, and stays there. `clip` bounds the global
    gradient norm; 0 turns clipping off.
    """

    lr: float = 2e-4
    final_lr: float = 2e-5
    warmup_steps: int = 0
    warmup_from_zero: bool = False
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_end: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "final_lr", "warmup_steps", "weight_decay", "eps", "clip"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name}: {getattr(self, name)} must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas: {self.betas} must be at least 0 and below 1")
        if self.decay != "constant" and self.decay_end <= self.warmup_steps:
            raise UserError(
                f"optim.decay_end: {self.decay_end} must be after optim.warmup_steps = {self.warmup_steps} "
                f"for optim.decay = {self.decay}"
            )


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * ((step + 1) / config.warmup_steps if config.warmup_from_zero else 1.0)
    if config.decay == "constant":
        return config.lr
    progress = min((step - config.warmup_steps) / (config.decay_end - config.warmup_steps), 1.0)
    remaining = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_lr + (config.lr - config.final_lr) * remaining


def adamw(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> optim.AdamW:
    """The optimizer in its fused form."""
    return optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        eps=config.eps,
        fused=True,
    )
