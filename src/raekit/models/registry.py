"""The registered encoders, and how to run each model family (RAE v1 and v2).

A new model of a known family needs one `register(...)` line, or no code at all: the name FAMILY:WHERE loads any
checkpoint of a family of `transformers`. A new family needs one `Family` entry; `Family.load` may build any network.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raekit import hub
from raekit.config import check_sizes, configclass
from raekit.errors import UserError, check_choice

Colours = tuple[float, float, float]
Size = int | tuple[int, int]
"""The side of a square in pixels, or (height, width)."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

MAX_DEPTH = 1000  # deepest network that a config.json may ask for; a damaged number would fill the memory


def sides(size: Size) -> tuple[int, int]:
    """Return `size` as (height, width)."""
    return (size, size) if isinstance(size, int) else size


@configclass
class LayersConfig:
    """The encoder blocks whose outputs form the latent.

    Each output is normalised over its channels, without an affine part. `LAYERS` has RAE v2's choices for DINOv3-L.

    Attributes:
        blocks: Block numbers from 0; negative numbers count from the end, so that (-1,) is the last block.
        combine: Combines the outputs of several blocks as their mean or their sum.
        token_mean: Adds the mean over the patches of the last block's normalised output.
    """

    blocks: tuple[int, ...] = (-1,)
    combine: Literal["mean", "sum"] = "mean"
    token_mean: bool = False

    def __post_init__(self) -> None:
        if not self.blocks:
            raise UserError("layers.blocks: no blocks are given; choose at least one block")

    def __str__(self) -> str:
        several = [f"{self.combine} of"] if len(self.blocks) > 1 else []
        return " ".join([*several, "blocks", *map(str, self.blocks), *["with token mean"] * self.token_mean])


# RAE v2's choices for DINOv3-L: the last block (k1), blocks 11, 13, ..., 23 (k7) and blocks 1 to 23 (k23). The code
# takes means and adds the token mean, where the paper writes sums; for DINOv2 the code adds no token mean (RAE v2).
LAYERS = {
    "k1": LayersConfig(),
    "k7": LayersConfig(blocks=tuple(range(11, 24, 2)), token_mean=True),
    "k23": LayersConfig(blocks=tuple(range(1, 24)), token_mean=True),
}


@configclass
class EncoderSpec:
    """The properties of an encoder that the library needs.

    Attributes:
        family: Key of `FAMILIES`; "raekit" for the library's own ViT, which is never registered.
        width: Channels of a token.
        patch_size: Side of a patch in pixels.
        image_size: Default input size in pixels.
        prefix_tokens: Tokens before the patches (class token and registers).
        mean: Mean colour that is subtracted from images in [0, 1].
        std: Standard deviation of the colours, by which images are divided.
        hub_id: Hub repository, folder or file of the weights; empty for the library's own ViT.
        licence: Licence of the weights, as published with them; empty if it is not known.
        file: File of the weights in the layout of the published code; empty for the layout of `transformers`.
    """

    family: str
    width: int
    patch_size: int
    image_size: Size
    prefix_tokens: int
    mean: Colours
    std: Colours
    hub_id: str = ""
    licence: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise UserError(f"std: {self.std} must be positive")


REGISTRY: dict[str, EncoderSpec] = {}


def register(name: str, spec: EncoderSpec) -> None:
    """Register an encoder under `name`, for this process.

    Raises:
        UserError: If there is no such family, or `transformers` would load it and no weights are named.
    """
    check_choice(f"register {name}: family", spec.family, FAMILIES)
    if not spec.hub_id and not FAMILIES[spec.family].load:
        raise UserError(f"register {name}: hub_id is empty; name the Hub repository or the folder of the weights")
    REGISTRY[name] = spec


