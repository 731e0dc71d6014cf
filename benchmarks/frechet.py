"""How fast is the Frechet distance?

    python benchmarks/frechet.py [--dim 2048] [--samples 10000] [--repeats 3] [--out DIR]

Compares ours, with a reference that is kept as during training, with scipy.linalg.sqrtm of the product of the
covariances as in pytorch-fid, in turns in one process. `ours, steep` has features whose deviations span five orders of
magnitude, so that singular values are needed. `scaling.py` has the memory and time of a streamed evaluation.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from harness import interleaved, report
from machine import MatmulRate
from raekit.evaluation.frechet import Gaussian, frechet_distance
from raekit.moments import Moments


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
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
    cpu = torch.device("cpu")
    rate = MatmulRate(torch.float32, cpu)
    times = interleaved(variants, repeats, cpu, rate)
    report(f"Frechet distance, {dim} dimensions, {samples} samples", times, 1, cpu, out, rate=rate)


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


if __name__ == "__main__":
    main()
