"""How close does each solver come to the exact samples, and to real images, for a number of evaluations?

    python benchmarks/solvers.py [--model builtin:emoji] [--guidance cfg:3.0@0.1-1.0] [--evaluations 5 10 20 50]
        [--count 16] [--judge builtin:vit-tiny] [--judge dinov2:FOLDER@112] [--out DIR]

Each solver starts from the same noise and classes. `error` is ||z - exact|| / ||exact|| over the first 16 latents z.
The exact samples come from `abm` with 200 steps. Without guidance, the row `heun full 400` shows how closely a
different method agrees. With --judge the table also has the Frechet distance to the held-out emoji in that network
with its 95 % interval, and a row for as many training images. Rows that --out already holds
are not computed again, so a run can be stopped and resumed.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from harness import Table, publish, save, saved
from raekit.data.loader import DataConfig, Loader
from raekit.distributed import CPU, World
from raekit.evaluation.assessment import TRAINING
from raekit.evaluation.features import Images, ReferenceNetwork, load_networks
from raekit.evaluation.labels import draw_labels
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.references import Reference, measure_reference
from raekit.evaluation.streaming import images_of, score_stream
from raekit.flow.guidance import parse_guidance
from raekit.flow.sampling import Sampling, sample_latents
from raekit.flow.solvers import Grid, SolverName
from raekit.inference.model import Model, load

ONE, BATCH = World(), 50
REFERENCE = Sampling(steps=200, solver="abm")
Row = Mapping[str, float]


def latents(model: Model, labels: list[int], sampling: Sampling) -> Tensor:
    batches = torch.arange(len(labels)).split(BATCH)
    return torch.cat(
        [sample_latents(model.denoiser, torch.tensor(labels)[part], part, 0, sampling, "cpu") for part in batches]
    )


@torch.no_grad()
def decoded(model: Model, z: Tensor) -> Iterable[Images]:
    for part in torch.arange(len(z)).split(BATCH):
        yield Images(model.autoencoder.decode(z[part]).clamp(0, 1), torch.full_like(part, -1), indices=part)


def distances(images: Iterable[Images], networks: list[ReferenceNetwork], real: Reference) -> dict[str, float]:
    return score_stream(images, [FrechetDistance(n, real.gaussian(n), intervals=True) for n in networks], ONE)


def table(title: str, rows: Mapping[str, Row]) -> Table:
    scores = list(dict.fromkeys(key for row in rows.values() for key in row if f"{key}_low" in row))
    cells = [[name, *(cell(row, key) for key in ("error", *scores))] for name, row in rows.items()]
    return Table(title, ["", "error", *scores], cells, figures=dict(rows))


def cell(row: Row, key: str) -> str:
    """Return a value with four digits, and with its interval if it has one."""
    interval = f" ({row[f'{key}_low']:.2f}-{row[f'{key}_high']:.2f})" if f"{key}_low" in row else ""
    return f"{row[key]:.4f}{interval}" if key in row else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:emoji")
    parser.add_argument("--solvers", nargs="+", default=["euler", "heun", "ab2", "abm"])
    parser.add_argument("--grids", nargs="+", default=list(get_args(Grid)), choices=get_args(Grid))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[5, 8, 10, 15, 20, 25, 50])
    parser.add_argument("--guidance", help="as in cfg:3.0@0.1-1.0")
    parser.add_argument("--count", type=int, default=16, help="samples; intervals need at least 40")
    parser.add_argument("--judge", action="append", default=[], help="as in `raekit evaluate --features`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    model, networks = load(arguments.model), [n for name in arguments.judge for n in load_networks(name, CPU).values()]
    heldout = DataConfig(source="emoji", split="heldout", image_size=model.autoencoder.image_size)
    rules = parse_guidance(arguments.guidance) if arguments.guidance else ()
    title = ", ".join(["solvers", arguments.model, arguments.guidance or "unguided", f"{arguments.count} samples"])
    title += f", judged by {', '.join(arguments.judge)}" if networks else ""
    earlier = saved(arguments.out) if arguments.out else []
    rows: dict[str, Row] = next((each["figures"] for each in earlier if each["title"] == title), {})

    def keep(name: str, row: Row) -> None:
        rows[name] = row
        print(name, *(cell(row, key) for key in row if key == "error" or f"{key}_low" in row), flush=True)
        if arguments.out:
            save(table(title, rows), CPU, arguments.out)

    real = measure_reference(heldout, {n.name: n for n in networks}, ONE, keep=0) if networks else None
    if real and TRAINING not in rows:
        loader = Loader(DataConfig(source="emoji", split="train", image_size=heldout.image_size), seed=0)
        order = range(0, len(loader), len(loader) // arguments.count)[: arguments.count]
        keep(TRAINING, distances(images_of(loader.read([order], ONE), ONE), networks, real))
    of_reference = real.about.classes if real else None
    kind = "reference" if of_reference else "balanced"
    labels = draw_labels(kind, model.denoiser.config.num_classes, arguments.count, 0, of_reference)
    first = labels[:16]
    exact = latents(model, first, replace(REFERENCE, guidance=rules))
    runs: list[tuple[SolverName, Grid, int]] = [("heun", "full", 400)] if not rules else []
    runs += [(s, g, n) for n in arguments.evaluations for g in arguments.grids for s in arguments.solvers]
    for solver, grid, evaluations in runs:
        name = f"{solver} {grid} {evaluations}"
        if name in rows:
            continue
        steps = evaluations // 2 if solver == "heun" else evaluations
        sampling = Sampling(steps=steps + (grid == "published"), solver=solver, grid=grid, guidance=rules)
        z = latents(model, labels if real else first, sampling)
        error = ((z[: len(first)] - exact).norm() / exact.norm()).item()
        scores = distances(decoded(model, z), networks, real) if real else {}
        keep(name, {"error": error} | scores)
    publish(table(title, rows), CPU, arguments.out)


if __name__ == "__main__":
    main()
