"""The type that a loaded network holds its weights in, and so computes in."""

from collections.abc import Collection

import torch
from torch import nn

from raekit.errors import check_choice
from raekit.models.linear import Linear


def check_dtype(dtype: object) -> None:
    """Check the type that a model is to be loaded in.

    Raises:
        UserError: it is neither float32 nor bfloat16.
    """
    check_choice("dtype", dtype, (torch.float32, torch.bfloat16))


def set_dtype(module: nn.Module, dtype: torch.dtype, keep: Collection[object] = ()) -> None:
    """Convert the floating-point weights and tables of `module` to `dtype`, in place.

    No autocast is needed after that, so no evaluation casts weights. Norms and softmax still compute their
    statistics in float32. A submodule that lays out narrow weights itself does so (`cast_weights`, see
    `raekit.training.casting`).

    Args:
        module: the network.
        dtype: float32 or bfloat16. Weights that were bfloat16 stay rounded when they become float32.
        keep: submodules and tables to leave as they are.

    Raises:
        UserError: `dtype` is neither float32 nor bfloat16.
    """
    check_dtype(dtype)
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.unpack()
    if dtype != torch.float32 and (own := getattr(module, "cast_weights", None)):
        for name, copy in own(dtype).items():
            module.get_parameter(name).data = copy.detach()
        return
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point() and not any(tensor is kept for kept in keep):
            tensor.data = tensor.data.to(dtype)
    for child in module.children():
        if not any(child is kept for kept in keep):
            set_dtype(child, dtype, keep)
