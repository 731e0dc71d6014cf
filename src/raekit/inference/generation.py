"""Generating images with a model: lazy iterators of batches, with noise that depends on the seed and sample number."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from raekit import randomness
from raekit.distributed import World
from raekit.errors import MAX_COUNT, UserError, whole_number
from raekit.flow.path import to_data
from raekit.flow.sampling import (
    Sampling,
    Watch,
    as_sampling,
    check_finite,
    check_sampling,
    denoise,
    finite,
    latents_to_noise,
    sample_latents,
    sample_noise,
    slerp,
)
from raekit.flow.solvers import evaluated, time_grid
from raekit.inference.model import Model
from raekit.models.checks import check_images, check_latents
from raekit.models.denoiser import Denoiser

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """A batch of generated images.

    Attributes:
        images: the images (B, 3, S, S) in [0, 1].
        labels: the class id (B,) of each image; -1 for an image without a class.
        indices: the sample numbers (B,).
        passes: the forward passes for each image, counted by kind: `model`, `unconditional`, `weak`, and `head`
            for a pass that ran only the head and reused the output of the backbone.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    passes: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.images)

    def only(self, rows: slice | Tensor) -> "Samples":
        """Return the samples in these rows of the batch."""
        return Samples(self.images[rows], self.labels[rows], self.indices[rows], self.passes)


Seed = int | Sequence[int]
"""A seed for all samples, whose noise then also depends on the number of the sample. Or a seed for each sample: then a
sample depends on its own seed only, and is sample 0 of that seed."""
BatchSize = int | Literal["auto"]
"""Number of images in a batch; "auto" takes as many as the memory of the GPU holds, and 64 on the CPU."""

_TRIAL = 4
"""Number of images by which the memory of an image is measured."""


def generate(
    model: Model,
    labels: Sequence[int] | Tensor | None = None,
    *,
    count: int | None = None,
    seed: Seed = 0,
    sampling: Sampling | None = None,
    batch_size: BatchSize = "auto",
    world: World | None = None,
    indices: Sequence[int] | None = None,
    watch: Watch | None = None,
    must_be_finite: bool = True,
) -> Iterator[Samples]:
    """Generate images and yield them batch by batch.

    The noise of sample i depends only on `seed` and i. A sample is therefore the same for any batch size and any
    number of processes, up to rounding and, with dopri5, up to the tolerance of the solver. Process r yields batches r,
    r + `world.size`, r + 2 `world.size` and so on. A batch that does not fit into the memory of the GPU is yielded in
    smaller batches.

    Args:
        model: the model to sample from.
        labels: a class id for each sample; for a denoiser with a condition of its own, a float tensor with the
            condition of each sample, (N, ...). None generates `count` samples without a class.
        count: the number of samples, if `labels` is None.
        seed: the seed of the noise, or a seed for each sample.
        sampling: the solver, steps and guidance. Default: `Sampling()`.
        batch_size: the number of images in a batch.
        world: this process and its device. Default: a single process on the device of the model.
        indices: the numbers of the samples to generate, such as the missing samples of an interrupted run.
            Default: all samples.
        watch: called at each evaluation of the solver with the latents, the guided velocity and the time.
        must_be_finite: whether a sample whose values are not finite is an error. The error comes after the finite
            samples of its batch. False saves waiting for the device once for each batch.

    Raises:
        UserError: if a label is not a class of the model, a setting is invalid, or a sample is not finite.
    """
    _check_model(model)
    sampling = as_sampling(sampling)
    if not isinstance(world, World | None):
        raise UserError(f"world: {world!r} is no `World`; leave it out for a single process")
    if watch is not None and not callable(watch):
        raise UserError(f"watch: {watch!r} is no function")
    if not isinstance(indices, Iterable | None):
        raise UserError(f"indices: {indices!r} is no list of numbers")
    world = world or World(device=model.device)
    labels, total = _labels_and_total(model, labels, count)
    seed = _seed_for_each(seed, total)
    check_sampling(sampling, model.denoiser, labels is not None)
    size = fitting_batch(model, sampling, batch_size, world, total, labels)
    numbers = range(total) if indices is None else [whole_number("indices", each, 0) for each in indices]
    if numbers and max(numbers) >= total:
        raise UserError(f"indices: {max(numbers)} is not among the {total} samples, which are counted from 0")

    def make(part: Sequence[int]) -> Samples:
        batch = torch.tensor(part, device="cpu")
        chosen = None if labels is None else labels[batch].to(world.device)
        passes: Counter[str] = Counter()
        noise = _noise(model.denoiser, seed, part, world.device)
        latents = denoise(model.denoiser, noise, chosen, sampling, passes, watch)
        images = _decode(model, latents)
        shown = torch.full_like(batch, -1) if chosen is None or not model.classes else chosen
        return Samples(images, shown, batch, passes)

    shares = (numbers[first : first + size] for first in range(world.rank * size, len(numbers), world.size * size))
    batches = _in_parts(make, shares, min(size, total) if model.denoiser.compiled else 0)
    return _finite(batches, sampling) if must_be_finite else batches


