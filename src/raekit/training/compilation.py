"""Compile parts of models."""

import os
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from raekit.errors import UserError

GRAPHS = 128
"""The largest number of compiled graphs of one block's code."""
CXX_COMPILERS = (os.environ.get("CXX", "g++"), "clang++")


def check_compiler(option: str, device: torch.device) -> None:
    """Raise UserError, naming the `option` that asks for it, if nothing can be compiled for `device`."""
    if device.type == "cpu" and not any(map(shutil.which, CXX_COMPILERS)):
        raise UserError(f"{option}: on a CPU it needs a C++ compiler; install g++, or leave it off")


def compile_parts(parts: Iterable[nn.Module], **options: Any) -> None:
    """Compile modules in place, with the options of `torch.compile`. Each is compiled when it first runs."""
    import torch._dynamo as dynamo  # torch imports it slowly

    # All blocks share the code of one class, and each width, batch size and kind of guidance needs a graph of its own.
    # Beyond torch's limit of 8 graphs, the blocks would run eagerly.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, GRAPHS)
    for part in parts:
        part.compile(**options)
