"""Derive a published denoiser's arguments from the names and shapes of its tensors."""

import math
from typing import Any

from torch import Tensor

from raekit.errors import UserError
from raekit.formats.states import State
from raekit.models.denoiser_config import SIZES


def denoiser_arguments(state: State) -> dict[str, Any]:
    """Return the arguments of a published denoiser, derived from its names and shapes.

    The label table is assumed to contain the null class. `mlp_ratio` and `base_model_depth` are not derived: their
    defaults are the released values.

    Returns:
        Arguments for `denoiser_config`, or for `denoiser_v2_config` if they contain `num_t_tokens`. Empty if the
        state dict is not a published denoiser.

    Raises:
        UserError: the shapes do not determine where the head begins, the number of attention heads, or the number
            of tokens.
    """
    embeds = [state.get(f"{name}.proj.weight") for name in ("s_embedder", "x_embedder")]
    kernels = [kernel for kernel in embeds if kernel is not None and kernel.ndim == 4]
    label = next((state[key] for key in _LABELS if key in state), None)
    blocks = _block_widths(state)
    if not kernels or label is None or not blocks or embeds[1] is None:
        return {}
    second = any(key.startswith("ctx_embedder.") for key in state)
    widths = [len(kernel) for kernel in kernels]
    depths = [len(blocks)]
    if len(widths) == 2:
        inside = [f"blocks.{i}.adaln_modulation.1.weight" not in state for i in range(len(blocks))]
        if not second:
            inside = [width == widths[0] for width in blocks]
            if widths[0] == widths[1]:
                raise UserError("backbone and head are equally wide, so the shapes do not show where the head begins")
        depths = [sum(inside), len(blocks) - sum(inside)]
    rope = "rope" if second else "feat_rope"
    tables = [state.get(f"{part}{rope}.freqs_cos") for part in (("enc_", "dec_") if len(widths) == 2 else ("",))]
    placed = [table for table in (state.get("pos_embed"), tables[-1]) if table is not None]
    if not placed:
        raise UserError("no position table, so the shapes do not give the number of tokens")
    channels, patch = kernels[0].shape[1], kernels[0].shape[2]
    values: dict[str, Any] = {
        "input_size": math.isqrt(placed[0].shape[-2]) * patch,
        "in_channels": channels,
        "hidden_size": tuple(widths),
        "depth": tuple(depths),
        "num_heads": tuple(
            _head_count(state, width, first, table)
            for width, first, table in zip(widths, (0, depths[0])[: len(widths)], tables, strict=True)
        ),
        "num_classes": len(label) - 1,
    }
    if second:
        tokens = {"num_t_tokens": "t_embedder.learnable_tokens", "num_c_tokens": "ctx_embedder.learnable_tokens"}
        if missing := [key for key in tokens.values() if key not in state]:
            raise UserError(f"missing {' and '.join(missing)}, so the shapes do not give the number of tokens")
        return values | {"patch_size": (patch, patch)} | {k: len(state[key]) for k, key in tokens.items()}
    modulation = state.get("blocks.0.adaLN_modulation.1.weight")
    values |= {
        "patch_size": patch,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in state,
        "use_swiglu": "blocks.0.mlp.fc1.weight" not in state,
        "use_rope": tables[0] is not None,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "use_pos_embed": "pos_embed" in state,
        "wo_shift": modulation is not None and len(modulation) == 4 * widths[0],
    }
    return values if len(widths) == 2 else {k: v[0] if isinstance(v, tuple) else v for k, v in values.items()}


_LABELS = ("y_embedder.embedding_table.weight", "ctx_embedder.embedding_table.weight")


def _block_widths(state: State) -> list[int]:
    """Return the width of each block, up to the first gap in the numbering."""
    widths = []
    while (weight := state.get(f"blocks.{len(widths)}.attn.proj.weight")) is not None:
        widths.append(len(weight))
    return widths


def _head_count(state: State, width: int, block: int, table: Tensor | None) -> int:
    """Return the number of attention heads in the backbone or head.

    The size of an attention head follows from the rotary table or the QK-norm. Without these, the published model
    of the same width gives the number.
    """
    norm = state.get(f"blocks.{block}.attn.q_norm.weight")
    if table is not None or norm is not None:
        size = table.shape[-1] if table is not None else len(norm)  # type: ignore[arg-type]
        return max(width // size, 1)
    if heads := next((size.heads for size in SIZES.values() if size.width == width), None):
        return heads
    raise UserError(f"no published size has width {width}, and the shapes do not give the number of heads")
