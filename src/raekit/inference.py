"""Using trained models: lazy streams of batches, one seed for each sample."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from raekit import conversion as conversion  # enters the published names, which everything here may be given
from raekit import randomness
from raekit.data.images import UnreadableImage, decode
from raekit.data.loader import Batch
from raekit.data.transforms import FITS, Fit
from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow.guidance import Guidance, Reference, Velocity, check_guidance, guided
from raekit.flow.path import to_velocity
from raekit.flow.solvers import Grid, SolverName, dopri5, euler, euler_maruyama, evaluated, heun, time_grid
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser import Denoiser
from raekit.moments import Moments


@dataclass(frozen=True)
class Model:
    """A denoiser with the autoencoder of its latents: all that generation needs."""

    autoencoder: Autoencoder
    denoiser: Denoiser

    def __post_init__(self) -> None:
        ours, theirs = self.denoiser.config.latent_shape, self.autoencoder.latent_shape
        if ours != theirs:
            raise UserError(f"the denoiser is for latents {ours}, the autoencoder has {theirs}")

    @property
    def device(self) -> torch.device:
        return self.autoencoder.var.device

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by id; ids as names where they are not known; empty if the model is unconditional."""
        config = self.denoiser.config
        return config.class_names or tuple(map(str, range(config.num_classes)))

    def class_id(self, name: str) -> int:
        """The id of a class given by name or number; UserError, listing the classes, if there is none."""
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        if not self.classes:
            raise UserError(f"class {name!r}: this model is unconditional, it has no classes")
        raise UserError(f"class {name!r}: no such class; there are {', '.join(self.classes)}")


def load(name: str, device: torch.device | str = "cpu", ema: float | None = None) -> Model:
    """Load a model: `builtin:emoji`, a model folder, a stage-2 run, or OWNER/NAME on the Hub.

    `ema` chooses among the averages of its denoiser, as `Denoiser.load` does.
    """
    return Model(Autoencoder.load(name).to(device), Denoiser.load(name, ema).to(device))


@dataclass(frozen=True)
class Sampling:
    """How to sample. `steps` on a `full` grid are so many solver steps; `published` is the official grid (spec 3).

    `weak` is the weaker denoiser of `auto` guidance. With `reuse` k the backbone of a network with a head runs
    at every k-th step only. `atol` and `rtol` belong to dopri5.
    """

    steps: int = 50
    solver: SolverName = "euler"
    grid: Grid = "full"
    guidance: tuple[Guidance, ...] = ()
    weak: Denoiser | None = None
    reuse: int = 1
    atol: float = 1e-6
    rtol: float = 1e-3