def fitting_batch(
    model: Model, sampling: Sampling, batch_size: BatchSize, world: World, total: int, labels: Tensor | None = None
) -> int:
    """Return `batch_size` as a number, the same in all processes. All processes must call this function.

    On a GPU, "auto" is found by sampling a few images and measuring the memory that they take. If no more are wanted,
    there is no trial: a batch that does not fit is halved.

    Raises:
        UserError: if `batch_size` is below 1.
    """
    if batch_size != "auto":
        return whole_number("batch_size", batch_size, 1)
    if world.device.type != "cuda":
        return 64
    if total <= _TRIAL:
        return _TRIAL
    torch.cuda.reset_peak_memory_stats(world.device)
    held = torch.cuda.memory_allocated(world.device)
    # Guidance takes memory, too. The scale does not change how much.
    rules = tuple(replace(rule, scale=2.0, start=0.0, end=1.0) for rule in sampling.guidance)
    short = Sampling(steps=2, guidance=rules, weak=sampling.weak)
    labels = _trial_labels(model, labels, _TRIAL)
    each = math.inf
    compiled = model.denoiser.compiled  # for one batch size, so not for the trial's
    with suppress(torch.OutOfMemoryError), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        labels = None if labels is None else labels.to(world.device)
        latents = sample_latents(model.denoiser, labels, torch.arange(_TRIAL, device="cpu"), 0, short, world.device)
        _decode(model, latents)
        each = (torch.cuda.max_memory_allocated(world.device) - held) / _TRIAL
    torch.cuda.empty_cache()
    return min(world.gather(_fitting(torch.cuda.mem_get_info(world.device)[0], each)))


def _trial_labels(model: Model, labels: Tensor | None, count: int) -> Tensor | None:
    """Return the labels of `count` trial samples: a class, or the first row of a condition of the user's own."""
    if model.classes:
        return torch.zeros(count, dtype=torch.int64)
    return None if labels is None else labels[:1].expand(count, *labels.shape[1:])


def _fitting(free: int, each: float) -> int:
    """Return the largest power of two from 1 to 1024 of images of `each` bytes that fit into 80 % of `free` bytes."""
    return 2 ** min(int(math.log2(max(0.8 * free / each, 1))), 10)


def _in_parts(
    make: Callable[[Sequence[int]], Samples], shares: Iterable[Sequence[int]], static: int = 0
) -> Iterator[Samples]:
    """Yield `make(part)` for each share, and halve the parts as often as the memory of the GPU requires it.

    A compiled model has one batch size, `static`: a smaller part is filled up to it, and the result is cut.
    """
    limit = static
    for share in shares:
        limit, start = limit or len(share), 0
        while start < len(share):
            part, made = share[start : start + limit], None
            try:
                filled = max(min(static, limit) - len(part), 0)
                made = make([*part, *[part[-1]] * filled]).only(slice(len(part)))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise UserError(
                        "batch_size: not even one image fits into the GPU's memory; use a larger GPU or the CPU"
                    ) from None
            if made is None:  # outside the handler, because its traceback keeps the tensors alive
                limit = len(part) // 2
                torch.cuda.empty_cache()
                _log.warning(
                    "a batch of %d images does not fit into the GPU's memory; continuing with %d", len(part), limit
                )
                continue
            yield made
            start += len(part)


