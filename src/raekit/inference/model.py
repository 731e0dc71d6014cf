"""Loading complete models: an autoencoder and a denoiser of its latents."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from raekit.distributed import plain_tensors
from raekit.errors import UserError, did_you_mean, some
from raekit.flow.sampling import Sampling
from raekit.formats.yaml_files import read_published
from raekit.models.autoencoder import load_autoencoder
from raekit.models.checks import check_device
from raekit.models.denoiser import Denoiser
from raekit.models.latent_space import LatentSpace
from raekit.training.compilation import check_compiler, compile_parts


@dataclass(frozen=True)
class Model:
    """An autoencoder and a denoiser of its latents, which together generate images."""

    autoencoder: LatentSpace
    denoiser: Denoiser

    def __post_init__(self) -> None:
        ours = getattr(getattr(self.denoiser, "config", None), "latent_shape", None)
        theirs = getattr(self.autoencoder, "latent_shape", None)
        if ours is None or theirs is None:
            kinds = f"{type(self.autoencoder).__name__} and {type(self.denoiser).__name__}"
            raise UserError(f"{kinds} are no autoencoder and denoiser; give Model(autoencoder, denoiser)")
        if ours != theirs:
            raise UserError(
                f"the denoiser needs latents of shape {ours}, but the autoencoder has {theirs}; use the autoencoder "
                "that the denoiser was trained with"
            )

    @property
    def device(self) -> torch.device:
        return self.autoencoder.var.device

    def compile(self, weak: Denoiser | None = None) -> Self:
        """Compile the blocks of denoiser and decoder, in place, when they are first used.

        Generation then pads its last batch, so that all batches have one size and nothing is compiled again. Blocks do
        not become CUDA graphs: torch (2.11, on an H200) rejects a graph whose input is the output of its own last run.

        Args:
            weak: the weaker denoiser of `auto` guidance, to compile as well.

        Raises:
            UserError: if the machine has no compiler.
        """
        check_compiler("compile", self.device)
        compile_parts([self.denoiser, self.autoencoder.decoder, *([weak] if weak else [])], dynamic=False)
        return self

    @property
    def image_size(self) -> int:
        """The side of the images in pixels; UserError if the images are not square."""
        return self.autoencoder.image_size

    @property
    def trained_on(self) -> str | None:
        """The address of the data source that the denoiser was trained on, if that is known."""
        return self.denoiser.trained_on

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their ids.

        The ids themselves if the model has no class names; empty if the model is unconditional.
        """
        config = self.denoiser.config
        return config.class_names or tuple(map(str, range(config.num_classes)))

    def class_id(self, name: str) -> int:
        """Return the id of a class that is given by name, by a part of a name, or by number.

        Upper and lower case are the same. A part must occur in one name only. If any class is named by a number, a
        number stands for the class of this name, and otherwise for the class of this id.

        Raises:
            UserError: if there is no such class, or a part occurs in several names. The message lists classes.
        """
        if not isinstance(name, str):
            raise UserError(f"class {name!r}: must be a text; give ids as `labels`, or as text such as '3'")
        if name in self.classes:
            return self.classes.index(name)
        if _is_number(name):
            for number, label in self._numbered():
                if number == int(name):
                    return label
        if not self.classes:
            raise UserError(f"class {name!r}: this model is unconditional and has no classes; leave the class out")
        folded, part = [each.casefold() for each in self.classes], name.casefold()
        if part in folded:
            return folded.index(part)
        found = [i for i, each in enumerate(folded) if part and part in each and not part.isdecimal()]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"class {name!r}: stands for {some([self.classes[i] for i in found], 20)}; give a longer part"
            )
        hint = did_you_mean(name, self.classes) or f"the classes are {some(self.classes, 20)}"
        raise UserError(f"class {name!r}: no such class; {hint}")

    def class_ids(self, name: str) -> list[int]:
        """Return the ids of a name, a number or a range of numbers.

        The range 0-9 includes both ends, and numbers mean the same as in `class_id`: if any class is named by a number,
        the range has the classes whose names are these numbers. A name takes precedence over a range.

        Raises:
            UserError: if there is no such class, or the range runs backwards.
        """
        first, dash, last = name.partition("-")
        if name in self.classes or not (dash and _is_number(first) and _is_number(last)):
            return [self.class_id(name)]
        for end in first, last:
            self.class_id(end)
        if int(last) < int(first):
            raise UserError(f"class {name!r}: the range runs backwards; give {last}-{first}")
        return [label for number, label in self._numbered() if int(first) <= number <= int(last)]

    def _numbered(self) -> list[tuple[int, int]]:
        """Return the numbers of classes and their ids: the numbers that are names, or the ids if there are none."""
        named = sorted((int(name), label) for label, name in enumerate(self.classes) if _is_number(name))
        return named or [(label, label) for label in range(len(self.classes))]


def _is_number(name: str) -> bool:
    return name.isdecimal() and len(name) < 100  # Python converts at most 4,300 digits


def load(
    name: str | Path,
    device: torch.device | str = "cpu",
    ema: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a model.

    Args:
        name: `builtin:emoji`, a published name, a model folder, a stage-2 run, or OWNER/NAME on the Hub.
        device: the device to load the model to.
        ema: the decay of the weight average of the denoiser to load. Default: the first average.
        dtype: float32, or bfloat16 for half the memory and, on hardware that multiplies it fast, faster sampling.
            Latents, statistics, the solver's state and images are always float32.

    Raises:
        UserError: there is no such model or device, or a file is missing or damaged.
    """
    device = check_device(device)
    return Model(load_autoencoder(name, dtype).to(device), Denoiser.load(name, ema, dtype).to(device))


@plain_tensors()
def load_published(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Model, Sampling]:
    """Load the model and the sampling settings of a published sampling config.

    Args:
        path: a YAML file for sampling, as the authors of RAE v1 and v2 publish it.
        device: the device to load the model to.
        dtype: float32 or bfloat16, as in `load`.

    Returns:
        The model and its sampling settings, including guidance and a weak model.

    Raises:
        UserError: if the file lacks a part of the model, or there is no such device.
    """
    device = check_device(device)
    parts, sampling = read_published(Path(path))
    assert parts.autoencoder
    assert parts.denoiser
    weak = sampling.weak.set_dtype(dtype).to(device) if sampling.weak else None
    model = Model(parts.autoencoder.build(dtype).to(device), parts.denoiser.build(dtype).to(device))
    return model, replace(sampling, weak=weak)


@torch.no_grad()
def reconstruct(autoencoder: LatentSpace, images: Tensor) -> Tensor:
    """Encode and decode images.

    Args:
        autoencoder: the autoencoder.
        images: the images (B, 3, H, W) in [0, 1].

    Returns:
        The reconstructions (B, 3, *autoencoder.image_shape) in [0, 1].
    """
    if not isinstance(autoencoder, LatentSpace):
        raise UserError(
            f"autoencoder: a {type(autoencoder).__name__} is no autoencoder; give the field `autoencoder` of a model"
        )
    return autoencoder.decode(autoencoder.encode(images))
