"""Models to use: an autoencoder with the denoiser of its latents."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from raekit.compilation import check_compiler
from raekit.errors import UserError
from raekit.flow.sampling import Sampling
from raekit.formats.yaml_files import read_published
from raekit.models.autoencoder import load_autoencoder
from raekit.models.denoiser import Denoiser
from raekit.models.latent_space import LatentSpace


@dataclass(frozen=True)
class Model:
    """A denoiser with the autoencoder of its latents: all that generation needs."""

    autoencoder: LatentSpace
    denoiser: Denoiser

    def __post_init__(self) -> None:
        ours, theirs = self.denoiser.config.latent_shape, self.autoencoder.latent_shape
        if ours != theirs:
            raise UserError(f"the denoiser is for latents {ours}, the autoencoder has {theirs}")

    @property
    def device(self) -> torch.device:
        return self.autoencoder.var.device

    def compile(self, weak: Denoiser | None = None) -> Self:
        """Compile the blocks of denoiser and decoder, in place, when they are first used.

        Generation then pads its last batch, so that all batches have one size and nothing is compiled again. On CUDA
        each block becomes a CUDA graph.

        Args:
            weak: the weaker denoiser of `auto` guidance, to compile as well.

        Raises:
            UserError: if the machine has no compiler.
        """
        check_compiler("compile", self.device)
        options: dict[str, Any] = {"mode": "reduce-overhead"} if self.device.type == "cuda" else {}
        for part in (self.denoiser, self.autoencoder.decoder, *([weak] if weak else [])):
            part.compile(dynamic=False, **options)
        return self

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

    def class_ids(self, name: str) -> list[int]:
        """The ids that a name, a number, or a range of numbers as 0-9, ends included, means; else as `class_id`."""
        first, dash, last = name.partition("-")
        if name in self.classes or not (dash and first.isdecimal() and last.isdecimal()):
            return [self.class_id(name)]
        start, end = self.class_id(first), self.class_id(last)
        if end < start:
            raise UserError(f"class {name!r}: the range runs backwards; give {last}-{first}")
        return list(range(start, end + 1))


def load(
    name: str,
    device: torch.device | str = "cpu",
    ema: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a model.

    Args:
        name: `builtin:emoji`, a model folder, a stage-2 run, or OWNER/NAME on the Hub.
        device: where to put the model.
        ema: the decay of the denoiser's average. Default: the first average that was trained.
        dtype: float32, or bfloat16 for half the memory and, on hardware that multiplies it fast, shorter sampling.
            Latents, statistics, the solver's state and images are always float32.
    """
    return Model(load_autoencoder(name, dtype).to(device), Denoiser.load(name, ema, dtype).to(device))


def load_published(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Model, Sampling]:
    """Return the complete model of a published sampling YAML, and its sampling settings.

    Raises:
        UserError: if a part is missing; it names the part.
    """
    parts, sampling = read_published(path)
    assert parts.autoencoder
    assert parts.denoiser
    weak = sampling.weak.set_dtype(dtype).to(device) if sampling.weak else None
    model = Model(parts.autoencoder.build(dtype).to(device), parts.denoiser.build(dtype).to(device))
    return model, replace(sampling, weak=weak)


@torch.no_grad()
def reconstruct(autoencoder: LatentSpace, images: Tensor) -> Tensor:
    """Encode and decode images (B, 3, H, W) in [0, 1]; gives (B, 3, *image_shape) in [0, 1]."""
    return autoencoder.decode(autoencoder.encode(images))
