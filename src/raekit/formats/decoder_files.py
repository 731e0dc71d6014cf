"""Autoencoders of version 1 and 2, from and to their files."""

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
)
from raekit.formats.parts import AutoencoderParts, about, geometry, guessed, only_last_block
from raekit.formats.states import State, unwrap
from raekit.formats.yaml_model import ENCODER_CLASSES
from raekit.models.autoencoder import AutoencoderConfig
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.registry import EncoderSpec, LayersConfig
from raekit.weights import mismatches, read_weights


def read_decoder(
    fields: Mapping[str, Any],
    decoder: Path,
    stats: Path | None,
    *,
    weights: Mapping[str, Any] | None = None,
    config: Path | None = None,
    patch_size: int | None = None,
    eps: float | None = None,
) -> AutoencoderParts:
    """Read the files of v1 or v2, `weights` being what the file `decoder` holds if that is read.

    `fields` are those of AutoencoderConfig but `decoder`. Without `config` the decoder is the published one of
    its width, without `patch_size` it has that of its shapes.
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
            f"{decoder}: a decoder of width {sizes['width']} is none of the published ({widths}), and its shapes do "
            "not tell the number of heads; give its config.json, as in --decoder-config DIR"
        )
    mean, var = _read_statistics(stats, (spec.width, *grid), eps)
    whole_config = from_dict(AutoencoderConfig, {**fields, "decoder": to_dict(built)}, decoder)
    return AutoencoderParts(whole_config, checked_decoder(state, built, f"{decoder}: does not fit {name}"), mean, var)


def checked_decoder(state: State, config: DecoderConfig, fault: str) -> dict[str, Tensor]:
    """Our state dict of a published decoder; UserError that lists what does not fit, and says what it is instead."""
    with torch.device("meta"):
        wanted = published_decoder_state(Decoder(config).state_dict(), config)
    if "decoder_pos_embed" not in state:
        wanted.pop("decoder_pos_embed")
    if faults := mismatches(state, wanted):
        raise UserError(f"{fault}: {faults}{guessed(state)}")
    return decoder_state(state, config)


def _read_statistics(
    path: Path | None, shape: tuple[int, ...], eps: float | None = None
) -> tuple[Tensor | None, Tensor]:
    if path is None:
        return statistics({"var": torch.ones(shape)}, eps=0.0)  # which leaves latents as they are
    with about(path):
        mean, var = statistics(read_weights(path), *([] if eps is None else [eps]))
    if var.shape != shape:
        raise UserError(f"{path}: statistics of latents {tuple(var.shape)}, but the encoder gives {shape}")
    return mean, var


def write_v1(parts: AutoencoderParts, folder: Path) -> None:
    """`model.pt`, `stat.pt`, the decoder's `config.json`, and `config.yaml` if v1 has a class for the encoder."""
    only_last_block(parts, "v1")
    spec, grid = geometry(parts.config.encoder, parts.config.encoder_size)
    if grid[0] != grid[1]:
        raise UserError(f"v1: holds square images alone, this model's latents are {grid[0]} x {grid[1]}")
    with whole(folder, folder=True) as partial:
        partial.mkdir()
        torch.save(to_published_decoder(parts, spec), partial / "model.pt")
        torch.save({"mean": parts.mean, "var": parts.var}, partial / "stat.pt")
        (partial / "config.json").write_text(to_json(published_decoder_config(parts.config.decoder)))
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
            (partial / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def to_published_decoder(parts: AutoencoderParts, spec: EncoderSpec) -> dict[str, Tensor]:
    """The published state dict of its decoder, one that gives the encoder's colours."""
    ours = parts.decoder
    if parts.config.output == "pixels":
        ours = encoder_colours(ours, torch.tensor(spec.mean), torch.tensor(spec.std))
    return {key: value.contiguous() for key, value in published_decoder_state(ours, parts.config.decoder).items()}
