"""Copies of weights in the type of the forward and backward passes, made once for all micro-batches of a step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def cast_weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies in `dtype` of the parameters of the linear layers in `module`, by name.

    Gradients flow through the copies to the parameters, and accumulate there in the type of the parameters. A module
    that lays out its copies itself has a method `cast_weights(dtype)` with the same result.
    """
    if own := getattr(module, "cast_weights", None):
        return own(dtype)
    if isinstance(module, nn.Linear):
        return {name: parameter.to(dtype) for name, parameter in module.named_parameters()}
    return {
        f"{child}.{name}": copy
        for child, part in module.named_children()
        for name, copy in cast_weights(part, dtype).items()
    }


class CastWeights:
    """The copies of the weights of `blocks` for one step.

    Under autocast alone, each forward pass casts all weights, and so does each backward pass of compiled or
    checkpointed blocks.
    """

    def __init__(self, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._absent: list[Tensor | None] = []  # the copies; inside `used`, the parameters
        for block in blocks:
            for name, copy in cast_weights(block, dtype).items():
                owner, _, leaf = name.rpartition(".")
                self._places.append((block.get_submodule(owner), leaf))
                self._absent.append(copy)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the blocks compute with the copies inside this block, in forward and backward passes."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, (owner, name) in enumerate(self._places):
            present = owner._parameters[name]
            owner._parameters[name] = self._absent[i]  # type: ignore[assignment]
            self._absent[i] = present
