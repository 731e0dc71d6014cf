"""The numerical precision of the forward and backward passes in training."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["auto", "fp32", "tf32", "bf16"]
"""Precision of the losses. `tf32` is float32 with matrix products of 10 fraction bits on CUDA (eight times as fast from
Ampere on), and plain float32 on other devices; for `auto` see `compute_dtype`."""


_WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10")
"""The beginnings of oneDNN's names for instruction sets with AVX-512 BF16."""


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether torch multiplies bfloat16 faster than float32.

    It does on GPUs with native bfloat16, with AMX, and with AVX-512 BF16 of AMD: an EPYC (Zen 4) has twice its rate of
    float32 products, but an Intel Xeon half to two thirds of it (docs/results/cpu.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN multiplies the matrices. This variable of its own limits the instructions that it uses.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    free = limit in ("", "DEFAULT", "ALL")
    processor = torch.cpu.get_capabilities()
    if processor.get("amx_tile") and (free or "AMX" in limit):
        return True
    by_amd = "AMD" in processor.get("cpu_name", "") and processor.get("avx512_bf16", False)
    return by_amd and (free or limit.startswith(_WITH_BF16))


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return bfloat16 or float32. `auto` is bfloat16 on devices that multiply it fast (`multiplies_bf16`)."""
    narrow = precision == "bf16" or (precision == "auto" and multiplies_bf16(device))
    return torch.bfloat16 if narrow else torch.float32


def autocast(precision: Precision, device: torch.device):
    """Return the autocast context for computing losses on `device`."""
    dtype = compute_dtype(precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def float32_precision(precision: Precision) -> Iterator[None]:
    """Set how CUDA computes float32 matrix products and convolutions in forward and backward passes.

    They use TF32 for the precision `tf32`, and exact float32 for all others. On exit the earlier settings return.
    """
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32  # by default torch allows TF32 in convolutions only
    products.allow_tf32 = convolutions.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
