"""What compiling a model needs."""

import os
import shutil

import torch

from raekit.errors import UserError

CXX_COMPILERS = (os.environ.get("CXX", "g++"), "clang++")


def check_compiler(option: str, device: torch.device) -> None:
    """Raise UserError, naming the `option` that asks for it, if nothing can be compiled for `device`."""
    if device.type == "cpu" and not any(map(shutil.which, CXX_COMPILERS)):
        raise UserError(f"{option}: on a CPU it needs a C++ compiler; install g++, or leave it off")
