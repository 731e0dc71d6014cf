"""Lists of the models and encoders that have a name."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from raekit import artifacts
from raekit.config import from_dict
from raekit.errors import check_text
from raekit.formats.decoder_keys import DECODERS
from raekit.formats.releases import DENOISERS, RELEASES, in_cache
from raekit.hub import builtin_names
from raekit.models.autoencoder import AutoencoderConfig
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig
from raekit.models.encoders import load_encoder
from raekit.models.registry import FAMILIES, REGISTRY, grid_of, sides

BUILT_IN_LICENCE = "apache-2.0"
PATCH = 16
"""The side in pixels of the patches that all published decoders decode."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that can be loaded by name.

    Attributes:
        name: its name.
        parts: the trained parts: "autoencoder", "denoiser", or both.
        parameters: the number of parameters of these parts, without the frozen encoder.
        image_size: the side of the images in pixels.
        classes: the number of classes; 0 without a denoiser or classes.
        encoder: the name of its encoder.
        licence: the licence of the encoder's weights, "" if it is not known.
        cached: whether loading needs no network.
    """

    name: str
    parts: str
    parameters: int
    image_size: int
    classes: int
    encoder: str
    licence: str
    cached: bool


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """A built-in or registered encoder.

    Attributes:
        name: its name.
        width: the channels of a token.
        patch_size: the side of a patch in pixels.
        input_size: height and width of its input in pixels.
        tokens: the number of tokens of an image.
        hub_id: the repository of its weights on the Hub, "" if they are in the package.
        licence: the licence of the weights, "" if it is not known.
        cached: whether loading needs no network.
    """

    name: str
    width: int
    patch_size: int
    input_size: tuple[int, int]
    tokens: int
    hub_id: str
    licence: str
    cached: bool


def list_models(pattern: str = "") -> list[ModelInfo]:
    """Return the models that have a name: built-in ones, published autoencoders and published denoisers.

    Args:
        pattern: a part of the names to list. Default: all.

    Raises:
        UserError: `pattern` is not a text.
    """
    check_text("pattern", pattern)
    found = []
    for name in builtin_names():
        if pattern in name and (info := _built_in(name)):
            found.append(info)
    found += [_autoencoder(name) for name in RELEASES if pattern in name]
    found += [_denoiser(name) for name in DENOISERS if pattern in name]
    return found


def list_encoders(pattern: str = "") -> list[EncoderInfo]:
    """Return the built-in and the registered encoders. `load_encoder` also loads other checkpoints, by FAMILY:WHERE.

    Args:
        pattern: a part of the names to list. Default: all.

    Raises:
        UserError: `pattern` is not a text.
    """
    check_text("pattern", pattern)
    built_in = [name for name in builtin_names() if pattern in name and _is_encoder(name)]
    registered = sorted(name for name in REGISTRY if pattern in name)
    return [
        EncoderInfo(
            name=name,
            width=spec.width,
            patch_size=spec.patch_size,
            input_size=sides(spec.image_size),
            tokens=math.prod(grid_of(spec, name, None)),
            hub_id=spec.hub_id,
            licence=BUILT_IN_LICENCE if name in built_in else spec.licence,
            cached=name in built_in or _encoder_cached(name),
        )
        for name, spec in (
            *((name, load_encoder(name).spec) for name in built_in),
            *((name, REGISTRY[name]) for name in registered),
        )
    ]


def _is_encoder(name: str) -> bool:
    """Return whether a built-in model is an encoder."""
    try:
        return bool(artifacts.find(name, "encoder"))
    except artifacts.MissingArtifact:
        return False


def _built_in(name: str) -> ModelInfo | None:
    """Return what a built-in model is; None for an encoder."""
    try:
        autoencoder = artifacts.find(name, "autoencoder")
    except artifacts.MissingArtifact:
        return None
    own = from_dict(AutoencoderConfig, autoencoder.config, autoencoder.path / "config.json")
    denoiser = artifacts.find(name, "denoiser")
    config = from_dict(DenoiserConfig, denoiser.config, denoiser.path / "config.json")
    return ModelInfo(
        name=name,
        parts="autoencoder and denoiser",
        parameters=_parameters(lambda: Decoder(own.decoder)) + _parameters(lambda: Denoiser(config)),
        image_size=own.decoder.grid[0] * own.decoder.patch_size,
        classes=config.num_classes,
        encoder=own.encoder,
        licence=BUILT_IN_LICENCE,
        cached=True,
    )


def _autoencoder(name: str) -> ModelInfo:
    encoder = RELEASES[name].fields["encoder"]
    spec = REGISTRY[encoder]
    grid = grid_of(spec, encoder, RELEASES[name].fields.get("encoder_size"))
    sizes = DecoderConfig(token_dim=spec.width, grid=grid, patch_size=PATCH, **DECODERS["ViT-XL"])
    return ModelInfo(
        name=name,
        parts="autoencoder",
        parameters=_parameters(lambda: Decoder(sizes)),
        image_size=grid[0] * PATCH,
        classes=0,
        encoder=encoder,
        licence=spec.licence,
        cached=in_cache(name) and _encoder_cached(encoder),
    )


def _denoiser(name: str) -> ModelInfo:
    release = DENOISERS[name]
    autoencoder = _autoencoder(release.autoencoder)
    return ModelInfo(
        name=name,
        parts="autoencoder and denoiser",
        parameters=autoencoder.parameters + _parameters(lambda: Denoiser(release.config)),
        image_size=autoencoder.image_size,
        classes=release.config.num_classes,
        encoder=autoencoder.encoder,
        licence=autoencoder.licence,
        cached=in_cache(name) and autoencoder.cached,
    )


def _parameters(build: Callable[[], nn.Module]) -> int:
    """Return the number of parameters of a network, without taking memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def _encoder_cached(encoder: str) -> bool:
    spec = REGISTRY[encoder]
    if FAMILIES[spec.family].load or Path(spec.hub_id).exists():
        return True
    files = (spec.file,) if spec.file else ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(spec.hub_id, file), str) for file in files)
