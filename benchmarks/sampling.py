"""How fast is sampling from DiT^DH, unguided and with each guidance? Euler steps on 768 x 16 x 16 latents.

    python benchmarks/sampling.py [--size S] [--batch 2] [--steps 2] [--precision bf16] [--out DIR]

"doubled" is a baseline as the published sampler works: each network that takes part runs on the batch twice over, at
every step. The weak model of AutoGuidance is as large as the guided one, and the base output of internal guidance is
taken after block 8. The backbone's output is reused where the steps run are a multiple. All take turns in one process;
a speed-up is to the first line of its table, with its range. The latents of a method and its baseline are compared
first. Images/s are for 50 steps, scaled from the steps run.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from harness import SIZES, compiled, denoiser, interleaved, named, ratio, report
from machine import MatmulRate
from raekit import randomness
from raekit.distributed import prepare_device
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling, sample_latents
from raekit.flow.solvers import euler, time_grid
from raekit.models.denoiser import Denoiser
from raekit.train.precision import autocast, compute_dtype

FULL_STEPS = 50
REUSE = (2, 4)
RULES = {
    "CFG": Guidance(scale=1.5),
    "CFG in an interval": Guidance(scale=1.5, start=0.1, end=0.9),
    "AutoGuidance": Guidance(method="auto", scale=1.5),
    "internal": Guidance(method="internal", scale=1.5),
}


@torch.no_grad()
def doubled(
    model: Denoiser, weak: Denoiser, labels: Tensor, rule: Guidance, steps: int, precision: Literal["fp32", "bf16"]
) -> Tensor:
    """Latents by a sampler that runs each network on two batches, and chooses afterwards what it needs."""
    config, count = model.config, len(labels)
    twice = torch.cat([labels, labels if rule.method == "auto" else torch.full_like(labels, config.num_classes)])

    def field(x: Tensor, t: float) -> Tensor:
        both, times = torch.cat([x, x]), torch.full((2 * count,), t, device=x.device)
        with autocast(precision, x.device):
            v, other = model(both, times, twice).float().chunk(2)
            if rule.method == "auto":
                other = weak(both, times, twice).float().chunk(2)[0]
        return other + rule.scale * (v - other) if rule.holds(t) else v

    noise = randomness.normal(0, "sample", torch.arange(count), config.latent_shape).to(labels.device)
    return euler(field, noise, time_grid(steps, config.shift, "full"))


def samplers(
    model: Denoiser, weak: Denoiser, labels: Tensor, steps: int, precision: Literal["fp32", "bf16"]
) -> dict[str, Callable[[], Tensor]]:
    """{name: a call that gives latents}: unguided, with each of RULES, and the baselines."""
    indices = torch.arange(len(labels))

    def ours(*rules: Guidance, reuse: int = 1) -> Callable[[], Tensor]:
        needed = weak if any(rule.method == "auto" for rule in rules) else None
        sampling = Sampling(steps=steps, guidance=rules, weak=needed, reuse=reuse, precision=precision)
        return lambda: sample_latents(model, labels, indices, 0, sampling, labels.device)

    def baseline(rule: Guidance) -> Callable[[], Tensor]:
        return lambda: doubled(model, weak, labels, rule, steps, precision)

    return (
        {"unguided": ours()}
        | {f"backbone 1 step in {k}": ours(reuse=k) for k in REUSE if steps % k == 0}
        | {name: ours(rule) for name, rule in RULES.items()}
        | {f"{name}, doubled": baseline(rule) for name, rule in RULES.items() if rule.method != "internal"}
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--batch", type=int, help="default: 2 on a CPU, 64 on a GPU")
    parser.add_argument("--steps", type=int, help="solver steps to run; default: 2 on a CPU, 50 on a GPU")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the variants; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    device = prepare_device()
    batch = arguments.batch or (64 if device.type == "cuda" else 2)
    steps = arguments.steps or (FULL_STEPS if device.type == "cuda" else 2)
    labels = torch.randint(1000, (batch,), device=device)
    for mode in ("eager", "compiled"):
        model, weak = (denoiser(arguments.size, device, seed=seed, base_depth=8).eval() for seed in (0, 1))
        if mode == "compiled":
            model, weak = compiled(model), compiled(weak)
        variants = samplers(model, weak, labels, steps, arguments.precision)
        if arguments.only:
            variants = {name: variants[name] for name in arguments.only}
        for name in RULES:
            if (theirs := variants.get(f"{name}, doubled")) and name in variants:
                ours, theirs = variants[name](), theirs()
                print(f"{mode}, {name}: relative difference {((ours - theirs).norm() / theirs.norm()).item():.1e}")
        rate = MatmulRate(compute_dtype(arguments.precision, device), device)
        runs = interleaved(variants, arguments.repeats, device, rate)
        for each in runs.values():
            each.seconds = [FULL_STEPS / steps * seconds for seconds in each.seconds]
        what = f"{named(arguments.size)}, batch {batch}, {FULL_STEPS} Euler steps, {arguments.precision}"
        report(f"sampling, {what}, {mode}", runs, batch, device, arguments.out, rate=rate)
        for name in RULES:
            if (theirs := runs.get(f"{name}, doubled")) and name in runs:
                ratios = [a / b for a, b in zip(theirs.seconds, runs[name].seconds, strict=True)]
                print(f"{name}: {ratio(ratios)} times as fast as its baseline")


if __name__ == "__main__":
    main()
