"""Frozen, pretrained encoders: a registry of names, and one small adapter for each family (spec 1.2, II.1).

Adding a model of a known family is one `register(...)` line, or none: FAMILY:WHERE names any checkpoint of it.
Adding a family is one `Family` entry.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from torch import Tensor, nn

from raekit import artifacts
from raekit.config import check_sizes, configclass, from_dict, read_json
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.layers import ViTBlock, patchify, sincos_positions
from raekit.weights import check_fit, find_folder, how_to_fetch, load_strict

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


@configclass
class ViTConfig:
    """The small ViT of our own pretraining (`stages.representation`): sine-cosine positions, no class token."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    mean: Colours = HALF[0]
    std: Colours = HALF[1]

    def __post_init__(self) -> None:
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size, "width": self.width}
        check_sizes("vit", **sizes, heads=self.heads)
        check_sizes("vit", limit=MAX_DEPTH, depth=self.depth)
        if self.width % self.heads or self.width % 4:
            raise UserError(f"vit.width: {self.width} must be a multiple of 4 and of vit.heads = {self.heads}")

    @property
    def spec(self) -> EncoderSpec:
        return EncoderSpec(
            family="raekit",
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
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.register_buffer("positions", sincos_positions(config.width, self.grid), persistent=False)

    def tokens(self, pixels: Tensor) -> Tensor:
        """The embedded patches (B, N, width), with their positions: what enters the first block."""
        size = self.config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        positions = self.get_buffer("positions") if grid == self.grid else sincos_positions(self.config.width, grid)
        return self.embed(patchify(pixels, size)) + positions.to(pixels)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.tokens(pixels)
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


_OWN = Family(model_class="", blocks="blocks", norm="norm", embed=lambda m, x: m.tokens(x), prefix_tokens=0)


def grid_of(spec: EncoderSpec, name: str, input_size: Size | None) -> tuple[int, int]:
    """The grid of tokens of the encoder `name` at `input_size`, or its own; UserError if patches do not divide it."""
    size = spec.image_size if input_size is None else input_size
    height, width = sides(size)
    if min(height, width) < 1 or height % spec.patch_size or width % spec.patch_size:
        raise UserError(f"encoder_size: {size} is no multiple of {name}'s patch size {spec.patch_size}")
    return (height // spec.patch_size, width // spec.patch_size)


class Encoder(nn.Module):
    """A frozen encoder: images (B, 3, H, W) in [0, 1] -> patch tokens (B, N, width), float32.

    Images of another size than `input_size` (H, W) are resized to it (bicubic). A latent of one block has zero
    mean and unit variance over the channels of each token: no norm here has an affine part. Always in
    evaluation mode. It computes in the type of its weights, whatever autocast surrounds it, and only as far
    as the last block that is asked for.
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
        self.family = _OWN if isinstance(model, ViT) else FAMILIES[spec.family]
        self.layers = layers or LayersConfig()
        self._chosen = self._indices(self.layers.blocks)
        if len({*self._chosen}) < len(self._chosen):
            raise UserError(f"layers.blocks: {self.layers.blocks} names a block of {name} twice")
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        super().train(False)

    def save(self, folder: Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/encoder, for `load_encoder`. Only for encoders that raekit pretrained."""
        assert isinstance(self.model, ViT), "public encoders are shared by name"
        artifacts.write(folder / "encoder", "encoder", self.model.config, self.model, world or World(), dtype=dtype)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.spec.width

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.model.parameters()).dtype

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def train(self, mode: bool = True) -> "Encoder":
        """Does nothing: a frozen encoder has one mode."""
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, which have one graph in common, when first used. Takes what `torch.compile` takes."""
        for block in self.blocks:
            block.compile(*args, **kwargs)

    def _indices(self, blocks: Sequence[int]) -> list[int]:
        depth = len(self.blocks)
        if wrong := [block for block in blocks if not -depth <= block < depth]:
            raise UserError(f"layers.blocks: {wrong[0]}, but {self.name} has blocks 0 to {depth - 1}")
        return [block % depth for block in blocks]

    def _run(self, images: Tensor, last: int) -> Iterator[Tensor]:
        """The patch tokens after each block up to `last`. To be exhausted outside of autocast."""
        if images.shape[2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode="bicubic", align_corners=False)
        pixels = ((images - self.mean) / self.std).to(self.dtype)
        x, context = self.family.embed(self.model, pixels), self.family.context(self.model, pixels)
        for block in self.blocks[: last + 1]:
            x = block(x, **context)
            yield x[:, self.spec.prefix_tokens :]

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """The patch tokens (B, N, width) after each of `blocks` (zero-based), not normalised.

        Images are (B, 3, H, W) in [0, 1], resized as in the forward pass. Differentiable in the images.
        """
        chosen = self._indices(blocks)
        with torch.autocast(images.device.type, enabled=False):
            found = {i: x for i, x in enumerate(self._run(images, max(chosen))) if i in chosen}
        return [found[i] for i in chosen]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        layers, eps = self.layers, self.model.get_submodule(self.family.norm).eps
        last = len(self.blocks) - 1 if layers.token_mean else max(self._chosen)
        tokens = total = torch.zeros((), device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            # Summed on the way: the outputs of two dozen blocks need not be held at once.
            for i, x in enumerate(self._run(images, last)):
                if i in self._chosen or i == last:
                    tokens = F.layer_norm(x.float(), x.shape[-1:], eps=eps)  # type: ignore[arg-type]
                if i in self._chosen:
                    total = total + tokens
        if layers.combine == "mean":
            total = total / len(self._chosen)
        return total + tokens.mean(1, keepdim=True) if layers.token_mean else total


def load_encoder(
    name: str,
    input_size: Size | None = None,
    layers: LayersConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load an encoder by name:

    - a registered name, read from the Hub or its cache;
    - FAMILY:WHERE, a `transformers` checkpoint of one of FAMILIES, WHERE a local folder or OWNER/NAME on the Hub;
    - `builtin:NAME`, or the folder (or Hub repository) of one that `raekit` pretrained.

    `input_size` is what images are resized to, by default the encoder's own; `layers` what its latent is made
    of, by default the last block; `dtype` (float32 or bfloat16) what it computes in. Raises UserError if there
    is no such encoder, or its weights are missing or damaged.
    """
    family, _, where = name.partition(":")
    if spec := REGISTRY.get(name):
        model = _read_transformers(name, spec.family, spec.hub_id, dtype)
    elif family in FAMILIES:
        model = _read_transformers(name, family, where, dtype)
        spec = _spec(name, family, where, model.config)
    else:
        try:
            find_folder(name)
        except UserError as error:
            raise UserError(
                f"encoder {error}. Registered: {', '.join(sorted(REGISTRY))}. Others of a family are FAMILY:WHERE, "
                f"WHERE a folder or OWNER/NAME on the Hub, FAMILY {', '.join(FAMILIES)}"
            ) from None
        path, values = artifacts.find(name, "encoder")
        config = from_dict(ViTConfig, values, path / "config.json")
        state = artifacts.read(path)
        check_fit(lambda: ViT(config), state, path)
        model, spec = ViT(config), config.spec
        load_strict(model, state, path)
        model.to(dtype)
    return Encoder(name, spec, model, input_size, layers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `transformers` from warning and from showing how it loads; downloads still show their progress."""
    from transformers import logging

    verbosity, bar, silent = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()  # that of downloads too
    if not silent:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@_quiet()  # what it would print is checked
def _read_transformers(name: str, family: str, where: str, dtype: torch.dtype) -> Any:
    """The `transformers` model in the folder or Hub repository `where`; UserError if it is not whole."""
    import transformers  # slow to import, and not needed for our own encoders

    kind = FAMILIES[family]
    model_class = getattr(transformers, kind.model_class)
    advice = how_to_fetch(where, f"encoder {name}")
    try:
        values, _ = transformers.PretrainedConfig.get_config_dict(where)
        if not isinstance(values, dict) or not values:
            raise OSError("no config.json, or an empty one")
        if (found := values.get("model_type")) not in (family, kind.tower_type):
            raise UserError(f"encoder {name}: {where} holds a model of type {found!r}, not {family!r}")
        values = values.get("vision_config", values) | kind.config
        if not 0 < values.get("num_hidden_layers", 1) <= MAX_DEPTH:
            raise ValueError(f"num_hidden_layers: {values['num_hidden_layers']} in config.json")
        config = model_class.config_class.from_dict(values)
        model, found = model_class.from_pretrained(
            where, config=config, dtype=dtype, output_loading_info=True, **kind.arguments
        )
    except UserError:
        raise
    except Exception as error:  # of many types, for files that are absent, cut off, changed or from elsewhere
        raise UserError(f"encoder {name}: {where} could not be loaded ({_reason(error)}); {advice}") from error
    if missing := sorted(found["missing_keys"]):  # which transformers would fill with random numbers
        raise UserError(f"encoder {name}: {where} lacks {', '.join(missing[:8])}; {advice}")
    return model


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):
        return "refused, its weights file is damaged or holds more than tensors"
    if "ignore_mismatched_sizes" in str(error):
        return "its tensors have other shapes than its config.json says"
    return f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0][:200]}"


def _spec(name: str, family: str, where: str, config: Any) -> EncoderSpec:
    """What config.json and preprocessor_config.json tell; without the latter, the family's mean and std."""
    patch_size, *others = {*([config.patch_size] if isinstance(config.patch_size, int) else config.patch_size)}
    if others:
        raise UserError(f"encoder {name}: patches of {config.patch_size} pixels; only square ones are supported")
    height, width = (side // patch_size * patch_size for side in sides(config.image_size))
    path = _preprocessor(where)
    values = read_json(path) if path else {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no mean and std; fetch it again, or remove it to use the family's")
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
    return from_dict(EncoderSpec, facts, path or where)


def _preprocessor(where: str) -> Path | None:
    file = "preprocessor_config.json"
    if Path(where).is_dir():
        return path if (path := Path(where, file)).is_file() else None
    try:
        return Path(hf_hub_download(where, file))
    except (EntryNotFoundError, LocalEntryNotFoundError):  # the repository has none, or its cached copy
        return None
