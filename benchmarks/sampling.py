"""How fast is sampling from DiT^DH, unguided and with each guidance? Euler steps on 768 x 16 x 16 latents.

    python benchmarks/sampling.py [--size S] [--batch 2] [--steps 2] [--methods unguided CFG] [--out DIR]

There is one table for each method. Its sides take turns in one process, and each speed-up is to the first side:

- float32 weights: weights are float32, autocast casts them to bf16 in each evaluation, and torch computes the products.
- products by torch: weights are held in bf16, and torch computes the products (on a CPU where raekit computes them
  itself, see `raekit.models.linear`).
- bf16 weights: weights are held in bf16. For CFG, once with both predictions in one pass and once in two passes.
- bf16 weights, compiled: the same with compiled blocks, in one pass or two as `raekit.flow.sampling` decides.
- not packed: compiled, but torch lays out the weights for each product (on a CPU where raekit packs them).
- doubled: as in the published sampler, each network runs at every step on a batch that holds each image twice.

With --precision fp32 all weights are float32, and nothing is cast. The share of the matmul rate counts the
multiplications of the first side. The weak model of AutoGuidance is as large as the guided model, and the base output
of internal guidance follows block 8. The relative difference between each side's latents and the first side's latents
is printed first. Times and images/s are for 50 steps, scaled from the steps that were run.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness import SIZES, denoiser, interleaved, named, report
from machine import MatmulRate
from raekit import randomness
from raekit.distributed import prepare_device
from raekit.flow import sampling as flow_sampling
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling, sample_latents
from raekit.flow.solvers import euler, time_grid
from raekit.models import linear
from raekit.models.denoiser import Denoiser
from raekit.training.precision import Precision

FULL_STEPS = 50
METHODS: dict[str, tuple[Guidance | None, int]] = {
    "unguided": (None, 1),
    "backbone 1 step in 2": (None, 2),
    "CFG": (Guidance(scale=1.5), 1),
    "CFG in an interval": (Guidance(scale=1.5, start=0.1, end=0.9), 1),
    "AutoGuidance": (Guidance(method="auto", scale=1.5), 1),
    "internal": (Guidance(method="internal", scale=1.5), 1),
}


def casting(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context in which each evaluation casts float32 weights to bf16; with fp32 it has no effect."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


@torch.no_grad()
def doubled(model: Denoiser, weak: Denoiser, labels: Tensor, rule: Guidance, steps: int) -> Tensor:
    """Sample latents with each network on two batches, and choose the needed predictions afterwards."""
    config, count = model.config, len(labels)
    twice = torch.cat([labels, labels if rule.method == "auto" else torch.full_like(labels, config.num_classes)])

    def field(x: Tensor, t: float) -> Tensor:
        both, times = torch.cat([x, x]), torch.full((2 * count,), t, device=x.device)
        v, other = model(both, times, twice).float().chunk(2)
        if rule.method == "auto":
            other = weak(both, times, twice).float().chunk(2)[0]
        return other + rule.scale * (v - other) if rule.holds(t) else v

    noise = randomness.normal(0, "sample", torch.arange(count), config.latent_shape).to(labels.device)
    return euler(field, noise, time_grid(steps, config.shift, "full"))


def variants(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Denoiser]:
    """Return a denoiser with float32 weights, and compiled ones with its weights held in `dtype`, packed and not."""
    model = denoiser(size, device, seed=seed, base_depth=8).eval()
    for name, values in model.named_parameters():
        if "modulation" in name:  # zeros would switch the blocks off
            nn.init.normal_(values, std=0.02)
    held = Denoiser.build(model.config, model.state_dict(), "the benchmark", dtype).to(device)
    found = {"float32": model, "held": held}
    if any(isinstance(layer, linear.Linear) and layer.packed for layer in held.modules()):
        found["not packed"] = copy.deepcopy(held)  # a copy has plain weights
    for name in found.keys() - {"float32"}:
        found[name].compile(dynamic=False)
    return found


def sides(
    method: str,
    models: dict[str, Denoiser],
    weak: dict[str, Denoiser],
    labels: Tensor,
    steps: int,
    precision: Precision,
) -> dict[str, Callable[[], Tensor]]:
    """Return {side: a call that returns latents}.

    Args:
        method: One of METHODS.
        models: The denoiser as `variants` returns it.
        weak: The same of the weak model.
        labels: (B,) classes.
        steps: Solver steps.
        precision: `bf16` or `fp32`.
    """
    rule, reuse = METHODS[method]
    sampling = Sampling(steps=steps, guidance=(rule,) if rule else (), reuse=reuse)
    indices, device = torch.arange(len(labels)), labels.device
    auto = rule is not None and rule.method == "auto"

    def call(
        which: str, *, compiled: bool = False, one_pass: bool | None = None, native: bool = False
    ) -> Callable[[], Tensor]:
        chosen = replace(sampling, weak=weak[which] if auto else None)

        def run() -> Tensor:
            eager = nullcontext() if compiled else torch.compiler.set_stance("force_eager")
            casts = casting(precision, device) if which == "float32" else nullcontext()
            passes = nullcontext()
            if one_pass is not None:
                passes = patch.object(flow_sampling, "one_pass_is_faster", lambda x: one_pass)
            with eager, casts, passes, patch.object(linear, "NATIVE", native or linear.NATIVE):
                return sample_latents(models[which], labels, indices, 0, chosen, device)

        return run

    held = "bf16 weights" if precision == "bf16" else "eager"
    found: dict[str, Callable[[], Tensor]] = {}
    if precision == "bf16":
        found["float32 weights"] = call("float32", one_pass=False, native=True)
        if labels.device.type == "cpu" and not linear.NATIVE:
            found["products by torch"] = call("held", one_pass=False, native=True)
    if rule and rule.method == "cfg":
        found[f"{held}, two passes"] = call("held", one_pass=False)
        found[f"{held}, one pass"] = call("held", one_pass=True)
    else:
        found[held] = call("held")
    found[f"{held}, compiled"] = call("held", compiled=True)
    if "not packed" in models:
        found["not packed"] = call("not packed", compiled=True)
    if rule and rule.method != "internal":

        def baseline() -> Tensor:
            with casting(precision, device), patch.object(linear, "NATIVE", True):
                return doubled(models["float32"], weak["float32"], labels, rule, steps)

        found["doubled"] = baseline
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--batch", type=int, help="default: 2 on a CPU, 64 on a GPU")
    parser.add_argument("--steps", type=int, help="solver steps to run; default: 2 on a CPU, 50 on a GPU")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--skip", nargs="+", default=[], metavar="SIDE", help="sides to leave out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    device = prepare_device()
    batch = arguments.batch or (64 if device.type == "cuda" else 2)
    steps = arguments.steps or (FULL_STEPS if device.type == "cuda" else 2)
    labels = torch.randint(1000, (batch,), device=device)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32

    models = variants(arguments.size, device, dtype, seed=0)
    weak = variants(arguments.size, device, dtype, seed=1) if "AutoGuidance" in arguments.methods else models
    for method in arguments.methods:
        calls = sides(method, models, weak, labels, steps, arguments.precision)
        calls = {name: run for name, run in calls.items() if name not in arguments.skip}
        print(f"\n{method}")
        counter = FlopCounterMode(display=False)
        latents = {}
        for name, run in calls.items():
            with counter if not latents else nullcontext():
                latents[name] = run()
        first = next(iter(latents.values()))
        for name, each in latents.items():
            print(f"{name}: relative difference {((each - first).norm() / first.norm()).item():.1e}")
        rate = MatmulRate(dtype, device)
        runs = interleaved(calls, arguments.repeats, device, rate)
        flops = counter.get_total_flops() * FULL_STEPS / steps
        for each in runs.values():
            each.seconds = [FULL_STEPS / steps * seconds for seconds in each.seconds]
        what = f"{named(arguments.size)}, batch {batch}, {FULL_STEPS} Euler steps, {arguments.precision}"
        report(f"sampling, {method}, {what}", runs, batch, device, arguments.out, flops=flops, rate=rate)


if __name__ == "__main__":
    main()
