"""How do time and memory grow with the work?

    python benchmarks/scaling.py [AXIS ...] [--size S] [--precision auto] [--repeats 3] [--out DIR]

Each axis is a table of one quantity that grows, with all others fixed: the median time with its range, the time for
each unit, and the peak memory besides the memory in use before the run. A straight line is fitted to the times and to
the memory. The exponent of a power law between the smallest and the largest size is 1 for proportional growth, and 0
if nothing grows.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness import SIZES, Table, denoiser, interleaved, named, publish, training_step
from machine import MatmulRate
from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World, prepare_device
from raekit.evaluation.features import Images
from raekit.evaluation.frechet import Gaussian
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.streaming import score_stream
from raekit.flow.sampling import Sampling
from raekit.inference.cache import cache_latents
from raekit.inference.cached_loader import LatentLoader
from raekit.inference.generation import generate
from raekit.inference.model import load
from raekit.models.autoencoder import load_autoencoder
from raekit.training.optim import OptimConfig, adamw
from raekit.training.precision import Precision, compute_dtype
from synthetic import make_images

BATCH = 50
Runs = Mapping[int, Callable[[], object]]


@dataclass(frozen=True)
class Settings:
    """What the axes share.

    Attributes:
        scale: How large the work is: 0 for a test, 1 for a CPU, 2 for a GPU.
        folder: A scratch folder.
    """

    size: str
    precision: Precision
    device: torch.device
    scale: int
    folder: Path

    def chosen(self, *sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of this scale."""
        return sizes[self.scale]

    def step(self, batch: int, **config: int) -> Callable[[], None]:
        model = denoiser(self.size, self.device, **config)
        return training_step(model, adamw(OptimConfig(), model.parameters()), batch, self.precision, self.device)


def batch(settings: Settings) -> tuple[str, Runs]:
    sizes = settings.chosen((1, 2), (1, 2, 4), (8, 16, 32, 64, 128))
    return f"a training step of {named(settings.size)}", {n: settings.step(n) for n in sizes}


def tokens(settings: Settings) -> tuple[str, Runs]:
    """Latents of 64, 256 (256 pixels) and 1024 tokens (512 pixels)."""
    count = settings.chosen((1,), (1,), (16,))[0]
    runs = {side**2: settings.step(count, grid=side) for side in settings.chosen((8, 16), (8, 16, 32), (8, 16, 32))}
    return f"a training step of {named(settings.size)} with other grids, batch {count}", runs


def classes(settings: Settings) -> tuple[str, Runs]:
    count = settings.chosen((1,), (1,), (64,))[0]
    sizes = settings.chosen((10, 100), (10, 1000, 100_000), (10, 1000, 100_000))
    runs = {n: settings.step(count, classes=n) for n in sizes}
    return f"a training step of {named(settings.size)}, batch {count}", runs


def samples(settings: Settings) -> tuple[str, Runs]:
    model = load("builtin:emoji", settings.device)
    sampling = Sampling(steps=2)

    def run(count: int) -> None:
        for made in generate(model, count=count, sampling=sampling, batch_size=16):
            made.images.cpu()

    sizes = settings.chosen((2, 4), (64, 256, 1024), (256, 1024, 4096))
    return "generating samples with builtin:emoji, 2 steps, batch 16", {n: lambda n=n: run(n) for n in sizes}


def images(settings: Settings) -> tuple[str, Runs]:
    """Opening a source and reading the same number of batches of it."""
    sizes = settings.chosen((40, 80), (1000, 4000, 16_000), (1000, 4000, 16_000))
    sources = {n: make_images(settings.folder / f"images-{n}", n, 64) for n in sizes}
    runs: Runs = {n: lambda source=source: read(Loader(data(source), seed=0)) for n, source in sources.items()}
    return "opening a folder of images and reading 4 batches of 16", runs


def cached(settings: Settings) -> tuple[str, Runs]:
    """Opening a cache of latents and reading the same number of batches of it."""
    autoencoder = load_autoencoder("builtin:emoji").to(settings.device)
    world, runs = World(device=settings.device), {}
    for n in settings.chosen((40, 80), (1000, 4000, 16_000), (1000, 4000, 16_000)):
        source, place = make_images(settings.folder / f"cached-{n}", n, 64), settings.folder / f"latents-{n}"
        cache_latents(autoencoder, "builtin:emoji", data(source), place, world=world)
        runs[n] = lambda source=source, place=place: read(LatentLoader(place, data(source), 0, autoencoder))
    return "opening a cache of latents and reading 4 batches of 16", runs


