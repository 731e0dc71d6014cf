"""How close does each solver come to the exact samples, and to real images, for its evaluations?

    python benchmarks/solvers.py [--model builtin:emoji] [--guidance cfg:3.0@0.1-1.0] [--evaluations 5 10 20 50]
        [--count 16] [--judge builtin:vit-tiny] [--judge dinov2:FOLDER@112] [--out solvers.json]

Each solver starts from the same noise and classes. `error` is ||z - exact|| / ||exact|| over the first 16 latents z.
The exact samples are those of `abm` with 200 steps; the row `heun, 400` shows how closely a different method agrees.
With --judge also the Frechet distance to the held-out emoji, in that network (@SIZE: at that input size), with its 95 %
interval, after the distance of as many training images. Figures already in --out are kept, so a run can be stopped.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.evaluation.evaluate import evaluate, images_of
from raekit.evaluation.features import EncoderFeatures, Images
from raekit.evaluation.labels import draw_labels
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.references import Reference, measure_reference
from raekit.flow.guidance import parse_guidance
from raekit.flow.sampling import Sampling, sample_latents
from raekit.flow.solvers import Grid, SolverName
from raekit.inference.model import Model, load
from raekit.models.encoders import load_encoder

ONE, BATCH = World(), 50
REFERENCE = Sampling(steps=200, solver="abm")
Row = dict[str, Any]


def network(name: str) -> EncoderFeatures:
    name, _, size = name.partition("@")
    return EncoderFeatures(load_encoder(name, (int(size), int(size)) if size else None).eval())


def latents(model: Model, labels: list[int], sampling: Sampling) -> Tensor:
    batches = torch.arange(len(labels)).split(BATCH)
    return torch.cat(
        [sample_latents(model.denoiser, torch.tensor(labels)[part], part, 0, sampling, "cpu") for part in batches]
    )


@torch.no_grad()
def decoded(model: Model, z: Tensor) -> Iterable[Images]:
    for part in torch.arange(len(z)).split(BATCH):
        yield Images(model.autoencoder.decode(z[part]).clamp(0, 1), torch.full_like(part, -1), indices=part)


def distances(images: Iterable[Images], networks: list[EncoderFeatures], real: Reference) -> dict[str, float]:
    return evaluate(images, [FrechetDistance(n, real.gaussian(n), intervals=True) for n in networks], ONE)


def show(name: str, row: Row) -> None:
    scores = [key for key in row if f"{key}_low" in row]
    intervals = "".join(f"{row[key]:12.3f} ({row[f'{key}_low']:.2f}-{row[f'{key}_high']:.2f})" for key in scores)
    print(f"{name:32}{row.get('error', float('nan')):9.4f}{intervals}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:emoji")
    parser.add_argument("--solvers", nargs="+", default=["euler", "heun", "ab2", "abm"])
    parser.add_argument("--grids", nargs="+", default=list(get_args(Grid)), choices=get_args(Grid))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[5, 8, 10, 15, 20, 25, 50])
    parser.add_argument("--guidance", help="as in cfg:3.0@0.1-1.0")
    parser.add_argument("--count", type=int, default=16, help="samples; intervals need at least 40")
    parser.add_argument("--judge", action="append", default=[], help="an encoder, or ENCODER@SIZE")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    model, networks = load(arguments.model), [network(name) for name in arguments.judge]
    heldout = DataConfig(source="emoji", split="heldout", image_size=model.autoencoder.image_size)
    rules = parse_guidance(arguments.guidance) if arguments.guidance else ()
    rows: dict[str, Row] = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}

    def keep(name: str, row: Row) -> None:
        rows[name] = row
        show(name, row)
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=2) + "\n")

    real = measure_reference(heldout, {n.name: n for n in networks}, ONE, keep=0) if networks else None
    if real:
        loader = Loader(DataConfig(source="emoji", split="train", image_size=heldout.image_size), seed=0)
        order = range(0, len(loader), len(loader) // arguments.count)[: arguments.count]
        keep("training images", distances(images_of(loader.read([order], ONE), ONE), networks, real))
    of_reference = real.about.classes if real else None
    kind = "reference" if of_reference else "balanced"
    labels = draw_labels(kind, model.denoiser.config.num_classes, arguments.count, 0, of_reference)
    first = labels[:16]
    exact = latents(model, first, replace(REFERENCE, guidance=rules))
    runs: list[tuple[SolverName, Grid, int]] = [("heun", "full", 400)] if not rules else []
    runs += [(s, g, n) for n in arguments.evaluations for g in arguments.grids for s in arguments.solvers]
    for solver, grid, evaluations in runs:
        name = f"{arguments.guidance or 'unguided'} {solver} {grid} {evaluations}"
        if name in rows:
            show(name, rows[name])
            continue
        steps = evaluations // 2 if solver == "heun" else evaluations
        sampling = Sampling(steps=steps + (grid == "published"), solver=solver, grid=grid, guidance=rules)
        z = latents(model, labels if real else first, sampling)
        error = ((z[: len(first)] - exact).norm() / exact.norm()).item()
        keep(name, {"error": error} | (distances(decoded(model, z), networks, real) if real else {}))


if __name__ == "__main__":
    main()
