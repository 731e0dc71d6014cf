"""How good the samples are while a denoiser is trained."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raekit.config import Interval, Place, configclass
from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import UserError, whole_number
from raekit.evaluation.against import Against, find_networks
from raekit.evaluation.assessment import check_count
from raekit.evaluation.features import Images, default_features, load_networks
from raekit.evaluation.labels import Labels, draw_labels
from raekit.evaluation.references import measure_reference, read_reference, reference_loader
from raekit.evaluation.streaming import BATCH, score_stream
from raekit.evaluation.streams import Samples
from raekit.flow.guidance import as_rules
from raekit.flow.sampling import Sampling, check_sampling, finite
from raekit.inference.model import Model
from raekit.models.denoiser import Denoiser
from raekit.training.precision import autocast

_log = logging.getLogger(__name__)


@configclass
class EvaluationConfig:
    """Scores of samples during training, logged as evaluation/METRIC.

    All scores of a run use the same noise and labels.

    Attributes:
        every: Steps between scores.
        count: Number of samples, at least 2.
        ema: Decays of the averages to score, logged as evaluation/ema_DECAY/METRIC. Default: the average that is
            exported, logged without a decay.
        reference: A file that `raekit reference` wrote. Default: the held-out images of the data source.
        features: The networks whose features are compared. Default: the networks of the reference. Without a reference,
            only the built-in images have a default.
        labels: How the classes of the samples are drawn, as in `raekit evaluate`.
        seed: Seed of the samples.
        steps: Euler steps.
        guidance: Guidance, as in cfg:2.0@0.1-0.9. Default: none.
        precision: The precision in which the denoiser computes.
        batch_size: The number of images to process at once.
        intervals: Also log 95 % intervals.
    """

    every: Interval
    count: int = 5000
    ema: tuple[float, ...] = ()
    reference: Place | None = None
    features: tuple[Place, ...] = ()
    labels: Labels = "balanced"
    seed: int = 0
    steps: int = 50
    guidance: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = BATCH
    intervals: bool = False

    @property
    def sampling(self) -> Sampling:
        """How the samples are made."""
        return Sampling(steps=self.steps, guidance=as_rules(self.guidance))

    def __post_init__(self) -> None:
        for name in ("every", "batch_size"):
            whole_number(f"evaluation.{name}", getattr(self, name), 1)
        try:
            check_count(self.count, self.intervals)
        except UserError as error:
            raise UserError(f"evaluation.{error}") from None
        if any(rule.method == "auto" for rule in self.sampling.guidance):
            raise UserError(
                f"evaluation.guidance: {self.guidance} needs a weaker model, and a training has none; choose another "
                "guidance, and score the run with raekit evaluate --weak later"
            )


def evaluator(
    config: EvaluationConfig,
    data: DataConfig,
    denoiser: Denoiser,
    models: Callable[[], dict[str, Model]],
    world: World,
) -> Callable[[int], dict[str, float]]:
    """Return a function for `Periodic` that scores samples.

    Args:
        config: what to score.
        data: the training data.
        denoiser: the denoiser that is trained.
        models: returns the models to score, by the prefix of their metrics' names.
        world: the processes.

    Raises:
        UserError: the reference is missing or of other images, or the denoiser does not allow this sampling.
    """
    classes = denoiser.config.num_classes
    try:
        check_sampling(config.sampling, denoiser, labelled=bool(classes))
    except UserError as error:
        raise UserError(f"evaluation.{error}") from None
    heldout = replace(data, split="heldout")
    compared: list[Against] = []
    if config.reference:
        reference = read_reference(Path(config.reference))
        reference.check_size(data.image_size)
        networks = find_networks([reference], config.features, world.device)
        compared.append(Against([reference], networks, world.device))
        if classes:  # fail now, and not at the first score, if the labels cannot be drawn
            if config.labels == "reference":
                reference.check_classes(denoiser.config.class_names)
            draw_labels(config.labels, classes, config.count, config.seed, reference.about.classes)
    else:
        reference_loader(heldout)  # fail now if there are too few images to compare with
        names = config.features or default_features(data.address)
        networks = {key: each for name in names for key, each in load_networks(name, world.device).items()}

    def call(step: int) -> dict[str, float]:
        if not compared:
            measured = measure_reference(heldout, networks, world, keep=0)
            compared.append(Against([measured], networks, world.device))
        compared[0].complete(world)
        values: dict[str, float] = {}
        for prefix, model in models().items():
            stream = Samples(
                model,
                config.count,
                config.sampling,
                seed=config.seed,
                labels=config.labels,
                of_reference=compared[0].references[0].about.classes,
                batch_size=config.batch_size,
                must_be_finite=False,
            )
            metrics = compared[0].accumulators(config.count, config.intervals, stream.classes)
            lost: list[int] = []
            batches = _without_nan(_autocast(stream.share(world), config.precision, world), lost)
            scores = score_stream(batches, metrics, world)
            if world.any(bool(lost)):  # this does not end the training
                scores = dict.fromkeys(scores, math.nan)
                if world.is_main:
                    _log.warning("step %d: samples have values that are not finite, so their scores are NaN", step)
            values |= {prefix + name: value for name, value in scores.items()}
        return values

    return call


def _autocast(stream: Iterator[Images], precision: Literal["fp32", "bf16"], world: World) -> Iterator[Images]:
    """Yield the batches of `stream`, computed in `precision`; what the caller does between them is not affected."""
    while True:
        with autocast(precision, world.device):
            batch = next(stream, None)
        if batch is None:
            return
        yield batch


def _without_nan(stream: Iterator[Images], lost: list[int]) -> Iterator[Images]:
    """Yield the batches with 0 in place of NaN, which networks reject. Add the sizes of changed batches to `lost`."""
    for batch in stream:
        if not finite(batch.images).all():
            lost.append(len(batch))
            batch = replace(batch, images=batch.images.nan_to_num())
        yield batch
