"""What every benchmark here shares: interleaved timing, peak memory, a table, and JSON."""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from raekit.flow.path import shift_factor
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import SIZES, DenoiserConfig, wide_head
from raekit.stages.generation import flow_matching_loss
from raekit.train.precision import Precision, autocast


def denoiser(size: str, device: torch.device, *, seed: int = 0, base_depth: int = 0) -> Denoiser:
    """DiT^DH of the paper on DINOv2-B latents at 256 pixels: 768 x 16 x 16, head of 2 x 2048."""
    shift = shift_factor((768, 16, 16))
    config = DenoiserConfig(
        channels=768, grid=(16, 16), backbone=SIZES[size], head=wide_head(), base_depth=base_depth, shift=shift
    )
    torch.manual_seed(seed)
    model = Denoiser(config).to(device)
    for final in (model.final, model.base_final):
        if final is not None:
            torch.nn.init.normal_(final.out.weight, std=0.02)  # a zero output would be a fixed point of sampling
    return model


def compiled(model: Denoiser) -> Denoiser:
    """Compile the blocks, as the trainer does."""
    for block in [*model.blocks, *model.head_blocks]:
        block.compile()
    return model


def training_step(
    model: Denoiser, optimizer: torch.optim.Optimizer, batch: int, precision: Precision, device: torch.device
) -> Callable[[], None]:
    """A call that trains `model` by one step: forward, backward, clipping, and the optimizer."""
    latents = torch.randn(batch, *model.config.latent_shape, device=device)
    labels = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with autocast(precision, device):
            loss, _ = flow_matching_loss(
                model, latents, labels, torch.arange(batch), seed=0, time_law="uniform", alpha=model.config.shift
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class MatmulRate:
    """What this machine can do: FLOP/s of square matrix products in `dtype`, just before and after each timed run, as
    other users of a machine may change it from second to second. The matrices are large enough to fill the device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        side = 8192 if device.type == "cuda" else 2048
        self.a, self.b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        self.device = device
        self.around: dict[str, list[float]] = {}
        self.measure()

    def measure(self, repeats: int = 3) -> float:
        times = []
        for _ in range(repeats):
            synchronise(self.device)
            began = time.perf_counter()
            _ = self.a @ self.b
            synchronise(self.device)
            times.append(time.perf_counter() - began)
        return 2 * len(self.a) ** 3 / statistics.median(times)


@dataclass
class Runs:
    """Seconds of each run of a variant, and the most memory that one took beyond what was held before it, in bytes."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    rate: MatmulRate | None = None,
) -> dict[str, Runs]:
    """The runs of each variant, in turns after one warm-up each, so that a busy machine slows all alike.

    `rate` gets the machine's own around each run.
    """
    runs = {name: Runs() for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            before = rate.measure() if rate and turn else 0.0
            synchronise(device)
            held = reset_peak_memory(device)
            began = time.perf_counter()
            run()
            synchronise(device)
            if turn:
                runs[name].seconds.append(time.perf_counter() - began)
                runs[name].peak = max(runs[name].peak, peak_memory(device) - held)
                if rate:
                    rate.around.setdefault(name, []).append((before + rate.measure()) / 2)
    return runs


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes since the last reset: of the device's allocator on CUDA, of the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")


def reset_peak_memory(device: torch.device) -> int:
    """Forget the peak so far; gives what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed is held for later, and no run takes any
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def report(
    title: str,
    runs: Mapping[str, Runs],
    images: int,
    device: torch.device,
    out: Path | None,
    *,
    flops: float | None = None,
    rate: MatmulRate | None = None,
) -> None:
    """Print a table (median, images/s, ratio to the first variant with its range over turns), and write JSON.

    With the `flops` of a turn and the machine's `rate`, also the share of that rate that each variant reaches.
    """
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{title}\n{machine}, torch {torch.__version__}")
    if flops and rate:
        every = [each for rates in rate.around.values() for each in rates]
        print(
            f"{flops / images / 1e9:.1f} GFLOP an image; the machine's matmul rate is "
            f"{statistics.median(every) / 1e12:.3g} TFLOP/s ({min(every) / 1e12:.3g}-{max(every) / 1e12:.3g})"
        )
    print(
        f"{'':24}{'ms':>10}{'images/s':>12}{'MiB':>8}{'speed-up':>12}   {'range':12}{'rate' if flops and rate else ''}"
    )
    first = next(iter(runs.values()))
    rows = {}
    for name, run in runs.items():
        seconds = run.seconds
        ratios = [a / b for a, b in zip(first.seconds, seconds, strict=True)]
        median = statistics.median(seconds)
        rows[name] = {"seconds": seconds, "images_per_second": images / median, "speed_up": statistics.median(ratios)}
        rows[name] |= {"peak_memory_bytes": run.peak}
        share = ""
        if flops and rate:
            shares = [flops / a / b for a, b in zip(seconds, rate.around[name], strict=True)]
            rows[name] |= {"flops_per_second": flops / median, "shares_of_matmul_rate": shares}
            share = f"{statistics.median(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})"
        figures = (
            f"{1000 * median:10.1f}{images / median:12.3f}{run.peak / 2**20:8.0f}{statistics.median(ratios):12.2f}"
        )
        print(f"{name:24}{figures}   {f'{min(ratios):.2f}-{max(ratios):.2f}':12}{share}")
    if out:
        values = {
            "title": title,
            "machine": machine,
            "platform": platform.platform(),
            "torch": torch.__version__,
            "images": images,
            "variants": rows,
        }
        out.write_text(json.dumps(values, indent=2) + "\n")
