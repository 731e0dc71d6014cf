"""Images to whitened latents and back: what every denoiser learns in, whatever made it."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raekit.distributed import World
from raekit.errors import UserError
from raekit.weights import VARIANCE_EPS


class LatentSpace(nn.Module, ABC):
    """An encoder, a decoder, and the latent statistics between them (spec 1.1, 1.3).

    The statistics `mean` (None if it is not used: scale-only whitening) and `var`, both `latent_shape`, are
    zeros and ones until `set_statistics` is called. The encoder computes in `encoder_dtype`.
    """

    config: Any
    encoder: Any
    decoder: Any
    encoder_dtype: torch.dtype
    mean: Tensor | None
    var: Tensor
    trained_on: str | None = None
    """The address of the data source that the decoder was trained on, if that is known."""

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_shape))
        self.register_buffer("var", torch.ones(latent_shape))

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the encoder's latents (B, C, h, w), not whitened."""

    @abstractmethod
    def pixels(self, tokens: Tensor) -> Tensor:
        """Latents (B, C, h, w), not whitened -> images (B, 3, *image_shape), about [0, 1], not clamped."""

    @abstractmethod
    def save(self, folder: Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/autoencoder, for `load_autoencoder`. Called by all processes, done by the first."""

    @abstractmethod
    def compile_encoder(self) -> None:
        """Compile the encoder in place, when first used."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the decoded images in pixels."""

    @property
    @abstractmethod
    def encoder_facts(self) -> tuple[object, ...]:
        """What the encoder's latents depend on beside its weights and the images."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.var.shape
        return (channels, height, width)

    @property
    def image_size(self) -> int:
        """Side of the decoded images in pixels; UserError if they are not square."""
        height, width = self.image_shape
        if height != width:
            raise UserError(f"this autoencoder gives images of {height} x {width} pixels; this needs square ones")
        return height

    def set_statistics(self, mean: Tensor | None, var: Tensor) -> None:
        """Whiten by these, each (C, H, W), from now on. A mean of None stays None: nothing is subtracted."""
        self.mean = None if mean is None else mean.to(self.var)
        self.var = var.to(self.var)

    def whiten(self, latents: Tensor) -> Tensor:
        centred = latents if self.mean is None else latents - self.mean
        return centred / (self.var + VARIANCE_EPS).sqrt()

    def unwhiten(self, latents: Tensor) -> Tensor:
        scaled = latents * (self.var + VARIANCE_EPS).sqrt()
        return scaled if self.mean is None else scaled + self.mean

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> whitened latents (B, C, h, w). Adds no noise."""
        return self.whiten(self.tokens(images).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Whitened latents (B, C, h, w) -> images (B, 3, *image_shape) in [0, 1]."""
        return self.pixels(self.unwhiten(latents)).clamp(0, 1)
