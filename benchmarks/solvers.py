"""How close does each solver come to the exact samples, and to real images, for a number of evaluations?

    python benchmarks/solvers.py [--solvers euler abm] [--grids full few] [--evaluations 5 10 20 50] [--count 16]
        [--guidance cfg:3.0@0.1-1.0] [--precision bf16] [--judge classifier:builtin:emoji --reference FILE] [--out DIR]

Each solver starts from the same noise and classes. The error of a sample is ||z - exact|| / ||exact|| over its latents
z, where the exact samples come from `abm` with 200 steps; the table has the median and the largest error. With --judge
the table has the Frechet distances to a reference of `raekit reference` instead, with their 95 % intervals. Rows that
--out already holds are not computed again, so several calls fill one table, and a run can be stopped and resumed.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from harness import Table, publish, save, saved
from raekit.distributed import CPU, World
from raekit.evaluation.features import Images, ReferenceNetwork, load_networks
from raekit.evaluation.labels import draw_labels
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.references import Reference, read_reference
from raekit.evaluation.streaming import score_stream
from raekit.flow.guidance import parse_guidance
from raekit.flow.sampling import Sampling, sample_latents
from raekit.flow.solvers import SOLVERS, Grid
from raekit.inference.model import Model, load

ONE, BATCH = World(), 50
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
        yield Images(model.autoencoder.decode(z[part]).clamp(0, 1), torch.full_like(part, -1), part)


def distances(images: Iterable[Images], networks: list[ReferenceNetwork], real: Reference) -> dict[str, float]:
    return score_stream(images, [FrechetDistance(n, real.gaussian(n), intervals=True) for n in networks], ONE)


def table(title: str, rows: Mapping[str, Row]) -> Table:
    scores = list(dict.fromkeys(key for row in rows.values() for key in scores_of(row)))
    cells = [[name, *(cell(row, key) for key in scores)] for name, row in rows.items()]
    return Table(title, ["", *scores], cells, figures=dict(rows))


def scores_of(row: Row) -> list[str]:
    """Return the errors, or the distances without the ends of their intervals."""
    return [key for key in row if key.endswith("error") or f"{key}_low" in row]


def cell(row: Row, key: str) -> str:
    """Return a value with four digits, and with its interval if it has one."""
    interval = f" ({row[f'{key}_low']:.2f}-{row[f'{key}_high']:.2f})" if f"{key}_low" in row else ""
    return f"{row[key]:.4f}{interval}" if key in row else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:emoji")
    parser.add_argument("--solvers", nargs="+", default=[*SOLVERS], choices=SOLVERS)
    parser.add_argument("--grids", nargs="+", default=["full", "few"], choices=get_args(Grid))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[5, 8, 10, 15, 20, 25, 50])
    parser.add_argument("--guidance", help="as in cfg:3.0@0.1-1.0")
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    parser.add_argument("--count", type=int, default=16, help="samples; distances need some hundred")
    parser.add_argument("--judge", action="append", default=[], help="as in `raekit evaluate --features`")
    parser.add_argument("--reference", type=Path, help="of `raekit reference`, with the features of the judges")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    if bool(arguments.judge) != bool(arguments.reference):
        parser.error("--judge and --reference belong together; give both, or none for the errors of latents only")
    model = load(arguments.model, dtype=DTYPES[arguments.precision])
    networks = [n for name in arguments.judge for n in load_networks(name, CPU).values()]
    real = read_reference(arguments.reference) if arguments.reference else None
    rules = parse_guidance(arguments.guidance) if arguments.guidance else ()
    settings = arguments.model, arguments.guidance or "unguided", arguments.precision, f"{arguments.count} samples"
    title = ", ".join(["solvers", *settings])
    title += f", judged by {', '.join(arguments.judge)}" if networks else ""
    earlier = saved(arguments.out) if arguments.out else []
    rows: dict[str, Row] = next((each["figures"] for each in earlier if each["title"] == title), {})

    def keep(name: str, row: Row) -> None:
        rows[name] = row
        print(name, *(cell(row, key) for key in scores_of(row)), flush=True)
        if arguments.out:
            save(table(title, rows), CPU, arguments.out)

    classes = model.denoiser.config.num_classes
    labels = draw_labels("balanced", classes, arguments.count, 0, None)
    exact = None if real else latents(model, labels, replace(REFERENCE, guidance=rules))
    for evaluations, grid, solver in product(arguments.evaluations, arguments.grids, arguments.solvers):
        name = f"{solver} {grid} {evaluations}"
        if name in rows:
            continue
        steps = evaluations // 2 if solver == "heun" else evaluations
        sampling = Sampling(steps=steps + (grid == "published"), solver=solver, grid=grid, guidance=rules)
        z = latents(model, labels, sampling)
        if real:
            keep(name, distances(decoded(model, z), networks, real))
        elif exact is not None:
            errors = (z - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
            keep(name, {"median error": errors.median().item(), "largest error": errors.max().item()})
    publish(table(title, rows), CPU, arguments.out)


if __name__ == "__main__":
    main()
