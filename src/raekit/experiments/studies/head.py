"""A wide, shallow head helps on tokens of high dimension, and only there.

Paper:  RAE v1, tables 6, 10 and 11. With the head, the FID of DiT-XL improves by the factors 1.45, 1.98 and 2.23 for
        tokens of dimension n = 384, 768 and 1024 (DINOv2-S, B, L), and from 51.09 to 30.56 on patches of pixels
        (n = 768). On the latents of a VAE (n = 16) it gets worse, from 7.13 to 11.70.
Here:   The same synthetic images, made of six numbers, at three sizes: 2 x 2 patches with n = 12, 48 and 192. A plain
        DiT of width 128 (4 blocks) is compared with a DiT^DH of the same FLOPs: a backbone of width 64 (2 blocks) and a
        head of width 192 (1 block). Both predict the velocity, as in the paper. The distance is to the known
        distribution of the images. The paper adds the head to a DiT of the same size; here the head replaces a part of
        the backbone.
Cost:   about 50 minutes on one core of an Intel Xeon with AVX-512
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import raekit
from raekit.experiments.studies.engine import waves
from raekit.experiments.studies.engine.drawing import draw_pairs, draw_seeds, plain_numbers
from raekit.experiments.studies.engine.plan import Claim, Result, Run, Settings, Values, geometric, within
from raekit.experiments.studies.engine.training import small_dit
from raekit.experiments.studies.engine.waves import draw_numbers, write_images
from raekit.models.denoiser import Denoiser
from raekit.progress import Progress
from raekit.recipes import cache, configured
from raekit.training.throughput import flop_counter

DIMENSIONS = (12, 48, 192)
"""Dimensions of a token: patches of 2, 4 and 8 pixels."""
WIDTH = 128
"""Width of the plain DiT."""
SIZES: dict[str, dict[str, Any]] = {
    "DiT": {"denoiser__backbone": {"width": WIDTH, "depth": 4, "heads": 2}},
    "DiT-DH": {
        "denoiser__backbone": {"width": 64, "depth": 2, "heads": 2},
        "denoiser__head": {"width": 192, "depth": 1, "heads": 2},
    },
}
SEEDS = (0, 1, 2)
IMAGES = 4096
EVALUATIONS = 20
STEPS = 2000
SHIFT_BASE = 192
"""Dimension of the latents whose schedule is not shifted."""


def prepare(folder: Path, quick: bool, device: str | None, progress: Progress) -> None:
    """Write the images of each size, and cache their latents."""
    numbers = draw_numbers(IMAGES, seed=0)
    for n in DIMENSIONS:
        write_images(_images(folder, n), numbers, _side(n))
        cache(_config("DiT", n, seed=0, folder=folder, steps=2), progress)


def plan(folder: Path, quick: bool) -> list[Run]:
    """Return a run for each seed, token dimension and network."""
    return [
        Run(
            f"{network}-n{n}-seed{seed}",
            {"network": network, "dimension": n, "seed": seed},
            _config(network, n, seed, folder, steps=4 if quick else STEPS),
        )
        for seed in SEEDS[: 2 if quick else None]
        for n in DIMENSIONS[:: 2 if quick else 1]
        for network in SIZES
    ]


def _side(dimension: int) -> int:
    """Return the side in pixels of images of 2 x 2 tokens."""
    return 2 * math.isqrt(dimension // 3)


def _images(folder: Path, dimension: int) -> Path:
    return folder / "images" / f"{dimension}.npz"


def _config(network: str, dimension: int, seed: int, folder: Path, steps: int) -> Any:
    """Return the config of a training of one network on the images of one size."""
    side = _side(dimension)
    config = small_dit(
        side,
        folder / "latents" / str(dimension),
        steps,
        seed,
        data__source=f"npz:{_images(folder, dimension)}",
        shift_base=SHIFT_BASE,
        denoiser__patch_size=side // 2,
        denoiser__prediction="velocity",
    )
    return configured(config, train__batch_size=128, optim__lr=3e-3, **SIZES[network])


def measure(artifact: Path, settings: Settings, folder: Path) -> Values:
    """Return the distance of generated images from the true distribution, and the FLOPs of a forward pass."""
    model = raekit.load(str(artifact))
    found = waves.measure(model, int(settings["seed"]), EVALUATIONS, _side(int(settings["dimension"])))
    return found | {"flops": forward_flops(model.denoiser)}


@torch.no_grad()
def forward_flops(denoiser: Denoiser) -> int:
    """Return the FLOPs of a forward pass for one image."""
    with flop_counter() as counter:
        denoiser(torch.zeros(1, *denoiser.config.latent_shape), torch.ones(1))
    return counter.get_total_flops()


Distances = dict[int, dict[str, list[float]]]
"""The distances of all seeds by token dimension and network."""


def judge(results: Sequence[Result], folder: Path) -> list[Claim]:
    """Compare the two networks at each token dimension."""
    distances: Distances = {}
    flops: dict[int, dict[str, int]] = {}
    for result in results:
        network, n = str(result.settings["network"]), int(result.settings["dimension"])
        distances.setdefault(n, {}).setdefault(network, []).append(result.values["distance"])
        flops.setdefault(n, {})[network] = result.values["flops"]
    ratios = [values["DiT"] / values["DiT-DH"] for values in flops.values()]
    cost = f"FLOPs of DiT over FLOPs of DiT^DH from {min(ratios):.2f} to {max(ratios):.2f}"
    return [_high(distances, cost), _low(distances), _growth(distances)]


def _factors(distances: Distances, dimension: int) -> list[float]:
    """Return how many times larger the distance of the plain DiT is, for each seed."""
    row = distances[dimension]
    return [plain / wide for plain, wide in zip(row["DiT"], row["DiT-DH"], strict=True)]


def _high(distances: Distances, cost: str) -> Claim:
    """Judge the largest token dimension."""
    largest = max(distances)
    factor = geometric(_factors(distances, largest))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(
            xlabel="token dimension n", ylabel="distance to the true distribution", xscale="log", yscale="log"
        )
        for network, color in zip(SIZES, ("C0", "C1"), strict=True):
            rows = [row[network] for row in distances.values()]
            count = len(distances[largest][network])
            label = f"{_spelled(network)} (mean of {count} seeds, 95 % interval)"
            draw_seeds(axes, list(distances), rows, mean=geometric, color=color, label=label)
        axes.axvline(WIDTH, color="grey", linestyle=":", label=f"width of the DiT, {WIDTH}")
        axes.set_xticks(list(distances), list(map(str, distances)))
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.legend()

    return Claim(
        name="high",
        text="On tokens wider than the DiT, the wide head lowers the distance at equal FLOPs",
        paper="table 6: FID 4.28 to 2.16 for n = 768 (with more FLOPs); table 11: 51.09 to 30.56 on pixels",
        found=f"n = {largest}: the distance of the DiT of width {WIDTH} is {factor} times the distance of the DiT^DH "
        f"({cost}); shown if the interval lies above 1",
        verdict=within(factor, 1, math.inf),
        draw=draw,
        caption="Distance of generated images against the token dimension, for a DiT and a DiT^DH of equal FLOPs.",
    )


def _spelled(network: str) -> str:
    return {"DiT": f"DiT, width {WIDTH}", "DiT-DH": "DiT^DH, width 64, head 192"}[network]


def _low(distances: Distances) -> Claim:
    """Judge the smallest token dimension."""
    smallest = min(distances)
    factor = geometric(_factors(distances, smallest))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(ylabel=f"distance to the true distribution, n = {smallest}")
        draw_pairs(axes, [_spelled(network) for network in SIZES], [distances[smallest][network] for network in SIZES])

    return Claim(
        name="low",
        text="On tokens of low dimension, the wide head does not help",
        paper="table 10: FID 7.13 without, 11.70 with the head on the latents of a VAE (n = 16)",
        found=f"n = {smallest}: the distance of the DiT is {factor} times the distance of the DiT^DH; shown if the "
        "interval lies below 1",
        verdict=within(factor, 0, 1),
        draw=draw,
        caption=f"Distance for tokens of dimension {smallest}, without and with the head.",
    )


def _growth(distances: Distances) -> Claim:
    """Judge whether the benefit grows with the token dimension."""
    smallest, largest = min(distances), max(distances)
    factors = {n: _factors(distances, n) for n in distances}
    change = geometric([b / a for a, b in zip(factors[smallest], factors[largest], strict=True)])

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(
            xlabel="token dimension n", ylabel="distance of DiT over distance of DiT^DH", xscale="log", yscale="log"
        )
        label = f"mean of {len(factors[largest])} seeds, 95 % interval"
        draw_seeds(axes, list(factors), list(factors.values()), mean=geometric, label=label)
        axes.axhline(1, color="black", linewidth=1, label="no difference")
        axes.set_xticks(list(factors), list(map(str, factors)))
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        plain_numbers(axes.yaxis)
        axes.legend()

    return Claim(
        name="growth",
        text="The benefit of the wide head grows with the token dimension",
        paper="table 6: factors of the FID 1.45, 1.98 and 2.23 for n = 384, 768 and 1024",
        found="factors of the distance "
        + ", ".join(f"{geometric(values)} (n = {n})" for n, values in factors.items())
        + f"; from n = {smallest} to {largest} the factor grows {change} times; shown if this interval lies above 1",
        verdict=within(change, 1, math.inf),
        draw=draw,
        caption="How many times larger the distance of the plain DiT is. Above 1 the head helps. Points: each seed.",
    )
