"""The encoders by name, what is known of each, and how to run each family (spec 1.2, II.1).

Adding a model of a known family is one `register(...)` line, or none: FAMILY:WHERE names any checkpoint of it.
Adding a family is one `Family` entry.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from raekit.config import configclass
from raekit.errors import UserError

Colours = tuple[float, float, float]
Size = int | tuple[int, int]
"""The side of a square in pixels, or (height, width)."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

MAX_DEPTH = 1000  # of a config.json that is believed: the modules of more would fill the memory


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of `size`."""
    return (size, size) if isinstance(size, int) else size


@configclass
class LayersConfig:
    """The blocks whose outputs make the latent: each is normalised over its channels, without affine part.

    `blocks` are zero-based; negative ones count from the end, so (-1,) is the last. Several are averaged or
    summed (`combine`); `token_mean` adds the mean over the patches of the last block's output, normalised.
    RAE v2's choices for DINOv3-L are (`LAYERS`): k1, the last; k7, blocks 11, 13, .. 23; k23, blocks 1 to 23; k7 and
    k23 as means with the token mean.
    """

    blocks: tuple[int, ...] = (-1,)
    combine: Literal["mean", "sum"] = "mean"
    token_mean: bool = False

    def __post_init__(self) -> None:
        if not self.blocks:
            raise UserError("layers.blocks: choose at least one block")

    def __str__(self) -> str:
        several = [f"{self.combine} of"] if len(self.blocks) > 1 else []
        return " ".join([*several, "blocks", *map(str, self.blocks), *["with token mean"] * self.token_mean])


# RAE v2's choices for DINOv3-L, as its code combines them. The paper writes a sum of the blocks; for DINOv2
# the code leaves the token mean out (spec II.1).
LAYERS = {
    "k1": LayersConfig(),
    "k7": LayersConfig(blocks=tuple(range(11, 24, 2)), token_mean=True),
    "k23": LayersConfig(blocks=tuple(range(1, 24)), token_mean=True),
}


@configclass
class EncoderSpec:
    """What the library has to know of an encoder. `hub_id` (or a folder) is empty for one of our own."""

    family: str
    width: int
    patch_size: int
    image_size: Size
    prefix_tokens: int
    mean: Colours
    std: Colours
    hub_id: str = ""

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise UserError(f"std: {self.std} must be positive")


REGISTRY: dict[str, EncoderSpec] = {}


def register(name: str, spec: EncoderSpec) -> None:
    """Make `spec` known under `name`."""
    REGISTRY[name] = spec


def grid_of(spec: EncoderSpec, name: str, input_size: Size | None) -> tuple[int, int]:
    """The grid of tokens of the encoder `name` at `input_size`, or its own; UserError if patches do not divide it."""
    size = spec.image_size if input_size is None else input_size
    height, width = sides(size)
    if min(height, width) < 1 or height % spec.patch_size or width % spec.patch_size:
        raise UserError(f"encoder_size: {size} is no multiple of {name}'s patch size {spec.patch_size}")
    return (height // spec.patch_size, width // spec.patch_size)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to run a `transformers` model piece by piece. The families' names are its model types.

    blocks, norm: the attributes that hold its blocks, and the norm after the last.
    embed: normalised pixels -> the tokens that enter the first block.
    context: what each block is given beside the tokens.
    prefix_tokens: tokens before the patches, without the registers that its configuration counts.
    config, arguments: what replaces fields of its configuration, and arguments of its class.
    """

    model_class: str
    blocks: str
    norm: str
    embed: Callable[[Any, Tensor], Tensor]
    context: Callable[[Any, Tensor], dict[str, Any]] = lambda model, pixels: {}
    prefix_tokens: int = 1
    colours: tuple[Colours, Colours] = IMAGENET
    tower_type: str = ""  # model type of the image tower alone, of a model with two
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def _order(model: Any, pixels: Tensor) -> Tensor:
    size = model.config.patch_size
    patches = (pixels.shape[2] // size) * (pixels.shape[3] // size)
    return torch.arange(patches, device=pixels.device).expand(len(pixels), -1)


FAMILIES = {
    "dinov2": Family(
        model_class="Dinov2Model", blocks="encoder.layer", norm="layernorm", embed=lambda m, x: m.embeddings(x)
    ),
    "dinov2_with_registers": Family(
        model_class="Dinov2WithRegistersModel",
        blocks="encoder.layer",
        norm="layernorm",
        embed=lambda m, x: m.embeddings(x),
    ),
    "dinov3_vit": Family(
        model_class="DINOv3ViTModel",
        blocks="model.layer",
        norm="norm",
        embed=lambda m, x: m.embeddings(x),
        context=lambda m, x: {"position_embeddings": m.rope_embeddings(x)},
    ),
    "siglip": Family(
        model_class="SiglipVisionModel",
        blocks="encoder.layers",
        norm="post_layernorm",
        embed=lambda m, x: m.embeddings(x, interpolate_pos_encoding=True),
        context=lambda m, x: {"attention_mask": None},
        prefix_tokens=0,
        colours=HALF,
        tower_type="siglip_vision_model",
        config={"vision_use_head": False},
    ),
    # The mask keeps every patch, and increasing noise keeps their order.
    "vit_mae": Family(
        model_class="ViTMAEModel",
        blocks="layers",
        norm="layernorm",
        embed=lambda m, x: m.embeddings(x, noise=_order(m, x), interpolate_pos_encoding=True)[0],
        config={"mask_ratio": 0.0},
    ),
    "clip": Family(
        model_class="CLIPVisionModel",
        blocks="encoder.layers",
        norm="post_layernorm",
        embed=lambda m, x: m.pre_layrnorm(m.embeddings(x, interpolate_pos_encoding=True)),
        context=lambda m, x: {"attention_mask": None},
        colours=CLIP,
        tower_type="clip_vision_model",
    ),
    # Also the published form of DINO (v1).
    "vit": Family(
        model_class="ViTModel",
        blocks="layers",
        norm="layernorm",
        embed=lambda m, x: m.embeddings(x, interpolate_pos_encoding=True),
        arguments={"add_pooling_layer": False},
    ),
}


def _register_all() -> None:
    def add(name: str, family: str, hub_id: str, width: int, patch_size: int, registers: int = 0) -> None:
        kind = FAMILIES[family]
        spec = EncoderSpec(
            family=family,
            hub_id=hub_id,
            width=width,
            patch_size=patch_size,
            image_size=16 * patch_size,  # for 256 tokens
            prefix_tokens=kind.prefix_tokens + registers,
            mean=kind.colours[0],
            std=kind.colours[1],
        )
        register(name, spec)

    for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536)):
        hub_id = f"facebook/dinov2-with-registers-{size}"
        add(f"dinov2-{size[0]}", "dinov2_with_registers", hub_id, width, 14, registers=4)
        add(f"dinov2-noreg-{size[0]}", "dinov2", f"facebook/dinov2-{size}", width, 14)
    for size, width in (("s", 384), ("s-plus", 384), ("b", 768), ("l", 1024), ("h-plus", 1280)):
        model = f"{size[0]}16{size[2:]}"  # as in vith16plus
        add(f"dinov3-{size}", "dinov3_vit", f"facebook/dinov3-vit{model}-pretrain-lvd1689m", width, 16, registers=4)
    for size, width in (("base", 768), ("large", 1024)):
        add(f"siglip-{size[0]}", "siglip", f"google/siglip-{size}-patch16-256", width, 16)
        add(f"siglip2-{size[0]}", "siglip", f"google/siglip2-{size}-patch16-256", width, 16)
    add("siglip-so400m", "siglip", "google/siglip-so400m-patch14-224", 1152, 14)
    add("siglip2-so400m", "siglip", "google/siglip2-so400m-patch16-256", 1152, 16)
    for size, width, patch_size in (("base", 768, 16), ("large", 1024, 16), ("huge", 1280, 14)):
        add(f"mae-{size[0]}", "vit_mae", f"facebook/vit-mae-{size}", width, patch_size)
    for size, width, patch_size in (("base", 768, 16), ("large", 1024, 14)):
        add(f"clip-{size[0]}", "clip", f"openai/clip-vit-{size}-patch{patch_size}", width, patch_size)


_register_all()
