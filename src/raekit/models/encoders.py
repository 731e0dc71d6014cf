"""Frozen, pretrained encoders, loaded by name and run block by block (RAE v1 and v2)."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit import artifacts
from raekit.config import from_dict, read_json
from raekit.distributed import World, plain_tensors
from raekit.errors import UserError
from raekit.hub import find_file, find_folder
from raekit.models.checks import check_images
from raekit.models.dinov3 import read_dinov3
from raekit.models.precision import check_dtype
from raekit.models.pretrained import read_pretrained
from raekit.models.registry import (
    FAMILIES,
    REGISTRY,
    EncoderSpec,
    Family,
    LayersConfig,
    Size,
    grid_of,
    sides,
)
from raekit.models.vit import ViT, ViTConfig
from raekit.weights import load_network

_OWN = Family(blocks="blocks", norm="norm", embed=lambda m, x: m.tokens(x), prefix_tokens=0)


class Encoder(nn.Module):
    """Frozen encoder from images (B, 3, H, W) in [0, 1] to patch tokens (B, N, width), float32.

    The tokens of one block have zero mean and unit variance over their channels, as no norm has an affine part. The
    encoder is always in evaluation mode, computes in the type of its weights and not of the surrounding autocast, and
    runs only the blocks that it needs.

    Args:
        name: the name that it was loaded by.
        spec: its token width, patch size, colours and prefix tokens.
        model: the network.
        input_size: the size that images are resized to (bicubic). Default: the encoder's own.
        layers: the blocks whose outputs make the latents. Default: the last block.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        spec: EncoderSpec,
        model: nn.Module,
        input_size: Size | None = None,
        layers: LayersConfig | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.spec = spec
        self.grid = grid_of(spec, name, input_size)
        self.input_size = sides(spec.image_size if input_size is None else input_size)
        self.model = model.requires_grad_(False)
        self.layers = layers or LayersConfig()
        self._chosen = self._indices(self.layers.blocks)
        if len({*self._chosen}) < len(self._chosen):
            raise UserError(f"layers.blocks: {self.layers.blocks} names a block of {name} twice; name each once")
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        super().train(False)

    def save(self, folder: str | Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/encoder, for `load_encoder`.

        Raises:
            UserError: the encoder is not one that raekit pretrained. Others are loaded by name.
        """
        if not isinstance(self.model, ViT):
            raise UserError(
                f"encoder {self.name}: raekit saves only encoders that it pretrained; load this one by name"
            )
        artifacts.write(
            Path(folder) / "encoder", "encoder", self.model.config, self.model, world or World(), dtype=dtype
        )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.spec.width

    @property
    def family(self) -> Family:
        """How the model runs block by block."""
        return _OWN if isinstance(self.model, ViT) else FAMILIES[self.spec.family]

    @property
    def dtype(self) -> torch.dtype:
        """The type that the encoder computes in."""
        return next(self.model.parameters()).dtype

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        blocks = self.model.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def train(self, mode: bool = True) -> "Encoder":
        """Return the encoder unchanged: it is always in evaluation mode."""
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, which share a graph, when they are first used. Takes the arguments of `torch.compile`."""
        for block in self.blocks:
            block.compile(*args, **kwargs)

    def _indices(self, blocks: Sequence[int]) -> list[int]:
        depth = len(self.blocks)
        if wrong := [block for block in blocks if not -depth <= block < depth]:
            raise UserError(f"layers.blocks: {wrong[0]}, but {self.name} has blocks 0 to {depth - 1}")
        return [block % depth for block in blocks]

    def _run(self, images: Tensor, last: int) -> Iterator[Tensor]:
        """Yield the patch tokens after each block up to `last`. The caller switches autocast off."""
        if images.shape[2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode="bicubic", align_corners=False)
        pixels = ((images - self.mean) / self.std).to(self.dtype)
        x, context = self.family.embed(self.model, pixels), self.family.context(self.model, pixels)
        for block in self.blocks[: last + 1]:
            x = block(x, **context)
            yield x[:, self.spec.prefix_tokens :]

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the patch tokens (B, N, width) after each of `blocks`, not normalised. Differentiable in the images.

        Args:
            images: (B, 3, H, W) in [0, 1]. They are resized to `input_size`.
            blocks: zero-based numbers of blocks.

        Raises:
            UserError: if the encoder lacks one of the blocks.
        """
        check_images(images, ranged=False)
        chosen = self._indices(blocks)
        with torch.autocast(images.device.type, enabled=False):
            found = {i: x for i, x in enumerate(self._run(images, max(chosen))) if i in chosen}
        return [found[i] for i in chosen]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        layers, eps = self.layers, self.model.get_submodule(self.family.norm).eps
        last = len(self.blocks) - 1 if layers.token_mean else max(self._chosen)
        tokens = total = torch.zeros((), device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            # Outputs are summed at once, to save the memory of two dozen of them.
            for i, x in enumerate(self._run(images, last)):
                if i in self._chosen or i == last:
                    tokens = F.layer_norm(x.float(), x.shape[-1:], eps=eps)  # type: ignore[arg-type]
                if i in self._chosen:
                    total = total + tokens
        if layers.combine == "mean":
            total = total / len(self._chosen)
        return total + tokens.mean(1, keepdim=True) if layers.token_mean else total


@plain_tensors()
def load_encoder(
    name: str | Path,
    input_size: Size | None = None,
    layers: LayersConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load an encoder.

    Args:
        name: a registered name, read from the Hub or its cache; FAMILY:WHERE, a `transformers` checkpoint of one of
            FAMILIES in the folder or Hub repository WHERE (`dinov3_vit:FILE` is a file of DINOv3's published code); or
            `builtin:NAME`, a folder or a Hub repository of an encoder that raekit pretrained.
        input_size: the size that images are resized to. Default: the encoder's own.
        layers: the blocks whose outputs make the latents. Default: the last block.
        dtype: float32 or bfloat16, the type that the weights are held and used in.

    Raises:
        UserError: if there is no such encoder, its weights are missing or damaged, or `dtype` is another type.
    """
    check_dtype(dtype)
    name = str(name)
    family, _, where = name.partition(":")
    if spec := REGISTRY.get(name):
        model, _ = _read_family(name, spec.family, spec.hub_id, dtype, spec.file)
    elif family in FAMILIES and not FAMILIES[family].load:
        model, folder = _read_family(name, family, where, dtype)
        spec = _spec(name, family, where, folder, model.config)
    else:
        try:
            find_folder(name, encoders=REGISTRY)
        except UserError as error:
            raise UserError(
                f"encoder {error}{'' if str(error).endswith('?') else '.'} Any checkpoint of a known family is "
                f"FAMILY:WHERE; WHERE is a folder or OWNER/NAME on the Hub, FAMILY one of {', '.join(FAMILIES)}. A "
                "name that your own code registers is known after that code has run: set RAEKIT_IMPORT to its FILE.py"
            ) from None
        found = artifacts.find(name, "encoder")
        path, config = found.path, from_dict(ViTConfig, found.config, found.path / "config.json")
        state = artifacts.read(path)
        model, spec = load_network(lambda: ViT(config), state, path).to(dtype), config.spec
    encoder = Encoder(name, spec, model, input_size, layers)
    if name in REGISTRY:
        _check_spec(encoder)
    return encoder


@torch.no_grad()
def _check_spec(encoder: Encoder) -> None:
    """Raise UserError unless the network makes the tokens that its spec promises. No block is run."""
    pixels = torch.zeros(1, 3, *encoder.input_size, dtype=encoder.dtype)
    made, spec = tuple(encoder.family.embed(encoder.model, pixels).shape), encoder.spec
    if made != (wanted := (1, spec.prefix_tokens + math.prod(encoder.grid), spec.width)):
        raise UserError(
            f"encoder {encoder.name}: is registered with {spec.prefix_tokens} + {math.prod(encoder.grid)} tokens of "
            f"{spec.width} channels, {wanted}, but its network makes {made} of an image; correct its EncoderSpec"
        )


def _read_family(name: str, family: str, where: str, dtype: torch.dtype, file: str = "") -> tuple[Any, Path]:
    """Return the `transformers` model of `family`, and the local folder or file of its weights.

    Args:
        name: the name of the encoder.
        family: the family.
        where: a folder or a Hub repository; for DINOv3 also a file in the layout of the published code.
        dtype: type that the weights are held in.
        file: the name of such a file in `where`. Default: `where` has the layout of `transformers`.
    """
    if file or (family == "dinov3_vit" and Path(where).is_file()):
        try:
            path = Path(where, file) if Path(where).exists() else find_file(where, file)
            return read_dinov3(path, dtype), path
        except UserError as error:
            raise UserError(f"encoder {name}: {error}") from None
    kind = FAMILIES[family]
    if kind.load:
        return kind.load(where, dtype), Path(where)
    return read_pretrained(
        f"encoder {name}",
        where,
        kind.model_class,
        (family, kind.tower_type),
        config=kind.config,
        arguments=kind.arguments,
        dtype=dtype,
    )


def _spec(name: str, family: str, where: str, folder: Path, config: Any) -> EncoderSpec:
    """Return the facts of config.json and preprocessor_config.json; without the latter, the family's mean and std."""
    patch_size, *others = {*([config.patch_size] if isinstance(config.patch_size, int) else config.patch_size)}
    if others:
        raise UserError(f"encoder {name}: patches of {config.patch_size} pixels; only square patches are supported")
    height, width = (side // patch_size * patch_size for side in sides(config.image_size))
    path = folder / "preprocessor_config.json"
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no mean and std; fetch it again, or remove it to use the family's")
    if values.get("do_normalize") is False:
        values = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    mean, std = FAMILIES[family].colours
    facts = {
        "family": family,
        "hub_id": where,
        "width": config.hidden_size,
        "patch_size": patch_size,
        "image_size": height if height == width else (height, width),
        "prefix_tokens": FAMILIES[family].prefix_tokens + getattr(config, "num_register_tokens", 0),
        "mean": values.get("image_mean", mean),
        "std": values.get("image_std", std),
    }
    return from_dict(EncoderSpec, facts, path if path.is_file() else where)
