"""Encoders whose tokens tell classes apart give better generated images.

Paper:  RAE v1, tables 1 and 15. A linear probe on the tokens of DINOv2-B, SigLIP2-B and MAE-B gives 84.5, 79.1 and
        68.0 %, and a DiT-XL on their latents reaches an FID of 4.81, 6.69 and 16.14. MAE-B reconstructs best: rFID
        0.16, 0.49 for DINOv2-B and 0.53 for SigLIP2-B. "What matters for representation alignment" (arXiv 2512.10794)
        finds over 27 encoders that the FID correlates with the spatial structure of the tokens (|r| > 0.85), and hardly
        with the accuracy of a linear probe (|r| = 0.26). There the encoder is the target of REPA, not the latent space.
Here:   The built-in emoji at 32 x 32 pixels, as 4 x 4 tokens of 192 channels. The encoders have one architecture:
        random weights, masked autoencoders (MAE) that are trained here, and the built-in encoder, which was distilled
        from a ViT-S/14. Early and middle blocks of the built-in encoder give more latents. For each encoder: accuracy
        of a linear probe on the mean token, the spatial structure of the whitened tokens (how much more similar
        neighbours are than tokens at least 4 steps apart), the reconstructions of held-out images by a small decoder,
        iFID (arXiv 2603.05630: decoded latents halfway between a held-out image and a similar training image), and the
        images of a small DiT. Decoders and DiTs have one size and one number of steps. The built-in
        classifier, which took part in no training, judges the images. Seeds are seeds of the DiT.
        Three encoders are added if the folder of a ViT-S/14 (vit-s14-focus, which is not part of raekit), or a link to
        it, is in the folder of the study under this name: this network itself, which runs at 56 pixels and gives tokens
        of 384 channels, and two encoders that are distilled from it here, with all patches visible and with 60 % of
        them hidden.
Cost:   about 95 minutes on one core of an AMD EPYC with AVX-512
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import raekit
from raekit.config import read_json, to_json
from raekit.data.loader import DataConfig
from raekit.data.sources.base import Split
from raekit.distributed import World
from raekit.evaluation.evaluate import evaluate
from raekit.evaluation.probe import linear_probe, untrained
from raekit.experiments.studies.engine.drawing import draw_seeds, error_bars, plain_numbers
from raekit.experiments.studies.engine.execution import train_shared
from raekit.experiments.studies.engine.judging import CLASSIFIER, JUDGE, measure_real, reference
from raekit.experiments.studies.engine.latents import encode
from raekit.experiments.studies.engine.plan import (
    Claim,
    Estimate,
    Result,
    Run,
    Settings,
    Values,
    estimate,
    geometric,
    rank_correlation,
    within,
)
from raekit.experiments.studies.engine.training import SIDE, small_decoder, small_denoiser, split_of
from raekit.files import whole
from raekit.flow.sampling import Sampling
from raekit.models.autoencoder import load_autoencoder
from raekit.models.encoders import load_encoder
from raekit.progress import Progress
from raekit.recipes import StageConfig, cache, configured


@dataclass(frozen=True)
class Latents:
    """Latents to compare.

    Attributes:
        label: What they are, for figures.
        encoder: A built-in encoder, or the name of an encoder in the folder of the study.
        blocks: The blocks of the encoder whose outputs form the latents.
        size: The side in pixels at which the encoder gives 4 x 4 tokens.
    """

    label: str
    encoder: str
    blocks: tuple[int, ...] = (-1,)
    size: int = SIDE


@dataclass(frozen=True)
class Pretraining:
    """The training of an encoder in the study.

    Attributes:
        hidden: Share of hidden patches.
        teacher: Whether the encoder predicts the tokens of the user's ViT-S/14, and not only pixels.
    """

    hidden: float
    teacher: bool = False


BUILT_IN = "builtin:vit-tiny"
PRETRAINED = {
    "mae": Pretraining(0.6),  # the recipe's share
    "mae-90": Pretraining(0.9),
    "student": Pretraining(0.0, teacher=True),
    "student-masked": Pretraining(0.6, teacher=True),
}
SHORT = 40
"""Steps of the early checkpoint of the first masked autoencoder."""
RANDOM, MAE, DISTILLED = "random", "mae", "distilled"
LATENTS = {
    RANDOM: Latents("random weights", "random"),
    MAE: Latents("MAE", "mae"),
    DISTILLED: Latents("distilled", BUILT_IN),
    "mae-short": Latents(f"MAE, {SHORT} steps", f"mae@{SHORT}"),
    "mae-90": Latents("MAE, 90 % hidden", "mae-90"),
    "distilled-0": Latents("distilled, block 0 of 6", BUILT_IN, (0,)),
    "distilled-2": Latents("distilled, block 2 of 6", BUILT_IN, (2,)),
    "distilled-mean": Latents("distilled, mean of blocks 0 and 5", BUILT_IN, (0, 5)),
}
GUEST = "vit-s14-focus"
"""An encoder that the user may add."""
STUDENTS = {
    "student": Latents("distilled here", "student"),
    "student-masked": Latents("distilled here, 60 % hidden", "student-masked"),
}
"""Latents of the encoders that are distilled from the added encoder."""
SEEDS = (0, 1, 2)
SAMPLES = 540
EVALUATIONS = 15
PRETRAINING_STEPS, DECODER_STEPS, STEPS = 400, 500, 1000
FAR = 4
"""Steps along rows and columns from which tokens count as far apart."""
MEASURES = {
    "accuracy": "class accuracy of a linear probe",
    "structure": "spatial structure (similarity of near minus far tokens)",
    "psnr": "PSNR of reconstructions (dB)",
    "ifid": "iFID (classifier's features)",
}
"""What is measured on the latents, without a denoiser."""


def prepare(folder: Path, quick: bool, device: str | None, progress: Progress) -> None:
    """Train the encoders and a decoder for each, cache the latents, and measure the latents and the real images."""
    measure_real(folder, [CLASSIFIER], quick, progress)
    random = folder / "encoders" / "random"
    if not (random / "encoder").is_dir():
        untrained(load_encoder(BUILT_IN)).save(random)
    for name, pretraining in PRETRAINED.items():
        if any(latents.encoder == name for latents in _chosen(folder, quick).values()):
            train_shared(
                _encoder(pretraining, folder, quick), folder / "encoders" / name, device, progress, f"encoder {name}"
            )
    for name, latents in _chosen(folder, quick).items():
        measured = _measured(folder, name)
        if not measured.is_file():
            place = folder / "decoders" / name
            train_shared(_decoder(latents, folder, quick), place, device, progress, f"decoder {name}")
            cache(_config(name, 0, folder, quick), progress)
            values = _measure_latents(place, split_of(quick))
            with whole(measured) as partial:
                partial.write_text(to_json(values))


def _chosen(folder: Path, quick: bool) -> dict[str, Latents]:
    """Return the latents that are compared, with the user's ViT-S/14 if it is in the folder of the study."""
    if quick:
        return {name: LATENTS[name] for name in (RANDOM, MAE, DISTILLED)}
    if not (folder / GUEST).is_dir():
        return LATENTS
    return LATENTS | STUDENTS | {GUEST: Latents("ViT-S/14", f"dinov2:{folder / GUEST}", size=56)}


