"""A denoiser learns faster on the latents of a representation encoder than on the latents of a VAE.

Paper:  RAE v1, section 5 and tables 8, 10 and 11. On the latents of DINOv2-B, DiT-XL converges 47 times faster than
        SiT-XL on the latents of a VAE, and 16 times faster than REPA-XL, which adds an alignment loss. After 80
        epochs, the FID of DiT-XL is 4.28 on these latents, 7.13 on a VAE's, and 51.09 on pixels; of REPA-XL it is 7.90.
Here:   The built-in emoji at 32 x 32 pixels, as 4 x 4 tokens in all cases. One DiT of width 192 (4 blocks) is trained
        on latents of the built-in encoder (n = 192), on latents of a VAE that is trained here (8 x 8 x 4 in patches of
        2 x 2, so n = 16 as in the paper), on the same with REPA's alignment loss, whose target is the built-in
        encoder, and on pixels (patches of 8 x 8, n = 192). The schedule is shifted by the paper's rule, with the VAE's
        latents as the unshifted ones. The decoder of the encoder's latents is trained for 4,500 steps of 32 images
        (13 minutes), the VAE for 6,000 steps of 16 images (17 minutes). The built-in classifier, which took part in no
        training, judges 540 samples at six checkpoints. The pretraining of the encoder does not count, as in the paper.
Cost:   about 215 minutes on one core of an Intel Xeon with AVX-512
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from raekit.distributed import World
from raekit.evaluation.evaluate import evaluate
from raekit.experiments.studies.engine.drawing import draw_seeds, plain_numbers
from raekit.experiments.studies.engine.execution import train_shared
from raekit.experiments.studies.engine.judging import CLASSIFIER, JUDGE, measure_real, reconstruction, reference
from raekit.experiments.studies.engine.plan import (
    Claim,
    Result,
    Run,
    Settings,
    Values,
    estimate,
    geometric,
    within,
)
from raekit.experiments.studies.engine.training import (
    LARGER_DECODER,
    SIDE,
    small_decoder,
    small_denoiser,
    small_vae,
    split_of,
)
from raekit.flow.sampling import Sampling
from raekit.inference.model import Model
from raekit.models.autoencoder import load_autoencoder
from raekit.models.denoiser import Denoiser
from raekit.progress import Progress
from raekit.recipes import cache, configured
from raekit.training.tracking import read_metrics

RAE, VAE, REPA, PIXELS = "RAE", "VAE", "VAE-REPA", "pixels"
NAMES = {RAE: "RAE latents", VAE: "VAE latents", REPA: "VAE latents, with alignment loss", PIXELS: "pixels"}
"""What the denoiser is trained on, and what the figures call it."""
COLORS = dict(zip(NAMES, ("C0", "C1", "C2", "C3"), strict=True))
SEEDS = (0, 1, 2, 3, 4)
SAMPLES, RECONSTRUCTIONS = 540, 300
EVALUATIONS = 15
STEPS = 4000
PARTS = (32, 16, 8, 4, 2, 1)
"""The denoiser is judged after these parts of the steps."""
DECODER_STEPS, VAE_STEPS = 4500, 6000
SHIFT_BASE = 256
"""Dimension of the VAE's latents, whose schedule is not shifted."""


def prepare(folder: Path, quick: bool, device: str | None, progress: Progress) -> None:
    """Train the decoder and the VAE, cache the latents, and measure the real images."""
    measure_real(folder, [CLASSIFIER], quick, progress)
    split = split_of(quick)
    decoder = small_decoder(2 if quick else DECODER_STEPS, 0, split, decoder=LARGER_DECODER)
    train_shared(decoder, folder / RAE, device, progress, "decoder")
    train_shared(small_vae(2 if quick else VAE_STEPS, 0, split), folder / VAE, device, progress, "VAE")
    for space in (RAE, VAE, PIXELS):
        cache(_config(space, 0, folder, quick), progress)


def plan(folder: Path, quick: bool) -> list[Run]:
    """Return a run for each seed and latent space: the training of a denoiser."""
    counts = {"samples": 9, "reconstructions": 9} if quick else {"samples": SAMPLES, "reconstructions": RECONSTRUCTIONS}
    return [
        Run(
            f"{space}-seed{seed}",
            {"space": space, "steps": _steps(quick), **counts, "seed": seed},
            _config(space, seed, folder, quick),
        )
        for seed in SEEDS[: 2 if quick else None]
        for space in NAMES
    ]


