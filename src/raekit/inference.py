"""Using trained models: lazy streams of batches, one seed for each sample."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from raekit.conversion.configurations import read_published  # with it come the published names, for all that loads
from raekit.data.images import UnreadableImage, decode
from raekit.data.loader import Batch
from raekit.data.transforms import FITS, Fit
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser import Denoiser
from raekit.moments import Moments
from raekit.sampling import Sampling, check_sampling, sample_latents


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


def load_published(path: Path, device: torch.device | str = "cpu") -> tuple[Model, Sampling]:
    """The whole model of a published YAML of sampling, and how that samples; UserError, naming what is missing."""
    parts, sampling = read_published(path)
    assert parts.autoencoder
    assert parts.denoiser
    weak = sampling.weak.to(device) if sampling.weak else None
    model = Model(parts.autoencoder.build().to(device), parts.denoiser.build().to(device))
    return model, replace(sampling, weak=weak)


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
    check_sampling(sampling, model.denoiser, labels is not None)
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
