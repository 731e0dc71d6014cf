"""For latents of an encoder, the best shift of the schedule grows with the square root of the dimension.

Paper:  RAE v1, section 4.2 and table 4. Times are shifted by alpha = sqrt(m / 4096), where m counts all values of the
        latents, channels included. For DINOv2-B (m = 196,608), alpha = 6.93 improves the FID from 23.08 to 4.81.
Here:   Fashion-MNIST, the first 6,000 training images, padded to 32 x 32 pixels. Three masked autoencoders are trained
        here on these images. They differ only in their patches of 8, 4 and 2 pixels, so that the same images become
        4 x 4, 8 x 8 and 16 x 16 tokens of 48 channels: m = 768, 3,072 and 12,288. Each has 600 steps; together they
        take about 5 minutes of the cost below. One encoder at three image sizes would see positions and scales that it
        was not trained on. A class-conditional DiT of width 64 learns each latent space in 1,200 steps of 16 images.
        Training times and sampling grid use the same shift, as in the paper.
        No decoder takes part. The distance is the Frechet distance (squared, as in the FID) between descriptions of
        generated latents and of the training latents, three numbers for each channel: mean over the tokens, standard
        deviation over the tokens, and mean product of neighbouring tokens. The numbers are divided by their standard
        deviation over the training images. So the judge sees the very values that the DiT learns, but no network is
        between them. The distance of held-out images is given for comparison. Distances of different m cannot be
        compared.
        The images are read from the Debian package dataset-fashion-mnist, or from the folder `fashion-mnist`, or a link
        to it, in the folder of the study.
Cost:   about 100 minutes on one core of an Intel Xeon with AVX-512
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raekit.config import read_json, to_json
from raekit.data.loader import DataConfig
from raekit.data.sources import open_source
from raekit.data.sources.base import Split
from raekit.errors import UserError
from raekit.evaluation.frechet import Gaussian, frechet_distance
from raekit.evaluation.probe import linear_probe
from raekit.experiments.studies.engine.execution import train_shared
from raekit.experiments.studies.engine.latents import encode, generate
from raekit.experiments.studies.engine.plan import Claim, Result, Run, Settings, Values
from raekit.experiments.studies.engine.shifts import shift_claims
from raekit.experiments.studies.engine.training import SIDE, small_decoder, small_denoiser
from raekit.files import whole
from raekit.flow.sampling import Sampling
from raekit.models.autoencoder import load_autoencoder
from raekit.models.denoiser import Denoiser
from raekit.progress import Progress
from raekit.recipes import StageConfig, cache, configured

FASHION = "fashion-mnist"
"""The folder of the images in the folder of the study."""
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""The folder of the Debian package dataset-fashion-mnist."""
IMAGES: dict[Split, int] = {"train": 6000, "heldout": 2000}
"""Number of images of each split: the first ones."""
WIDTH = 48
"""Channels of a token."""
BASES = {
    4: (6144, 768, 96, 12, 2),
    8: (24576, 3072, 384, 48, 6),
    16: (12288, 1536, 192, 24, 3),
}
"""Values of `shift_base` by the number of rows of tokens. The shifts are 0.35, 1, 2.8, 8 and 20 for m = 768, 0.35, 1,
2.8, 8 and 23 for m = 3,072, and 1, 2.8, 8, 23 and 64 for m = 12,288."""
SEEDS = (0, 1, 2, 3)
SAMPLES = 500
EVALUATIONS = 30
PRETRAINING_STEPS, STEPS = 600, 1200


def prepare(folder: Path, quick: bool, device: str | None, progress: Progress) -> None:
    """Write the images, train the encoders, cache their latents, and describe the latents of real images."""
    for split, count in IMAGES.items():
        _write_images(folder, split, 64 if quick else count)
    for rows in dict.fromkeys(int(run.settings["rows"]) for run in plan(folder, quick)):
        if not _described(folder, rows).is_file():
            train_shared(
                _encoder(rows, folder, quick), folder / "encoders" / str(rows), device, progress, f"encoder {rows}"
            )
            # One step, because only the statistics of the latents are needed.
            autoencoder = folder / "autoencoders" / str(rows)
            train_shared(_autoencoder(rows, folder), autoencoder, device, progress, f"statistics {rows}")
            cache(_config(rows, 1, 0, folder, quick), progress)
            _describe_images(rows, folder)


def _write_images(folder: Path, split: Split, count: int) -> None:
    """Write the first images of a split, with a margin of 2 pixels, which makes them 32 x 32. A file is kept."""
    path = _images(folder, split)
    if path.is_file():
        return
    place = next((place for place in (folder / FASHION, DEBIAN) if place.is_dir()), None)
    if place is None:
        raise UserError(
            f"{DEBIAN}: no such folder; install Fashion-MNIST (on Debian: apt install dataset-fashion-mnist), or link "
            f"the folder of its four IDX files to {folder / FASHION}"
        )
    source = open_source(f"idx:{place}", split)
    images, labels = zip(*(source[index] for index in range(min(count, len(source)))), strict=True)
    margin = [(0, 0), (2, 2), (2, 2), (0, 0)]
    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, arr_0=np.pad(np.stack(list(map(np.asarray, images))), margin), arr_1=np.array(labels))


def _images(folder: Path, split: Split) -> Path:
    return folder / "images" / f"{split}.npz"


def _described(folder: Path, rows: int) -> Path:
    return folder / "described" / f"{rows}.safetensors"


def _measured(folder: Path, rows: int) -> Path:
    return folder / "described" / f"{rows}.json"


def _data(folder: Path, split: Split = "train") -> DataConfig:
    return DataConfig(source=f"npz:{_images(folder, split)}", split="all", image_size=SIDE)


