"""Map the names, shapes and configurations of published decoders and latent statistics (RAE v1)."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raekit.config import from_dict
from raekit.errors import UserError
from raekit.formats.states import State, inverse, is_table, rename, without_tables
from raekit.models.decoder import DecoderConfig
from raekit.models.layers import decoder_positions
from raekit.weights import VARIANCE_EPS, check_statistics, is_real


def statistics(values: Any, eps: float = VARIANCE_EPS) -> tuple[Tensor | None, Tensor]:
    """Return the mean and variance in a published statistics file.

    Args:
        values: the contents of the file, {"mean": ..., "var": ...}. `mean` may be None or absent.
        eps: the value that the publisher adds to the variance. If raekit adds another value, the difference is
            added to the returned variance.

    Returns:
        Mean and variance, each float32 of shape (C, H, W). A mean of None means that nothing is subtracted.

    Raises:
        UserError: a field is missing or unknown, or has the wrong shape.
    """
    if not isinstance(values, Mapping):
        raise UserError("statistics: must be a dictionary with mean and var")
    mean, var = values.get("mean"), values.get("var")
    if unknown := sorted(values.keys() - {"mean", "var"}, key=str):
        raise UserError(f"statistics: unknown {', '.join(map(str, unknown))}; expected only mean and var")
    if not is_real(var) or var.ndim != 3:
        raise UserError("statistics: var must be a floating-point tensor of shape (C, H, W)")
    if mean is not None and not (is_real(mean) and mean.shape == var.shape):
        raise UserError(f"statistics: mean must be None or a tensor of the same shape as var, {tuple(var.shape)}")
    mean, var = (None if mean is None else mean.float()), var.float() + (eps - VARIANCE_EPS)
    check_statistics(mean, var)
    return mean, var


def decoder_config(values: Any, token_dim: int, grid: tuple[int, int], patch_size: int) -> DecoderConfig:
    """Return the decoder configuration that a ViT-MAE style `config.json` describes.

    Like the published code, this ignores `hidden_size`, `image_size` and `patch_size` in the file.

    Args:
        values: the contents of the file.
        token_dim: the channels of a token.
        grid: the rows and columns of tokens.
        patch_size: the side of a decoded patch in pixels.

    Raises:
        UserError: a field is missing, or has a value that raekit does not support.
    """
    if not isinstance(values, Mapping):
        raise UserError("decoder config: must be a dictionary")
    for field, built in (("hidden_act", "gelu"), ("qkv_bias", True), ("num_channels", 3)):
        if (value := values.get(field, built)) != built:
            raise UserError(f"decoder config: {field} = {value!r} is not supported, only {built!r}")
    ours = {
        "width": "decoder_hidden_size",
        "depth": "decoder_num_hidden_layers",
        "heads": "decoder_num_attention_heads",
        "hidden": "decoder_intermediate_size",
        "norm_eps": "layer_norm_eps",
    }
    if missing := [name for name in ours.values() if name not in values]:
        raise UserError(f"decoder config: {', '.join(missing)} missing")
    sizes = {field: values[name] for field, name in ours.items()}
    return from_dict(
        DecoderConfig, {"token_dim": token_dim, "grid": grid, "patch_size": patch_size, **sizes}, "decoder config"
    )


_DECODER = {
    "decoder_embed": "embed",
    "decoder_norm": "norm",
    "decoder_pred": "out",
}
_DECODER_BLOCK = {
    "attention.output.dense": "attention.out",
    "intermediate.dense": "mlp.0",
    "output.dense": "mlp.2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}


def with_its_positions(config: DecoderConfig, state: State) -> DecoderConfig:
    """Return the configuration with the kind of positions that the published state dict holds.

    Raises:
        UserError: the positions have another shape.
    """
    fixed = is_table(state, "decoder_pos_embed", decoder_positions(config.width, config.grid)[None])
    return replace(config, positions="sincos" if fixed else "learned")


def decoder_state(state: State, config: DecoderConfig) -> dict[str, Tensor]:
    """Convert a published decoder's state dict to raekit's.

    Missing, unexpected and misshapen tensors pass through, for `load_strict` to report.

    Raises:
        UserError: the positions are not the fixed table, which the configuration requires.
    """
    fixed = {"decoder_pos_embed": decoder_positions(config.width, config.grid)[None]}
    ours = {}
    for key, value in without_tables(state, fixed if config.positions == "sincos" else {}).items():
        if key == "trainable_cls_token":
            ours["cls_token"] = value.flatten()
        elif key == "decoder_pos_embed":
            ours["positions"] = value.flatten(0, 1)
        elif match := re.fullmatch(r"decoder_layers\.(\d+)\.(.+)", key):
            ours[f"blocks.{match[1]}.{rename(match[2], _DECODER_BLOCK)}"] = value
        else:
            ours[rename(key, _DECODER)] = value
    for index in range(config.depth):
        prefix = f"blocks.{index}.attention"
        for kind in ("weight", "bias"):
            parts = [f"{prefix}.attention.{part}.{kind}" for part in ("query", "key", "value")]
            if all(part in ours for part in parts):
                ours[f"{prefix}.qkv.{kind}"] = torch.cat([ours.pop(part) for part in parts])
    return ours


DECODERS: dict[str, dict[str, Any]] = {  # RAE v1, decoder sizes
    "ViT-B": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "ViT-L": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
    "ViT-XL": {"width": 1152, "depth": 28, "heads": 16, "hidden": 4096},
}


def decoder_part(state: State) -> dict[str, Tensor]:
    """Return the decoder's tensors from a complete autoencoder's state dict, or any other state dict unchanged."""
    if not any(key.startswith("decoder.decoder_") for key in state):
        return dict(state)
    return {key.removeprefix("decoder."): value for key, value in state.items() if not key.startswith("encoder.")}


def decoder_sizes(state: State) -> dict[str, int]:
    """Return the sizes that follow from the shapes of a published decoder's tensors.

    Returns:
        `width`, `depth`, `hidden`, `token_dim` and `patch_size`, and `tokens` if there is a position table. Empty if
        the state dict is not a published decoder.
    """
    embed, out = state.get("decoder_embed.weight"), state.get("decoder_pred.weight")
    hidden = state.get("decoder_layers.0.intermediate.dense.weight")
    if embed is None or out is None or hidden is None or not embed.ndim == out.ndim == hidden.ndim == 2:
        return {}
    layers = {int(match[1]) for key in state if (match := re.match(r"decoder_layers\.(\d+)\.", key))}
    sizes = {"width": len(embed), "depth": len(layers), "hidden": len(hidden)}
    sizes |= {"token_dim": embed.shape[1], "patch_size": math.isqrt(len(out) // 3)}
    positions = state.get("decoder_pos_embed")
    return sizes | ({"tokens": positions.shape[1] - 1} if positions is not None and positions.ndim == 3 else {})


def published_decoder_state(ours: State, config: DecoderConfig) -> dict[str, Tensor]:
    """Convert raekit's decoder state dict to the published one. This is the inverse of `decoder_state`."""
    state = {"decoder_pos_embed": ours.get("positions", decoder_positions(config.width, config.grid))[None]}
    names, block_names = inverse(_DECODER), inverse(_DECODER_BLOCK)
    for key, value in ours.items():
        if key == "cls_token":
            state["trainable_cls_token"] = value[None, None]
        elif key == "positions":
            continue  # written above, as the fixed table is
        elif match := re.fullmatch(r"blocks\.(\d+)\.attention\.qkv\.(weight|bias)", key):
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"decoder_layers.{match[1]}.attention.attention.{part}.{match[2]}"] = rows
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            state[f"decoder_layers.{match[1]}.{rename(match[2], block_names)}"] = value
        else:
            state[rename(key, names)] = value
    return state


