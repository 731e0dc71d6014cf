"""Map the names, shapes and arguments of published denoisers: DiT and DiT^DH of RAE v1, and the denoiser of RAE v2.

Sources: the papers and the published code of RAE v1 and v2.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from raekit.config import configclass, from_dict
from raekit.errors import UserError
from raekit.flow.path import Prediction, shift_factor
from raekit.formats.states import State, inverse, is_table, rename, without_tables
from raekit.models.denoiser_config import ContextConfig, DenoiserConfig, TransformerConfig
from raekit.models.layers import rotary_table, sincos_positions


@configclass
class PublishedDenoiser:
    """The arguments of the published v1 networks (RAE v1's code).

    `hidden_size`, `depth` and `num_heads` are pairs (backbone, head) for DiT^DH, and single numbers for DiT.
    `class_dropout_prob` only affects training. `learn_sigma` and `use_gembed` accept only the value that raekit
    supports.

    The published code crashes with `wo_shift`, and for DiT^DH with `use_rope=False` or a `patch_size` above 1
    (RAE v1's code). No checkpoint exists for these options, so raekit implements their evident meaning.
    """

    input_size: int
    in_channels: int
    hidden_size: int | tuple[int, int]
    depth: int | tuple[int, int]
    num_heads: int | tuple[int, int]
    patch_size: int | tuple[int, int] = 1
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    use_pos_embed: bool = True
    wo_shift: bool = False
    learn_sigma: Literal[False] = False
    use_gembed: Literal[True] = True


def denoiser_config(values: Mapping[str, Any]) -> DenoiserConfig:
    """Return the configuration of a published v1 denoiser.

    The time shift is the published default, sqrt(latent dimension / 4096). A network narrower than the token
    dimension is accepted.

    Args:
        values: the arguments of the published network (`PublishedDenoiser`).

    Raises:
        UserError: a field is unknown, or has a value that raekit does not support.
    """
    published = from_dict(PublishedDenoiser, dict(values), "published denoiser")
    return DenoiserConfig(
        **_sizes(published),
        mlp_ratio=published.mlp_ratio,
        norm="rms" if published.use_rmsnorm else "layer",
        mlp="swiglu" if published.use_swiglu else "gelu",
        positions="sincos" if published.use_pos_embed else "none",
        rotary=published.use_rope,
        qk_norm=published.use_qknorm,
        adaln_shift=not published.wo_shift,
    )


def published_denoiser(config: DenoiserConfig) -> PublishedDenoiser:
    """Return the arguments of the published v1 network of this configuration.

    Raises:
        UserError: RAE v1 has no such network.
    """
    head = config.head
    unsupported = {
        "a denoiser of RAE v2 (context, base output or predicted data)": config.context is not None
        or config.base_depth > 0
        or config.prediction != "velocity",
        "a denoiser without classes": config.num_classes == 0,
        f"latents of {config.grid}, which are not square": config.grid[0] != config.grid[1],
    }
    if faults := [what for what, present in unsupported.items() if present]:
        raise UserError(f"cannot hold {faults[0]}")

    def both(name: str) -> int | tuple[int, int]:
        own = getattr(config.backbone, name)
        return (own, getattr(head, name)) if head else own

    return PublishedDenoiser(
        input_size=config.grid[0],
        in_channels=config.channels,
        hidden_size=both("width"),
        depth=both("depth"),
        num_heads=both("heads"),
        patch_size=config.patch_size,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        use_qknorm=config.qk_norm,
        use_swiglu=config.mlp == "swiglu",
        use_rope=config.rotary,
        use_rmsnorm=config.norm == "rms",
        use_pos_embed=config.positions != "none",
        wo_shift=not config.adaln_shift,
    )


@configclass
class PublishedDenoiserV2:
    """The arguments of the RAE v2 denoiser (RAE v2). Pairs are (backbone, head).

    The base output follows block number `base_model_depth`, which is 8 in the released model.
    """

    input_size: int
    in_channels: int
    hidden_size: tuple[int, int]
    depth: tuple[int, int]
    num_heads: int | tuple[int, int]
    patch_size: int | tuple[int, int] = 1
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    base_model_depth: int = 8
    num_t_tokens: int = 4
    num_c_tokens: int = 8


def denoiser_v2_config(values: Mapping[str, Any], prediction: Prediction = "data") -> DenoiserConfig:
    """Return the configuration of a published RAE v2 denoiser.

    Args:
        values: the arguments of the published network (`PublishedDenoiserV2`).
        prediction: the quantity that the network predicts.

    Raises:
        UserError: a field is unknown, or has a value that raekit does not support.
    """
    published = from_dict(PublishedDenoiserV2, dict(values), "published denoiser, version 2")
    return DenoiserConfig(
        **_sizes(published),
        mlp_ratio=published.mlp_ratio,
        qk_norm=True,
        positions="none",
        context=ContextConfig(time_tokens=published.num_t_tokens, label_tokens=published.num_c_tokens),
        base_depth=published.base_model_depth,
        prediction=prediction,
    )


def _sizes(published: PublishedDenoiser | PublishedDenoiserV2) -> dict[str, Any]:
    """Return the DenoiserConfig fields for sizes, which v1 and v2 describe in the same way."""
    wide = isinstance(published.hidden_size, tuple)
    if isinstance(published.depth, tuple) != wide:
        raise UserError("published denoiser: hidden_size and depth must both be pairs, or both numbers")
    widths, depths, heads, patches = map(
        _pair, (published.hidden_size, published.depth, published.num_heads, published.patch_size)
    )
    if patches[0] != patches[1]:
        raise UserError(
            f"published denoiser: patch_size = {published.patch_size} is not supported, only two equal numbers"
        )
    parts = [TransformerConfig(width=widths[i], depth=depths[i], heads=heads[i]) for i in range(2 if wide else 1)]
    grid = (published.input_size, published.input_size)
    return {
        "channels": published.in_channels,
        "grid": grid,
        "backbone": parts[0],
        "head": parts[1] if wide else None,
        "num_classes": published.num_classes,
        "patch_size": patches[0],
        "shift": shift_factor((published.in_channels, *grid)),
        "allow_narrow": parts[-1].width < published.in_channels * patches[0] ** 2,
    }


_DENOISER = {
    "pos_embed": "positions",
    "s_projector": "head_condition",
    "t_embedder.W": "time.frequencies",
    "t_embedder.mlp": "time.mlp",
    "y_embedder.embedding_table": "label",
    "final_layer.norm_final": "final.norm",
    "final_layer.linear": "final.out",
    "final_layer.adaLN_modulation.1": "final.modulation",
}
_DENOISER_V2 = {
    "t_embedder.learnable_tokens": "time_tokens",
    "ctx_embedder.learnable_tokens": "label_tokens",
    "ctx_embedder.embedding_table": "label",
    "final_layer.norm": "final.norm",
    "final_layer.adaln_modulation.1": "final.modulation",
    "base_final_layer.norm": "base_final.norm",
    "base_final_layer.linear": "base_final.out",
    "base_final_layer.adaln_modulation.1": "base_final.modulation",
}
_DIT = {"x_embedder.proj": "embed"}
_DIT_DH = {"s_embedder.proj": "embed", "x_embedder.proj": "head_embed"}
_DENOISER_BLOCK = {
    "attn.qkv": "attention.qkv",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "attn.proj": "attention.out",
    "mlp.w12": "mlp.w_in",
    "mlp.w3": "mlp.w_out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation.1": "modulation",
    "adaln_modulation.1": "modulation",
}
# Projections that v2 stores separately. v1 and raekit store them as one.
_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.w1", "mlp.w2")}


def with_its_positions(config: DenoiserConfig, state: State) -> DenoiserConfig:
    """Return the configuration. Its positions become "learned" if the state dict holds others than the fixed table.

    Raises:
        UserError: the positions have another shape.
    """
    fixed = config.positions != "sincos" or is_table(state, "pos_embed", _position_table(config))
    return config if fixed else replace(config, positions="learned")


def denoiser_state(state: State, config: DenoiserConfig) -> dict[str, Tensor]:
    """Convert the state dict of a published DiT, DiT^DH or RAE v2 denoiser to raekit's.

    A network trained without class dropout has no null class. Its row in the label table becomes zero. Missing,
    unexpected and misshapen tensors pass through, for `load_strict` to report.

    Raises:
        UserError: a position or rotary table is not the fixed one.
    """
    ours = {}
    names = _DENOISER | (_DIT_DH if config.head else _DIT) | (_DENOISER_V2 if config.context else {})
    for key, value in _fused(without_tables(state, _denoiser_tables(config))).items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if not match:
            value = _patch_matrix(value) if key.endswith("_embedder.proj.weight") else value
            value = value.flatten(0, 1) if key == "pos_embed" and value.ndim == 3 else value
            if key.endswith("_embedder.embedding_table.weight") and len(value) == config.num_classes:
                value = torch.cat([value, torch.zeros_like(value[:1])])
            ours[rename(key, names)] = value
            continue
        index, name = int(match[1]), match[2]
        part, prefix = config.backbone, f"blocks.{index}"
        if config.head and index >= part.depth:
            part, prefix = config.head, f"head_blocks.{index - config.backbone.depth}"
        if name.startswith("attn.qkv."):
            value = torch.cat([*(_halves(x, part) for x in value.chunk(3)[:2]), *value.chunk(3)[2:]])
        elif name.startswith(("attn.q_norm.", "attn.k_norm.")):
            value = _halves(value, part)
        ours[f"{prefix}.{rename(name, _DENOISER_BLOCK)}"] = value
    return ours


def published_denoiser_state(state: State, config: DenoiserConfig) -> dict[str, Tensor]:
    """Convert a raekit state dict to a published state dict of DiT or DiT^DH, with its fixed tables.

    This is the inverse of `denoiser_state` for networks that `published_denoiser` accepts.
    """
    names = inverse(_DENOISER | (_DIT_DH if config.head else _DIT))
    theirs = _denoiser_tables(config)
    for key, value in state.items():
        match = re.fullmatch(r"(head_)?blocks\.(\d+)\.(.+)", key)
        if not match:
            name = rename(key, names)
            if name.endswith("_embedder.proj.weight"):
                value = value.unflatten(1, (config.patch_size, config.patch_size, -1)).permute(0, 3, 1, 2)
            theirs[name] = value[None] if name == "pos_embed" else value
            continue
        part, index, name = config.backbone, int(match[2]), match[3]
        if match[1] and config.head:
            part, index = config.head, index + config.backbone.depth
        if name.startswith("attention.qkv."):
            value = torch.cat([*(_pairs(x, part) for x in value.chunk(3)[:2]), value.chunk(3)[2]])
        elif name.startswith(("attention.q_norm.", "attention.k_norm.")):
            value = _pairs(value, part)
        theirs[f"blocks.{index}.{rename(name, inverse(_DENOISER_BLOCK))}"] = value
    return theirs


def _denoiser_tables(config: DenoiserConfig) -> dict[str, Tensor]:
    """Return the fixed position and rotary tables, with their published names and layout."""
    tables = {"pos_embed": _position_table(config)} if config.positions == "sincos" else {}
    context = config.context.time_tokens + config.context.label_tokens if config.context else 0
    rope = "rope" if config.context else "feat_rope"
    parts = [(f"enc_{rope}", config.backbone, context), (f"dec_{rope}", config.head, 0)]
    if config.head is None:
        parts = [(rope, config.backbone, context)]
    for name, part, unplaced in parts if config.rotary else ():
        assert part is not None
        table = rotary_table(part.width // part.heads, config.token_grid, unplaced)
        for suffix, values in zip(("cos", "sin"), table, strict=True):
            tables[f"{name}.freqs_{suffix}"] = values.repeat_interleave(2, dim=1)
    return tables


def _position_table(config: DenoiserConfig) -> Tensor:
    return sincos_positions(config.backbone.width, config.token_grid)[None]


def _fused(state: State) -> dict[str, Tensor]:
    """Join the projections in `_FUSED`. Incomplete ones stay as they are, for `load_strict` to report."""
    ours = dict(state)
    for key in state:
        for whole, (first, *others) in _FUSED.items():
            prefix, found, kind = key.partition(f".{first}.")
            parts = [f"{prefix}.{part}.{kind}" for part in (first, *others)]
            if found and all(part in ours for part in parts):
                ours[f"{prefix}.{whole}.{kind}"] = torch.cat([ours.pop(part) for part in parts])
    return ours


def _patch_matrix(kernel: Tensor) -> Tensor:
    """Reshape a patch embedding's kernel (d, C, p, p) to a matrix (d, p*p*C), in the order of `layers.patchify`."""
    return kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel


def _halves(rows: Tensor, part: TransformerConfig) -> Tensor:
    """Reorder each head's rows from interleaved rotary pairs (0 1) (2 3) .. to halves (0 2 ..) (1 3 ..).

    Rows that do not divide into heads stay as they are, for `load_strict` to report.
    """
    pairs = part.width // part.heads // 2
    return rows if len(rows) % (2 * pairs) else rows.unflatten(0, (-1, pairs, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(rows: Tensor, part: TransformerConfig) -> Tensor:
    """Reorder each head's rows from halves to interleaved rotary pairs, the inverse of `_halves`."""
    return rows.unflatten(0, (-1, 2, part.width // part.heads // 2)).transpose(1, 2).flatten(0, 2)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
