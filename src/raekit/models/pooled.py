"""Networks that map an image to one vector: the networks of FDr6 (Yang et al., 2026, arXiv 2604.28190).

The published evaluator takes them from timm. Its differences from `transformers` are repeated here: learned positions
are resampled with antialiasing, images are padded to whole patches, and CLIP has the exact GELU.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.errors import UserError
from raekit.models.pretrained import read_pretrained
from raekit.models.registry import CLIP, HALF, IMAGENET, Colours, patch_order


@dataclass(frozen=True, kw_only=True)
class PooledSpec:
    """How to load and run a network.

    Attributes:
        hub_id: Hub repository of the weights.
        model_class: Name of the class in `transformers`.
        model_types: Model types that a checkpoint's config.json may name.
        width: Number of features.
        size: Side in pixels that images are resized to.
        colours: Mean and standard deviation of the colours.
        vector: Maps (model, normalised pixels) to the features (B, width).
        config: Overrides for fields of the model's config.
    """

    hub_id: str
    model_class: str
    model_types: tuple[str, ...]
    width: int
    size: int
    colours: tuple[Colours, Colours] = IMAGENET
    vector: Callable[[Any, Tensor], Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)


def _mae_class_token(model: Any, pixels: Tensor) -> Tensor:
    order = patch_order(model, pixels)
    return model(pixels, noise=order, interpolate_pos_encoding=True).last_hidden_state[:, 0]


POOLED = {
    "convnextv2": PooledSpec(
        hub_id="facebook/convnextv2-base-22k-224",  # pretrained on ImageNet-22k, then fine-tuned on ImageNet-1k
        model_class="ConvNextV2Model",
        model_types=("convnextv2",),
        width=1024,
        size=224,
        vector=lambda m, x: m(x).last_hidden_state.mean((2, 3)),
    ),
    "dinov2_cls": PooledSpec(
        hub_id="facebook/dinov2-large",
        model_class="Dinov2Model",
        model_types=("dinov2",),
        width=1024,
        size=256,
        vector=lambda m, x: m(x).pooler_output,
    ),
    "mae_cls": PooledSpec(
        hub_id="facebook/vit-mae-large",
        model_class="ViTMAEModel",
        model_types=("vit_mae",),
        width=1024,
        size=224,
        vector=_mae_class_token,
        config={"mask_ratio": 0.0},
    ),
    # The released evaluator and its statistics use 224 pixels for this network of 256.
    "siglip2_pool": PooledSpec(
        hub_id="google/siglip2-so400m-patch16-256",
        model_class="SiglipVisionModel",
        model_types=("siglip", "siglip_vision_model"),
        width=1152,
        size=224,
        colours=HALF,
        vector=lambda m, x: m(x, interpolate_pos_encoding=True).pooler_output,
    ),
    # timm's network has the exact GELU, although CLIP was trained with its quick approximation.
    "clip_cls": PooledSpec(
        hub_id="openai/clip-vit-large-patch14",
        model_class="CLIPVisionModel",
        model_types=("clip", "clip_vision_model"),
        width=1024,
        size=256,
        colours=CLIP,
        vector=lambda m, x: m(x, interpolate_pos_encoding=True).pooler_output,
        config={"hidden_act": "gelu"},
    ),
}
"""The networks of FDr6 besides Inception, by the name of their features."""


class PooledNetwork(nn.Module):
    """Frozen network from images (B, 3, H, W) in [0, 1] to features (B, width), float32.

    Images are resized (bicubic, antialiased, not clamped), normalised, and padded with zeros at the right and at the
    bottom to whole patches.

    Args:
        name: name of the features.
        spec: how to run the model.
        model: the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, spec: PooledSpec, model: Any):
        super().__init__()
        self.name, self.spec, self.width = name, spec, spec.width
        self.model = model.requires_grad_(False).eval()
        patch = model.config.patch_size
        side = -(-spec.size // patch) * patch
        self.padding = side - spec.size
        padded = f", padded to {side} x {side}" if self.padding else ""
        self.resize = f"bicubic, antialiased, not clamped, to {spec.size} x {spec.size}{padded}"
        _resample_positions(model, side // patch)
        mean, std = torch.tensor(spec.colours).view(2, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        # Features are float32, also if the caller computes in bf16.
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            size = (self.spec.size, self.spec.size)
            if images.shape[2:] != size:
                images = F.interpolate(images, size, mode="bicubic", antialias=True)
            pixels = F.pad((images - self.mean) / self.std, (0, self.padding, 0, self.padding))
            return self.spec.vector(self.model, pixels)


def _resample_positions(model: Any, grid: int) -> None:
    """Resample the learned positions of a vision transformer to grid x grid patches, bicubic and antialiased.

    With a table of the right size, `transformers` does not interpolate, for which it has no antialiasing.
    """
    holder = model.embeddings
    table = getattr(holder, "position_embeddings", None)
    if table is None and hasattr(holder, "position_embedding"):
        table = holder.position_embedding.weight[None]
    if table is None or (side := math.isqrt(table.shape[1])) == grid:
        return
    prefix = table.shape[1] - side**2  # the class token's position
    patches = table[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    resampled = torch.cat([table[:, :prefix], patches], 1)
    if hasattr(holder, "position_embedding"):
        holder.position_embedding = nn.Embedding.from_pretrained(resampled[0])
        holder.position_ids = torch.arange(resampled.shape[1])[None]
    else:
        holder.position_embeddings = nn.Parameter(resampled, requires_grad=False)


def load_pooled(name: str, where: str | Path | None = None) -> PooledNetwork:
    """Load a network of `POOLED`.

    Args:
        name: key of `POOLED`.
        where: a folder, or OWNER/NAME on the Hub. Default: the published repository, from the Hub or its cache.

    Raises:
        UserError: the weights are missing, damaged or of another network.
    """
    spec = POOLED[name]
    place = str(where or spec.hub_id)
    model, _ = read_pretrained(f"fdr6 {name}", place, spec.model_class, spec.model_types, config=spec.config)
    width = model.config.hidden_sizes[-1] if hasattr(model.config, "hidden_sizes") else model.config.hidden_size
    if width != spec.width:
        raise UserError(f"fdr6 {name}: {place} has {width} features instead of {spec.width}; give {spec.hub_id}")
    return PooledNetwork(name, spec, model)