@dataclass(frozen=True)
class Samples:
    """Generated images (B, 3, S, S) in [0, 1], the class ids (B,) asked for (-1 if none), and sample numbers (B,).

    `passes` counts the forward passes that each image cost, by kind: `model`, `unconditional`, `weak`; `head`
    are those that reused the backbone's output.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    passes: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.images)


def generate(
    model: Model,
    labels: Sequence[int] | None = None,
    *,
    count: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    world: World | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[Samples]:
    """Yield generated images, batch by batch.

    `labels` has a class id for each sample; None generates `count` samples without a class. Sample i has
    its own noise, a function of `seed` and i, so it is the same for any batch size or number of processes.
    Processes take turns: each yields every `world.size`-th batch. `indices` are the numbers of the samples to
    make, by default all of them: those that an interrupted generation lacks. Raises UserError for labels
    outside the model's classes.
    """
    sampling = sampling or Sampling()
    world = world or World(device=model.device)
    classes = model.denoiser.config.num_classes
    if (labels is None) == (count is None):
        raise UserError("generate: give either labels, one for each sample, or count")
    if labels is not None and (wrong := [label for label in labels if not 0 <= label < classes]):
        raise UserError(f"labels: {wrong[0]} is not among the model's {classes} classes")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} must be at least 1")
    total = len(labels) if labels is not None else count or 0
    _check(sampling, model.denoiser, labels is not None)
    numbers = range(total) if indices is None else indices
    for first in range(world.rank * batch_size, len(numbers), world.size * batch_size):
        batch = torch.tensor(numbers[first : first + batch_size])
        chosen = None if labels is None else torch.tensor([labels[i] for i in batch.tolist()], device=world.device)
        passes: Counter[str] = Counter()
        latents = sample_latents(model.denoiser, chosen, batch, seed, sampling, world.device, passes)
        with torch.no_grad():
            images = model.autoencoder.decode(latents)
        yield Samples(images, torch.full_like(batch, -1) if chosen is None else chosen, batch, passes)


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    labels: Tensor | None,
    indices: Tensor,
    seed: int,
    sampling: Sampling,
    device: torch.device | str,
    passes: Counter[str] | None = None,
) -> Tensor:
    """Whitened latents (B, C, H, W) of samples number `indices`, over the time grid shifted as in training.

    The noise is drawn on the CPU, so that it does not depend on the device. Forward passes are added to `passes`.
    """

    def normal(stream: str) -> Tensor:
        return randomness.normal(seed, stream, indices, denoiser.config.latent_shape).to(device)

    _check(sampling, denoiser, labels is not None)
    field = _velocity(denoiser, labels, sampling, Counter() if passes is None else passes)
    times = time_grid(sampling.steps, denoiser.config.shift, sampling.grid)
    if sampling.solver == "euler-maruyama":
        return euler_maruyama(field, normal("sample"), times, lambda step: normal(f"sample, step {step}"))
    return _follow(sampling, field, normal("sample"), times)


@torch.no_grad()
def latents_to_noise(denoiser: Denoiser, latents: Tensor, labels: Tensor | None, sampling: Sampling) -> Tensor:
    """The noise (B, C, H, W) from which sampling arrives at `latents`, as far as its steps are exact.

    The same grid the other way: a `published` one takes `latents` for those of its last time.
    """
    _check(sampling, denoiser, labels is not None, reverse=True)
    field = _velocity(denoiser, labels, sampling, Counter())
    return _follow(sampling, field, latents, time_grid(sampling.steps, denoiser.config.shift, sampling.grid)[::-1])


def _follow(sampling: Sampling, field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    if sampling.solver == "dopri5":
        return dopri5(field, x, times, sampling.atol, sampling.rtol)
    return (heun if sampling.solver == "heun" else euler)(field, x, times)


def _check(sampling: Sampling, denoiser: Denoiser, labelled: bool, reverse: bool = False) -> None:
    """UserError if `denoiser` cannot be sampled so, or if a setting would have no effect."""
    weak, config = sampling.weak, denoiser.config
    missing: dict[Reference, str] = {}
    if not labelled:
        missing["unconditional"] = "needs labels, and none are given"
    if not config.base_depth:
        missing["base"] = "needs a base output, which this denoiser was trained without (denoiser.base_depth is 0)"
    if weak is None:
        missing["weak"] = "needs a weaker model; give it with --weak"
    elif not any(rule.method == "auto" for rule in sampling.guidance):
        raise UserError("weak: no effect without guidance auto:SCALE")
    elif weak is denoiser:
        raise UserError("weak: the same model as the one to guide, which has no effect")
    elif (weak.config.latent_shape, weak.config.num_classes) != (config.latent_shape, config.num_classes):
        raise UserError(
            f"weak: it is for latents {weak.config.latent_shape} of {weak.config.num_classes} classes, "
            f"the model for {config.latent_shape} of {config.num_classes}"
        )
    times = time_grid(sampling.steps, config.shift, sampling.grid)
    check_guidance(sampling.guidance, missing, evaluated(sampling.solver, times[::-1] if reverse else times))
    if sampling.reuse < 1:
        raise UserError(f"reuse: {sampling.reuse} must be at least 1")
    if sampling.reuse > 1 and (not config.head or sampling.solver not in ("euler", "euler-maruyama")):
        raise UserError("reuse: only for a denoiser with a head, and the solvers euler and euler-maruyama")
    if reverse and sampling.solver == "euler-maruyama":
        raise UserError("solver euler-maruyama: goes from noise to data only; take euler, heun or dopri5")


def _velocity(denoiser: Denoiser, labels: Tensor | None, sampling: Sampling, passes: Counter[str]) -> Velocity:
    """The guided velocity, which counts the forward passes that it makes."""
    conditional = _reusing(denoiser, sampling.reuse, "model", passes)
    unconditional = _reusing(denoiser, sampling.reuse, "unconditional", passes)

    def predict(x: Tensor, t: float, references: Collection[Reference]) -> tuple[Tensor, dict[Reference, Tensor]]:
        times = torch.full((len(x),), t, device=x.device)
        outputs: dict[Reference, Tensor] = {}
        if "base" in references:
            full, outputs["base"] = conditional(x, times, labels, with_base=True)
        else:
            full = conditional(x, times, labels)
        if "unconditional" in references:
            outputs["unconditional"] = unconditional(x, times, None)
        prediction = denoiser.config.prediction
        for name, output in outputs.items():
            outputs[name] = to_velocity(x, output, times, prediction)
        if "weak" in references:
            assert sampling.weak
            passes["weak"] += 1
            weak = sampling.weak(x, times, labels)
            outputs["weak"] = to_velocity(x, weak, times, sampling.weak.config.prediction)
        return to_velocity(x, full, times, prediction), outputs

    return guided(predict, sampling.guidance)


def _reusing(denoiser: Denoiser, every: int, kind: str, passes: Counter[str]) -> Callable[..., Any]:
    """`denoiser`, counted in `passes`, whose backbone runs at every `every`-th call only."""
    calls, features = 0, None

    def forward(x: Tensor, t: Tensor, labels: Tensor | None, **options: Any) -> Any:
        nonlocal calls, features
        fresh = calls % every == 0
        calls += 1
        passes[kind if fresh else "head"] += 1
        if every == 1:
            return denoiser(x, t, labels, **options)
        if fresh:
            features = denoiser.features(x, t, labels)
        return denoiser(x, t, labels, features=features, **options)

    return forward


@torch.no_grad()
def measure_latents(
    tokens: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    latent_shape: tuple[int, int, int],
    world: World,
    mirror: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and population variance, each (C, H, W), of `tokens(images)` over all processes' batches.

    Exact in one pass, in float64: independent of batch size, order and number of processes. `mirror` counts
    each image a second time, flipped left to right. `tokens` gives un-whitened latents (B, C, H, W).
    """
    moments = Moments(torch.Size(latent_shape).numel(), diagonal=True)
    for batch in batches:
        images = batch.to(world.device).pixels()
        for view in (images, images.flip(-1)) if mirror else (images,):
            moments.update(tokens(view).float())
    moments.reduce(world)
    mean, variance = moments.mean.view(latent_shape), moments.variance.view(latent_shape)
    return mean.float().to(world.device), variance.float().to(world.device)


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Encode and decode images (B, 3, H, W) in [0, 1]; gives (B, 3, *image_shape) in [0, 1]."""
    return autoencoder.decode(autoencoder.encode(images))


def read_image(path: Path, size: int, fit: Fit = "crop") -> Image.Image:
    """The picture in `path`, of any format and mode, as size x size: cropped to its middle, or whole on white.

    UserError if it is unreadable, or larger than `data.images.MAX_PIXELS`.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file")
    try:
        return FITS[fit](decode(path, str(path)), size)
    except UnreadableImage as error:
        raise UserError(f"{path}: not a readable image ({error.reason})") from None
