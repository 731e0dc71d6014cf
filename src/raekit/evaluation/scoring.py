"""The scores of a model beside the baselines that give them a meaning."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from raekit import randomness
from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.evaluation.evaluate import BATCH, evaluate, feature_bank, images_of
from raekit.evaluation.features import EncoderFeatures, Images, PairScore
from raekit.evaluation.labels import draw_labels
from raekit.evaluation.metrics import FrechetDistance, NearestNeighbours
from raekit.evaluation.pairs import PairMean, psnr, ssim
from raekit.flow.sampling import Sampling
from raekit.inference.generation import generate
from raekit.inference.model import Model, reconstruct
from raekit.models.encoders import load_encoder
from raekit.moments import Moments
from raekit.progress import Progress, counted, silent

Scores = dict[str, dict[str, float]]
"""{row: {metric: value}}, as `score` returns them."""


def score(
    model: Model,
    data: DataConfig,
    samplings: dict[str, Sampling],
    *,
    count: int = 1000,
    seed: int = 0,
    features: str = "builtin:vit-tiny",
    intervals: bool = False,
    world: World | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score each of `samplings` with `count` images, in the proportions of the held-out images' classes, and the
    baselines: real, reconstructed, and decoded noise.

    All distances are to the held-out images of `data`, in the features of the registered encoder `features`.
    `knn_accuracy_*` is the share of images whose nearest training images have the class that was asked for,
    `nearest_distance_*` the median distance to the nearest training image. With `intervals` the distances and
    accuracies of samples and reconstructions have 95 % intervals.
    """
    world = world or World()
    train = Loader(_of_split(data, "train"), seed)
    heldout = Loader(_of_split(data, "heldout"), seed)
    network = EncoderFeatures(load_encoder(features).to(world.device))

    def shown(what: str, total: int) -> Callable[[int], None]:
        return counted(progress, what, total, world.size)

    bank, bank_labels = feature_bank(
        images_of(train.once(BATCH, world), world), network, world, shown("training images", len(train))
    )
    near, _ = feature_bank(
        images_of(heldout.once(BATCH, world), world), network, world, shown("held-out images", len(heldout))
    )
    reference = Moments(network.width)
    reference.update(near)

    def accumulators() -> list:
        return [
            FrechetDistance(network, reference, intervals=intervals),
            NearestNeighbours(network, bank, bank_labels, intervals=intervals),
        ]

    def scored(what: str, stream: Iterable[Images], metrics: list, total: int) -> dict[str, float]:
        return evaluate(stream, metrics, world, shown(what, total))

    def reconstructed() -> Iterator[Images]:
        for batch in heldout.once(BATCH, world):
            images = batch.to(world.device).pixels()
            yield Images(reconstruct(model.autoencoder, images), batch.labels, images, batch.positions)

    def decoded_noise() -> Iterator[Images]:
        for first in range(world.rank * BATCH, count, world.size * BATCH):
            indices = range(first, min(first + BATCH, count))
            noise = randomness.normal(seed, "noise baseline", indices, model.autoencoder.latent_shape)
            with torch.no_grad():
                images = model.autoencoder.decode(noise.to(world.device))
            yield Images(images, torch.full((len(images),), -1))

    def samples(sampling: Sampling) -> Iterator[Images]:
        labels, number = None, count
        if classes := model.denoiser.config.num_classes:
            known = heldout.source.labels[heldout.source.labels >= 0]
            images = np.bincount(known, minlength=classes).tolist()
            labels, number = draw_labels("reference", classes, count, 0, images), None
        for batch in generate(model, labels, count=number, seed=seed, sampling=sampling, batch_size=BATCH, world=world):
            yield Images(batch.images, batch.labels, indices=batch.indices)

    heldout_metrics = [NearestNeighbours(network, bank, bank_labels)]
    training_metrics = [FrechetDistance(network, reference)]
    pairs = [PairMean(PairScore("psnr", psnr)), PairMean(PairScore("ssim", ssim))]
    scores = {
        "held-out images": scored(
            "held-out images", images_of(heldout.once(BATCH, world), world), heldout_metrics, len(heldout)
        ),
        "training images": scored(
            "training images", images_of(train.once(BATCH, world), world), training_metrics, len(train)
        ),
        "reconstructions": scored("reconstructions", reconstructed(), [*accumulators(), *pairs], len(heldout)),
        "decoded noise": scored("decoded noise", decoded_noise(), [FrechetDistance(network, reference)], count),
    }
    for name, sampling in samplings.items():
        scores[name] = scored(name, samples(sampling), accumulators(), count)
    return scores


def _of_split(data: DataConfig, split: str) -> DataConfig:
    return replace(data, split=split, flip=False, crop="center")  # type: ignore[arg-type]