def grid_of(spec: EncoderSpec, name: str, input_size: Size | None) -> tuple[int, int]:
    """Return the token grid (rows, columns) of the encoder `name`.

    `input_size` None means the encoder's default size.

    Raises:
        UserError: If the input size is not a multiple of the patch size.
    """
    size = spec.image_size if input_size is None else input_size
    height, width = sides(size)
    if min(height, width) < 1 or height % spec.patch_size or width % spec.patch_size:
        raise UserError(f"encoder_size: {size} is not a multiple of {name}'s patch size {spec.patch_size}")
    check_sizes("encoder", tokens=height // spec.patch_size * (width // spec.patch_size))
    return (height // spec.patch_size, width // spec.patch_size)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to load the models of a family, and to run them block by block.

    Attributes:
        model_class: Name of the class in `transformers`; empty with `load`.
        load: Maps (hub_id, dtype) to any other network, with its weights. None: the class of `transformers`.
        blocks: Path of the attribute with the blocks, an `nn.ModuleList`. Each maps tokens (B, N, width) to tokens.
        norm: Path of the attribute with the norm after the last block. Only its `eps` is used.
        embed: Maps (model, normalised pixels) to the tokens that enter the first block.
        context: Maps (model, normalised pixels) to the keyword arguments of every block.
        prefix_tokens: Tokens before the patches, without the registers, whose number is in the model's config.
        colours: Default mean and standard deviation of the colours.
        tower_type: Model type of the image tower of a model with an image and a text tower.
        config: Overrides for fields of the model's config.
        arguments: Extra arguments of the model's class.
        licence: Licence of most registered weights, as published with them; empty if there are none.
    """

    model_class: str = ""
    load: Callable[[str, torch.dtype], nn.Module] | None = None
    blocks: str
    norm: str
    embed: Callable[[Any, Tensor], Tensor]
    context: Callable[[Any, Tensor], dict[str, Any]] = lambda model, pixels: {}
    prefix_tokens: int = 1
    colours: tuple[Colours, Colours] = IMAGENET
    tower_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    licence: str = ""


def patch_order(model: Any, pixels: Tensor) -> Tensor:
    """Return increasing noise (B, patches) for MAE, which hides the patches of the largest values and sorts the others.

    With a mask ratio of 0, it keeps all patches in their order.
    """
    size = model.config.patch_size
    patches = (pixels.shape[2] // size) * (pixels.shape[3] // size)
    return torch.arange(patches, device=pixels.device).expand(len(pixels), -1)


FAMILIES = {
    "dinov2": Family(
        model_class="Dinov2Model",
        licence="apache-2.0",
        blocks="encoder.layer",
        norm="layernorm",
        embed=lambda m, x: m.embeddings(x),
    ),
    "dinov2_with_registers": Family(
        model_class="Dinov2WithRegistersModel",
        licence="apache-2.0",
        blocks="encoder.layer",
        norm="layernorm",
        embed=lambda m, x: m.embeddings(x),
    ),
    "dinov3_vit": Family(
        model_class="DINOv3ViTModel",
        licence="dinov3-license",
        blocks="model.layer",
        norm="norm",
        embed=lambda m, x: m.embeddings(x),
        context=lambda m, x: {"position_embeddings": m.rope_embeddings(x)},
    ),
    "siglip": Family(
        model_class="SiglipVisionModel",
        licence="apache-2.0",
        blocks="encoder.layers",
        norm="post_layernorm",
        embed=lambda m, x: m.embeddings(x, interpolate_pos_encoding=True),
        context=lambda m, x: {"attention_mask": None},
        prefix_tokens=0,
        colours=HALF,
        tower_type="siglip_vision_model",
        config={"vision_use_head": False},
    ),
    # Mask ratio 0 keeps every patch, and increasing noise keeps the patches in order.
    "vit_mae": Family(
        model_class="ViTMAEModel",
        licence="apache-2.0",
        blocks="layers",
        norm="layernorm",
        embed=lambda m, x: m.embeddings(x, noise=patch_order(m, x), interpolate_pos_encoding=True)[0],
        config={"mask_ratio": 0.0},
    ),
    # Images are not normalised. The register is a second class token.
    "tipsv2": Family(
        model_class="Tipsv2VisionModel",
        blocks="encoder.layer",
        norm="layernorm",
        embed=lambda m, x: m.embeddings(x),
        colours=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        tower_type="tipsv2_vision_model",
    ),
    "ijepa": Family(
        model_class="IJepaModel",
        blocks="layers",
        norm="layernorm",
        embed=lambda m, x: m.embeddings(x, interpolate_pos_encoding=True),
        context=lambda m, x: {"attention_mask": None},
        prefix_tokens=0,
        arguments={"add_pooling_layer": False},
    ),
    "clip": Family(
        model_class="CLIPVisionModel",
        licence="mit",
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
    def add(
        name: str,
        family: str,
        hub_id: str,
        width: int,
        patch_size: int,
        registers: int = 0,
        licence: str = "",
        file: str = "",
    ) -> None:
        kind = FAMILIES[family]
        spec = EncoderSpec(
            family=family,
            hub_id=hub_id,
            width=width,
            patch_size=patch_size,
            image_size=16 * patch_size,  # gives 256 tokens
            prefix_tokens=kind.prefix_tokens + registers,
            mean=kind.colours[0],
            std=kind.colours[1],
            licence=licence or kind.licence,
            file=file,
        )
        register(name, spec)

    for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536)):
        hub_id = f"facebook/dinov2-with-registers-{size}"
        add(f"dinov2-{size[0]}", "dinov2_with_registers", hub_id, width, 14, registers=4)
        add(f"dinov2-noreg-{size[0]}", "dinov2", f"facebook/dinov2-{size}", width, 14)
    for size, width in (("s", 384), ("s-plus", 384), ("b", 768), ("l", 1024), ("h-plus", 1280)):
        model = f"{size[0]}16{size[2:]}"  # as in vith16plus
        add(f"dinov3-{size}", "dinov3_vit", f"facebook/dinov3-vit{model}-pretrain-lvd1689m", width, 16, registers=4)
    for size, width in (("t", 192), ("s", 384), ("b", 768)):
        model, licence = f"EUPE-ViT-{size.upper()}", "fair-noncommercial-research-license"
        add(f"eupe-{size}", "dinov3_vit", f"facebook/{model}", width, 16, 4, licence, f"{model}.pt")
    for size, width in (("base", 768), ("large", 1024)):
        add(f"siglip-{size[0]}", "siglip", f"google/siglip-{size}-patch16-256", width, 16)
        add(f"siglip2-{size[0]}", "siglip", f"google/siglip2-{size}-patch16-256", width, 16)
    add("siglip-so400m", "siglip", "google/siglip-so400m-patch14-224", 1152, 14)
    add("siglip2-so400m", "siglip", "google/siglip2-so400m-patch16-256", 1152, 16)
    add("siglip2-so400m-p14", "siglip", "google/siglip2-so400m-patch14-224", 1152, 14)
    add("webssl-300m", "dinov2", "facebook/webssl-dino300m-full2b-224", 1024, 14, licence="cc-by-nc-4.0")
    for size, width, patch_size in (("base", 768, 16), ("large", 1024, 16), ("huge", 1280, 14)):
        add(f"mae-{size[0]}", "vit_mae", f"facebook/vit-mae-{size}", width, patch_size)
    for size, width, patch_size in (("base", 768, 16), ("large", 1024, 14)):
        add(f"clip-{size[0]}", "clip", f"openai/clip-vit-{size}-patch{patch_size}", width, patch_size)


_register_all()


def absolute(name: str) -> str:
    """Return the name of a model, a dataset or a file with an absolute path, if it names something on disk.

    The absolute name means the same from any working folder. Names that are looked up elsewhere first stay as they are.
    """
    known = hub.published().NAMES
    prefix, place, size = re.fullmatch(r"(?:(\w+):)?(.*?)(@\d+)?", name, re.DOTALL).groups("")  # type: ignore[union-attr]
    path = hub.expanded(place)
    if prefix == "builtin" or name in REGISTRY or name in known or not place or not path.exists():
        return name
    return f"{prefix}:{path.absolute()}{size}" if prefix else f"{path.absolute()}{size}"
