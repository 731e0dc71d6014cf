"""Linear layers whose bfloat16 products are fast on every processor."""

from collections.abc import Callable
from typing import Any, Self

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
    """A linear layer that uses `linear`, and packs frozen bfloat16 weights on a CPU that multiplies bfloat16 fast.

    oneDNN, torch's library of products on a CPU, uses a layout of its own, and torch converts plain weights to it at
    every call. `to(device)` packs a weight, which means that it converts the weight once. A packed weight takes no more
    memory. State dicts and copies of the layer have plain weights.
    """

    packed = False
    """Whether the weight is packed. Its `is_mkldnn` says so too, but not while torch compiles the layer."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.packed:
            return linear(input, self.weight, self.bias)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(self.weight.dtype)
        # The packed product has no gradient.
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return F.linear(input, self.weight.to_dense(), self.bias)
        return torch.ops.raekit.packed_linear(input, self.weight, self.bias)

    def unpack(self) -> None:
        """Make the weight a plain tensor, which can be changed and converted."""
        if self.packed:
            self.weight, self.packed = self._plain(), False

    def _plain(self) -> nn.Parameter:
        return nn.Parameter(self.weight.detach().to_dense(), self.weight.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.unpack()
        super()._apply(fn, recurse)
        weight = self.weight
        if NATIVE and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not weight.requires_grad:
            self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight), requires_grad=False)
            self.packed = True
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for `copy` and `pickle`, which cannot handle a packed weight."""
        state = self.__dict__.copy()
        if self.packed:
            state |= {"packed": False, "_parameters": self._parameters | {"weight": self._plain()}}
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination[prefix + "weight"] = self._plain().detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, as `torch.nn.functional.linear`, for x (..., K), W (N, K) and b (N,).

    On a CPU that does not multiply bfloat16 fast (`multiplies_bf16`), bfloat16 products are computed with float32
    instructions: the bfloat16 values are widened, and the sums are rounded at the end. The result is the same up to the
    order of the sums, because torch's bfloat16 products also sum in float32. This is faster: on a Xeon with AVX-512
    BF16, torch's products have two thirds of the rate, and far less without instructions for bfloat16
    (docs/results/cpu.md).
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
        rows.sum(0) if ctx.biased and wanted[2] else None,
    )


_widened.register_autograd(_backward, setup_context=_remember)


# Not `custom_op`: its `device_types` do not include oneDNN's tensors on a CPU.
_LIBRARY = torch.library.Library("raekit", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(_LIBRARY, "packed_linear", "MkldnnCPU")
def _packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != weight.dtype:
        raise RuntimeError(f"expected x and weight to have the same dtype, but got {x.dtype} and {weight.dtype}")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("raekit::packed_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@register_flop_formula([torch.ops.raekit.linear, torch.ops.raekit.packed_linear])
def _flops(x_shape: Any, weight_shape: Any, *rest: Any, **options: Any) -> int:
    """Return the FLOPs of a product from the shapes of its tensors."""
    return 2 * x_shape.numel() * weight_shape[0]