def _measured(folder: Path, name: str) -> Path:
    return folder / "measured" / f"{name}.json"


def _encoder(pretraining: Pretraining, folder: Path, quick: bool) -> StageConfig:
    """Return the config of an encoder."""
    steps = 2 if quick else PRETRAINING_STEPS
    teacher = {"teacher__encoder": f"dinov2:{folder / GUEST}"} if pretraining.teacher else {}
    return configured(
        "emoji_encoder_distilled" if pretraining.teacher else "emoji_encoder",
        **teacher,
        mask_ratio=pretraining.hidden,
        data__split=split_of(quick),
        data__image_size=SIDE,
        encoder__image_size=SIDE,
        train__steps=steps,
        train__batch_size=64,
        train__precision="fp32",
        train__milestones=[1 if quick else SHORT],
        optim__warmup_steps=min(20, steps - 1),
        optim__decay_end=steps,
        ema=[],
    )


def _decoder(latents: Latents, folder: Path, quick: bool) -> StageConfig:
    """Return the config of a decoder."""
    known = ":" in latents.encoder
    return configured(
        small_decoder(2 if quick else DECODER_STEPS, 0, split_of(quick), noise=0.4),
        encoder=latents.encoder if known else str(folder / "encoders" / latents.encoder),
        encoder_size=latents.size,
        layers__blocks=list(latents.blocks),
    )


def _config(name: str, seed: int, folder: Path, quick: bool) -> Any:
    """Return the config of a denoiser."""
    return small_denoiser(
        folder / "decoders" / name,
        folder / "latents" / name,
        2 if quick else STEPS,
        seed,
        split_of(quick),
        denoiser__allow_narrow=True,  # the user's encoder may have wider tokens
    )


def _measure_latents(decoder: Path, split: Split) -> Values:
    """Measure the latents of an encoder, and the reconstructions of its decoder."""
    autoencoder = load_autoencoder(decoder)
    parts = [DataConfig(source="emoji", split=each, image_size=SIDE) for each in (split, "heldout")]
    training, heldout = (encode(autoencoder, part) for part in parts)
    probe = linear_probe(training[0].mean((2, 3)), training[1], heldout[0].mean((2, 3)), heldout[1])
    report, _ = evaluate(str(decoder), reconstruct=True, out=decoder / "evaluation", world=World())
    halfway, _ = evaluate(str(decoder), interpolate=True, out=decoder / "interpolations", world=World())
    return {
        "accuracy": probe.accuracy,
        "accuracy_low": probe.low,
        "accuracy_high": probe.high,
        "structure": spatial_structure(heldout[0]),
        "psnr": report.results["psnr"],
        "reconstruction": report.results[f"rfd_{JUDGE}"],
        "ifid": halfway.results[f"ifd_{JUDGE}"],
    }


