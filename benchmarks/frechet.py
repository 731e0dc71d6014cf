"""How fast is the Frechet distance, and how much memory does a streamed evaluation take?

    python benchmarks/frechet.py [--dim 2048] [--samples 10000] [--repeats 3] [--out frechet.json]
    python benchmarks/frechet.py --memory 5000 50000 [--out memory.json]

The first compares ours, with a reference that is kept as during training, with scipy.linalg.sqrtm of the product of
the covariances as in pytorch-fid, in turns in one process. `ours, steep` has features whose deviations span five orders
of magnitude, so that singular values are needed. The second streams images of a stub generator through a stub
network of as many features into FID's moments, each count in a process of its own, and gives its peak memory.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from harness import interleaved, peak_memory, report
from raekit.distributed import World
from raekit.evaluation.features import Images
from raekit.evaluation.frechet import Gaussian, frechet_distance
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.streaming import score_stream
from raekit.moments import Moments

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="+", help="counts of images to stream, in place of the timing")
    parser.add_argument("--stream", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.stream:
        print(json.dumps({"images": arguments.stream, "gib": stream(arguments.stream, arguments.dim)}))
    elif arguments.memory:
        memory(arguments.memory, arguments.dim, arguments.out)
    else:
        timing(arguments.dim, arguments.samples, arguments.repeats, arguments.out)


def timing(dim: int, samples: int, repeats: int, out: Path | None) -> None:
    flat = [features(samples, dim, seed) for seed in (1, 2)]
    steep = [values * torch.logspace(0, -5, dim, dtype=torch.float64) for values in flat]
    (a, reference), (c, steep_reference) = ([gaussian(values) for values in pair] for pair in (flat, steep))
    variants = {
        "scipy.linalg.sqrtm": lambda: by_sqrtm(a, reference),
        "ours": lambda: frechet_distance(Gaussian(a.mean, a.covariance, a.count), reference),
        "ours, reference not kept": lambda: frechet_distance(*(Gaussian(g.mean, g.covariance) for g in (a, reference))),
        "ours, steep": lambda: frechet_distance(Gaussian(c.mean, c.covariance, c.count), steep_reference),
    }
    ours, theirs = frechet_distance(a, reference), by_sqrtm(a, reference)
    print(f"relative difference from sqrtm: {abs(ours - theirs) / theirs:.1e}")
    times = interleaved(variants, repeats, torch.device("cpu"))
    report(f"Frechet distance, {dim} dimensions, {samples} samples", times, 1, torch.device("cpu"), out)


def features(samples: int, dim: int, seed: int) -> Tensor:
    """Correlated features, each seed with a mean and a mixing of its own."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    white = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    return white + 0.5 * white @ mixing + 0.1 * seed


def gaussian(values: Tensor) -> Gaussian:
    moments = Moments(values.shape[1])
    moments.update(values)
    return Gaussian.of(moments)


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    root = np.asarray(scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()))
    difference = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    return float(difference - 2 * np.trace(root).real)


class Stub:
    """A network that repeats the pixels: free, and of the width of a real one."""

    name = "stub"

    def __init__(self, width: int):
        self.width = width

    def __call__(self, images: Tensor) -> Tensor:
        rows = images.flatten(1)
        return rows.repeat(1, -(-self.width // rows.shape[1]))[:, : self.width]


def stream(count: int, dim: int) -> float:
    """Evaluate `count` generated images, 3 x 32 x 32, and return the peak memory in GiB."""
    generator = torch.Generator().manual_seed(0)

    def generated() -> Iterator[Images]:
        for first in range(0, count, BATCH):
            size = min(BATCH, count - first)
            yield Images(torch.rand(size, 3, 32, 32, generator=generator), torch.full((size,), -1))

    reference = Gaussian(torch.full((dim,), 0.5), torch.eye(dim) / 12)
    score_stream(generated(), [FrechetDistance(Stub(dim), reference)], World())
    return peak_memory(torch.device("cpu")) / 2**30


def memory(counts: list[int], dim: int, out: Path | None) -> None:
    rows = []
    for count in counts:
        command = [sys.executable, __file__, "--dim", str(dim), "--stream", str(count)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"{count:8} images: peak memory {rows[-1]['gib']:.3f} GiB")
    if out:
        out.write_text(json.dumps({"title": f"streamed evaluation, {dim} dimensions", "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
