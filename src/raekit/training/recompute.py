"""Activation checkpointing: run blocks again in the backward pass instead of keeping their activations."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Change each of `blocks` in place to keep only its input for the backward pass.

    The second forward pass of a block must give the same result as the first. A block must therefore neither draw
    random numbers from a generator nor change a buffer.
    """
    for block in blocks:
        block.forward = MethodType(_forward_again, block)


@contextmanager
def without_recomputation(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Undo `checkpoint_blocks` inside this block, for example to count each operation once."""
    changed = {block: block.__dict__.pop("forward") for block in blocks if "forward" in block.__dict__}
    try:
        yield
    finally:
        for block, forward in changed.items():
            block.forward = forward


def _forward_again(block: nn.Module, *args: Any) -> Any:
    return recomputed(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False)
