"""Images from a model: lazy streams of batches, one seed for each sample."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow.path import to_data
from raekit.flow.sampling import (
    Sampling,
    check_sampling,
    denoise,
    latents_to_noise,
    sample_latents,
    sample_noise,
    slerp,
)
from raekit.flow.solvers import evaluated, time_grid
from raekit.inference.model import Model

_log = logging.getLogger(__name__)


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

    def first(self, count: int) -> "Samples":
        """Return the first `count` samples."""
        return Samples(self.images[:count], self.labels[:count], self.indices[:count], self.passes)


BatchSize = int | Literal["auto"]
"""Images at once; "auto" is what fits the memory of a GPU, and 64 elsewhere."""


def generate(
    model: Model,
    labels: Sequence[int] | None = None,
    *,
    count: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    batch_size: BatchSize = "auto",
    world: World | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[Samples]:
    """Yield generated images, batch by batch.

    `labels` has a class id for each sample; None generates `count` samples without a class. Sample i has
    its own noise, a function of `seed` and i, so it is the same for any batch size or number of processes.
    Processes take turns: each yields every `world.size`-th batch, in parts where a GPU's memory does not suffice.
    `indices` are the numbers of the samples to make, by default all of them: those that an interrupted generation
    lacks. Raises UserError for labels outside the model's classes.
    """
    sampling = sampling or Sampling()
    world = world or World(device=model.device)
    if (labels is None) == (count is None):
        raise UserError("generate: give either labels, one for each sample, or count")
    _check_labels(model, labels or ())
    total = len(labels) if labels is not None else count or 0
    check_sampling(sampling, model.denoiser, labels is not None)
    size = fitting_batch(model, sampling, batch_size, world)
    numbers = range(total) if indices is None else indices

    def make(part: Sequence[int]) -> Samples:
        batch = torch.tensor(part)
        chosen = None if labels is None else torch.tensor([labels[i] for i in part], device=world.device)
        passes: Counter[str] = Counter()
        latents = sample_latents(model.denoiser, chosen, batch, seed, sampling, world.device, passes)
        images = _decode(model, latents)
        return Samples(images, torch.full_like(batch, -1) if chosen is None else chosen, batch, passes)

    shares = (numbers[first : first + size] for first in range(world.rank * size, len(numbers), world.size * size))
    return _in_parts(make, shares, min(size, total) if model.denoiser.compiled else 0)


def fitting_batch(model: Model, sampling: Sampling, batch_size: BatchSize, world: World) -> int:
    """`batch_size` as a number; UserError if it is none. "auto" is found by a trial on a GPU; all processes call it."""
    if batch_size != "auto":
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} must be at least 1")
        return batch_size
    if world.device.type != "cuda":
        return 64
    torch.cuda.reset_peak_memory_stats(world.device)
    held, trial = torch.cuda.memory_allocated(world.device), 4
    short = replace(sampling, steps=2, solver="euler", guidance=(), weak=None, reuse=1)
    each = math.inf
    with suppress(torch.OutOfMemoryError):
        latents = sample_latents(model.denoiser, None, torch.arange(trial), 0, short, world.device)
        _decode(model, latents)
        each = (torch.cuda.max_memory_allocated(world.device) - held) / trial
    torch.cuda.empty_cache()
    return min(world.gather(_fitting(torch.cuda.mem_get_info(world.device)[0], each)))


def _fitting(free: int, each: float) -> int:
    """The power of two, up to 1024, of images of `each` bytes that fills at most 80 % of `free` bytes."""
    return 2 ** min(int(math.log2(max(0.8 * free / each, 1))), 10)


def _in_parts(
    make: Callable[[Sequence[int]], Samples], shares: Iterable[Sequence[int]], static: int = 0
) -> Iterator[Samples]:
    """Yield `make` of each share, halved as often as memory demands it.

    With `static` smaller shares are filled up to this size, and the result is cut: a compiled model has one batch size.
    """
    limit = static
    for share in shares:
        limit, start = limit or len(share), 0
        while start < len(share):
            part, made = share[start : start + limit], None
            try:
                filled = max(min(static, limit) - len(part), 0)
                made = make([*part, *[part[-1]] * filled]).first(len(part))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise UserError("batch_size: not even one image fits into the GPU's memory") from None
            if made is None:  # outside of the handler, whose traceback would hold what is to be freed
                limit = len(part) // 2
                torch.cuda.empty_cache()
                _log.warning(
                    "batches of %d images do not fit into the GPU's memory; going on with %d", len(part), limit
                )
                continue
            yield made
            start += len(part)


def interpolate(
    model: Model,
    *,
    seeds: tuple[int, int],
    labels: tuple[int, int] | None = None,
    frames: int = 8,
    sampling: Sampling | None = None,
    batch_size: BatchSize = "auto",
) -> Iterator[Samples]:
    """Yield `frames` images on the way from one sample to another, batch by batch.

    The ends are sample 0 of each of `seeds`, with the classes `labels`, as `generate` makes them. The noise goes along
    a great circle, the embedding of the class in a straight line. The `labels` of what is yielded are -1.
    """
    sampling = sampling or Sampling()
    if frames < 2:
        raise UserError(f"frames: {frames} must be at least 2")
    _check_labels(model, labels or ())
    if seeds[0] == seeds[1] and (labels is None or labels[0] == labels[1]):
        raise UserError("interpolate: both ends are the same; give two seeds or two classes")
    denoiser, device = model.denoiser, model.device
    way = torch.linspace(0, 1, frames, dtype=torch.float64)

    def make(part: Sequence[int]) -> Samples:
        along = way[list(part)]

        def noise(stream: str) -> Tensor:
            start, end = (sample_noise(denoiser, seed, stream, [0])[0] for seed in seeds)
            return slerp(start, end, along).to(device)

        weights = None
        if labels is not None:
            weights = torch.zeros(len(part), denoiser.config.num_classes + 1)
            weights[:, labels[0]] += 1 - along
            weights[:, labels[1]] += along
            weights = weights.to(device)
        passes: Counter[str] = Counter()
        images = _decode(model, denoise(denoiser, noise, weights, sampling, passes))
        return Samples(images, torch.full((len(part),), -1), torch.tensor(part), passes)

    size = fitting_batch(model, sampling, batch_size, World(device=device))
    shares = (range(frames)[first : first + size] for first in range(0, frames, size))
    return _in_parts(make, shares, min(size, frames) if model.denoiser.compiled else 0)


def trajectory(
    model: Model,
    labels: Sequence[int] | None = None,
    *,
    count: int | None = None,
    frames: int = 8,
    seed: int = 0,
    sampling: Sampling | None = None,
) -> tuple[list[float], Tensor]:
    """How samples 0, 1, .. come about: falling times, and images (frames, B, 3, S, S) of the data that the guided
    velocity then points to, at evaluations spread evenly; at last, time 0, the samples themselves.
    """
    sampling = sampling or Sampling()
    if (labels is None) == (count is None):
        raise UserError("trajectory: give either labels, one for each sample, or count")
    check_sampling(sampling, model.denoiser, labels is not None)
    points = evaluated(sampling.solver, time_grid(sampling.steps, model.denoiser.config.shift, sampling.grid))
    most = len({t for t in points if t > 0}) + 1
    if not 2 <= frames <= most:
        raise UserError(f"frames: {frames} must be from 2 to {most}, the solver's evaluations and the sample")
    _check_labels(model, labels or ())
    indices = torch.arange(len(labels) if labels is not None else count or 0)
    chosen = None if labels is None else torch.tensor(labels, device=model.device)
    seen: dict[float, Tensor] = {}

    def watch(x: Tensor, v: Tensor, t: float) -> None:
        seen[t] = to_data(x, v, torch.full((len(x),), t, device=x.device)).cpu()

    final = sample_latents(model.denoiser, chosen, indices, seed, sampling, model.device, watch=watch)
    times = sorted((t for t in seen if t > 0), reverse=True)
    if frames > len(times) + 1:  # of dopri5, whose evaluations are not known before
        raise UserError(f"frames: {frames} must be at most {len(times) + 1}, the solver's evaluations and the sample")
    kept = [times[round(i)] for i in torch.linspace(0, len(times) - 1, frames - 1).tolist()]
    latents = [seen[t] for t in kept] + [final.cpu()]
    return [*kept, 0.0], torch.stack([_decode(model, each.to(model.device)).cpu() for each in latents])


@torch.no_grad()
def images_to_noise(
    model: Model, images: Tensor, labels: Sequence[int] | None = None, sampling: Sampling | None = None
) -> Tensor:
    """The noise (B, C, H, W) from which `noise_to_images` makes the images (B, 3, H, W) in [0, 1] again, as far as the
    autoencoder holds them and the solver's steps are exact: the flow backwards. `labels` has a class id for each.
    """
    sampling, chosen = sampling or Sampling(), _chosen(model, labels, len(images))
    latents = model.autoencoder.encode(images.to(model.device))
    return latents_to_noise(model.denoiser, latents, chosen, sampling)


@torch.no_grad()
def noise_to_images(
    model: Model, noise: Tensor, labels: Sequence[int] | None = None, sampling: Sampling | None = None
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] from noise (B, C, H, W) of one's own, where `generate` draws it."""
    sampling, chosen = sampling or Sampling(), _chosen(model, labels, len(noise))
    if noise.shape[1:] != model.denoiser.config.latent_shape:
        raise UserError(
            f"noise: of shape {tuple(noise.shape[1:])}, and the model's latents of {model.denoiser.config.latent_shape}"
        )
    if sampling.solver == "euler-maruyama":
        raise UserError("solver euler-maruyama: draws noise at every step; take euler, heun or dopri5")
    return _decode(model, denoise(model.denoiser, lambda stream: noise.to(model.device), chosen, sampling))


def _chosen(model: Model, labels: Sequence[int] | None, count: int) -> Tensor | None:
    if labels is None:
        return None
    if len(labels) != count:
        raise UserError(f"labels: {len(labels)} of them for {count} images")
    _check_labels(model, labels)
    return torch.tensor(labels, device=model.device)


@torch.no_grad()
def _decode(model: Model, latents: Tensor) -> Tensor:
    return model.autoencoder.decode(latents)


def _check_labels(model: Model, labels: Iterable[int]) -> None:
    classes = model.denoiser.config.num_classes
    if wrong := [label for label in labels if not 0 <= label < classes]:
        raise UserError(f"labels: {wrong[0]} is not among the model's {classes} classes")
