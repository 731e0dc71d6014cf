"""What does each choice in a training step of DiT^DH bring? Compare our step with steps that undo one choice.

    python benchmarks/choices.py [--size S] [--batch 2] [--precision bf16] [--only NAME ...] [--modes compiled]
        [--repeats 5] [--out DIR]

The steps take turns in one process, first eager, then compiled. A speed-up is relative to our step and has its range
over the turns; below 1, our choice is faster. These choices are undone:

- contiguous halves in the rotary embedding (the published code interleaves pairs);
- rotation in float32;
- the norm as one operation;
- one projection for queries, keys and values;
- attention without a mask (RAE v2 passes a mask of zeros);
- SwiGLU's hidden width aligned in bf16;
- bf16 products computed in float32 on a CPU that does not multiply bf16 fast;
- weights cast in each pass in bf16 (a step with several micro-batches casts them once);
- the fused optimizer;
- blocks compiled one by one (compiled step only).
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import SIZES, denoiser, interleaved, named, report, training_step
from machine import MatmulRate
from raekit.distributed import prepare_device
from raekit.models import layers, linear
from raekit.models.denoiser import Denoiser
from raekit.training.precision import compute_dtype

ATTENTION = F.scaled_dot_product_attention


def interleaved_pairs(x: Tensor, rotary: layers.Rotary) -> Tensor:
    cos, sin = rotary
    x_wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    a, b = x_wide.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def rotate_in_type_of_input(x: Tensor, rotary: layers.Rotary) -> Tensor:
    cos, sin = (table.to(x.dtype) for table in rotary)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def norm_in_steps(self: layers.RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def three_projections(self: layers.Attention, x: Tensor, rotary: layers.Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w, b in parts)
    q, k = self.q_norm(q), self.k_norm(k)
    return (layers.rotate(q, rotary), layers.rotate(k, rotary), v) if rotary else (q, k, v)


def attention_with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ATTENTION(q, k, v, attn_mask=torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device))


def swiglu_not_aligned(self: layers.SwiGLU, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: parameter.to(dtype) for name, parameter in self.named_parameters()}


PATCHES: dict[str, tuple[Any, str, Any]] = {
    "interleaved rotary": (layers, "rotate", interleaved_pairs),
    "rotation in bf16": (layers, "rotate", rotate_in_type_of_input),
    "norm in steps": (layers.RMSNorm, "forward", norm_in_steps),
    "three projections": (layers.Attention, "_project", three_projections),
    "attention with a mask": (layers.F, "scaled_dot_product_attention", attention_with_mask),
    "bf16 products of torch": (linear, "NATIVE", True),
    "SwiGLU not aligned": (layers.SwiGLU, "cast_weights", swiglu_not_aligned),
}
NOT_FUSED, AS_ONE, CAST = "optimizer not fused", "compiled as one", "weights cast once"
MODES = ("eager", "compiled")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--batch", type=int, help="default: 2 on a CPU, 64 on a GPU")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument(
        "--only", nargs="+", choices=(NOT_FUSED, AS_ONE, CAST, *PATCHES), metavar="NAME", help="default: all"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    device = prepare_device()
    batch = arguments.batch or (64 if device.type == "cuda" else 2)

    def stepper(model: Denoiser, optimizer: torch.optim.Optimizer, cast_once: bool = False) -> Callable[[], None]:
        return training_step(model, optimizer, batch, arguments.precision, device, cast_once=cast_once)

    def undone(name: str, step: Callable[[], None]) -> None:
        with patch.object(*PATCHES[name]):
            step()

    torch._dynamo.config.recompile_limit = 64  # a block is compiled for each variant and width
    chosen = arguments.only or (NOT_FUSED, AS_ONE, CAST, *PATCHES)
    for mode in arguments.modes:
        model = denoiser(arguments.size, device)
        fused, plain = (torch.optim.AdamW(model.parameters(), fused=f, foreach=not f) for f in (True, False))
        variants = {"ours": stepper(model, fused)}
        if NOT_FUSED in chosen:
            variants[NOT_FUSED] = stepper(model, plain)
        if CAST in chosen and arguments.precision == "bf16":
            variants[CAST] = stepper(model, fused, cast_once=True)
        if mode == "compiled":
            model.compile()
            if AS_ONE in chosen:
                complete = denoiser(arguments.size, device)
                torch.nn.Module.compile(complete)  # `Denoiser.compile` compiles block by block
                variants[AS_ONE] = stepper(complete, torch.optim.AdamW(complete.parameters(), fused=True))
        variants |= {name: partial(undone, name, variants["ours"]) for name in PATCHES if name in chosen}
        rate = MatmulRate(compute_dtype(arguments.precision, device), device)
        times = interleaved(variants, arguments.repeats, device, rate)
        title = f"choices in a training step, {named(arguments.size)}, batch {batch}, {arguments.precision}, {mode}"
        report(title, times, batch, device, arguments.out, rate=rate)


if __name__ == "__main__":
    main()
