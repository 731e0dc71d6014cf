"""How good the samples are while a denoiser is trained."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raekit.config import configclass
from raekit.data.loader import DataConfig
from raekit.data.sources import open_source
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.against import Against, find_networks
from raekit.evaluation.assessment import Samples
from raekit.evaluation.evaluate import BATCH, evaluate
from raekit.evaluation.features import Images, load_networks
from raekit.evaluation.intervals import LEAST
from raekit.evaluation.labels import Labels, draw_labels
from raekit.evaluation.references import measure_reference, read_reference
from raekit.flow.guidance import parse_guidance
from raekit.flow.sampling import Sampling, check_sampling
from raekit.inference.model import Model
from raekit.models.denoiser import Denoiser
from raekit.train.precision import autocast


@configclass
class EvaluationConfig:
    """Score `count` samples every `every` steps, and log the scores as evaluation/METRIC.

    They are samples of the averages with the decays `ema`, logged as evaluation/ema_DECAY/METRIC; by default of the
    average that is exported, without such a prefix. They are compared with the file `reference`, as of
    `raekit evaluate`, or without one with the source's held-out images, in the features of the networks `features`: by
    default all of the reference's, or builtin:vit-tiny. All scores of a run are of the same noise and labels.
    """

    every: int
    count: int = 5000
    ema: tuple[float, ...] = ()
    reference: str | None = None
    features: tuple[str, ...] = ()
    labels: Labels = "balanced"
    seed: int = 0
    steps: int = 50
    guidance: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = BATCH
    intervals: bool = False

    @property
    def sampling(self) -> Sampling:
        """How it samples."""
        rules = parse_guidance(self.guidance) if self.guidance is not None else ()
        return Sampling(steps=self.steps, guidance=rules)

    def __post_init__(self) -> None:
        for name in ("every", "count", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.{name}: {getattr(self, name)} must be at least 1")
        if self.intervals and self.count < LEAST:
            raise UserError(f"evaluation.intervals: they need at least {LEAST} images, and count is {self.count}")
        if any(rule.method == "auto" for rule in self.sampling.guidance):
            raise UserError(
                f"evaluation.guidance: {self.guidance} needs a weaker model, and a training has none; take another, "
                "and score the run by raekit evaluate --weak later"
            )


def evaluator(
    config: EvaluationConfig,
    data: DataConfig,
    denoiser: Denoiser,
    models: Callable[[], dict[str, Model]],
    world: World,
) -> Callable[[int], dict[str, float]]:
    """A function for `Periodic` that scores `models()`, each under its name as a prefix: averages of `denoiser`.

    UserError, at once, for a reference that is absent or of other images, and for what `denoiser` does not allow.
    """
    classes = denoiser.config.num_classes
    try:
        check_sampling(config.sampling, denoiser, labelled=bool(classes))
    except UserError as error:
        raise UserError(f"evaluation.{error}") from None
    heldout = replace(data, split="heldout", flip=False, crop="center")
    compared: list[Against] = []
    if config.reference:
        reference = read_reference(Path(config.reference))
        reference.check_size(data.image_size)
        networks = find_networks([reference], config.features, world.device)
        compared.append(Against([reference], networks, world.device))
        if classes:  # that there are labels of the kind wanted
            draw_labels(config.labels, classes, config.count, config.seed, reference.about.classes)
    else:
        open_source(data.source, "heldout")  # that there are images to compare with
        names = config.features or ("builtin:vit-tiny",)
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
            )
            metrics = compared[0].accumulators(config.count, config.intervals)
            scores = evaluate(_autocast(stream.share(world), config.precision, world), metrics, world)
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