def data(source: str) -> DataConfig:
    return DataConfig(source=source, split="all", image_size=64)


def read(loader: Loader | LatentLoader) -> None:
    for _ in islice(loader.stream(0, 16, World()), 4):
        pass


class Stub:
    """A network that repeats the pixels: it costs nothing, and its features are as wide as a real network's."""

    name = "stub"

    def __init__(self, width: int):
        self.width = width

    def __call__(self, images: Tensor) -> Tensor:
        rows = images.flatten(1)
        return rows.repeat(1, -(-self.width // rows.shape[1]))[:, : self.width]


def evaluation(settings: Settings) -> tuple[str, Runs]:
    """The moments and the distance of generated images, 3 x 32 x 32, in as many features as FID's."""
    (dim,) = settings.chosen((64,), (2048,), (2048,))
    device = settings.device
    reference = Gaussian(torch.full((dim,), 0.5), torch.eye(dim) / 12)

    def generated(count: int) -> Iterator[Images]:
        generator = torch.Generator(device).manual_seed(0)
        for first in range(0, count, BATCH):
            size = min(BATCH, count - first)
            pixels = torch.rand(size, 3, 32, 32, generator=generator, device=device)
            yield Images(pixels, torch.full((size,), -1, device=device), torch.arange(first, first + size))

    def run(count: int) -> None:
        score_stream(generated(count), [FrechetDistance(Stub(dim), reference)], World(device=device))

    sizes = settings.chosen((50, 100), (5000, 50_000), (5000, 50_000))
    return f"evaluating generated images in {dim} features", {n: lambda n=n: run(n) for n in sizes}


AXES = {
    "batch": batch,
    "tokens": tokens,
    "classes": classes,
    "samples": samples,
    "images": images,
    "cached": cached,
    "evaluation": evaluation,
}


def slope(sizes: Sequence[int], values: Sequence[float]) -> tuple[float, float, float]:
    """Return (a, b, k): the least-squares line a + b n, and the exponent k from the first to the last value."""
    b, a = np.polyfit(sizes, values, 1)
    exponent = math.log(max(values[-1], 1e-12) / max(values[0], 1e-12)) / math.log(sizes[-1] / sizes[0])
    return float(a), float(b), exponent


def measure(axis: str, settings: Settings, repeats: int, out: Path | None) -> None:
    """Time one axis and publish its table."""
    what, runs = AXES[axis](settings)
    rate = MatmulRate(compute_dtype(settings.precision, settings.device), settings.device)
    timed = interleaved({str(n): run for n, run in runs.items()}, repeats, settings.device, rate)
    rows, figures = [], {}
    for n, run in zip(runs, timed.values(), strict=True):
        low, median, high = (1000 * f(run.seconds) for f in (min, statistics.median, max))
        figures[str(n)] = asdict(run)
        cells = f"{median:.4g}", f"{low:.4g}-{high:.4g}", f"{median / n:.3g}", f"{run.peak / 2**20:.1f}"
        rows.append([f"{n:,}", *cells])
    times = slope([*runs], [1000 * statistics.median(run.seconds) for run in timed.values()])
    memory = slope([*runs], [run.peak / 2**20 for run in timed.values()])
    notes = [str(rate), line("time", "ms", times), line("memory", "MiB", memory)]
    figures = {"axis": axis, "sizes": figures, "time": times, "memory": memory, "matmul_rates": rate.history}
    columns = [axis, "ms", "range", f"ms / {axis}", "MiB"]
    title = f"scaling with {axis}: {what}, {settings.precision}"
    publish(Table(title, columns, rows, notes, figures), settings.device, out)


def line(what: str, unit: str, fit: tuple[float, float, float]) -> str:
    a, b, exponent = fit
    return f"{what}: {a:.4g} + {b:.4g} n {unit}, exponent {exponent:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", choices=[*AXES, []], metavar="AXIS", help=f"of {', '.join(AXES)}; all")
    parser.add_argument("--size", default="S", choices=SIZES, help="the denoiser; tiny makes all sizes small")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    device = prepare_device()
    precision = "bf16" if compute_dtype(arguments.precision, device) == torch.bfloat16 else "fp32"
    scale = 0 if arguments.size == "tiny" else 2 if device.type == "cuda" else 1
    for axis in arguments.axes or AXES:
        with tempfile.TemporaryDirectory() as scratch:
            settings = Settings(arguments.size, precision, device, scale, Path(scratch))
            measure(axis, settings, arguments.repeats, arguments.out)


if __name__ == "__main__":
    main()
