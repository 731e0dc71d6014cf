"""What is each float32 part of bf16 sampling worth, in the error of the latents?

    python benchmarks/islands.py [--model builtin:emoji] [--steps 50] [--count 18] [--out DIR]

A model that is loaded in bf16 computes some parts in float32. Each row changes one part: a part that is float32 becomes
bf16, or the other way around. All rows start from the same noise and classes and take Euler steps, unguided. The error
is ||z - exact|| / ||exact|| over all latents z, where the float32 model makes the exact latents. `against bf16` is the
same distance from the latents of the unchanged bf16 model: the effect of the part on its own.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from choices import rotate_in_type_of_input
from harness import Table, publish
from raekit.distributed import CPU
from raekit.flow.path import to_velocity
from raekit.flow.sampling import sample_noise
from raekit.flow.solvers import euler, time_grid
from raekit.models import layers
from raekit.models.conditioning import ClassCondition
from raekit.models.denoiser import Denoiser

BF16 = torch.bfloat16


def narrow_time(self: layers.TimeEmbedding, t: Tensor) -> Tensor:
    angles = 2 * math.pi * t.to(BF16)[:, None] * self.frequencies.to(BF16)
    return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).float()).to(BF16)


def narrow_label(self: ClassCondition, given: Tensor, count: int) -> Tensor:
    return self.weight[given].to(BF16)


def narrow_norm(self: layers.RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(x.dtype)


def wide_final(self: layers.FinalLayer, x: Tensor, condition: Tensor) -> Tensor:
    def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())

    shift, scale = linear(self.modulation, torch.nn.functional.silu(condition.float())).chunk(2, dim=-1)
    return linear(self.out, layers.modulate(self.norm(x.float()), shift, scale))


CHANGES: dict[str, tuple[Any, str, Any]] = {
    "time embedding in bf16": (layers.TimeEmbedding, "forward", narrow_time),
    "class embedding in bf16": (ClassCondition, "forward", narrow_label),
    "rotation in bf16": (layers, "rotate", rotate_in_type_of_input),
    "statistics of norms in bf16": (layers.RMSNorm, "forward", narrow_norm),
    "last layer in float32": (layers.FinalLayer, "forward", wide_final),
}
"""Rows that replace one function of the library."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:emoji")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--count", type=int, default=18)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    exact, held = Denoiser.load(arguments.model), Denoiser.load(arguments.model, dtype=BF16)
    labels = torch.arange(arguments.count) % exact.config.num_classes
    noise = sample_noise(exact, 0, "sample", range(arguments.count))
    times = time_grid(arguments.steps, exact.config.shift)

    def sample(model: Denoiser, state: torch.dtype = torch.float32) -> Tensor:
        def field(x: Tensor, t: float) -> Tensor:
            x, now = x.float(), torch.full((len(x),), t)
            return to_velocity(x, model(x, now, labels), now, model.config.prediction).to(state)

        return euler(field, noise.to(state), times).float()

    def changed(place: Any, name: str, function: Callable[..., Any]) -> Tensor:
        with patch.object(place, name, function):
            return sample(held)

    with torch.no_grad():
        wanted, plain = sample(exact), sample(held)
        latents = {"bf16": plain} | {name: changed(*change) for name, change in CHANGES.items()}
        latents["solver's state in bf16"] = sample(held, BF16)
        latents["weights rounded to bf16, all else in float32"] = sample(held.set_dtype(torch.float32))
        with torch.autocast("cpu", BF16):
            latents["autocast: residual stream in float32"] = sample(exact)

    def distance(one: Tensor, other: Tensor) -> float:
        return ((one - other).norm() / wanted.norm()).item()

    figures = {name: [distance(z, wanted), distance(z, plain)] for name, z in latents.items()}
    rows = [[name, *(f"{100 * each:.2f} %" for each in errors)] for name, errors in figures.items()]
    title = (
        f"float32 parts of bf16 sampling, {arguments.model}, {arguments.steps} Euler steps, {arguments.count} samples"
    )
    publish(Table(title, ["", "error", "against bf16"], rows, figures=figures), CPU, arguments.out)


if __name__ == "__main__":
    main()
