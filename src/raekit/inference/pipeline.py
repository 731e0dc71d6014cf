"""One object for all that a trained model does: generate, interpolate, vary, reconstruct, encode and decode."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from PIL import Image
from torch import Tensor

from raekit import artifacts
from raekit.data.images import read_image
from raekit.data.transforms import center_crop, to_rgb
from raekit.distributed import World
from raekit.errors import MAX_COUNT, UserError, check_choice, did_you_mean, real_number, whole_number
from raekit.files import as_path, check_folder
from raekit.flow.guidance import Guidance, as_rules
from raekit.flow.path import to_data
from raekit.flow.sampling import (
    START,
    Sampling,
    Watch,
    check_finite,
    check_sampling,
    denoise,
    finite,
    sample_noise,
    slerp,
)
from raekit.flow.solvers import SolverName, time_grid
from raekit.inference.gallery import Pictures
from raekit.inference.generation import (
    BatchSize,
    Seed,
    as_ends,
    as_seed,
    class_labels,
    fitting_batch,
    generate,
    images_to_noise,
    interpolate,
    random_labels,
    trajectory,
)
from raekit.inference.model import Model, reconstruct
from raekit.models.autoencoder import load_autoencoder
from raekit.models.checks import check_device, check_latents
from raekit.models.denoiser import Denoiser
from raekit.models.latent_space import LatentSpace
from raekit.pictures import from_pil, to_pil

Output = Literal["pil", "pt", "np"]
Input = Image.Image | str | Path | Tensor | Sequence[Image.Image | str | Path]
"""Images: PIL images, files, or a tensor (B, 3, H, W) in [0, 1]."""
Callback = Callable[[int, int, Callable[[], list[Image.Image]]], object]
"""A function that is called at each step of the solver with (step, total, preview). `preview()` returns the images of
the present batch as the model predicts them at this step. An exception of the function stops the work."""


class Pipeline:
    """A trained model, ready to use.

        pipe = raekit.Pipeline.from_pretrained("builtin:emoji")
        pipe(classes=["flags"] * 4, guidance=3.0)

    Image i of a call has its own seed, `seed` + i, and depends only on this seed, its class and the settings (with
    dopri5 also on its batch, within the tolerance). `raekit.generate` is the layer below, which streams batches and
    runs in several processes.

    Args:
        autoencoder: the autoencoder.
        denoiser: the denoiser. Without a denoiser, only `reconstruct`, `encode` and `decode` work.
        name: the name that the model was loaded by.
    """

    def __init__(self, autoencoder: LatentSpace, denoiser: Denoiser | None = None, name: str | None = None) -> None:
        self.autoencoder, self.denoiser, self.name = autoencoder, denoiser, name
        if not isinstance(autoencoder, LatentSpace):
            raise UserError(
                f"autoencoder: a {type(autoencoder).__name__} is no autoencoder; give Pipeline(autoencoder, denoiser)"
            )
        self._model = Model(autoencoder, denoiser) if denoiser else None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        ema: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a model.

        Args:
            name: `builtin:NAME`, a published name (`raekit.list_models`), a model folder, a run, or OWNER/NAME on the
                Hub.
            revision: a branch, tag or commit of the repository on the Hub. Default: its main branch.
            ema: the decay of the weight average of the denoiser. Default: the first average.
            dtype: float32 or bfloat16, as in `raekit.load`.

        Raises:
            UserError: there is no such model, or a file is missing or damaged.
        """
        full = f"{name}@{revision}" if revision else str(name)
        autoencoder = load_autoencoder(full, dtype)
        try:
            found = artifacts.find(full, "denoiser", ema)
        except artifacts.MissingArtifact:
            if ema is not None:
                raise
            return cls(autoencoder, None, full)
        return cls(autoencoder, Denoiser.load(found.path, dtype=dtype), full)

    @property
    def model(self) -> Model:
        """The autoencoder and the denoiser. UserError if there is no denoiser."""
        if self._model is None:
            raise UserError(f"{self.name}: has no denoiser, so it cannot generate; load a model that has one")
        return self._model

    @property
    def device(self) -> torch.device:
        return self.autoencoder.var.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are held in."""
        return next(self.autoencoder.decoder.parameters(), self.autoencoder.var).dtype

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of their ids; empty without classes."""
        return self._model.classes if self._model else ()

    def to(self, place: str | torch.device | torch.dtype) -> Self:
        """Move the model to a device, or load its weights again in another type. Returns the pipeline itself.

        Raises:
            UserError: there is no such device, the type is neither float32 nor bfloat16, or the model was not loaded by
                name.
        """
        if isinstance(place, torch.dtype):
            if place == self.dtype:
                return self
            if self.name is None:
                raise UserError("to: this model is only in memory; save it, and load it with dtype=")
            # Loading again is exact: weights that are once rounded to bfloat16 stay rounded.
            ema = self.denoiser.ema if self.denoiser else None
            device, again = self.device, type(self).from_pretrained(self.name, ema=ema, dtype=place)
            self.autoencoder, self.denoiser, self._model = again.autoencoder, again.denoiser, again._model
            return self.to(device)
        place = check_device(place)
        for part in (self.autoencoder, self.denoiser):
            if part is not None:
                part.to(place)
        return self

    def __repr__(self) -> str:
        parts = [self.autoencoder.decoder, *([self.denoiser] if self.denoiser else [])]
        numbers = sum(p.numel() for part in parts for p in part.parameters())
        size = " x ".join(map(str, self.autoencoder.image_shape))
        kind = str(self.dtype).removeprefix("torch.")
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"Pipeline({self.name}: {size} pixels{classes}, {numbers / 1e6:.1f} M parameters, {kind}, {self.device})"

    def __call__(
        self,
        classes: str | Sequence[str] | None = None,
        *,
        labels: Sequence[int] | None = None,
        count: int = 1,
        seed: Seed = 0,
        guidance: "float | str | Guidance | Sequence[Guidance] | None" = None,
        steps: int = 50,
        solver: SolverName = "euler",
        output: Output = "pil",
        callback: Callback | None = None,
        batch_size: BatchSize = "auto",
        **sampling: Any,
    ) -> Pictures:
        """Generate images.

        Args:
            classes: class names, parts of names, or ids as text. Default: random classes, which depend on the seeds.
            labels: class ids, instead of `classes`.
            count: the number of images: of each class that is given, otherwise in total.
            seed: the seed of the first image; the others follow. Or a seed for each image.
            guidance: the scale of classifier-free guidance; a text such as `cfg:2.0@0.1-0.9`; or `Guidance`. None and 1
                mean no guidance.
            steps: the solver's steps.
            solver: the solver, see `Sampling`.
            output: PIL images, a tensor (N, 3, H, W) or an array (N, H, W, 3), in [0, 1].
            callback: called at each step with (step, total, preview), see `Callback`.
            batch_size: the number of images in a batch.
            **sampling: further fields of `Sampling`: grid, reuse, weak, atol, rtol.

        Raises:
            UserError: there is no such class, or a setting is invalid.
        """
        _check_output(output)
        ids, seeds = self._samples(classes, labels, count, seed)
        settings = _sampling(steps, solver, guidance, sampling)
        size = fitting_batch(self.model, settings, batch_size, World(device=self.device), len(seeds))
        watch = self._watch(settings, callback, math.ceil(len(seeds) / size))
        batches = generate(
            self.model,
            ids,
            count=None if ids else len(seeds),
            seed=seeds,
            sampling=settings,
            batch_size=size,
            watch=watch,
        )
        return self._pictures([batch.images for batch in batches], output, ids, seeds)

    def interpolate(
        self,
        seeds: tuple[int, int],
        classes: str | tuple[str, str] | None = None,
        *,
        frames: int = 8,
        guidance: "float | str | Guidance | Sequence[Guidance] | None" = None,
        steps: int = 50,
        solver: SolverName = "euler",
        output: Output = "pil",
        callback: Callback | None = None,
        **sampling: Any,
    ) -> Pictures:
        """Generate a row of images from one image to another, see `raekit.inference.generation.interpolate`.

        Args:
            seeds: the seeds of the first and the last image, which the pipeline makes from the same seeds and classes.
            classes: the classes of both, or one class for both. Default: no class.
            frames: the number of images, with the first and the last.
            guidance: see `__call__`; so are the other arguments.
        """
        _check_output(output)
        seeds, frames = as_ends("seeds", seeds), whole_number("frames", frames, 2, MAX_COUNT)
        ends = None if classes is None else [self.model.class_id(name) for name in _names(classes)]
        ends = ends * 2 if ends and len(ends) == 1 else ends
        settings = _sampling(steps, solver, guidance, sampling)
        size = fitting_batch(self.model, settings, "auto", World(device=self.device), frames)
        watch = self._watch(settings, callback, math.ceil(frames / size))
        batches = interpolate(
            self.model, seeds=seeds, labels=ends, frames=frames, sampling=settings, batch_size=size, watch=watch
        )
        images = [batch.images for batch in batches]
        made = self._pictures(images, output, None, [None] * frames, columns=frames)
        middle = [None] * (frames - 2)
        labels = (self.classes[ends[0]], *middle, self.classes[ends[1]]) if ends else made.labels
        return Pictures(made.images, labels, (seeds[0], *middle, seeds[1]), frames)

    def trajectory(
        self,
        classes: str | Sequence[str] | None = None,
        *,
        labels: Sequence[int] | None = None,
        count: int = 1,
        seed: Seed = 0,
        frames: int = 8,
        guidance: "float | str | Guidance | Sequence[Guidance] | None" = None,
        steps: int = 50,
        solver: SolverName = "euler",
        output: Output = "pil",
        callback: Callback | None = None,
        **sampling: Any,
    ) -> Pictures:
        """Return how images form, from noise to the finished image: `frames` images in a row for each sample.

        The last image of a row is what the pipeline returns for the same seed, class and settings. `frames` is the
        number of images in a row. `__call__` describes the other arguments.
        """
        _check_output(output)
        ids, seeds = self._samples(classes, labels, count, seed)
        settings = _sampling(steps, solver, guidance, sampling)
        number = None if ids else len(seeds)
        watch = self._watch(settings, callback, 1)
        _, images = trajectory(self.model, ids, count=number, frames=frames, seed=seeds, sampling=settings, watch=watch)
        each = None if ids is None else [label for label in ids for _ in range(frames)]
        rows = [images.transpose(0, 1).flatten(0, 1)]
        return self._pictures(rows, output, each, [s for s in seeds for _ in range(frames)], columns=frames)

    @torch.no_grad()
    def variations(
        self,
        image: Image.Image | str | Path | Tensor,
        strength: float = 0.3,
        classes: str | None = None,
        *,
        count: int = 4,
        seed: Seed = 0,
        guidance: "float | str | Guidance | Sequence[Guidance] | None" = None,
        steps: int = 50,
        solver: SolverName = "euler",
        output: Output = "pil",
        callback: Callback | None = None,
        **sampling: Any,
    ) -> Pictures:
        """Return images that resemble a given image.

        The flow takes the image back to its noise, without guidance. The noise is moved along the great circle towards
        other noise, and the flow makes an image of it again.

        Args:
            image: the image.
            strength: how far to move: 0 gives the image itself, up to the solver's error, 1 an independent sample.
            classes: the class of the image and its variations. Default: no class.
            count: the number of variations.
            seed: the seed of the first variation's other noise; the others follow. Or a seed for each.
            guidance: see `__call__`; so are the other arguments.
        """
        _check_output(output)
        strength = real_number("strength", strength)
        if not 0 <= strength <= 1:
            raise UserError(f"strength: {strength} must be from 0 to 1")
        seeds = _seeds(seed, count)
        model, settings = self.model, _sampling(steps, solver, guidance, sampling)
        ids = None if classes is None else [model.class_id(classes)] * len(seeds)
        check_sampling(settings, model.denoiser, ids is not None)
        plain = replace(
            settings, solver="euler" if solver == "euler-maruyama" else solver, guidance=(), weak=None, reuse=1
        )
        given = self.tensor(image)
        if given.ndim == 4 and len(given) > 1:
            raise UserError(f"image: {len(given)} are given; give one, and call `variations` for each")
        start = images_to_noise(model, given, ids and ids[:1], plain)[0]
        way = torch.tensor([strength], dtype=torch.float32, device="cpu")

        def noise(stream: str) -> Tensor:
            other = [sample_noise(model.denoiser, each, stream, [0], self.device)[0] for each in seeds]
            if stream != START:
                return torch.stack(other)
            return torch.cat([slerp(start.cpu(), each.cpu(), way) for each in other]).to(self.device)

        chosen = None if ids is None else torch.tensor(ids, device=self.device)
        watch = self._watch(settings, callback, 1)
        images = self.autoencoder.decode(denoise(model.denoiser, noise, chosen, settings, watch=watch))
        check_finite(images, range(len(images)), settings)
        return self._pictures([images], output, ids, seeds)

    def reconstruct(self, images: Input, *, output: Output = "pil") -> Pictures:
        """Encode and decode images. An image that is not square is cropped to its central square."""
        _check_output(output)
        return self._plain(reconstruct(self.autoencoder, self.tensor(images)), output)

    def encode(self, images: Input) -> Tensor:
        """Return the whitened latents (B, C, h, w) of images."""
        return self.autoencoder.encode(self.tensor(images))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, output: Output = "pil") -> Pictures:
        """Return the images of whitened latents (B, C, h, w)."""
        _check_output(output)
        check_latents(latents, self.autoencoder.latent_shape)
        if not len(latents):
            raise UserError("latents: none are given; give at least one row")
        if not (good := finite(latents)).all():
            raise UserError(
                f"latents: the values of number {good.tolist().index(False)} are not finite; load the model that made "
                "them in float32, or leave them out"
            )
        return self._plain(self.autoencoder.decode(latents.to(self.device)), output)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the model to a folder, for `from_pretrained`.

        Args:
            folder: the model folder.
            dtype: the type to store the weights in. Default: the type that they have.
        """
        check_folder(folder := as_path("folder", folder))
        self.autoencoder.save(folder, dtype=dtype)
        if self.denoiser:
            self.denoiser.save(folder, dtype=dtype)

    def push_to_hub(self, repository: str, *, private: bool = False, dtype: torch.dtype | None = None) -> str:
        """Publish the model with a model card on the Hub, and return its address. `raekit push` adds facts and scores.

        Args:
            repository: OWNER/NAME. The repository is created if it does not exist.
            private: whether a new repository is private.
            dtype: the type to store the weights in. Default: the type that they have.
        """
        from raekit.inference.publish import prepared, push  # `publish` uses pipelines

        with prepared(self, repository, dtype=dtype) as folder:
            return push(folder, repository, private=private)

    def _samples(
        self, classes: str | Sequence[str] | None, labels: Sequence[int] | None, count: int, seed: Seed
    ) -> tuple[list[int] | None, list[int]]:
        """Return the class id (None without classes) and the seed of each image."""
        if classes is not None and labels is not None:
            raise UserError("labels: no effect with classes; give only one of the two")
        count = whole_number("count", count, 1, MAX_COUNT)
        if classes is not None:
            labels = [self.model.class_id(name) for name in _names(classes)]
        if labels is not None:
            ids = [label for label in class_labels(self.model, labels) for _ in range(count)]
            return ids, _seeds(seed, len(ids))
        seeds = _seeds(seed, count)
        return (random_labels(self.model, seeds, len(seeds)) if self.model.classes else None), seeds

    def _watch(self, sampling: Sampling, callback: Callback | None, batches: int) -> Watch | None:
        """Return the observer of the solver that calls `callback` once for each step."""
        if callback is None:
            return None
        if not callable(callback):
            raise UserError(f"callback: {callback!r} is no function")
        times = time_grid(sampling.steps, self.model.denoiser.config.shift, sampling.grid)[:-1]
        before, last, total = -len(times), 0, len(times) * batches

        def watch(x: Tensor, v: Tensor, t: float) -> None:
            nonlocal before, last
            if t >= times[0]:  # each batch starts here, and comes here only once
                before, last = before + len(times), 0
            step = max(sum(t <= each for each in times), 1)

            def preview() -> list[Image.Image]:
                images = self.autoencoder.decode(to_data(x, v, t))
                check_finite(images, range(len(images)), sampling)
                return [to_pil(image) for image in images]

            if step > last:
                last = step
                callback(min(before + step, total), total, preview)

        return watch

    def tensor(self, images: Input) -> Tensor:
        """Return images as a tensor (B, 3, H, W) in [0, 1] on the device of the model.

        PIL images and files are cropped to their central square, and scaled to the size of the model's images.
        """
        if isinstance(images, Tensor):
            return images.to(self.device)
        if isinstance(images, Image.Image | str | Path) or not isinstance(images, Iterable):
            images = [images]
        squares = [_square(each, self.autoencoder.image_size) for each in images]
        if not squares:
            raise UserError("images: none are given; give at least one")
        return torch.stack([from_pil(square) for square in squares]).to(self.device)

    def _plain(self, images: Tensor, output: Output) -> Pictures:
        check_finite(images, range(len(images)), what="image")
        return self._pictures([images], output, None, [None] * len(images))

    def _pictures(
        self,
        batches: Sequence[Tensor],
        output: Output,
        ids: Sequence[int] | None,
        seeds: Sequence[int | None],
        columns: int | None = None,
    ) -> Pictures:
        tensors = torch.cat([batch.cpu() for batch in batches])
        match output:
            case "pil":
                made = [to_pil(image) for image in tensors]
            case "pt":
                made = tensors
            case "np":
                made = tensors.permute(0, 2, 3, 1).numpy()
        labels = [None] * len(tensors) if ids is None else [self.classes[label] for label in ids]
        return Pictures(made, tuple(labels), tuple(seeds), columns)


def _check_output(output: str) -> None:
    """Raise UserError, before any work starts, if `output` is no `Output`."""
    check_choice("output", output, get_args(Output))


def _square(image: Image.Image | str | Path, size: int) -> Image.Image:
    """Return the central square of an image as RGB, scaled to `size`."""
    match image:
        case Image.Image():
            try:
                return center_crop(to_rgb(image), size)
            except Exception as error:  # for a damaged file, Pillow raises many types of exception
                raise UserError(f"images: a PIL image cannot be read ({error}); give another image") from None
        case str() | Path():
            return read_image(Path(image), size)
    raise UserError(
        f"images: expected PIL images, files, or a float tensor (B, 3, H, W) in [0, 1], got {type(image).__name__}; "
        "PIL.Image.fromarray converts an array (H, W, 3) of uint8"
    )


def _sampling(steps: int, solver: SolverName, guidance: Any, more: dict[str, Any]) -> Sampling:
    """Return the settings of a call; UserError if `more` has a name that is no field of `Sampling`."""
    known = [field.name for field in fields(Sampling)]
    for name in more:
        if name not in known:
            raise UserError(f"{name}: no such argument; {did_you_mean(name, known) or 'give fields of `Sampling`'}")
    return Sampling(steps=steps, solver=solver, guidance=as_rules(guidance), **more)


def _names(classes: str | Sequence[str]) -> list[str]:
    return [classes] if isinstance(classes, str) or not isinstance(classes, Iterable) else [*classes]


def _seeds(seed: Seed, count: int) -> list[int]:
    """Return a seed for each of `count` images."""
    count, seed = whole_number("count", count, 1, MAX_COUNT), as_seed(seed)
    seeds = list(range(seed, seed + count)) if isinstance(seed, int) else [*seed]
    if len(seeds) != count:
        raise UserError(f"seed: {len(seeds)} seeds for {count} images; give one seed, or one for each image")
    return seeds
