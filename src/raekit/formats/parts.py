"""What is converted: models as configurations and our state dicts, without the weights of encoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    """An autoencoder without its encoder's weights: our decoder's state dict, and the statistics (C, H, W)."""

    config: AutoencoderConfig
    decoder: dict[str, Tensor]
    mean: Tensor | None
    var: Tensor

    def build(self, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Return the autoencoder with the weights of its encoder; UserError if the encoder is not there."""
        encoder = load_encoder(self.config.encoder, self.config.encoder_size, self.config.layers, dtype)
        return Autoencoder.build(self.config, encoder, self.decoder, (self.mean, self.var), "autoencoder", dtype)


@dataclass(frozen=True)
class DenoiserParts:
    """A denoiser: our state dict."""

    config: DenoiserConfig
    state: dict[str, Tensor]

    def build(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        return Denoiser.build(self.config, self.state, "denoiser", dtype)


@dataclass(frozen=True)
class Parts:
    """What a source holds: an autoencoder, a denoiser, or both, of the same latents."""

    autoencoder: AutoencoderParts | None = None
    denoiser: DenoiserParts | None = None

    def __post_init__(self) -> None:
        if self.autoencoder and self.denoiser:
            ours, theirs = self.denoiser.config.latent_shape, tuple(self.autoencoder.var.shape)
            if ours != theirs:
                raise UserError(f"the denoiser is for latents {ours}, the autoencoder has {theirs}")


def geometry(
    encoder: str, size: Size | None, layers: LayersConfig | None = None
) -> tuple[EncoderSpec, tuple[int, int]]:
    """What the encoder is, and its grid; a registered one is not loaded. UserError if it has not these `layers`."""
    spec = REGISTRY.get(encoder) or load_encoder(encoder, layers=layers or LayersConfig()).spec
    return spec, grid_of(spec, encoder, size)


def only_last_block(parts: AutoencoderParts, form: str) -> None:
    if parts.config.layers != LayersConfig():
        raise UserError(
            f"{parts.config.encoder}, {parts.config.layers}: {form} has the latents of an encoder's last block alone"
        )


def guessed(state: State) -> str:
    """The end of a message about `state`: what it looks like, if that is known."""
    kind = guess(state)
    return f"; this looks like {kind}" if kind else ""


@contextmanager
def about(source: Path) -> Iterator[None]:
    """Let a UserError within say which file it is about."""
    try:
        yield
    except UserError as error:
        raise (error if str(source) in str(error) else UserError(f"{source}: {error}")) from None