def _steps(quick: bool) -> int:
    return 8 if quick else STEPS


def _checkpoints(steps: int) -> list[int]:
    """Return the steps after which the denoiser is judged."""
    return [steps // part for part in PARTS if part <= steps]


def _config(space: str, seed: int, folder: Path, quick: bool) -> Any:
    """Return the config of the training of a denoiser."""
    steps = _steps(quick)
    config = small_denoiser(
        {RAE: folder / RAE, PIXELS: f"pixels@{SIDE}"}.get(space, folder / VAE),
        None if space == REPA else folder / "latents" / space,  # the alignment loss needs the images
        steps,
        seed,
        split_of(quick),
        denoiser__patch_size={RAE: 1, PIXELS: 8}.get(space, 2),
        shift_base=SHIFT_BASE,
        train__milestones=_checkpoints(steps),
        # No decay, so that an early checkpoint does not wait for it. The average takes its place.
        optim__decay="constant",
    )
    if space == REPA:
        target = {"encoder": "builtin:vit-tiny", "encoder_size": SIDE, "block": 2, "hidden": 384}
        config = configured(config, alignment=target)
    return configured(config, ema=[0.998])


def measure(artifact: Path, settings: Settings, folder: Path) -> Values:
    """Return the scores of samples at each checkpoint, the FLOPs of the training, and the reconstructions' scores."""
    run, steps = artifact.parent, int(settings["steps"])
    autoencoder = load_autoencoder(artifact)
    found = []
    for step in _checkpoints(steps):
        report, _ = evaluate(
            Model(autoencoder, Denoiser.load(f"{run}@{step}")),
            reference=reference(folder),
            features=[CLASSIFIER],
            count=int(settings["samples"]),
            seed=int(settings["seed"]),
            sampling=Sampling(steps=EVALUATIONS, solver="abm", grid="few"),
            out=_evaluation(run, step),
            world=World(),
        )
        found.append(report.results)
    last = read_metrics(run)[-1]
    scores = reconstruction(autoencoder, int(settings["reconstructions"]), [CLASSIFIER], folder)
    return {
        "steps": _checkpoints(steps),
        "distances": [values[f"fd_{JUDGE}"] for values in found],
        "accuracies": [values[f"class_accuracy_{JUDGE}"] for values in found],
        "flops": round(1e12 * last["tflops"] * last["step_seconds"]),  # of a step
        "reconstruction": {"distance": scores[CLASSIFIER], "psnr": scores["psnr"]},
    }


def _evaluation(run: Path, step: int) -> Path:
    return run / "evaluations" / str(step)


class Curve(NamedTuple):
    """What one training has reached.

    Attributes:
        flops: FLOPs of the training until each checkpoint.
        distances: Distance of the samples at each checkpoint.
    """

    flops: list[float]
    distances: list[float]

    def cost(self, target: float) -> float:
        """Return the FLOPs until the distance first reaches `target`, interpolated between checkpoints.

        If the first checkpoint has reached it, these are the FLOPs of the first checkpoint.

        Raises:
            ValueError: No checkpoint has reached the target.
        """
        points = list(zip(self.flops, self.distances, strict=True))
        if points[0][1] <= target:
            return points[0][0]
        for (cost, distance), (later, reached) in pairwise(points):
            if reached <= target:
                part = math.log(distance / target) / math.log(distance / reached)
                return cost * (later / cost) ** part
        raise ValueError(f"no distance is at most {target}")


def speedup(one: Curve, other: Curve) -> float:
    """Return the FLOPs of `other` over the FLOPs of `one` until each reaches the worse of their last distances."""
    target = max(one.distances[-1], other.distances[-1])
    return other.cost(target) / one.cost(target)


def judge(results: Sequence[Result], folder: Path) -> list[Claim]:
    """Compare the trainings of the same seed."""
    return [_steps_claim(results), _flops_claim(results), _alignment(results), _pixels(results, folder)]


def _of(results: Sequence[Result], space: str) -> list[Result]:
    return [result for result in results if result.settings["space"] == space]


def _curves(results: Sequence[Result], space: str) -> list[Curve]:
    """Return the curves of all seeds."""
    return [
        Curve([step * result.values["flops"] for step in result.values["steps"]], result.values["distances"])
        for result in _of(results, space)
    ]


def _rows(results: Sequence[Result], space: str) -> list[list[float]]:
    """Return for each checkpoint the distances of all seeds."""
    return [list(row) for row in zip(*(curve.distances for curve in _curves(results, space)), strict=True)]


def _factors(results: Sequence[Result], space: str, over: str = RAE) -> list[list[float]]:
    """Return for each checkpoint the distances in one latent space over the distances in another, for each seed."""
    return [
        [mine / other for mine, other in zip(*rows, strict=True)]
        for rows in zip(_rows(results, space), _rows(results, over), strict=True)
    ]


def _checked(results: Sequence[Result]) -> list[int]:
    return results[0].values["steps"]


def _table(results: Sequence[Result], space: str, over: str = RAE) -> str:
    """Return the factors of all checkpoints in words."""
    rows = zip(_checked(results), _factors(results, space, over), strict=True)
    return ", ".join(f"{geometric(row)} (step {step})" for step, row in rows)


def _floor(results: Sequence[Result], space: str) -> dict[str, float]:
    """Return the scores of the reconstructions, which are the same for all seeds."""
    return _of(results, space)[0].values["reconstruction"]


def _seeds(results: Sequence[Result]) -> str:
    return f"Mean of {len(_of(results, RAE))} seeds with its 95 % interval, and a point for each seed."


def _axes(figure: Any, results: Sequence[Result], **options: Any) -> Any:
    """Return axes against the steps."""
    axes = figure.add_subplot(xlabel="training steps", xscale="log", **options)
    axes.set_xticks(_checked(results), list(map(str, _checked(results))))
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    return axes


def _draw(axes: Any, space: str, x: Sequence[float], rows: Sequence[Sequence[float]]) -> None:
    """Draw the curve of one kind of latents."""
    draw_seeds(axes, x, rows, mean=geometric, color=COLORS[space], marker="o", label=NAMES[space])


def _steps_claim(results: Sequence[Result]) -> Claim:
    """Judge the distance at equal steps."""
    last = geometric(_factors(results, VAE)[-1])
    accuracies = {
        space: estimate([result.values["accuracies"][-1] for result in _of(results, space)]) for space in NAMES
    }

    def draw(figure: Any) -> None:
        axes = _axes(figure, results, ylabel="Frechet distance (classifier's features)", yscale="log")
        for space in NAMES:
            _draw(axes, space, _checked(results), _rows(results, space))
        plain_numbers(axes.yaxis)
        axes.legend()

    floors = ", ".join(
        f"{_floor(results, space)['distance']:.3g} ({NAMES[space]}, PSNR {_floor(results, space)['psnr']:.1f} dB)"
        for space in (RAE, VAE)
    )
    return Claim(
        name="steps",
        text="After the same number of steps, samples are closer to real images on RAE latents than on VAE latents",
        paper="tables 2, 5 and 10: FID 4.28 on RAE latents, 7.13 on VAE latents after 80 epochs (DiT-XL)",
        found=f"distance on VAE latents over distance on RAE latents: {_table(results, VAE)}; shown if the interval "
        f"of the last step lies above 1. Distance of reconstructed held-out images: {floors}; of the held-out images "
        f"themselves: {_floor(results, PIXELS)['distance']:.3g}. Share of samples that the classifier recognises, "
        f"after the last step: {', '.join(f'{value} ({NAMES[space]})' for space, value in accuracies.items())}",
        verdict=within(last, 1, math.inf),
        draw=draw,
        caption=f"Distance of samples to real images against the steps of the denoiser's training. {_seeds(results)}",
    )


def _flops_claim(results: Sequence[Result]) -> Claim:
    """Judge the FLOPs that reach the same distance."""
    factor = {
        space: geometric(
            [speedup(one, other) for one, other in zip(_curves(results, RAE), _curves(results, space), strict=True)]
        )
        for space in (VAE, REPA, PIXELS)
    }
    costs = {space: _of(results, space)[0].values["flops"] for space in NAMES}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(
            xlabel="FLOPs of the denoiser's training",
            ylabel="Frechet distance (classifier's features)",
            xscale="log",
            yscale="log",
        )
        for space in NAMES:
            _draw(axes, space, [step * costs[space] for step in _checked(results)], _rows(results, space))
        plain_numbers(axes.yaxis)
        axes.legend()

    return Claim(
        name="flops",
        text="RAE latents need fewer FLOPs than VAE latents for the same distance",
        paper="section 5: 47 times faster than SiT-XL on VAE latents, 16 times faster than REPA-XL",
        found="FLOPs over FLOPs on RAE latents, until the worse of the two last distances is reached: "
        + ", ".join(f"{value} ({NAMES[space]})" for space, value in factor.items())
        + "; GFLOPs of a step: "
        + ", ".join(f"{flops / 1e9:.3g} ({NAMES[space]})" for space, flops in costs.items())
        + "; shown if the interval for VAE latents lies above 1",
        verdict=within(factor[VAE], 1, math.inf),
        draw=draw,
        caption="Distance of samples against the FLOPs of the denoiser's training: forward and backward passes, with "
        f"the alignment loss also the frozen encoders that run in each step. {_seeds(results)}",
    )


def _alignment(results: Sequence[Result]) -> Claim:
    """Judge RAE latents against VAE latents with an alignment loss."""
    last = geometric(_factors(results, REPA)[-1])

    def draw(figure: Any) -> None:
        axes = _axes(figure, results, ylabel="distance over distance on RAE latents")
        for space in (VAE, REPA):
            _draw(axes, space, _checked(results), _factors(results, space))
        axes.axhline(1, color="black", linewidth=1, label="no difference")
        axes.legend()

    return Claim(
        name="alignment",
        text="RAE latents without an alignment loss are better than VAE latents with one",
        paper="tables 5 and 8: FID 4.28 (DiT-XL on RAE latents), 7.90 (REPA-XL) after 80 epochs",
        found=f"distance with the alignment loss over distance on RAE latents: {_table(results, REPA)}; over distance "
        f"on VAE latents without it: {_table(results, REPA, VAE)}; shown if the interval of the last step over RAE "
        "latents lies above 1",
        verdict=within(last, 1, math.inf),
        draw=draw,
        caption="How many times larger the distance is on VAE latents, without and with the alignment loss, than on "
        f"RAE latents. Above 1, RAE latents are better. {_seeds(results)}",
    )


def _pixels(results: Sequence[Result], folder: Path) -> Claim:
    """Judge RAE latents against pixels of the same dimension."""
    last = geometric(_factors(results, PIXELS)[-1])

    def draw(figure: Any) -> None:
        left, right = figure.subfigures(1, 2)
        axes = left.add_subplot(ylabel="Frechet distance (classifier's features)", yscale="log")
        for place, space in enumerate(NAMES):
            label = f"samples after {_checked(results)[-1]} steps" if space == RAE else None
            draw_seeds(axes, [place], _rows(results, space)[-1:], mean=geometric, color="C0", fmt="o", label=label)
            label = "reconstructed held-out images\n(pixels: the images themselves)" if space == RAE else None
            axes.plot([place], [_floor(results, space)["distance"]], "_", color="C3", markersize=24, label=label)
        axes.set_xticks(range(len(NAMES)), [_narrow(space) for space in NAMES], fontsize=7)
        axes.set_xlim(-0.5, len(NAMES) - 0.5)
        plain_numbers(axes.yaxis)
        left.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=7)
        for axes, space in zip(right.subplots(2, 2).flat, NAMES, strict=True):
            run = folder / "runs" / f"{space}-seed0"
            with Image.open(_evaluation(run, _checked(results)[-1]) / "samples.png") as samples:
                axes.imshow(samples.convert("RGB"), interpolation="none")
            axes.set_title(_narrow(space), fontsize=7)
            axes.axis("off")

    return Claim(
        name="pixels",
        text="High dimension is not the reason: pixels of the same dimension are worse than RAE latents",
        paper="table 11: FID 51.09 on pixels, 4.28 on RAE latents (DiT-XL)",
        found=f"distance on pixels over distance on RAE latents: {_table(results, PIXELS)}; last distances: "
        + ", ".join(f"{estimate(_rows(results, space)[-1])} ({name})" for space, name in NAMES.items())
        + "; shown if the interval of the last step lies above 1",
        verdict=within(last, 1, math.inf),
        draw=draw,
        caption="Left: last distance of the samples, and distance of reconstructions, which samples can hardly go "
        f"below. {_seeds(results)} Right: the first samples of seed 0 after the last step, of the same classes.",
    )


def _narrow(space: str) -> str:
    """Return the name of a kind of latents in three lines, if it is long."""
    return NAMES[space].replace(", with ", ",\nwith\n")
