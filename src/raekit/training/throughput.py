"""How fast a training is: its speed, its FLOPs, and the share of the rate that the device can reach."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from raekit.distributed import World
from raekit.training.precision import Precision, compute_dtype, float32_precision, multiplies_bf16

PEAKS = {
    "B200": {"bf16": 2250, "tf32": 1125, "fp32": 75},
    "H200": {"bf16": 989.5, "tf32": 494.7, "fp32": 67},
    "H100 NVL": {"bf16": 835.5, "tf32": 417.8, "fp32": 60},
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989.5, "tf32": 494.7, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "RTX 4090": {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
}
"""Peak TFLOP/s of dense products according to the data sheets, by words of the device's name, more specific first."""
_SLOWER = re.compile(r"\b(Laptop|MIG|RTX 4090 D)\b")
"""Words of a device's name that has less than the peak of the card: a laptop's, a part of a GPU, and the 4090 D."""

_MEASURED_SECONDS = 0.3


def stated_peak(precision: str, device: torch.device) -> float | None:
    """Return the FLOP/s of the device's data sheet, or None for a CPU and for GPUs that PEAKS does not list."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peaks = () if _SLOWER.search(name) else PEAKS.items()
    known = next((values for words, values in peaks if re.search(rf"\b{words}\b", name)), {})
    return 1e12 * known[precision] if precision in known else None


class Peak(NamedTuple):
    """The highest rate of matrix products on a device.

    Attributes:
        flops: FLOP/s.
        stated: Whether the data sheet states it. If not, it was measured on this machine.
    """

    flops: float
    stated: bool


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of FLOPs, which also counts attention on a CPU."""
    aten: Any = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def _attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Return the FLOPs of attention from the shapes of the operation's tensors."""
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Return the FLOPs of the backward pass of attention from the shapes of the operation's tensors."""
    return sdpa_backward_flop_count(gradient, query, key, value)


@cache
def peak_of(device: torch.device, precision: Precision) -> Peak:
    """Return the peak that the data sheet states, or the measured rate of a device that `PEAKS` does not list."""
    dtype = compute_dtype(precision, device)
    exact = "tf32" if precision == "tf32" else "fp32"
    if stated := stated_peak("bf16" if dtype == torch.bfloat16 else exact, device):
        return Peak(stated, stated=True)
    with float32_precision(precision):  # without fast bf16 products, networks use float32 instructions
        return Peak(_measured(device, dtype if multiplies_bf16(device) else torch.float32), stated=False)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest large matrix product within some time, as other programs slow some of them."""
    size = 8192 if device.type == "cuda" else 768
    matrix = torch.linspace(-1, 1, size * size, device=device, dtype=dtype).view(size, size)
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _MEASURED_SECONDS:
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def peak_memory(device: torch.device) -> float:
    """Return the largest number of GiB that this process has used: on its GPU, or without one in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Speed:
    """Measures the speed of a training between two records.

    Args:
        step: The number of finished steps at the start.
        batch_size: Images of a step, over all processes.
        world: The processes.
        peak: The highest rate of one process.
    """

    def __init__(self, step: int, batch_size: int, world: World, peak: Peak) -> None:
        self._batch_size, self._world, self._peak = batch_size, world, peak
        self._first = self._since = step
        self._start = self._began = time.perf_counter()
        self._waited = self._flops = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of this block as waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out of the speed. It counts for the time left."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    def add(self, flops: float) -> None:
        """Add the FLOPs of a step, over all processes."""
        self._flops += flops

    def record(self, step: int, total: int) -> dict[str, float]:
        """Return the values to log after `step` of `total` steps. Every process must call this method.

        `tflops` and the share of the peak are means over the processes. The share is called `mfu` if the data sheet
        states the peak, and `matmul_share` if the peak was measured. `data_wait` and `peak_memory_gib` are the largest
        values of all processes.
        """
        now = time.perf_counter()
        elapsed, steps = now - self._began, step - self._since
        waited, memory = zip(*self._world.gather((self._waited, peak_memory(self._world.device))), strict=True)
        rate = self._flops / self._world.size / elapsed
        values = {
            "images_per_second": steps * self._batch_size / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait": max(waited) / elapsed,
            "tflops": rate / 1e12,
            "mfu" if self._peak.stated else "matmul_share": rate / self._peak.flops,
            "peak_memory_gib": max(memory),
            "seconds_left": (now - self._start) / (step - self._first) * (total - step),
        }
        self._since, self._began = step, time.perf_counter()
        self._waited = self._flops = 0.0
        return values
