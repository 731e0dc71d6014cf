"""The models that readers pass to writers: configurations and raekit state dicts, without encoder weights.

This module also holds the checks and error messages that several readers and writers share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raekit.errors import UserError
from raekit.formats.guesses import guess
from raekit.formats.states import State
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig
from raekit.models.encoders import load_encoder
from raekit.models.registry import REGISTRY, EncoderSpec, LayersConfig, Size, grid_of


@dataclass(frozen=True)
class AutoencoderParts:
    """An autoencoder without the weights of its encoder.

    Attributes:
        config: the configuration. It refers to the encoder by name.
        decoder: raekit's decoder state dict.
        mean: the latents' mean, of shape (C, H, W). None means that nothing is subtracted.
        var: the latents' variance, of shape (C, H, W).
        trained_on: the address of the data source that the decoder was trained on, if it is known.
    """

    config: AutoencoderConfig
    decoder: dict[str, Tensor]
    mean: Tensor | None
    var: Tensor
    trained_on: str | None = None

    def build(self, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Build the autoencoder. This loads the encoder's weights, and fails if they are not available."""
        encoder = load_encoder(self.config.encoder, self.config.encoder_size, self.config.layers, dtype)
        return Autoencoder.build(self.config, encoder, self.decoder, (self.mean, self.var), "autoencoder", dtype)


@dataclass(frozen=True)
class DenoiserParts:
    """A denoiser: its configuration and raekit state dict.

    Attributes:
        config: the configuration.
        state: raekit's state dict.
        trained_on: the address of the data source that the denoiser was trained on, if it is known.
        ema: the decay, if the weights are an average.
    """

    config: DenoiserConfig
    state: dict[str, Tensor]
    trained_on: str | None = None
    ema: float | None = None

    def build(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        return Denoiser.build(self.config, self.state, "denoiser", dtype)


@dataclass(frozen=True)
class Parts:
    """The contents of a source: an autoencoder, a denoiser, or both. Both must have the same latent shape."""

    autoencoder: AutoencoderParts | None = None
    denoiser: DenoiserParts | None = None

    def __post_init__(self) -> None:
        if self.autoencoder and self.denoiser:
            ours, theirs = self.denoiser.config.latent_shape, tuple(self.autoencoder.var.shape)
            if ours != theirs:
                raise UserError(f"the denoiser is for latents {ours}, the autoencoder has {theirs}")

    def check_finite(self, source: str) -> None:
        """Raise UserError, naming the `source`, if a weight is not finite."""
        for state in (self.autoencoder and self.autoencoder.decoder, self.denoiser and self.denoiser.state):
            for name, value in (state or {}).items():
                if not value.isfinite().all():
                    raise UserError(f"{source}: {name} has values that are not finite; export it again from a good run")


def geometry(
    encoder: str, size: Size | None, layers: LayersConfig | None = None
) -> tuple[EncoderSpec, tuple[int, int]]:
    """Return an encoder's specification and token grid. A registered encoder is not loaded.

    Args:
        encoder: the encoder's name, as for `load_encoder`.
        size: the image size in pixels. Default: the encoder's own.
        layers: the layers that form the latent. Only checked for an encoder that is loaded.

    Raises:
        UserError: there is no such encoder, it lacks the layers, or the patch size does not divide the image size.
    """
    spec = REGISTRY.get(encoder) or load_encoder(encoder, layers=layers or LayersConfig()).spec
    return spec, grid_of(spec, encoder, size)


def only_last_block(parts: AutoencoderParts, form: str) -> None:
    """Raise a UserError, naming the format `form`, unless the latents come from the encoder's last block only."""
    config, layers = parts.config, parts.config.layers
    if len(layers.blocks) == 1 and layers.blocks[0] >= 0:  # the last block may be given by its number
        depth = len(load_encoder(config.encoder, config.encoder_size).blocks)
        layers = replace(layers, blocks=(layers.blocks[0] - depth,))
    if layers != LayersConfig():
        raise UserError(f"{config.encoder}, {config.layers}: {form} supports only latents of the encoder's last block")


def reject_code(path: Path, values: Any) -> None:
    """Raise a UserError if a `config.json` names code of its repository."""
    if isinstance(values, dict) and "auto_map" in values:
        cached = next((part for part in path.parts if part.startswith("models--")), "")  # the Hub's cache
        repository = cached.removeprefix("models--").replace("--", "/", 1)
        raise UserError(
            f"{repository or path}: names code of its repository (auto_map in config.json), and raekit runs no such "
            "code; convert its weights file if that has the names of RAE v1 or v2 (raekit convert FILE OUT --encoder "
            "ENCODER), or choose a published model (raekit models)"
        )


def guessed(state: State) -> str:
    """Return the end of an error message: what the state dict looks like. Empty if nothing known matches."""
    kind = guess(state)
    return f"; this looks like {kind}" if kind else ""


@contextmanager
def about(source: Path) -> Iterator[None]:
    """Add the file name `source` to a UserError raised in this context, unless its message has it already."""
    try:
        yield
    except UserError as error:
        raise (error if str(source) in str(error) else UserError(f"{source}: {error}")) from None