def spatial_structure(latents: Tensor) -> float:
    """Return how much more alike neighbouring tokens are than distant tokens of an image (arXiv 2512.10794).

    The likeness of two tokens is the cosine of the angle between them. The result is its mean over neighbours minus its
    mean over tokens that are at least `FAR` steps apart, along rows and columns.

    Args:
        latents: Latents (N, C, h, w) of N images.
    """
    tokens = F.normalize(latents.flatten(2), dim=1)
    alike = (tokens.mT @ tokens).mean(0)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, latents.shape[2:]), indexing="ij"))
    steps = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    return (alike[steps == 1].mean() - alike[steps >= FAR].mean()).item()


def plan(folder: Path, quick: bool) -> list[Run]:
    """Return a run for each seed and encoder: the training of a denoiser."""
    return [
        Run(
            f"{name}-seed{seed}",
            {"encoder": name, "label": latents.label, "samples": 9 if quick else SAMPLES, "seed": seed},
            _config(name, seed, folder, quick),
        )
        for seed in SEEDS[: 2 if quick else None]
        for name, latents in _chosen(folder, quick).items()
    ]


def measure(artifact: Path, settings: Settings, folder: Path) -> Values:
    """Return the measures of the latents and the scores of generated images."""
    report, _ = evaluate(
        raekit.load(artifact),
        reference=reference(folder),
        features=[CLASSIFIER],
        count=int(settings["samples"]),
        seed=int(settings["seed"]),
        sampling=Sampling(steps=EVALUATIONS, solver="abm", grid="few"),
        out=artifact.parent / "evaluation",
        world=World(),
    )
    return {
        **read_json(_measured(folder, str(settings["encoder"]))),
        "distance": report.results[f"fd_{JUDGE}"],
        "class_accuracy": report.results[f"class_accuracy_{JUDGE}"],
    }


def judge(results: Sequence[Result], folder: Path) -> list[Claim]:
    """Rank the encoders by each measure and by their generated images."""
    return [_probe(results), _structure(results), _reconstruction(results), _ifid(results), _distilled(results)]


def _encoders(results: Sequence[Result]) -> dict[str, str]:
    """Return the labels of the encoders by name."""
    return {str(result.settings["encoder"]): str(result.settings["label"]) for result in results}


def _values(results: Sequence[Result], encoder: str, measure: str) -> list[float]:
    """Return a value of one encoder for all seeds."""
    return [result.values[measure] for result in results if result.settings["encoder"] == encoder]


def _correlation(results: Sequence[Result], measure: str, other: str = "distance") -> Estimate:
    """Return the rank correlation of two measures over the encoders, averaged over the seeds."""
    rows = ([_average(_values(results, name, each)) for name in _encoders(results)] for each in (measure, other))
    return rank_correlation(*rows)


def _average(values: Sequence[float]) -> float:
    """Return the geometric mean if all values are positive, as distances are, and otherwise the mean."""
    return (geometric(values) if min(values) > 0 else estimate(values)).mean


def _of_seeds(results: Sequence[Result], measure: str) -> str:
    """Return the rank correlations of a measure with the distance for each seed."""
    seeds = dict.fromkeys(result.settings["seed"] for result in results)
    each = ([result for result in results if result.settings["seed"] == seed] for seed in seeds)
    return ", ".join(f"{_correlation(part, measure).mean:.2f}" for part in each)


def _found(results: Sequence[Result], measure: str) -> str:
    return (
        f"rank correlation with the distance of generated images over {len(_encoders(results))} encoders: "
        f"{_correlation(results, measure)} (each seed: {_of_seeds(results, measure)})"
    )


def _probe(results: Sequence[Result]) -> Claim:
    """Judge the probe's accuracy."""
    others = ", ".join(f"with the {name} {_correlation(results, 'accuracy', name)}" for name in ("structure", "psnr"))
    return Claim(
        name="probe",
        text="The better a linear probe tells the classes apart, the better the generated images",
        paper="tables 1 and 15: accuracy 84.5, 79.1 and 68.0 %, FID 4.81, 6.69 and 16.14",
        found=f"{_found(results, 'accuracy')}; shown if the interval lies below 0. Rank correlation of the accuracy "
        f"{others}",
        verdict=within(_correlation(results, "accuracy"), -math.inf, 0),
        draw=_scatter(results, "accuracy"),
        caption="Distance of generated images against the accuracy of a linear probe on held-out images.",
    )


