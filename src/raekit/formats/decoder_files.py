"""Read autoencoders from the decoder and statistics files of RAE v1 and v2, and write v1 folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raekit.config import from_dict, read_json, to_dict, to_json
from raekit.errors import UserError
from raekit.files import whole
from raekit.formats.decoder_keys import (
    DECODERS,
    decoder_config,
    decoder_part,
    decoder_sizes,
    decoder_state,
    encoder_colours,
    published_decoder_config,
    published_decoder_state,
    statistics,
    with_its_positions,
)
from raekit.formats.parts import AutoencoderParts, about, geometry, guessed, only_last_block
from raekit.formats.states import State, unwrap
from raekit.formats.yaml_model import ENCODER_CLASSES
from raekit.models.autoencoder import AutoencoderConfig
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.registry import EncoderSpec, LayersConfig
from raekit.weights import VARIANCE_EPS, mismatches, read_weights


def read_decoder(
    fields: Mapping[str, Any],
    decoder: Path,
    stats: Path | None,
    *,
    weights: Mapping[str, Any] | None = None,
    config: Path | None = None,
    patch_size: int | None = None,
    eps: float = VARIANCE_EPS,
) -> AutoencoderParts:
    """Read an autoencoder from the published files of RAE v1 or v2.

    Args:
        fields: the AutoencoderConfig fields, except `decoder`.
        decoder: the file of decoder weights.
        stats: the file of latent statistics. Without it, latents are not whitened.
        weights: the contents of the file `decoder`, if the caller has read it already.
        config: the decoder's ViT-MAE style `config.json`, or its folder. Default: the published decoder of this width.
        patch_size: the side of a decoded patch in pixels. Default: derived from the shapes in the file.
        eps: the value that the publisher adds to the variance.

    Raises:
        UserError: the file holds no decoder, no configuration is known for it, or the files do not fit the encoder.
    """
    name = fields["encoder"]
    layers = from_dict(LayersConfig, fields.get("layers", {}), decoder)
    spec, grid = geometry(name, fields.get("encoder_size"), layers)
    with about(decoder):
        state = decoder_part(unwrap(read_weights(decoder) if weights is None else weights))
    sizes = decoder_sizes(state)
    if not sizes:
        raise UserError(f"{decoder}: holds no published decoder{guessed(state)}")
    patch_size = patch_size or sizes["patch_size"]
    if config:
        path = config / "config.json" if config.is_dir() else config
        with about(path):
            built = decoder_config(read_json(path), spec.width, grid, patch_size)
    elif known := next((size for size in DECODERS.values() if size["width"] == sizes["width"]), None):
        built = DecoderConfig(token_dim=spec.width, grid=grid, patch_size=patch_size, **known)
    else:
        widths = ", ".join(f"{name} {size['width']}" for name, size in DECODERS.items())
        raise UserError(
            f"{decoder}: no published decoder has width {sizes['width']} (published: {widths}), and the shapes do not "
            "give the number of heads; give the decoder's config.json with --decoder-config DIR"
        )
    mean, var = _read_statistics(stats, (spec.width, *grid), eps)
    built, ours = checked_decoder(state, built, f"{decoder}: does not fit {name}")
    autoencoder = from_dict(AutoencoderConfig, {**fields, "decoder": to_dict(built)}, decoder)
    return AutoencoderParts(autoencoder, ours, mean, var)


def checked_decoder(state: State, config: DecoderConfig, fault: str) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Convert a published decoder's state dict to raekit's, and check that it fits the configuration.

    Args:
        state: the published state dict. The position table may be absent.
        config: the decoder to build.
        fault: the beginning of the error message.

    Returns:
        The configuration, with the kind of positions that the state dict holds, and raekit's state dict.

    Raises:
        UserError: names or shapes do not fit. The message lists them and says what the file looks like.
    """
    with torch.device("meta"):
        wanted = published_decoder_state(Decoder(config).state_dict(), config)
    if "decoder_pos_embed" not in state:
        wanted.pop("decoder_pos_embed")
    if faults := mismatches(state, wanted):
        raise UserError(f"{fault}: {faults}{guessed(state)}")
    config = with_its_positions(config, state)
    return config, decoder_state(state, config)


def _read_statistics(path: Path | None, shape: tuple[int, ...], eps: float) -> tuple[Tensor | None, Tensor]:
    if path is None:
        return statistics({"var": torch.ones(shape)}, eps=0.0)  # leaves latents unchanged
    with about(path):
        mean, var = statistics(read_weights(path), eps)
    if var.shape != shape:
        raise UserError(
            f"{path}: the statistics have shape {tuple(var.shape)}, but the encoder's latents have shape {shape}; "
            "give the statistics of this encoder and image size"
        )
    return mean, var


def write_v1(parts: AutoencoderParts, folder: Path) -> None:
    """Write an autoencoder as a folder of RAE v1 files.

    The folder contains `model.pt`, `stat.pt`, the decoder's `config.json`, and `config.yaml` if v1 has a class for
    the encoder.
    """
    only_last_block(parts, "v1")
    spec, grid = geometry(parts.config.encoder, parts.config.encoder_size)
    if grid[0] != grid[1]:
        raise UserError(f"v1: supports only square images, but this model's latents are {grid[0]} x {grid[1]}")
    with whole(folder, folder=True) as partial:
        partial.mkdir()
        torch.save(to_published_decoder(parts, spec), partial / "model.pt")
        torch.save({"mean": parts.mean, "var": parts.var}, partial / "stat.pt")
        (partial / "config.json").write_text(to_json(published_decoder_config(parts.config.decoder)), "utf-8")
        if cls := next((cls for cls, family in ENCODER_CLASSES.items() if family == spec.family), None):
            import yaml

            encoder = {"dinov2_path" if cls == "Dinov2withNorm" else "model_name": spec.hub_id, "normalize": True}
            params = {
                "encoder_cls": cls,
                "encoder_config_path": spec.hub_id,
                "encoder_input_size": grid[0] * spec.patch_size,
                "encoder_params": encoder,
                "decoder_config_path": ".",
                "decoder_patch_size": parts.config.decoder.patch_size,
                "pretrained_decoder_path": "model.pt",
                "noise_tau": 0.0,
                "reshape_to_2d": True,
                "normalization_stat_path": "stat.pt",
            }
            values = {"stage_1": {"target": "stage1.RAE", "params": params}}
            (partial / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")


def to_published_decoder(parts: AutoencoderParts, spec: EncoderSpec) -> dict[str, Tensor]:
    """Return the decoder's published state dict.

    A published decoder produces colours normalised by the encoder's mean and standard deviation. If this one
    produces pixels, the normalisation is added to its last layer.
    """
    ours = parts.decoder
    if parts.config.output == "pixels":
        ours = encoder_colours(ours, torch.tensor(spec.mean), torch.tensor(spec.std))
    return {key: value.contiguous() for key, value in published_decoder_state(ours, parts.config.decoder).items()}
