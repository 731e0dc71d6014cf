"""What all benchmarks share: the models, interleaved timing, and one way to report."""

import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from machine import MatmulRate, describe, peak_memory, reset_peak_memory, summary, synchronise
from raekit.flow.path import shift_factor
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import SIZES as BACKBONES
from raekit.models.denoiser_config import DenoiserConfig, TransformerConfig, wide_head
from raekit.recipes import raev2_k7_256
from raekit.stages.generation import flow_matching_loss
from raekit.training.casting import CastWeights
from raekit.training.precision import Precision, autocast, compute_dtype
from raekit.training.throughput import stated_peak

SIZES = ("S", "B", "L", "XL", "RAEv2", "tiny")
"""The denoisers of `denoiser`."""
NOISY = 0.3
"""A ratio is too noisy to conclude from if its range is wider than this share of its median."""


def denoiser_config(size: str, *, base_depth: int = 0, grid: int = 16, classes: int = 1000) -> DenoiserConfig:
    """Return the config of a denoiser.

    S to XL are the paper's DiT^DH on DINOv2-B latents (768 channels, a head of 2 x 2048), RAEv2 the network of RAE v2
    on DINOv3-L latents (1024 channels), and tiny a network for tests of the benchmarks (32 channels).

    Args:
        size: One of SIZES.
        base_depth: The block after which a base output stands; 0 for none. RAEv2 always has one.
        grid: The side of the latents: 16 at 256 pixels, 32 at 512.
        classes: The number of classes.
    """
    settings: dict[str, Any] = {"base_depth": base_depth}
    if size == "RAEv2":
        channels, settings = 1024, vars(raev2_k7_256.config().denoiser)
    elif size == "tiny":
        channels, part = 32, TransformerConfig(width=32, depth=2, heads=2)
        settings |= {"backbone": part, "head": part, "base_depth": min(base_depth, 1)}
    else:
        channels = 768
        settings |= {"backbone": BACKBONES[size], "head": wide_head()}
    shift = shift_factor((channels, grid, grid))
    return DenoiserConfig(**settings, channels=channels, grid=(grid, grid), num_classes=classes, shift=shift)


def denoiser(size: str, device: torch.device, *, seed: int = 0, **settings: int) -> Denoiser:
    """Return a denoiser with random weights, drawn on the device. `denoiser_config` takes the `settings`."""
    torch.manual_seed(seed)
    with device:
        model = Denoiser(denoiser_config(size, **settings))
        for final in (model.final, model.base_final):
            if final is not None:
                torch.nn.init.normal_(final.out.weight, std=0.02)  # a zero output would be a fixed point of sampling
    return model


def named(size: str, grid: int = 16) -> str:
    """Return the name of a denoiser and the shape of its latents, for a title."""
    shape = "x".join(map(str, denoiser_config(size, grid=grid).latent_shape))
    return f"{size if size == 'RAEv2' else f'DiT^DH-{size}'}, {shape}"


