"""Exponential moving averages of a module's weights."""

import copy

import torch
from torch import nn

from raekit.distributed.sharding import local


def averaged_copy(module: nn.Module) -> nn.Module:
    """Return a frozen copy of `module` for `update`. Copy before compiling: a compiled forward keeps its weights."""
    return copy.deepcopy(module).requires_grad_(False).eval()


def warmed_up(decay: float, updates: int) -> float:
    """Return the decay of an average after `updates` updates: small at first, so that it forgets the first weights."""
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def update(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Set `average` to decay * average + (1 - decay) * module, in place, and copy the buffers."""
    torch._foreach_lerp_(list(map(local, average.parameters())), list(map(local, module.parameters())), 1 - decay)
    for old, new in zip(average.buffers(), module.buffers(), strict=True):
        old.copy_(new)
