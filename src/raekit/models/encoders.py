"""Frozen, pretrained encoders, loaded by name and run block by block (RAE v1 and v2)."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from torch import Tensor, nn

from raekit import artifacts
from raekit.config import from_dict, read_json
from raekit.distributed import World
from raekit.errors import UserError
from raekit.hub import download, find_folder, how_to_fetch
from raekit.models.checks import check_images
from raekit.models.registry import (
    FAMILIES,
    MAX_DEPTH,
    REGISTRY,
    EncoderSpec,
    Family,
    LayersConfig,
    Size,
    grid_of,
    sides,
)
from raekit.models.vit import ViT, ViTConfig
from raekit.weights import check_fit, load_strict

_OWN = Family(model_class="", blocks="blocks", norm="norm", embed=lambda m, x: m.tokens(x), prefix_tokens=0)


class Encoder(nn.Module):
    """Frozen encoder from images (B, 3, H, W) in [0, 1] to patch tokens (B, N, width), float32.

    The tokens of one block have zero mean and unit variance over their channels, as no norm has an affine part. The
    encoder is always in evaluation mode, computes in the type of its weights and not of the surrounding autocast, and
    runs only the blocks that it needs.

    Args:
        name: the name that it was loaded by.
        spec: the facts about it.
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
        """Write FOLDER/encoder, for `load_encoder`. Only encoders that raekit pretrained can be saved."""
        assert isinstance(self.model, ViT), "public encoders are shared by name"
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


def load_encoder(
    name: str | Path,
    input_size: Size | None = None,
    layers: LayersConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load an encoder.

    Args:
        name: a registered name, read from the Hub or its cache; FAMILY:WHERE, a `transformers` checkpoint of one of
            FAMILIES in the folder or Hub repository WHERE; or `builtin:NAME`, a folder or a Hub repository of an
            encoder that raekit pretrained.
        input_size: the size that images are resized to. Default: the encoder's own.
        layers: the blocks whose outputs make the latents. Default: the last block.
        dtype: float32 or bfloat16, the type that the weights are held and used in.

    Raises:
        UserError: if there is no such encoder, or its weights are missing or damaged.
    """
    name = str(name)
    family, _, where = name.partition(":")
    if spec := REGISTRY.get(name):
        model, _ = _read_transformers(name, spec.family, spec.hub_id, dtype)
    elif family in FAMILIES:
        model, folder = _read_transformers(name, family, where, dtype)
        spec = _spec(name, family, where, folder, model.config)
    else:
        try:
            find_folder(name)
        except UserError as error:
            raise UserError(
                f"encoder {error}. Registered: {', '.join(sorted(REGISTRY))}. Others of a family are FAMILY:WHERE, "
                f"WHERE a folder or OWNER/NAME on the Hub, FAMILY {', '.join(FAMILIES)}"
            ) from None
        found = artifacts.find(name, "encoder")
        path, config = found.path, from_dict(ViTConfig, found.config, found.path / "config.json")
        state = artifacts.read(path)
        check_fit(lambda: ViT(config), state, path)
        model, spec = ViT(config), config.spec
        load_strict(model, state, path)
        model.to(dtype)
    return Encoder(name, spec, model, input_size, layers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and the loading bar of `transformers`. Downloads still show their progress."""
    from transformers import logging

    verbosity, bar, silent = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()  # also switches off the bars of downloads
    if not silent:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@_quiet()  # the faults that it would print are checked below
def _read_transformers(name: str, family: str, where: str, dtype: torch.dtype) -> tuple[Any, Path]:
    """Return the `transformers` model in the folder or Hub repository `where`, and its local folder.

    Raises:
        UserError: the model is missing, incomplete or of another type.
    """
    import transformers  # slow to import, and not needed for encoders that raekit pretrained

    kind = FAMILIES[family]
    model_class = getattr(transformers, kind.model_class)
    advice = how_to_fetch(where, f"encoder {name}")
    folder = Path(where) if Path(where).is_dir() else _download(name, where)
    try:
        path = folder / "config.json"
        values = json.loads(path.read_text("utf-8")) if path.is_file() else None
        if not isinstance(values, dict) or not values:
            raise OSError("no config.json, or an empty one")
        if (found := values.get("model_type")) not in (family, kind.tower_type):
            raise UserError(f"encoder {name}: {where} holds a model of type {found!r}, not {family!r}")
        values = values.get("vision_config", values) | kind.config
        if not 0 < values.get("num_hidden_layers", 1) <= MAX_DEPTH:
            raise ValueError(f"num_hidden_layers: {values['num_hidden_layers']} in config.json")
        # Only the fields that describe the architecture: others name code, kernels or a quantization to load.
        own = {field.name for field in fields(model_class.config_class)} - {
            field.name for field in fields(transformers.PretrainedConfig)
        }
        config = model_class.config_class.from_dict({key: value for key, value in values.items() if key in own})
        _check_size(model_class, config, kind, folder)
        model, found = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
            **kind.arguments,
        )
    except UserError:
        raise
    except Exception as error:  # damaged or missing files raise many types
        raise UserError(f"encoder {name}: {where} could not be loaded ({_reason(error)}); {advice}") from error
    if missing := sorted(found["missing_keys"]):  # transformers fills missing weights with random numbers
        raise UserError(f"encoder {name}: {where} lacks {', '.join(missing[:8])}; {advice}")
    return model, folder


def _download(name: str, where: str) -> Path:
    """Download what `transformers` reads of the repository `where`, and return the local folder."""
    try:
        folder = download(where, ["config.json", "preprocessor_config.json", "model*.safetensors*"])
        if not any(folder.glob("model*.safetensors")):
            folder = download(where, ["pytorch_model*.bin*"])
    except UserError as error:
        raise UserError(f"encoder {name}: {error}") from None
    return folder


def _check_size(model_class: Any, config: Any, kind: Family, folder: Path) -> None:
    """Check that the weights files are large enough for the model of `config`.

    `transformers` allocates a model of any size, and fills the weights that the files lack with random numbers.

    Raises:
        ValueError: the files are too small.
    """
    from transformers.initialization import no_init_weights

    files = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    with torch.device("meta"), no_init_weights():
        parameters = sum(p.numel() for p in model_class(config, **kind.arguments).parameters())
    held = sum(file.stat().st_size for file in files)
    if parameters > held + 2**24:  # a parameter takes at least one byte; small models get the names of what they lack
        raise ValueError(f"config.json describes {parameters:,} parameters, but the weights files have {held:,} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):
        return "its weights file is damaged or holds more than tensors"
    if "ignore_mismatched_sizes" in str(error):
        return "its tensors do not have the shapes of its config.json"
    return f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0][:200]}"


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
