"""Map the names, arguments and latent statistics of diffusers' AutoencoderRAE."""

import math
import re
from typing import Any, Literal

import torch
from torch import Tensor

from raekit.config import configclass
from raekit.errors import UserError, whole_number
from raekit.formats.states import State, rename
from raekit.models.decoder import DecoderConfig
from raekit.weights import VARIANCE_EPS, check_statistics

DIFFUSERS_EPS = 1e-5
DIFFUSERS_GRID = (16, 16)
"""The only token grid for which diffusers (0.42.1) computes the published position table.

diffusers spreads the positions of every grid over the range of this one.
"""

DiffusersEncoder = Literal["dinov2", "siglip2", "mae"]
DIFFUSERS_ENCODERS: dict[DiffusersEncoder, tuple[str, int]] = {
    "dinov2": ("dinov2_with_registers", 518),
    "siglip2": ("siglip", 256),
    "mae": ("vit_mae", 224),
}
"""For each `encoder_type` of AutoencoderRAE: raekit's family, and the image size of its position table in pixels."""


@configclass
class DiffusersAutoencoder:
    """The arguments of diffusers' AutoencoderRAE, with its defaults.

    `latents_mean` and `latents_std` are not read from here, because the weights contain them too. `noise_tau` and
    `use_encoder_loss` only affect training.
    """

    encoder_type: DiffusersEncoder = "dinov2"
    encoder_hidden_size: int = 768
    encoder_patch_size: int = 14
    encoder_num_hidden_layers: int = 12
    encoder_input_size: int = 224
    encoder_norm_mean: tuple[float, float, float] | None = None
    encoder_norm_std: tuple[float, float, float] | None = None
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    patch_size: int = 16
    image_size: int | None = None
    num_channels: Literal[3] = 3
    latents_mean: Any = None
    latents_std: Any = None
    scaling_factor: float = 1.0
    reshape_to_2d: Literal[True] = True
    noise_tau: float = 0.0
    use_encoder_loss: bool = False

    def __post_init__(self) -> None:
        whole_number("encoder_patch_size", self.encoder_patch_size, 1)
        if self.encoder_hidden_size < 64 or self.encoder_hidden_size % 64:
            raise UserError(
                f"encoder_hidden_size: {self.encoder_hidden_size} must be a multiple of 64, the channels of a head"
            )
        if self.encoder_input_size % self.encoder_patch_size:
            raise UserError(
                f"encoder_input_size: {self.encoder_input_size} must be a multiple of encoder_patch_size = "
                f"{self.encoder_patch_size}"
            )
        if self.image_size not in (None, self.patch_size * self.grid[0]):
            raise UserError(
                f"image_size: {self.image_size} must be {self.grid[0]} patches of patch_size = {self.patch_size}"
            )
        if not 0 < self.scaling_factor < math.inf:
            raise UserError(f"scaling_factor: {self.scaling_factor} must be positive and finite")

    @property
    def grid(self) -> tuple[int, int]:
        side = self.encoder_input_size // self.encoder_patch_size
        return (side, side)

    @property
    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            token_dim=self.encoder_hidden_size,
            grid=self.grid,
            patch_size=self.patch_size,
            width=self.decoder_hidden_size,
            depth=self.decoder_num_hidden_layers,
            heads=self.decoder_num_attention_heads,
            hidden=self.decoder_intermediate_size,
        )


_DIFFUSERS_ATTENTION = {
    "to_q": "attention.query",
    "to_k": "attention.key",
    "to_v": "attention.value",
    "to_out.0": "output.dense",
}


def from_diffusers(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Split an AutoencoderRAE's state dict.

    Returns:
        The decoder's tensors with their v1 names, the encoder's tensors, and all other tensors.
    """
    parts: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]] = ({}, {}, {})
    for key, value in state.items():
        if key.startswith("decoder."):
            if match := re.fullmatch(r"(decoder\.decoder_layers\.\d+\.attention\.)(.+)", key):
                key = match[1] + rename(match[2], _DIFFUSERS_ATTENTION)
            parts[0][key.removeprefix("decoder.")] = value
        elif key.startswith("encoder."):
            parts[1][key.removeprefix("encoder.")] = value
        else:
            parts[2][key] = value
    return parts


def diffusers_decoder_state(published: State) -> dict[str, Tensor]:
    """Convert a v1 decoder's state dict to the decoder tensors of an AutoencoderRAE, without the position table."""
    names = {theirs: name for name, theirs in _DIFFUSERS_ATTENTION.items()}
    state = {}
    for key, value in published.items():
        if match := re.fullmatch(r"(decoder_layers\.\d+\.attention\.)(.+)", key):
            key = match[1] + rename(match[2], names)
        if key != "decoder_pos_embed":
            state[f"decoder.{key}"] = value
    return state


def statistics_from_diffusers(
    mean: Tensor, std: Tensor, scale: float, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor]:
    """Return the mean and variance with which raekit produces the same latents as diffusers.

    diffusers divides by `_latents_std` + 1e-5. Its converted files already hold sqrt(var + 1e-5) there, so its
    latents are slightly smaller than v1's: by 0.01 % where the standard deviation is 0.1.

    Args:
        mean: `_latents_mean`.
        std: `_latents_std`.
        scale: `scaling_factor`.
        shape: the latent's shape (C, H, W). `mean` and `std` are expanded to it.

    Returns:
        Mean and variance, each of shape (C, H, W). The mean is None if it is zero everywhere.

    Raises:
        UserError: the tensors do not expand to `shape`, or hold impossible values.
    """
    try:
        mean, std = mean.double().expand(shape), std.double().expand(shape)
    except RuntimeError:
        given = f"{tuple(mean.shape)} and {tuple(std.shape)}"
        raise UserError(f"_latents_mean and _latents_std have shapes {given}, expected {shape}") from None
    var = ((std + DIFFUSERS_EPS) / scale).square() - VARIANCE_EPS
    ours = (mean.float().clone() if mean.any() else None), var.float()
    check_statistics(*ours)
    return ours


def statistics_for_diffusers(mean: Tensor | None, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return the `_latents_mean` and `_latents_std` with which diffusers produces the same latents as raekit."""
    std = (var.double() + VARIANCE_EPS).sqrt() - DIFFUSERS_EPS
    return (torch.zeros(1) if mean is None else mean.float()), std.float()
