"""How fast is sampling from DiT^DH? Euler steps on 768 x 16 x 16 latents, per image and step.

    python benchmarks/sampling.py [--size S] [--batch 2] [--steps 2] [--precision bf16] [--out sampling.json]

Eager and compiled alternate in one process; images/s are for 50 steps unguided, scaled from the steps run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from harness import compiled, denoiser, interleaved, report
from raekit.models.denoiser import Denoiser
from raekit.sampling import Sampling, sample_latents
from raekit.train.trainer import autocast

FULL_STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=["S", "B", "L", "XL"])
    parser.add_argument("--batch", type=int, help="default: 2 on a CPU, 64 on a GPU")
    parser.add_argument("--steps", type=int, help="solver steps to run; default: 2 on a CPU, 50 on a GPU")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = arguments.batch or (64 if device.type == "cuda" else 2)
    steps = arguments.steps or (FULL_STEPS if device.type == "cuda" else 2)
    labels = torch.randint(1000, (batch,), device=device)

    def sampler(model: Denoiser) -> Callable[[], object]:
        def sample() -> None:
            with autocast(arguments.precision, device):
                sample_latents(model, labels, torch.arange(batch), 0, Sampling(steps=steps), device)

        return sample

    variants = {
        "eager": sampler(denoiser(arguments.size, device).eval()),
        "compiled": sampler(compiled(denoiser(arguments.size, device)).eval()),
    }
    times = {
        name: [FULL_STEPS / steps * t for t in seconds]
        for name, seconds in interleaved(variants, arguments.repeats, device).items()
    }
    title = (
        f"sampling, DiT^DH-{arguments.size}, 768x16x16, batch {batch}, {FULL_STEPS} Euler steps, {arguments.precision}"
    )
    report(title, times, batch, device, arguments.out)


if __name__ == "__main__":
    main()
