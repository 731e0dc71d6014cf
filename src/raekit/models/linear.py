"""Linear layers whose bfloat16 products are fast on every processor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from raekit.training.precision import multiplies_bf16

NATIVE = multiplies_bf16(torch.device("cpu"))
"""Whether torch computes bfloat16 products on the CPU. If not, `linear` does so with float32 instructions."""
PIECE = 2**22
"""The largest number of values in a piece of a matrix. malloc takes such 16 MiB from memory that the process has."""


class Linear(nn.Linear):
    """A linear layer that uses `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, as `torch.nn.functional.linear`, for x (..., K), W (N, K) and b (N,).

    On a CPU that does not multiply bfloat16 fast (`multiplies_bf16`), bfloat16 products are computed with float32
    instructions: the bfloat16 values are widened, and the sums are rounded at the end. The result is the same up to the
    order of the sums, because torch's bfloat16 products also sum in float32. This is faster: on a Xeon with AVX-512
    BF16, torch's products have two thirds of the rate, and far less without instructions for bfloat16
    (docs/performance.md).
    """
    if NATIVE or weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        x, weight, bias = x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
    if not x.dtype == weight.dtype == torch.bfloat16:
        return F.linear(x, weight, bias)
    return _widened(x, weight, bias)


def widen_linear(model: nn.Module) -> None:
    """Change the layers of type `nn.Linear` in `model`, a network of another library, to `Linear`, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _pieces(matrix: Tensor) -> int:
    return max(1, -(-matrix.numel() // PIECE))


@torch.library.custom_op("raekit::linear", mutates_args=(), device_types="cpu")
def _widened(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, bias = _rows(x), None if bias is None else bias.float()
    out = x.new_empty(len(rows), len(weight))
    with torch.autocast("cpu", enabled=False):
        if rows.numel() > weight.numel():  # the smaller matrix is widened at once, the larger one piece by piece
            weight, pieces = weight.float(), _pieces(rows)
            for part, target in zip(rows.chunk(pieces), out.chunk(pieces), strict=True):
                target.copy_(F.linear(part.float(), weight, bias))
        else:
            rows, pieces = rows.float(), _pieces(weight)
            parts = weight.chunk(pieces)
            biases = [None] * len(parts) if bias is None else bias.chunk(pieces)
            for part, add, target in zip(parts, biases, out.chunk(pieces, 1), strict=True):
                target.copy_(F.linear(rows, part.float(), add))
    return out.view(*x.shape[:-1], len(weight))


@_widened.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.biased = bias is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias, of which two are products themselves."""
    x, weight = ctx.saved_tensors
    rows, wanted = _rows(gradient), ctx.needs_input_grad
    return (
        linear(gradient, weight.mT) if wanted[0] else None,
        linear(rows.mT, _rows(x).mT) if wanted[1] else None,
        rows.sum(0, dtype=torch.float32).to(weight.dtype) if ctx.biased and wanted[2] else None,
    )


_widened.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.raekit.linear)
def _flops(x_shape: Any, weight_shape: Any, *rest: Any, **options: Any) -> int:
    """Return the FLOPs of a product from the shapes of its tensors."""
    return 2 * x_shape.numel() * weight_shape[0]
