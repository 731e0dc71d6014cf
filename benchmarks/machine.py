"""The machine that a benchmark runs on: what it is, how fast it multiplies, and how much memory is in use."""

import ctypes
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")
"""The processor flags that decide how fast matrix products are. The last two are Arm's."""


def describe(device: torch.device) -> dict[str, str | int | float]:
    """Return what a reader needs to compare figures: processor, instruction set, GPU, driver, torch and threads."""
    facts: dict[str, str | int | float] = _processor() | {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": torch.version.cuda or "",
            "gpu_memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        }
    return facts


def summary(facts: dict[str, str | int | float]) -> str:
    """Return the facts of `describe` as a line."""
    line = "{processor} ({instructions}), {cores} cores, {threads} threads, torch {torch}".format(**facts)
    if "gpu" in facts:
        line = "{gpu}, {gpu_memory_gib} GiB, driver {driver}, CUDA {cuda}; ".format(**facts) + line
    return line


def _processor() -> dict[str, str]:
    place = Path("/proc/cpuinfo")
    lines = place.read_text().splitlines() if place.is_file() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", values.get("Features", "")).split()
    return {
        "processor": values.get("model name") or platform.processor() or platform.machine(),
        "instructions": " ".join(flag for flag in INSTRUCTIONS if flag in flags) or "instruction set unknown",
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


class MatmulRate:
    """The FLOP/s of square matrix products on this machine.

    A benchmark measures the rate just before and after each timed run, since other users of a machine may change it
    from second to second.

    Attributes:
        history: Every measured rate in FLOP/s, in order.
        around: The mean rate before and after each timed run, by variant.
    """

    ENOUGH_SECONDS = 5e-3

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.precision = device, "bf16" if dtype == torch.bfloat16 else "fp32"
        self.history: list[float] = []
        self.around: dict[str, list[float]] = {}
        side, largest = 256, 8192 if device.type == "cuda" else 2048
        while True:  # up to the size that fills the device, or takes long enough on a slow one
            self.a, self.b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            if side == largest or min(self._seconds() for _ in range(3)) > self.ENOUGH_SECONDS:
                break
            side *= 2
        self.measure()

    def _seconds(self) -> float:
        synchronise(self.device)
        began = time.perf_counter()
        _ = self.a @ self.b
        synchronise(self.device)
        return time.perf_counter() - began

    def measure(self, repeats: int = 3) -> float:
        """Return the median rate of `repeats` products, and add it to the history."""
        self.history.append(2 * len(self.a) ** 3 / statistics.median(self._seconds() for _ in range(repeats)))
        return self.history[-1]

    def __str__(self) -> str:
        first, last, low, high = (x / 1e12 for x in (self.history[0], self.history[-1], *self.range))
        unit = "TFLOP/s"
        return f"matmul rate, {self.precision}: {first:.3g} {unit} before, {last:.3g} after ({low:.3g}-{high:.3g})"

    @property
    def range(self) -> tuple[float, float]:
        return min(self.history), max(self.history)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes since the last reset, in CUDA's allocator, or in the resident set of a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")


def reset_peak_memory(device: torch.device) -> int:
    """Forget the peak so far, and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # the allocator keeps freed memory, and then no run takes any
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
