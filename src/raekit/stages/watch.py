"""Pictures of a model while it trains, and its loss on held-out images."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor

from raekit.config import Interval, configclass
from raekit.data.loader import Batch, DataConfig, Loader, spread
from raekit.distributed import World
from raekit.errors import UserError, whole_number
from raekit.evaluation.streaming import BATCH
from raekit.flow.guidance import as_rules
from raekit.flow.sampling import Sampling, check_sampling
from raekit.flow.solvers import SolverName
from raekit.inference.generation import generate
from raekit.inference.model import Model, reconstruct
from raekit.models.denoiser import Denoiser
from raekit.models.latent_space import LatentSpace
from raekit.pictures import grid, to_pil
from raekit.training.objective import Periodic
from raekit.training.precision import Precision, autocast, float32_precision

_log = logging.getLogger(__name__)

_EAGER = partial(torch.compiler.set_stance, "force_eager")
"""A context in which nothing is compiled: for a few images of another batch size it is not worth the time."""
_PAIRS = 4
"""Pairs of an original and its reconstruction in a row of a picture."""


@configclass
class PicturesConfig:
    """Pictures that the model makes during training, in RUN/samples/step-*.png and in every tracker.

    Attributes:
        every: Steps between two pictures.
        count: Number of held-out images in a picture. Each is shown next to its reconstruction.
    """

    every: Interval
    count: int = 16

    def __post_init__(self) -> None:
        for name in ("every", "count"):
            whole_number(f"samples.{name}", getattr(self, name), 1)


@configclass
class SamplesConfig(PicturesConfig):
    """Pictures of samples. All pictures have the same noise and classes.

    Attributes:
        every: Steps between two pictures.
        count: Number of samples in a picture. The classes follow each other in order.
        guidance: Guidance, as in cfg:2.0@0.1-0.9. Default: none.
        seed: Seed of the noise.
        steps: Steps of the solver.
        solver: The solver, as in `raekit generate`.
    """

    guidance: str | None = None
    seed: int = 0
    steps: int = 20
    solver: SolverName = "abm"

    @property
    def sampling(self) -> Sampling:
        """How the samples are made."""
        return Sampling(steps=self.steps, solver=self.solver, guidance=as_rules(self.guidance))


@configclass
class HeldoutConfig:
    """The loss on held-out images, logged as heldout/loss, and as heldout/ema_loss for the exported average.

    Attributes:
        every: Steps between two measurements.
        count: Number of held-out images to use, evenly spread. The images, noise and times are the same in every
            measurement.
    """

    every: Interval
    count: int = 256

    def __post_init__(self) -> None:
        for name in ("every", "count"):
            whole_number(f"heldout.{name}", getattr(self, name), 1)


def samples(
    config: SamplesConfig, denoiser: Denoiser, model: Callable[[], Model], precision: Precision, world: World
) -> Periodic:
    """Return the call that makes a picture of samples, in the first process.

    Args:
        config: What to sample.
        denoiser: The denoiser that is trained.
        model: Returns the model to sample from.
        precision: Precision of the denoiser.
        world: The processes.

    Raises:
        UserError: The denoiser does not allow this sampling.
    """
    classes = denoiser.config.num_classes
    try:
        check_sampling(config.sampling, denoiser, labelled=bool(classes))
    except UserError as error:
        raise UserError(f"samples.{error}") from None
    labels = [i * classes // config.count for i in range(config.count)] if classes else None
    count = None if classes else config.count

    def call(step: int) -> dict[str, Image]:
        if not world.is_main:
            return {}
        with _EAGER(), autocast(precision, world.device):
            stream = generate(
                model(), labels, count=count, seed=config.seed, sampling=config.sampling, batch_size=BATCH
            )
            try:
                return {"samples": grid([to_pil(image) for batch in stream for image in batch.images])}
            except UserError as error:  # a missing picture does not end the training
                _log.warning("step %d: no picture of samples: %s", step, error)
                return {}

    return Periodic(name="samples", every=config.every, call=call)


def reconstructions(
    config: PicturesConfig, data: DataConfig, model: Callable[[], LatentSpace], world: World
) -> Periodic:
    """Return the call that makes a picture of held-out images, each left of its reconstruction, in the first process.

    Args:
        config: How many images.
        data: The training data.
        model: Returns the autoencoder.
        world: The processes.
    """
    loader, indices = _heldout("samples", data, config.count)
    originals: list[Tensor] = []

    def call(step: int) -> dict[str, Image]:
        if not world.is_main:
            return {}
        if not originals:
            originals.extend(batch.pixels() for batch in loader.read([indices], World()))
        images = originals[0].to(world.device)
        with _EAGER():
            pairs = zip(images, reconstruct(model(), images), strict=True)
        return {"samples": grid([to_pil(image) for pair in pairs for image in pair], columns=2 * _PAIRS)}

    return Periodic(name="samples", every=config.every, call=call)


def heldout_loss(
    config: HeldoutConfig,
    data: DataConfig,
    losses: Mapping[str, Callable[[Batch, int], Tensor]],
    precision: Precision,
    world: World,
) -> Periodic:
    """Return the call that measures losses on held-out images.

    Args:
        config: How many images.
        data: The training data.
        losses: `loss(batch, step)` returns the mean loss of a batch, by the name of its value.
        precision: Precision of the losses.
        world: The processes, which share the images.
    """
    loader, indices = _heldout("heldout", data, config.count)
    mine = indices[world.rank :: world.size]

    @torch.no_grad()
    def call(step: int) -> dict[str, float]:
        totals = torch.zeros(len(losses) + 1, dtype=torch.float64)
        for batch in loader.read((mine[first : first + BATCH] for first in range(0, len(mine), BATCH)), world):
            if not len(batch):  # no image of the batch was readable, and the mean of nothing is NaN
                continue
            batch = batch.to(world.device)
            with _EAGER(), float32_precision(precision), autocast(precision, world.device):
                means = [loss(batch, step).item() for loss in losses.values()]
            totals += len(batch) * torch.tensor([*means, 1.0], dtype=torch.float64)
        *sums, images = world.sum(totals).tolist()
        return {name: total / images if images else math.nan for name, total in zip(losses, sums, strict=True)}

    return Periodic(name="heldout", every=config.every, call=call)


def _heldout(part: str, data: DataConfig, count: int) -> tuple[Loader, Sequence[int]]:
    """Return a loader of the held-out images of a source, and the indices of `count` of them, evenly spread.

    Raises:
        UserError: There are no held-out images. The error names the `part` of the config that needs them.
    """
    try:
        loader = Loader(replace(data, split="heldout"), seed=0)
    except UserError as error:
        raise UserError(f"{part}: {error}. To train without it, give --{part} None") from None
    return loader, spread(len(loader), count)