def _finite(batches: Iterator[Samples], sampling: Sampling) -> Iterator[Samples]:
    """Yield the batches. At a sample that is not finite, yield the finite samples of its batch and raise UserError."""
    for batch in batches:
        good = finite(batch.images)
        if good.all():
            yield batch
            continue
        if good.any():
            yield batch.only(good)
        check_finite(batch.images, batch.indices.tolist(), sampling)


def interpolate(
    model: Model,
    *,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    frames: int = 8,
    sampling: Sampling | None = None,
    batch_size: BatchSize = "auto",
    watch: Watch | None = None,
) -> Iterator[Samples]:
    """Generate images between two samples and yield them batch by batch.

    The first and the last image are the samples that `generate` makes as number 0 with each seed. The noise is
    interpolated along a great circle, and the class embedding linearly. The yielded `labels` are -1.

    Args:
        model: the model to sample from.
        seeds: the seeds of the first and the last image.
        labels: the class ids of the first and the last image. None generates images without a class.
        frames: the number of images, at least 2, including the first and the last.
        sampling: the solver, steps and guidance. Default: `Sampling()`.
        batch_size: the number of images in a batch.
        watch: called at each evaluation of the solver, as in `generate`.

    Raises:
        UserError: if both ends are the same, a setting is invalid, or an image is not finite.
    """
    _check_model(model)
    sampling, frames = as_sampling(sampling), whole_number("frames", frames, 2, MAX_COUNT)
    seeds = as_ends("seeds", seeds)
    labels = None if labels is None else as_ends("labels", class_labels(model, labels))
    if seeds[0] == seeds[1] and (labels is None or labels[0] == labels[1]):
        raise UserError("interpolate: both ends are the same; give two different seeds or classes")
    denoiser, device = model.denoiser, model.device
    way = torch.linspace(0, 1, frames, dtype=torch.float64, device="cpu")

    def make(part: Sequence[int]) -> Samples:
        along = way[list(part)]

        def noise(stream: str) -> Tensor:
            start, end = (sample_noise(denoiser, seed, stream, [0], device)[0].cpu() for seed in seeds)
            return slerp(start, end, along).to(device)

        weights = None
        if labels is not None:
            weights = torch.zeros(len(part), denoiser.config.num_classes + 1, dtype=torch.float32, device="cpu")
            weights[:, labels[0]] += 1 - along
            weights[:, labels[1]] += along
            weights = weights.to(device)
        passes: Counter[str] = Counter()
        images = _decode(model, denoise(denoiser, noise, weights, sampling, passes, watch))
        numbers = torch.tensor(part, device="cpu")
        return Samples(images, torch.full_like(numbers, -1), numbers, passes)

    size = fitting_batch(model, sampling, batch_size, World(device=device), frames)
    shares = (range(frames)[first : first + size] for first in range(0, frames, size))
    return _finite(_in_parts(make, shares, min(size, frames) if model.denoiser.compiled else 0), sampling)


