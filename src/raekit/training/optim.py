"""The optimizers AdamW and Muon, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn, optim

from raekit.config import OnPurpose, Steps, configclass
from raekit.distributed.sharding import local
from raekit.errors import UserError
from raekit.training.muon import muon_step


@configclass
class OptimConfig:
    """An optimizer and its learning rate schedule, in optimizer steps.

    Attributes:
        method: `adamw`, or `muon` (RAE v2). With `muon`, Muon trains the two-dimensional parameters, and AdamW trains
            the others. Muon's steps are scaled to the size of AdamW's steps, so that both use `lr`.
        momentum: Momentum of Muon.
        lr: Learning rate during the warm-up and at the start of the decay.
        final_lr: Learning rate from step `decay_end` on, unless `decay` is `constant`.
        warmup_steps: Number of steps before the decay starts. In these steps the learning rate is `lr`, or rises to
            `lr` with `warmup_from_zero`.
        warmup_from_zero: Increase the learning rate linearly from zero to `lr` in the warm-up steps.
        decay: Curve of the learning rate from `lr` to `final_lr`; `constant` stays at `lr`.
        decay_end: Step at which the decay ends, counted from 0 and including the warm-up.
        betas: The betas of AdamW.
        weight_decay: Decoupled weight decay.
        eps: The epsilon of AdamW.
        clip: Largest global gradient norm; 0 turns clipping off.
    """

    method: Literal["adamw", "muon"] = "adamw"
    momentum: float = 0.95
    lr: OnPurpose[float] = 2e-4
    final_lr: OnPurpose[float] = 2e-5
    warmup_steps: OnPurpose[Steps] = 0
    warmup_from_zero: OnPurpose[bool] = False
    decay: OnPurpose[Literal["constant", "linear", "cosine"]] = "constant"
    decay_end: OnPurpose[Steps] = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    clip: OnPurpose[float] = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "final_lr", "warmup_steps", "weight_decay", "eps", "clip"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name}: {getattr(self, name)} must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas: {self.betas} must be at least 0 and below 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim.momentum: {self.momentum} must be at least 0 and below 1")
        if self.decay != "constant" and self.decay_end <= self.warmup_steps:
            raise UserError(
                f"optim.decay_end: {self.decay_end} must be after optim.warmup_steps = {self.warmup_steps} "
                f"for optim.decay = {self.decay}"
            )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Return the learning rate in step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * ((step + 1) / config.warmup_steps if config.warmup_from_zero else 1.0)
    if config.decay == "constant":
        return config.lr
    progress = min((step - config.warmup_steps) / (config.decay_end - config.warmup_steps), 1.0)
    remaining = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_lr + (config.lr - config.final_lr) * remaining


def adamw(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> optim.AdamW:
    """Build torch's fused AdamW."""
    return optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        eps=config.eps,
        fused=True,
    )


class MuonAdamW(optim.Optimizer):
    """`Muon` for `matrices` and torch's AdamW for `others`, as one optimizer with two parameter groups.

    A step changes nothing if the tensor `found_inf` is not zero. Both check `found_inf` on the device.
    """

    found_inf: Tensor | None = None

    def __init__(self, config: OptimConfig, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> None:
        self.adamw = adamw(config, others)
        muon = {
            "params": list(matrices),
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "momentum": config.momentum,
        }
        super().__init__([muon, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        # Loading a checkpoint replaces groups and state, so AdamW gets the present ones before each step.
        muon, adamw = self.param_groups
        self.adamw.param_groups, self.adamw.state = [adamw], self.state
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        found = None if self.found_inf is None else local(self.found_inf)
        matrices = [p for p in muon["params"] if p.grad is not None]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix.grad)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        muon_step(matrices, momenta, muon["lr"], muon["weight_decay"], muon["momentum"], found)


def by_muon(config: OptimConfig, module: nn.Module, convolutions: Iterable[nn.Module] = ()) -> list[nn.Parameter]:
    """Return the parameters of `module` that Muon trains: its matrices, without the parameters of `convolutions`."""
    if config.method == "adamw":
        return []
    kernels = {p for each in convolutions for p in each.parameters()}
    return [p for p in module.parameters() if p.ndim == 2 and p not in kernels]


def count_moments(config: OptimConfig, module: nn.Module, convolutions: Iterable[nn.Module] = ()) -> int:
    """Return the number of values in the optimizer's moments: one for each parameter of Muon, two for the others."""
    matrices = sum(matrix.numel() for matrix in by_muon(config, module, convolutions))
    return 2 * sum(parameter.numel() for parameter in module.parameters()) - matrices


def build_optimizer(config: OptimConfig, module: nn.Module, convolutions: Iterable[nn.Module] = ()) -> optim.Optimizer:
    """Build the optimizer of `module`.

    Muon skips the parameters of `convolutions`, even if they are matrices; AdamW trains them.

    Raises:
        UserError: If `config.method` is muon and the module has no matrices.
    """
    if config.method == "adamw":
        return adamw(config, module.parameters())
    matrices = by_muon(config, module, convolutions)
    if not matrices:
        raise UserError("optim.method: muon trains matrices, but this module has none; use adamw")
    chosen = set(matrices)
    return MuonAdamW(config, matrices, [p for p in module.parameters() if p not in chosen])
