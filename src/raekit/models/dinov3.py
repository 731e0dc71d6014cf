"""DINOv3 vision transformers in the layout of their published code, such as the files of EUPE (arXiv 2603.22387)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raekit.errors import UserError
from raekit.weights import is_real, load_network, read_weights

HEAD_DIM = 64  # in every DINOv3 and EUPE
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "storage_tokens": "embeddings.register_tokens",
    r"patch_embed\.proj": "embeddings.patch_embeddings",
    r"blocks\.(\d+)": r"model.layer.\1",
    r"attn\.proj": "attention.o_proj",
    r"ls([12])\.gamma": r"layer_scale\1.lambda1",
    r"mlp\.fc1": "mlp.up_proj",
    r"mlp\.fc2": "mlp.down_proj",
    r"mlp\.w1": "mlp.gate_proj",
    r"mlp\.w2": "mlp.up_proj",
    r"mlp\.w3": "mlp.down_proj",
}
"""Patterns of the published names, and the names in `transformers`."""


def read_dinov3(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the `DINOv3ViTModel` of `transformers` with the weights of a file of the published code.

    The shapes determine the architecture. Projectors, which EUPE used in training only, are ignored.

    Args:
        path: a `.pt`, `.pth` or `.safetensors` file.
        dtype: type that the weights are held in.

    Raises:
        UserError: the file is missing or damaged, or is not a DINOv3 vision transformer.
    """
    import transformers  # slow to import

    state = {key: value for key, value in read_weights(path).items() if not key.startswith("projectors.")}
    patches = state.get("patch_embed.proj.weight")
    depth = len({match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})
    if not all(map(is_real, state.values())) or not is_real(patches) or patches.ndim != 4 or not depth:
        raise UserError(
            f"{path}: not a DINOv3 vision transformer in the layout of its published code, which has the tensors "
            "patch_embed.proj.weight and blocks.0.attn.qkv.weight"
        )
    width, patch_size = patches.shape[0], patches.shape[-1]
    if width % HEAD_DIM:
        raise UserError(f"{path}: a width of {width}, which is not a multiple of DINOv3's heads of {HEAD_DIM} channels")
    ours = _converted(state)
    ours.setdefault("embeddings.mask_token", torch.zeros(1, 1, width))  # used in pretraining only
    registers, gated = ours.get("embeddings.register_tokens"), "model.layer.0.mlp.gate_proj.weight" in ours
    hidden = ours.get("model.layer.0.mlp.up_proj.weight")
    config = transformers.DINOv3ViTConfig(
        patch_size=patch_size,
        image_size=16 * patch_size,
        hidden_size=width,
        intermediate_size=4 * width if hidden is None else len(hidden),
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_DIM,
        num_register_tokens=registers.shape[1] if registers is not None and registers.ndim > 1 else 0,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        key_bias="model.layer.0.attention.k_proj.bias" in ours,
    )
    model = load_network(lambda: transformers.DINOv3ViTModel(config), ours, path)
    return model.to(dtype).eval()  # type: ignore[arg-type]


def _converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under their names in `transformers`, with separate projections and masked biases."""
    ours = {}
    for key, value in state.items():
        if key.endswith((".periods", ".bias_mask")):  # fixed: the rotary frequencies, and zero for the keys' biases
            continue
        name = key
        for pattern, replacement in _NAMES.items():
            name = re.sub(rf"(?<![^.]){pattern}(?![^.])", replacement, name)
        if ".attn.qkv." not in key:
            ours[name] = value[None] if name == "embeddings.mask_token" and value.ndim == 2 else value
            continue
        # A damaged file may give fewer than three pieces. The check of all weights then names the missing projection.
        for part, piece in zip("qkv", value.chunk(3) if value.ndim else [value], strict=False):
            # The published code multiplies the keys' biases by zero.
            if part == "k" and name.endswith(".bias") and f"{key}_mask" in state:
                continue
            ours[name.replace("attn.qkv", f"attention.{part}_proj")] = piece.clone()
    return ours