def trajectory(
    model: Model,
    labels: Sequence[int] | Tensor | None = None,
    *,
    count: int | None = None,
    frames: int = 8,
    seed: Seed = 0,
    sampling: Sampling | None = None,
    watch: Watch | None = None,
) -> tuple[list[float], Tensor]:
    """Return times and images that show how samples form, from noise to the finished sample.

    An image at time t shows the data that the guided velocity at t predicts. The times are chosen evenly from the
    times at which the solver evaluates the velocity.

    Args:
        model: the model to sample from.
        labels: a class id or a condition for each sample, as in `generate`. None generates `count` samples without a
            class.
        count: the number of samples, if `labels` is None.
        frames: the number of images for each sample, at least 2, including the finished sample.
        seed: the seed of the noise, or a seed for each sample.
        sampling: the solver, steps and guidance. Default: `Sampling()`.
        watch: called at each evaluation of the solver, as in `generate`.

    Returns:
        The times in descending order, with 0 as the last, and the images (frames, B, 3, S, S) in [0, 1]. The images
        at time 0 are the finished samples.

    Raises:
        UserError: if the solver has too few evaluations for `frames`, a setting is invalid, or a sample is not finite.
    """
    _check_model(model)
    sampling = as_sampling(sampling)
    labels, total = _labels_and_total(model, labels, count)
    seed, frames = _seed_for_each(seed, total), whole_number("frames", frames, most=MAX_COUNT)
    check_sampling(sampling, model.denoiser, labels is not None)
    points = evaluated(sampling.solver, time_grid(sampling.steps, model.denoiser.config.shift, sampling.grid))
    most = len({t for t in points if t > 0}) + 1
    if not 2 <= frames <= most:
        raise UserError(f"frames: {frames} must be from 2 to {most} (the solver's evaluations plus the sample)")
    chosen = None if labels is None else labels.to(model.device)
    seen: dict[float, Tensor] = {}

    def keep(x: Tensor, v: Tensor, t: float) -> None:
        seen[t] = to_data(x, v, t).cpu()
        if watch is not None:
            watch(x, v, t)

    noise = _noise(model.denoiser, seed, range(total), model.device)
    final = denoise(model.denoiser, noise, chosen, sampling, watch=keep)
    times = sorted((t for t in seen if t > 0), reverse=True)
    if frames > len(times) + 1:  # dopri5: the number of its evaluations is known only after the run
        raise UserError(f"frames: {frames} must be at most {len(times) + 1} (the solver's evaluations plus the sample)")
    places = torch.linspace(0, len(times) - 1, frames - 1, dtype=torch.float32, device="cpu")
    kept = [times[round(i)] for i in places.tolist()]
    latents = [seen[t] for t in kept] + [final.cpu()]
    images = torch.stack([_decode(model, each.to(model.device)).cpu() for each in latents])
    check_finite(images.transpose(0, 1), range(total), sampling)
    return [*kept, 0.0], images


@torch.no_grad()
def images_to_noise(
    model: Model, images: Tensor, labels: Sequence[int] | Tensor | None = None, sampling: Sampling | None = None
) -> Tensor:
    """Return the noise from which `noise_to_images` generates the given images.

    The flow is solved backwards, from the latents to the noise. The images that `noise_to_images` returns differ from
    the originals by the reconstruction error of the autoencoder and the discretisation error of the solver.

    Args:
        model: the model to invert.
        images: the images (B, 3, H, W) in [0, 1].
        labels: a class id or a condition for each image, as in `generate`. Default: no class.
        sampling: the solver, steps and guidance. Default: `Sampling()`.

    Returns:
        The noise (B, C, h, w) in the shape of the latents.
    """
    _check_model(model)
    check_images(images)
    sampling, chosen = as_sampling(sampling), _chosen(model, labels, len(images))
    latents = model.autoencoder.encode(images.to(model.device))
    return latents_to_noise(model.denoiser, latents, chosen, sampling)


@torch.no_grad()
def noise_to_images(
    model: Model, noise: Tensor, labels: Sequence[int] | Tensor | None = None, sampling: Sampling | None = None
) -> Tensor:
    """Generate images from the given noise.

    Args:
        model: the model to sample from.
        noise: the noise (B, C, h, w) in the shape of the latents, with values from a standard normal distribution.
        labels: a class id or a condition for each image, as in `generate`. Default: no class.
        sampling: the solver, steps and guidance, without euler-maruyama. Default: `Sampling()`.

    Returns:
        The images (B, 3, H, W) in [0, 1].

    Raises:
        UserError: if a setting is invalid, or an image is not finite.
    """
    _check_model(model)
    check_latents(noise, model.denoiser.config.latent_shape, "noise")
    if not len(noise):
        raise UserError("noise: none is given; give at least one row")
    sampling, chosen = as_sampling(sampling), _chosen(model, labels, len(noise))
    if sampling.solver == "euler-maruyama":
        raise UserError("solver euler-maruyama: adds its own noise at every step; use another solver")
    images = _decode(model, denoise(model.denoiser, lambda stream: noise.to(model.device), chosen, sampling))
    check_finite(images, range(len(images)), sampling)
    return images


def random_labels(model: Model, seed: Seed, count: int) -> list[int]:
    """Return a random class id for each of `count` samples, a function of the seed and the number of the sample."""
    places = [(seed, i) for i in range(count)] if isinstance(seed, int) else [(each, 0) for each in seed]
    return [int(randomness.uniform(s, "class", [i]).item() * len(model.classes)) for s, i in places]


