"""Frozen, pretrained encoders: a registry of names, and one small adapter for each family (spec 1.2).

Adding a model of a known family is one `register(...)` line; adding a family is one `Family` entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from raekit import artifacts
from raekit.config import configclass, from_dict
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.layers import ViTBlock, patchify, sincos_positions
from raekit.weights import load_strict

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@configclass
class EncoderSpec:
    """What the library has to know of an encoder. `hub_id` is empty for one of our own families."""

    family: str
    width: int
    patch_size: int
    image_size: int
    prefix_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    hub_id: str = ""


REGISTRY: dict[str, EncoderSpec] = {}


def register(name: str, spec: EncoderSpec) -> None:
    """Make `spec` known under `name`."""
    REGISTRY[name] = spec


def _register_all() -> None:
    for size, width in (("small", 384), ("base", 768), ("large", 1024)):
        register(
            f"dinov2-{size[0]}",
            EncoderSpec(
                family="dinov2_with_registers",
                hub_id=f"facebook/dinov2-with-registers-{size}",
                width=width,
                patch_size=14,
                image_size=224,
                prefix_tokens=5,
                mean=IMAGENET[0],
                std=IMAGENET[1],
            ),
        )
    register(
        "siglip2-b",
        EncoderSpec(
            family="siglip",
            hub_id="google/siglip2-base-patch16-256",
            width=768,
            patch_size=16,
            image_size=256,
            prefix_tokens=0,
            mean=HALF[0],
            std=HALF[1],
        ),
    )
    register(
        "mae-b",
        EncoderSpec(
            family="vit_mae",
            hub_id="facebook/vit-mae-base",
            width=768,
            patch_size=16,
            image_size=256,
            prefix_tokens=1,
            mean=IMAGENET[0],
            std=IMAGENET[1],
        ),
    )


_register_all()


@dataclass(frozen=True)
class Family:
    """How to reach a `transformers` model: its class, the final norm's attribute, and its output from pixels."""

    model_class: str
    norm: str
    output: Callable[..., Any]
    config: dict[str, Any]


FAMILIES = {
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "layernorm", lambda m, x, **options: m(x, **options), config={}
    ),
    "siglip": Family(
        "SiglipVisionModel",
        "post_layernorm",
        lambda m, x, **options: m(x, interpolate_pos_encoding=True, **options),
        config={"vision_use_head": False},
    ),
    # The mask keeps every patch, and increasing noise keeps their order.
    "vit_mae": Family(
        "ViTMAEModel",
        "layernorm",
        lambda m, x, **options: m(x, noise=_order(m, x), interpolate_pos_encoding=True, **options),
        config={"mask_ratio": 0.0},
    ),
}