def _encoder(rows: int, folder: Path, quick: bool) -> StageConfig:
    """Return the config of a masked autoencoder."""
    steps = 2 if quick else PRETRAINING_STEPS
    return configured(
        "emoji_encoder",
        data__source=_data(folder).source,
        data__split="all",
        data__image_size=SIDE,
        encoder={"image_size": SIDE, "patch_size": SIDE // rows, "width": WIDTH, "depth": 4, "heads": 3},
        decoder_width=WIDTH,
        decoder_depth=1,
        train__steps=steps,
        train__batch_size=64,
        train__precision="fp32",
        optim__lr=2e-3,
        optim__warmup_steps=min(20, steps - 1),
        optim__decay_end=steps,
        ema=[],
    )


def _autoencoder(rows: int, folder: Path) -> StageConfig:
    """Return the config of an autoencoder, whose decoder is not used."""
    decoder = {"width": WIDTH, "depth": 1, "heads": 3, "hidden": WIDTH, "patch_size": SIDE // rows}
    return configured(
        small_decoder(1, 0, "all"),
        data__source=_data(folder).source,
        encoder=str(folder / "encoders" / str(rows)),
        layers__blocks=[-1],
        decoder=decoder,
    )


def _config(rows: int, base: int, seed: int, folder: Path, quick: bool) -> Any:
    """Return the config of a denoiser."""
    return configured(
        small_denoiser(
            folder / "autoencoders" / str(rows),
            folder / "latents" / str(rows),
            2 if quick else STEPS,
            seed,
            "all",
        ),
        data__source=_data(folder).source,
        denoiser__backbone={"width": 64, "depth": 2, "heads": 4},
        time_law="uniform",
        shift_base=base,
        train__batch_size=16,
        optim__lr=3e-3,
        optim__final_lr=1e-4,
    )


def _dimension(rows: int) -> int:
    """Return m, the number of values of the latents."""
    return WIDTH * rows**2


def describe(latents: Tensor) -> Tensor:
    """Return a description (N, 3 C) of latents (N, C, h, w).

    The first C numbers are the mean over the tokens and show what the image contains. The others show its fine
    structure: the standard deviation over the tokens, and the mean product of two neighbouring tokens.
    """
    pairs = [(latents[:, :, 1:] * latents[:, :, :-1]).mean((2, 3)), (latents[..., 1:] * latents[..., :-1]).mean((2, 3))]
    return torch.cat([latents.mean((2, 3)), latents.std((2, 3), correction=0), (pairs[0] + pairs[1]) / 2], 1)


def distances(descriptions: Tensor, real: Tensor) -> Values:
    """Return the squared Frechet distance between descriptions, and the distances of their two parts."""
    scaled = [(rows / real.std(0)).double() for rows in (descriptions, real)]

    def distance(part: slice) -> float:
        return frechet_distance(*(Gaussian(rows[:, part].mean(0), rows[:, part].T.cov()) for rows in scaled))

    channels = real.shape[1] // 3
    return {
        "distance": distance(slice(None)),
        "content": distance(slice(channels)),
        "structure": distance(slice(channels, None)),
    }


def _describe_images(rows: int, folder: Path) -> None:
    """Describe the latents of training images and of held-out images, and compare both."""
    autoencoder = load_autoencoder(folder / "autoencoders" / str(rows))
    training, heldout = (encode(autoencoder, _data(folder, split)) for split in IMAGES)
    real = describe(training[0])
    probe = linear_probe(training[0].mean((2, 3)), training[1], heldout[0].mean((2, 3)), heldout[1])
    values = {"accuracy": probe.accuracy, "real": distances(describe(heldout[0][:SAMPLES]), real)}
    with whole(_measured(folder, rows)) as partial:
        partial.write_text(to_json(values))
    with whole(_described(folder, rows)) as partial:
        save_file({"training": real}, partial)


def plan(folder: Path, quick: bool) -> list[Run]:
    """Return a run for each seed, number of tokens and shift."""
    return [
        Run(
            f"rows{rows}-base{base}-seed{seed}",
            {
                "rows": rows,
                "dimension": _dimension(rows),
                "shift": math.sqrt(_dimension(rows) / base),
                "samples": 9 if quick else SAMPLES,
                "seed": seed,
            },
            _config(rows, base, seed, folder, quick),
        )
        for seed in SEEDS[: 2 if quick else None]
        for rows, bases in list(BASES.items())[: 2 if quick else None]
        for base in bases[: 1 if quick else None]
    ]


def measure(artifact: Path, settings: Settings, folder: Path) -> Values:
    """Return the distance of generated latents from the training latents, and the measures of the latents."""
    rows = int(settings["rows"])
    sampling = Sampling(steps=EVALUATIONS, solver="abm")
    latents = generate(Denoiser.load(artifact), int(settings["samples"]), int(settings["seed"]), sampling)
    real = load_file(_described(folder, rows))["training"]
    return {**read_json(_measured(folder, rows)), **distances(describe(latents), real)}


def judge(results: Sequence[Result], folder: Path) -> list[Claim]:
    """Compare the best shifts of the latents."""
    growth, gain = shift_claims(results, "latents", "Frechet distance to real latents")
    latents = {int(result.settings["dimension"]): result.values for result in results}
    real = ", ".join(f"{values['real']['distance']:.2g} for m = {m:,}" for m, values in latents.items())
    accuracy = ", ".join(f"{100 * values['accuracy']:.1f} %" for values in latents.values())
    about = f"Distance of held-out images {real}. A linear probe on the mean token finds {accuracy} of their classes"
    return [replace(growth, found=f"{growth.found}. {about}"), gain]