def _check_model(model: object) -> None:
    if not isinstance(model, Model):
        raise UserError(
            f"model: a {type(model).__name__} is no `Model`; give raekit.load(NAME), or the field `model` of a pipeline"
        )


def _noise(denoiser: Denoiser, seed: Seed, indices: Sequence[int], device: torch.device) -> Callable[[str], Tensor]:
    """Return the noise (B, C, h, w) of the samples `indices`, as a function of the stream."""

    def noise(stream: str) -> Tensor:
        if isinstance(seed, int):
            return sample_noise(denoiser, seed, stream, indices, device)
        return torch.cat([sample_noise(denoiser, seed[i], stream, [0], device) for i in indices])

    return noise


def as_seed(seed: Seed) -> Seed:
    """Return a seed, or seeds, as int. Python, numpy and torch may give the whole numbers.

    Raises:
        UserError: if a seed is not a whole number.
    """
    if isinstance(seed, Iterable) and getattr(seed, "ndim", 1) and not isinstance(seed, str):
        return [whole_number("seed", each) for each in seed]
    return whole_number("seed", seed)


def _given(model: Model, labels: Iterable[int] | Tensor) -> Tensor:
    """Return the condition of each sample: class ids (N,), or the rows of a condition of its own (N, ...).

    Raises:
        UserError: if they are no classes of the model, or no rows of numbers for a condition of its own.
    """
    if model.classes or model.denoiser.label is None:
        return torch.tensor(class_labels(model, labels), device="cpu")
    if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.ndim < 1 or not len(labels):
        raise UserError("labels: the model has a condition of its own; give a float tensor with a row for each sample")
    return labels.float() if labels.dtype == torch.float64 else labels  # the usual type of numpy


def class_labels(model: Model, labels: Iterable[int] | Tensor) -> list[int]:
    """Return class ids as a list of int. Python, numpy and torch may give them.

    Raises:
        UserError: if a label is not a class of the model.
    """
    if not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) == 0:
        raise UserError(f"labels: {labels!r} must be a sequence of class ids, such as [{labels!r}]")
    ids, classes = [whole_number("labels", label) for label in labels], model.denoiser.config.num_classes
    if not ids:
        raise UserError("labels: none are given; give at least one, or None for samples without a class")
    if wrong := [label for label in ids if not 0 <= label < classes]:
        raise UserError(f"labels: {wrong[0]} is not among the model's {classes} classes")
    return ids


def _labels_and_total(
    model: Model, labels: Iterable[int] | Tensor | None, count: int | None
) -> tuple[Tensor | None, int]:
    """Return the condition of each sample, None for unconditional samples, and the number of samples."""
    if (labels is None) == (count is None):
        raise UserError("labels, count: give either labels, one for each sample, or count, at least 1")
    if labels is None:
        return None, whole_number("count", count, 1, MAX_COUNT)
    given = _given(model, labels)
    return given, len(given)


def _seed_for_each(seed: Seed, total: int) -> Seed:
    """Return one seed, or a seed for each sample."""
    seed = as_seed(seed)
    if not isinstance(seed, int) and len(seed) != total:
        raise UserError(f"seed: {len(seed)} seeds for {total} samples; give one seed, or one for each sample")
    return seed


def as_ends(name: str, values: Sequence[int]) -> tuple[int, int]:
    """Return the values for the first and the last image of an interpolation as int, see `as_seed`.

    Raises:
        UserError: if they are not two whole numbers in an order.
    """
    ends = values if isinstance(values, Set) else as_seed(values)  # a set has no first value
    if isinstance(ends, int | Set) or len(ends) != 2:
        raise UserError(f"{name}: {ends!r} must be two numbers, for the first and the last image")
    return (ends[0], ends[1])


def _chosen(model: Model, labels: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
    if labels is None:
        return None
    given = _given(model, labels)
    if len(given) != count:
        raise UserError(f"labels: {len(given)} given for {count} images; give one label for each image")
    return given.to(model.device)


@torch.no_grad()
def _decode(model: Model, latents: Tensor) -> Tensor:
    return model.autoencoder.decode(latents)
