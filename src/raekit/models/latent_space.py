"""The latent space that a denoiser learns in: from images to whitened latents and back."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.checks import check_latents
from raekit.weights import VARIANCE_EPS, check_statistics


class LatentSpace(nn.Module, ABC):
    """An encoder, a decoder, and the latent statistics (RAE v1).

    Attributes:
        encoder: from images to tokens. It computes in `encoder_dtype`.
        decoder: from tokens to pixels.
        mean: float32 of `latent_shape`, zeros until `set_statistics`. None whitens by the scale only.
        var: float32 of `latent_shape`, ones until `set_statistics`.
        trained_on: the address of the data source that the decoder was trained on, if it is known.
    """

    config: Any
    encoder: Any
    decoder: Any
    encoder_dtype: torch.dtype
    mean: Tensor | None
    var: Tensor
    trained_on: str | None = None

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_shape))
        self.register_buffer("var", torch.ones(latent_shape))

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Return the latents (B, C, h, w), not whitened, of images (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def pixels(self, tokens: Tensor) -> Tensor:
        """Return the images (B, 3, *image_shape), not clamped to [0, 1], of latents (B, C, h, w), not whitened."""

    @abstractmethod
    def save(self, folder: str | Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/autoencoder, for `load_autoencoder`. All processes call this, the first one writes."""

    @abstractmethod
    def compile_encoder(self) -> None:
        """Compile the encoder, in place, when it is first used."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the decoded images in pixels."""

    @property
    @abstractmethod
    def encoder_facts(self) -> tuple[object, ...]:
        """What the latents depend on, apart from the encoder's weights and the images."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.var.shape
        return (channels, height, width)

    @property
    def image_size(self) -> int:
        """Side of the decoded images in pixels. Raises UserError if they are not square."""
        height, width = self.image_shape
        if height != width:
            raise UserError(
                f"the autoencoder makes images of {height} x {width} pixels, and square ones are needed; take another"
            )
        return height

    def set_statistics(self, mean: Tensor | None, var: Tensor) -> None:
        """Set the latent statistics, each (C, H, W). With a mean of None nothing is subtracted.

        Raises:
            UserError: a tensor has another shape, a value is not finite, or a variance is negative.
        """
        for name, values in (("mean", mean), ("var", var)):
            if name == "mean" and values is None:
                continue
            if not isinstance(values, Tensor) or values.shape != self.latent_shape:
                found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise UserError(f"statistics: {name} must be a tensor of shape {self.latent_shape}, not {found}")
        check_statistics(mean, var)
        self.mean = None if mean is None else mean.to(self.var)
        self.var = var.to(self.var)

    def encoder_to(self, device: torch.device | str) -> Self:
        """Move all that `encode` needs to `device`. The decoder stays where it is."""
        self.encoder.to(device)
        self.mean, self.var = None if self.mean is None else self.mean.to(device), self.var.to(device)
        return self

    def whiten(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) with zero mean and unit variance over the training images."""
        centred = latents if self.mean is None else latents - self.mean
        return centred / (self.var + VARIANCE_EPS).sqrt()

    def unwhiten(self, latents: Tensor) -> Tensor:
        """Invert `whiten`."""
        scaled = latents * (self.var + VARIANCE_EPS).sqrt()
        return scaled if self.mean is None else scaled + self.mean

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the whitened latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]. Adds no noise.

        Raises:
            UserError: `images` has another type, shape or range.
        """
        return self.whiten(self.tokens(images).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (B, 3, *image_shape) in [0, 1] of whitened latents (B, C, h, w).

        Raises:
            UserError: `latents` has another type or shape.
        """
        check_latents(latents, self.latent_shape)
        return self.pixels(self.unwhiten(latents)).clamp(0, 1)