def training_step(
    model: Denoiser,
    optimizer: torch.optim.Optimizer,
    batch: int,
    precision: Precision,
    device: torch.device,
    *,
    cast_once: bool = False,
) -> Callable[[], None]:
    """Return a call that trains `model` by one step: forward, backward, clipping, and the optimizer.

    Like the trainer for a single micro-batch, it lets autocast cast the weights of the blocks in each pass. With
    `cast_once` they are cast before, as for several micro-batches.
    """
    latents = torch.randn(batch, *model.config.latent_shape, device=device)
    labels = torch.randint(model.config.num_classes, (batch,), device=device)
    blocks = [*model.blocks, *(model.head_blocks if model.config.head else [])]
    dtype = compute_dtype(precision, device)

    def step() -> None:
        weights = CastWeights(blocks if cast_once and dtype != torch.float32 else [], dtype)
        with weights.used():
            with autocast(precision, device):
                loss, _ = flow_matching_loss(
                    model, latents, labels, torch.arange(batch), seed=0, time_law="uniform", alpha=model.config.shift
                )
            loss.backward()
        del weights
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@dataclass
class Runs:
    """The timed runs of a variant.

    Attributes:
        seconds: The time of each run.
        peak: The most memory in bytes that a run took, besides the memory in use before it.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int = 0


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    rate: MatmulRate,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Runs]:
    """Time each variant `repeats` times after a warm-up, in turns, so that a busy machine slows all alike.

    The machine's own rate is measured around each run. Memory is measured in a turn of its own, because on a CPU the
    allocator first has to return what it holds, and the run after that is slower. `time.process_time` as the clock
    counts the time of all threads of this process on the processor, without waiting.
    """
    runs = {name: Runs() for name in variants}
    for run in variants.values():
        run()
    for name, run in variants.items():
        synchronise(device)
        held = reset_peak_memory(device)
        run()
        synchronise(device)
        runs[name].peak = peak_memory(device) - held
    for _ in range(repeats):
        for name, run in variants.items():
            before = rate.measure()
            synchronise(device)
            began = clock()
            run()
            synchronise(device)
            runs[name].seconds.append(clock() - began)
            rate.around.setdefault(name, []).append((before + rate.measure()) / 2)
    return runs


def ratio(values: Sequence[float]) -> str:
    """Return the median of a ratio over turns and its range, and a warning if the range is too wide."""
    low, median, high = min(values), statistics.median(values), max(values)
    warning = " too noisy to conclude" if high - low > NOISY * median else ""
    return f"{median:.2f} ({low:.2f}-{high:.2f}){warning}"


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        columns: The headings; the first is of the rows' names.
        rows: The cells, as text.
        notes: Lines to print above the table.
        figures: The numbers behind the cells, for JSON.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


def publish(table: Table, device: torch.device, out: Path | None) -> None:
    """Print a table and the machine; with `out`, also `save` both in that folder."""
    machine = describe(device)
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    print("\n" + "\n".join([table.title, summary(machine), *table.notes]))
    for row in [table.columns, *table.rows]:
        name, *cells = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row))
        print("   ".join([name, *cells]).rstrip(), flush=True)
    if out is not None:
        save(table, device, out)


def save(table: Table, device: torch.device, out: Path) -> None:
    """Add a table and the machine to results.json and results.md in `out`, in place of a table of the same title."""
    out.mkdir(parents=True, exist_ok=True)
    tables = [each for each in saved(out) if each["title"] != table.title]
    tables.append(asdict(table) | {"machine": describe(device)})
    (out / "results.json").write_text(json.dumps(tables, indent=1) + "\n")
    (out / "results.md").write_text("\n".join(map(_markdown, tables)))


def saved(out: Path) -> list[dict[str, Any]]:
    """Return the tables that `out` holds, with the fields of `Table` and `machine`."""
    path = out / "results.json"
    return json.loads(path.read_text()) if path.is_file() else []


def _markdown(table: Mapping[str, Any]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(re.sub(r'[|]', '/', cell) for cell in cells)} |"

    notes = "".join(f"- {note}\n" for note in [summary(table["machine"]), *table["notes"]])
    rows = [line(table["columns"]), "|---" * len(table["columns"]) + "|", *map(line, table["rows"])]
    return f"## {table['title']}\n\n{notes}\n" + "\n".join(rows) + "\n"


def report(
    title: str,
    runs: Mapping[str, Runs],
    images: int,
    device: torch.device,
    out: Path | None,
    *,
    rate: MatmulRate,
    flops: float | None = None,
) -> None:
    """Publish a table of timed runs: medians with ranges, images/s, memory, and the ratio to the first variant.

    Args:
        images: The images of a run.
        out: The folder for results.json and results.md.
        rate: The rate that `interleaved` measured around the runs.
        flops: The multiplications and additions of a run. If given, the table has the share of the machine's matmul
            rate, and on a known GPU the share of the data sheet's rate (MFU).
    """
    limit = stated_peak(rate.precision, device)
    columns = ["", "ms", "range", "images/s", "MiB", "speed-up"]
    notes = [str(rate)]
    if flops:
        columns.append("share of the matmul rate")
        notes.append(f"{flops / images / 1e9:.4g} GFLOP an image")
        if limit:
            columns.append("MFU")
            notes.append(f"MFU: share of the data sheet's {limit / 1e12:.4g} TFLOP/s")
    first = next(iter(runs.values())).seconds
    rows, figures = [], {}
    for name, run in runs.items():
        median = statistics.median(run.seconds)
        ratios = [a / b for a, b in zip(first, run.seconds, strict=True)]
        figures[name] = asdict(run) | {"images_per_second": images / median, "speed_ups": ratios}
        cells = [
            name,
            f"{1000 * median:.4g}",
            f"{1000 * min(run.seconds):.4g}-{1000 * max(run.seconds):.4g}",
            f"{images / median:.4g}",
            f"{run.peak / 2**20:.0f}",
            ratio(ratios),
        ]
        if flops:
            shares = [flops / a / b for a, b in zip(run.seconds, rate.around[name], strict=True)]
            figures[name] |= {"flops_per_second": flops / median, "shares_of_matmul_rate": shares}
            cells.append(f"{statistics.median(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})")
            if limit:
                figures[name]["mfu"] = flops / median / limit
                cells.append(f"{flops / median / limit:.1%}")
        rows.append(cells)
    publish(
        Table(title, columns, rows, notes, {"images": images, "matmul_rates": rate.history, "variants": figures}),
        device,
        out,
    )