def published_decoder_config(config: DecoderConfig) -> dict[str, Any]:
    """Return the ViT-MAE style `config.json` of a decoder. This is the inverse of `decoder_config`."""
    return {
        "model_type": "vit_mae",
        "decoder_hidden_size": config.width,
        "decoder_num_hidden_layers": config.depth,
        "decoder_num_attention_heads": config.heads,
        "decoder_intermediate_size": config.hidden,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "num_channels": 3,
        "hidden_size": config.token_dim,
        "patch_size": config.patch_size,
        "image_size": config.patch_size * config.grid[0],
    }


def encoder_colours(ours: State, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Convert a decoder that produces pixels into a decoder that produces normalised colours.

    v1 and diffusers support only decoders of the second kind. The normalisation is linear, so the last layer absorbs
    it and the images stay the same.

    Args:
        ours: raekit's decoder state dict.
        mean: the encoder's mean of each colour channel.
        std: the encoder's standard deviation of each colour channel.

    Returns:
        A raekit state dict with a changed last layer.
    """
    weight, bias = ours["out.weight"], ours["out.bias"]
    rows = len(bias) // 3  # the output is pixel by pixel, three channels each
    scale, shift = std.flatten().to(bias).repeat(rows), mean.flatten().to(bias).repeat(rows)
    return {**ours, "out.weight": weight / scale[:, None], "out.bias": (bias - shift) / scale}