def _order(model: Any, pixels: Tensor) -> Tensor:
    size = model.config.patch_size
    patches = (pixels.shape[2] // size) * (pixels.shape[3] // size)
    return torch.arange(patches, device=pixels.device).expand(len(pixels), -1)


@configclass
class ViTConfig:
    """The small ViT of our own pretraining (`stages.representation`): sine-cosine positions, no class token."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    mean: tuple[float, float, float] = HALF[0]
    std: tuple[float, float, float] = HALF[1]

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise UserError(f"vit.width: {self.width} must be a multiple of 4 and of vit.heads = {self.heads}")

    @property
    def spec(self) -> EncoderSpec:
        return EncoderSpec(
            family="vit",
            width=self.width,
            patch_size=self.patch_size,
            image_size=self.image_size,
            prefix_tokens=0,
            mean=self.mean,
            std=self.std,
        )


class ViT(nn.Module):
    """Normalised pixels (B, 3, H, W) -> tokens (B, N, width), standardised over channels.

    `keep` (B, K), indices of patches, runs it on those alone (masked pretraining).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(3 * config.patch_size**2, config.width)
        self.blocks = nn.ModuleList(
            ViTBlock(config.width, config.heads, int(config.width * config.mlp_ratio), eps=1e-6)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)

    def _embed(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        size = self.config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        positions = sincos_positions(self.config.width, grid).to(pixels.device)
        x = self.embed(patchify(pixels, size)) + positions
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        return x

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self._embed(pixels, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def block_outputs(self, pixels: Tensor) -> list[Tensor]:
        """The tokens (B, N, width) after each block."""
        x, outputs = self._embed(pixels), []
        for block in self.blocks:
            outputs.append(x := block(x))
        return outputs


class Encoder(nn.Module):
    """A frozen encoder: images (B, 3, H, W) in [0, 1] -> patch tokens (B, N, width).

    Images of another size than `input_size` are resized to it (bicubic). Each token has zero mean and unit
    variance over its channels: the last norm has no affine part. Always in evaluation mode, without gradient.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, spec: EncoderSpec, model: nn.Module, input_size: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.spec = spec
        self.input_size = input_size or spec.image_size
        if self.input_size % spec.patch_size:
            raise UserError(f"encoder_size: {self.input_size} is no multiple of {name}'s patch size {spec.patch_size}")
        self.model = model.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        if spec.family != "vit":
            norm = model.get_submodule(FAMILIES[spec.family].norm)
            norm.register_parameter("weight", None)
            norm.register_parameter("bias", None)
        super().train(False)

    def save(self, folder: Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/encoder, for `load_encoder`. Only for encoders that raekit pretrained."""
        assert isinstance(self.model, ViT), "public encoders are shared by name"
        artifacts.write(folder / "encoder", "encoder", self.model.config, self.model, world or World(), dtype=dtype)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.input_size // self.spec.patch_size
        return (side, side)

    def train(self, mode: bool = True) -> "Encoder":
        """Does nothing: a frozen encoder has one mode."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = self._pixels(images)
        if self.spec.family == "vit":
            return self.model(pixels)
        output = FAMILIES[self.spec.family].output(self.model, pixels)
        return output.last_hidden_state[:, self.spec.prefix_tokens :]

    def _pixels(self, images: Tensor) -> Tensor:
        size = (self.input_size, self.input_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", align_corners=False)
        return (images - self.mean) / self.std

    @property
    def width(self) -> int:
        return self.spec.width

    @property
    def depth(self) -> int:
        """The number of blocks."""
        config: Any = self.model.config
        return config.depth if self.spec.family == "vit" else config.num_hidden_layers

    def block_outputs(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch tokens (B, N, width) as each of `blocks`, counted from 0, puts them out: before the last norm.

        Unlike `forward`, differentiable with respect to the images.
        """
        pixels = self._pixels(images)
        if isinstance(self.model, ViT):
            outputs = self.model.block_outputs(pixels)
        else:
            found = FAMILIES[self.spec.family].output(self.model, pixels, output_hidden_states=True)
            outputs = found.hidden_states[1:]  # the first are the embedded patches
        return [outputs[index][:, self.spec.prefix_tokens :] for index in blocks]


def load_encoder(name: str, input_size: int | None = None) -> Encoder:
    """Load an encoder by its registered name, `builtin:NAME`, or the folder of one that `raekit` pretrained.

    `input_size` is the side that images are resized to, by default the encoder's own. Raises UserError if
    there is no such encoder, or its weights are missing or damaged.
    """
    if spec := REGISTRY.get(name):
        import transformers  # slow to import, and not needed for our own encoders

        family = FAMILIES[spec.family]
        try:
            model, found = getattr(transformers, family.model_class).from_pretrained(
                spec.hub_id, dtype=torch.float32, output_loading_info=True, **family.config
            )
        except (OSError, RuntimeError, SafetensorError) as error:  # absent, of other shapes, damaged
            raise UserError(
                f"encoder {name}: {spec.hub_id} could not be loaded ({str(error).splitlines()[0]}); "
                f"run `hf download {spec.hub_id}` where there is a network"
            ) from None
        if missing := sorted(found["missing_keys"]):  # which transformers would fill with random numbers
            raise UserError(f"encoder {name}: {spec.hub_id} lacks {', '.join(missing[:8])}; download it again")
        return Encoder(name, spec, model, input_size)
    try:
        path, values = artifacts.find(name, "encoder")
    except UserError as error:
        raise UserError(f"encoder {error}. Registered: {', '.join(sorted(REGISTRY))}") from None
    config = from_dict(ViTConfig, values, path / "config.json")
    model = ViT(config)
    load_strict(model, artifacts.read(path), path)
    return Encoder(name, config.spec, model, input_size)