def _structure(results: Sequence[Result]) -> Claim:
    """Judge the spatial structure."""
    return Claim(
        name="structure",
        text="The more spatial structure the tokens have, the better the generated images",
        paper="not in the paper; arXiv 2512.10794: correlation above 0.85 over 27 encoders, as targets of REPA",
        found=f"{_found(results, 'structure')}; shown if the interval lies below 0",
        verdict=within(_correlation(results, "structure"), -math.inf, 0),
        draw=_scatter(results, "structure"),
        caption="Distance of generated images against the spatial structure of the whitened tokens of held-out images.",
    )


def _reconstruction(results: Sequence[Result]) -> Claim:
    """Judge the reconstruction."""
    return Claim(
        name="reconstruction",
        text="Encoders that reconstruct better generate worse",
        paper="tables 1 and 15: rFID 0.16 (MAE-B), 0.49 (DINOv2-B), 0.53 (SigLIP2-B), FID 16.14, 4.81, 6.69",
        found=f"PSNR: {_found(results, 'psnr')}; shown if the interval lies above 0",
        verdict=within(_correlation(results, "psnr"), 0, math.inf),
        draw=_scatter(results, "psnr"),
        caption="Distance of generated images against the peak signal-to-noise ratio of reconstructed held-out images.",
    )


def _ifid(results: Sequence[Result]) -> Claim:
    """Judge iFID, which needs no denoiser."""
    return Claim(
        name="ifid",
        text="The lower the iFID, the better the generated images",
        paper="not in the paper; arXiv 2603.05630: correlation of iFID and FID about 0.85 over 14 autoencoders",
        found=f"{_found(results, 'ifid')}; shown if the interval lies above 0. For comparison, the distance of "
        f"reconstructions: {_correlation(results, 'reconstruction')}",
        verdict=within(_correlation(results, "ifid"), 0, math.inf),
        draw=_scatter(results, "ifid"),
        caption="Distance of generated images against iFID, the distance of decoded latents halfway between a held-out "
        "image and a similar training image.",
    )


_MARKERS = "osD^vP*XhpH"


def _scatter(results: Sequence[Result], measure: str) -> Callable[[Any], None]:
    """Return a function that draws the distance of each encoder against a measure."""

    def draw(figure: Any) -> None:
        scales = {"xscale": "log" if measure == "ifid" else "linear", "yscale": "log"}
        axes = figure.add_subplot(xlabel=MEASURES[measure], ylabel="Frechet distance of generated images", **scales)
        for place, (name, label) in enumerate(_encoders(results).items()):
            distances = _values(results, name, "distance")
            x = _values(results, name, measure)
            style = {"color": f"C{place}", "marker": _MARKERS[place]}
            draw_seeds(axes, x[:1], [distances], mean=geometric, linestyle="", label=label, **style)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                plain_numbers(axis)
        count = len(results) // len(_encoders(results))
        title = f"mean of {count} seeds, 95 % interval;\nsmall: each seed"
        figure.legend(loc="outside right center", fontsize=7, title=title, title_fontsize=7)

    return draw


def _distilled(results: Sequence[Result]) -> Claim:
    """Judge the distilled encoder against a masked autoencoder and random weights, by pairs of a seed."""
    distances = {name: _values(results, name, "distance") for name in _encoders(results)}

    def factor(name: str) -> Estimate:
        pairs = zip(distances[name], distances[DISTILLED], strict=True)
        return geometric([other / distilled for other, distilled in pairs])

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(xlabel="distance of generated images / distance with the distilled encoder")
        labels = _encoders(results)
        for row, name in enumerate(labels):
            ratios = [other / distilled for other, distilled in zip(distances[name], distances[DISTILLED], strict=True)]
            mean = geometric(ratios)
            axes.plot(ratios, [row] * len(ratios), ".", color="grey")
            axes.errorbar([mean.mean], [row], xerr=error_bars([mean]), fmt="o", capsize=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(labels)), list(labels.values()))
        axes.invert_yaxis()

    return Claim(
        name="distilled",
        text="Latents of the distilled encoder are generated better than latents of the masked autoencoder",
        paper="table 15: FID 16.14 with MAE-B, 4.81 with DINOv2-B, a factor of 3.36",
        found=f"the distance with the masked autoencoder is {factor(MAE)} times the distance with the distilled "
        f"encoder (random weights: {factor(RANDOM)} times); shown if the first interval lies above 1",
        verdict=within(factor(MAE), 1, math.inf),
        draw=draw,
        caption="Distance with each encoder over the distance with the distilled encoder: a grey point for each seed, "
        "the geometric mean and its 95 % interval. Left of 1 is better than the distilled encoder.",
    )
