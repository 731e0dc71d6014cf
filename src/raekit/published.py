"""The formats of the official RAE releases and of diffusers (spec 1.3, 7.1 to 7.5, II.2), as pure mappings.

Each function turns names, shapes or layouts into ours, or back, and passes on what it does not know, so that
a strict comparison names whatever is left over. Nothing here touches a file or builds a network:
`raekit.conversion` does.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from raekit.config import configclass, from_dict
from raekit.errors import UserError
from raekit.flow.path import Prediction, shift_factor
from raekit.models.autoencoder import VARIANCE_EPS
from raekit.models.decoder import DecoderConfig
from raekit.models.denoiser import ContextConfig, DenoiserConfig, TransformerConfig
from raekit.models.layers import rotary_table, sincos_positions

State = Mapping[str, Tensor]

# Tables are computed in float32 by some versions and may have passed through bfloat16; another grid, base
# of the frequencies or order of the axes is off by about one.
TABLE_TOLERANCE = 5e-3


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint: `ema` if there is one, else `model`, else the checkpoint itself.

    Prefixes that wrappers leave behind (`module.`, `_orig_mod.`) are removed. UserError if it is none.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        state = next((checkpoint[key] for key in ("ema", "model") if isinstance(checkpoint.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not state:
        raise UserError("checkpoint: holds no state dict, neither bare nor under `ema` or `model`")
    if foreign := sorted(str(key) for key, value in state.items() if not isinstance(value, Tensor)):
        raise UserError(f"checkpoint: no state dict, as these are no tensors: {', '.join(foreign[:8])}")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def statistics(values: Any, eps: float = VARIANCE_EPS) -> tuple[Tensor | None, Tensor]:
    """Mean (None: not subtracted) and variance, each (C, H, W), of a statistics file {"mean", "var"}.

    `eps` is what the publisher adds to the variance; where it is not ours the difference goes into the
    variance. UserError if a field is missing, foreign or of another shape.
    """
    if not isinstance(values, Mapping):
        raise UserError("statistics: must be a dictionary of mean and var")
    mean, var = values.get("mean"), values.get("var")
    if unknown := sorted(values.keys() - {"mean", "var"}, key=str):
        raise UserError(f"statistics: unknown {', '.join(map(str, unknown))}; expected mean and var alone")
    if not isinstance(var, Tensor) or var.ndim != 3:
        raise UserError("statistics: var must be a tensor of shape (C, H, W)")
    if mean is not None and not (isinstance(mean, Tensor) and mean.shape == var.shape):
        raise UserError(f"statistics: mean must be None or a tensor of var's shape {tuple(var.shape)}")
    return (None if mean is None else mean.float()), var.float() + (eps - VARIANCE_EPS)


def decoder_config(values: Any, token_dim: int, grid: tuple[int, int], patch_size: int) -> DecoderConfig:
    """The decoder of a ViT-MAE style `config.json`, for tokens of `token_dim` channels on `grid`.

    As in the release, the file's own `hidden_size`, `image_size` and `patch_size` are not used.
    """
    if not isinstance(values, Mapping):
        raise UserError("decoder config: must be a dictionary")
    for field, built in (("hidden_act", "gelu"), ("qkv_bias", True), ("num_channels", 3)):
        if (value := values.get(field, built)) != built:
            raise UserError(f"decoder config: {field} = {value!r} is not supported, only {built!r}")
    ours = {
        "width": "decoder_hidden_size",
        "depth": "decoder_num_hidden_layers",
        "heads": "decoder_num_attention_heads",
        "hidden": "decoder_intermediate_size",
        "norm_eps": "layer_norm_eps",
    }
    if missing := [name for name in ours.values() if name not in values]:
        raise UserError(f"decoder config: {', '.join(missing)} missing")
    sizes = {field: values[name] for field, name in ours.items()}
    return from_dict(
        DecoderConfig, {"token_dim": token_dim, "grid": grid, "patch_size": patch_size, **sizes}, "decoder config"
    )


_DECODER = {
    "decoder_embed": "embed",
    "decoder_norm": "norm",
    "decoder_pred": "out",
}
_DECODER_BLOCK = {
    "attention.output.dense": "attention.out",
    "intermediate.dense": "mlp.0",
    "output.dense": "mlp.2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}


def decoder_state(state: State, config: DecoderConfig) -> dict[str, Tensor]:
    """Our Decoder's state dict from the published one. UserError if its position table is not ours."""
    positions = sincos_positions(config.width, config.grid)
    state = _without_tables(state, {"decoder_pos_embed": torch.cat([torch.zeros(1, config.width), positions])[None]})
    ours = {}
    for key, value in state.items():
        if key == "trainable_cls_token":
            ours["cls_token"] = value.flatten()
        elif match := re.fullmatch(r"decoder_layers\.(\d+)\.(.+)", key):
            ours[f"blocks.{match[1]}.{_rename(match[2], _DECODER_BLOCK)}"] = value
        else:
            ours[_rename(key, _DECODER)] = value
    for index in range(config.depth):
        prefix = f"blocks.{index}.attention"
        for kind in ("weight", "bias"):
            parts = [f"{prefix}.attention.{part}.{kind}" for part in ("query", "key", "value")]
            if all(part in ours for part in parts):
                ours[f"{prefix}.qkv.{kind}"] = torch.cat([ours.pop(part) for part in parts])
    return ours


DECODERS = {  # spec 1.5
    "ViT-B": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "ViT-L": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
    "ViT-XL": {"width": 1152, "depth": 28, "heads": 16, "hidden": 4096},
}


def decoder_part(state: State) -> dict[str, Tensor]:
    """The decoder in the state dict of a whole published autoencoder; another state dict as it is."""
    if not any(key.startswith("decoder.decoder_") for key in state):
        return dict(state)
    return {key.removeprefix("decoder."): value for key, value in state.items() if not key.startswith("encoder.")}


def decoder_sizes(state: State) -> dict[str, int]:
    """The sizes that the shapes in a published decoder tell: those of DECODERS but `heads`, `token_dim`,
    `patch_size`, and `tokens` if it has a position table. Empty if it is no decoder.
    """
    embed, out = state.get("decoder_embed.weight"), state.get("decoder_pred.weight")
    hidden = state.get("decoder_layers.0.intermediate.dense.weight")
    if embed is None or out is None or hidden is None or not embed.ndim == out.ndim == hidden.ndim == 2:
        return {}
    layers = {int(match[1]) for key in state if (match := re.match(r"decoder_layers\.(\d+)\.", key))}
    sizes = {"width": len(embed), "depth": len(layers), "hidden": len(hidden)}
    sizes |= {"token_dim": embed.shape[1], "patch_size": math.isqrt(len(out) // 3)}
    positions = state.get("decoder_pos_embed")
    return sizes | ({"tokens": positions.shape[1] - 1} if positions is not None and positions.ndim == 3 else {})


def guess(state: State) -> str:
    """What a state dict looks like, as the end of a sentence; empty if it is like nothing that we know."""
    state = decoder_part(state)
    for key, kind in _KINDS.items():
        if key in state:
            return kind
    if not (sizes := decoder_sizes(state)):
        return ""
    named = (name for name, size in DECODERS.items() if all(sizes.get(k, v) == v for k, v in size.items()))
    size = next(named, f"width-{sizes['width']}, {sizes['depth']}-layer")
    tokens = f", {sizes['tokens']} tokens" if "tokens" in sizes else ""
    return f"a {size} decoder for {sizes['token_dim']} channels{tokens}, patches of {sizes['patch_size']} pixels"


_KINDS = {
    "decoder_layers.0.attention.to_q.weight": "the weights of diffusers' AutoencoderRAE: give their folder",
    "x_embedder.proj.weight": "a denoiser, of stage 2",
    "blocks.0.attention.qkv.weight": "weights of raekit: give their folder",
    "blocks.0.attn.qkv.weight": "a vision transformer, as the discriminator's",
    "embeddings.cls_token": "an encoder",
    "var": "latent statistics",
}


def published_decoder_state(ours: State, config: DecoderConfig) -> dict[str, Tensor]:
    """The published state dict from our Decoder's: the inverse of `decoder_state`."""
    positions = sincos_positions(config.width, config.grid)
    state = {"decoder_pos_embed": torch.cat([torch.zeros(1, config.width), positions])[None]}
    names = {ours: theirs for theirs, ours in _DECODER.items()}
    block_names = {ours: theirs for theirs, ours in _DECODER_BLOCK.items()}
    for key, value in ours.items():
        if key == "cls_token":
            state["trainable_cls_token"] = value[None, None]
        elif match := re.fullmatch(r"blocks\.(\d+)\.attention\.qkv\.(weight|bias)", key):
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"decoder_layers.{match[1]}.attention.attention.{part}.{match[2]}"] = rows
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            state[f"decoder_layers.{match[1]}.{_rename(match[2], block_names)}"] = value
        else:
            state[_rename(key, names)] = value
    return state


def published_decoder_config(config: DecoderConfig) -> dict[str, Any]:
    """The ViT-MAE style `config.json` of a decoder: the inverse of `decoder_config`."""
    return {
        "model_type": "vit_mae",
        "decoder_hidden_size": config.width,
        "decoder_num_hidden_layers": config.depth,
        "decoder_num_attention_heads": config.heads,
        "decoder_intermediate_size": config.hidden,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "num_channels": 3,
        "hidden_size": config.token_dim,
        "patch_size": config.patch_size,
        "image_size": config.patch_size * config.grid[0],
    }


def encoder_colours(ours: State, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Our Decoder's state dict for one that gives pixels, made to give colours normalised by `mean` and `std`.

    Both are linear in the last layer, so nothing is lost. Other formats know only such decoders.
    """
    weight, bias = ours["out.weight"], ours["out.bias"]
    rows = len(bias) // 3  # a patch has its pixels one after the other, each with three channels
    scale, shift = std.flatten().to(bias).repeat(rows), mean.flatten().to(bias).repeat(rows)
    return {**ours, "out.weight": weight / scale[:, None], "out.bias": (bias - shift) / scale}


EncoderClass = Literal["Dinov2withNorm", "SigLIP2wNorm", "MAEwNorm"]


@configclass
class PublishedEncoder:
    """`encoder_params` of a YAML: one of the two paths is the encoder's. Without `normalize` we have no latents."""

    dinov2_path: str | None = None
    model_name: str | None = None
    normalize: Literal[True] = True


@configclass
class PublishedAutoencoder:
    """`stage_1.params` of a YAML (spec 7.5), with the published defaults. `noise_tau` belongs to training."""

    encoder_cls: EncoderClass = "Dinov2withNorm"
    encoder_config_path: str | None = None
    encoder_input_size: int = 224
    encoder_params: PublishedEncoder = PublishedEncoder()
    decoder_config_path: str
    decoder_patch_size: int = 16
    pretrained_decoder_path: str | None = None
    noise_tau: float = 0.0
    reshape_to_2d: Literal[True] = True
    normalization_stat_path: str | None = None
    eps: float = VARIANCE_EPS

    @property
    def encoder_path(self) -> str | None:
        return self.encoder_params.dinov2_path or self.encoder_params.model_name or self.encoder_config_path


@configclass
class PublishedStage1:
    """`stage_1` of a YAML. `ckpt`, of a whole autoencoder, goes before the decoder's own file."""

    target: str
    params: PublishedAutoencoder
    ckpt: str | None = None


YAML_SECTIONS = ("stage_1", "stage_2", "transport", "sampler", "guidance", "misc", "training", "eval", "gan")

ENCODER_CLASSES: dict[EncoderClass, str] = {
    "Dinov2withNorm": "dinov2_with_registers",
    "SigLIP2wNorm": "siglip",
    "MAEwNorm": "vit_mae",
}
"""The published classes of encoders, with our family of each."""


def published_autoencoder(values: Any, source: str | Path) -> tuple[PublishedAutoencoder, str | None]:
    """The autoencoder that a published YAML describes, and the file of its decoder, if it names one.

    The other sections are not read, but must be known. UserError names what is unknown or missing.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("stage_1"), Mapping):
        raise UserError(f"{source}: no published configuration, as it has no section stage_1")
    if unknown := sorted(str(key) for key in values.keys() - set(YAML_SECTIONS)):
        raise UserError(f"{source}: unknown {', '.join(unknown)}; expected {', '.join(YAML_SECTIONS)}")
    stage = from_dict(PublishedStage1, values["stage_1"], f"{source}: stage_1")
    if stage.target.rsplit(".", 1)[-1] != "RAE":
        raise UserError(f"{source}: stage_1.target = {stage.target} is not supported, only stage1.RAE")
    return stage.params, stage.ckpt or stage.params.pretrained_decoder_path


DIFFUSERS_EPS = 1e-5
DIFFUSERS_GRID = (16, 16)
"""The only token grid on which diffusers (0.42.1) has the published positions: it spreads them over this one."""

DiffusersEncoder = Literal["dinov2", "siglip2", "mae"]
DIFFUSERS_ENCODERS: dict[DiffusersEncoder, tuple[str, int]] = {
    "dinov2": ("dinov2_with_registers", 518),
    "siglip2": ("siglip", 256),
    "mae": ("vit_mae", 224),
}
"""The `encoder_type` of diffusers' AutoencoderRAE, with our family and its size of pretraining."""


@configclass
class DiffusersAutoencoder:
    """The arguments of diffusers' AutoencoderRAE, with its defaults.

    The statistics are read from the weights, where they stand as well; noise and loss belong to training.
    """

    encoder_type: DiffusersEncoder = "dinov2"
    encoder_hidden_size: int = 768
    encoder_patch_size: int = 14
    encoder_num_hidden_layers: int = 12
    encoder_input_size: int = 224
    encoder_norm_mean: tuple[float, float, float] | None = None
    encoder_norm_std: tuple[float, float, float] | None = None
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    patch_size: int = 16
    image_size: int | None = None
    num_channels: Literal[3] = 3
    latents_mean: Any = None
    latents_std: Any = None
    scaling_factor: float = 1.0
    reshape_to_2d: Literal[True] = True
    noise_tau: float = 0.0
    use_encoder_loss: bool = False

    def __post_init__(self) -> None:
        if self.encoder_hidden_size % 64:
            raise UserError(f"encoder_hidden_size: {self.encoder_hidden_size} is no multiple of a head's 64 channels")
        if self.encoder_input_size % self.encoder_patch_size:
            raise UserError(
                f"encoder_input_size: {self.encoder_input_size} is no multiple of encoder_patch_size = "
                f"{self.encoder_patch_size}"
            )
        if self.image_size not in (None, self.patch_size * self.grid[0]):
            raise UserError(f"image_size: {self.image_size} is not the {self.grid[0]} patches of patch_size")
        if self.scaling_factor <= 0:
            raise UserError(f"scaling_factor: {self.scaling_factor} must be positive")

    @property
    def grid(self) -> tuple[int, int]:
        side = self.encoder_input_size // self.encoder_patch_size
        return (side, side)

    @property
    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            token_dim=self.encoder_hidden_size,
            grid=self.grid,
            patch_size=self.patch_size,
            width=self.decoder_hidden_size,
            depth=self.decoder_num_hidden_layers,
            heads=self.decoder_num_attention_heads,
            hidden=self.decoder_intermediate_size,
        )


_DIFFUSERS_ATTENTION = {
    "to_q": "attention.query",
    "to_k": "attention.key",
    "to_v": "attention.value",
    "to_out.0": "output.dense",
}


def from_diffusers(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The state dict of an AutoencoderRAE as those of its decoder (under v1's names), its encoder, and the rest."""
    parts: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]] = ({}, {}, {})
    for key, value in state.items():
        if key.startswith("decoder."):
            if match := re.fullmatch(r"(decoder\.decoder_layers\.\d+\.attention\.)(.+)", key):
                key = match[1] + _rename(match[2], _DIFFUSERS_ATTENTION)
            parts[0][key.removeprefix("decoder.")] = value
        elif key.startswith("encoder."):
            parts[1][key.removeprefix("encoder.")] = value
        else:
            parts[2][key] = value
    return parts


def diffusers_decoder_state(published: State) -> dict[str, Tensor]:
    """The decoder's part of an AutoencoderRAE's state dict, from v1's, which has a position table as well."""
    names = {theirs: name for name, theirs in _DIFFUSERS_ATTENTION.items()}
    state = {}
    for key, value in published.items():
        if match := re.fullmatch(r"(decoder_layers\.\d+\.attention\.)(.+)", key):
            key = match[1] + _rename(match[2], names)
        if key != "decoder_pos_embed":
            state[f"decoder.{key}"] = value
    return state


def statistics_from_diffusers(
    mean: Tensor, std: Tensor, scale: float, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor]:
    """Our mean (None for its zeros) and variance, with which `whiten` gives the latents that diffusers gives.

    It divides by std + 1e-5, although its files hold sqrt(var + 1e-5) for std: its latents are smaller than v1's,
    by 0.01 % where the deviation is 0.1. UserError if the tensors do not expand to `shape`.
    """
    try:
        mean, std = mean.double().expand(shape), std.double().expand(shape)
    except RuntimeError:
        given = f"{tuple(mean.shape)} and {tuple(std.shape)}"
        raise UserError(f"_latents_mean and _latents_std are {given}, expected {shape}") from None
    var = ((std + DIFFUSERS_EPS) / scale).square() - VARIANCE_EPS
    return (mean.float().clone() if mean.any() else None), var.float()


def statistics_for_diffusers(mean: Tensor | None, var: Tensor) -> tuple[Tensor, Tensor]:
    """`_latents_mean` and `_latents_std` with which diffusers, for all its epsilon, gives our latents."""
    std = (var.double() + VARIANCE_EPS).sqrt() - DIFFUSERS_EPS
    return (torch.zeros(1) if mean is None else mean.float()), std.float()


@configclass
class PublishedDenoiser:
    """The arguments of the published networks (spec 7.5): pairs (backbone, head) for DiT^DH, numbers for DiT.

    `class_dropout_prob` belongs to training. `learn_sigma` and `use_gembed` have the one value that we build.
    Of `use_rope` False and a `patch_size` above 1 in a DiT^DH, and of `wo_shift`, the published code crashes
    (spec 8): there is no checkpoint to agree with, and ours are the obvious readings.
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
    """Our configuration of a published denoiser, from its arguments.

    The shift of time is the published default, that of the latent's dimension over 4096. A network narrower
    than the token dimension is read as it is. UserError names the fields that are unknown, and the switches
    that we do not build.
    """
    published = from_dict(PublishedDenoiser, dict(values), "published denoiser")
    return DenoiserConfig(
        **_sizes(published),
        mlp_ratio=published.mlp_ratio,
        norm="rms" if published.use_rmsnorm else "layer",
        mlp="swiglu" if published.use_swiglu else "gelu",
        positions=published.use_pos_embed,
        rotary=published.use_rope,
        qk_norm=published.use_qknorm,
        adaln_shift=not published.wo_shift,
    )


@configclass
class PublishedDenoiserV2:
    """The arguments of the denoiser of RAE v2 (spec II.3): pairs (backbone, head). It has no switches.

    The base output stands after `base_model_depth` blocks; the released one has 8.
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
    """Our configuration of a denoiser of RAE v2, from its arguments; as `denoiser_config` otherwise."""
    published = from_dict(PublishedDenoiserV2, dict(values), "published denoiser, version 2")
    return DenoiserConfig(
        **_sizes(published),
        mlp_ratio=published.mlp_ratio,
        qk_norm=True,
        positions=False,
        context=ContextConfig(time_tokens=published.num_t_tokens, label_tokens=published.num_c_tokens),
        base_depth=published.base_model_depth,
        prediction=prediction,
    )


def _sizes(published: PublishedDenoiser | PublishedDenoiserV2) -> dict[str, Any]:
    """The fields of a DenoiserConfig that are sizes."""
    wide = isinstance(published.hidden_size, tuple)
    if isinstance(published.depth, tuple) != wide:
        raise UserError("published denoiser: hidden_size and depth must both be pairs, or both numbers")
    widths, depths, heads, patches = map(
        _pair, (published.hidden_size, published.depth, published.num_heads, published.patch_size)
    )
    if patches[0] != patches[1]:
        raise UserError(f"published denoiser: patch_size = {published.patch_size} is not supported, only two equal")
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
# Projections that version 2 keeps apart, and version 1 and we as one.
_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.w1", "mlp.w2")}


def denoiser_state(state: State, config: DenoiserConfig) -> dict[str, Tensor]:
    """Our Denoiser's state dict from the published one of a DiT, a DiT^DH, or the denoiser of RAE v2.

    UserError if its position or rotary tables are not ours. A network trained without class dropout has no
    null class: its row of the label table becomes zero.
    """
    ours = {}
    names = _DENOISER | (_DIT_DH if config.head else _DIT) | (_DENOISER_V2 if config.context else {})
    for key, value in _fused(_without_tables(state, _denoiser_tables(config))).items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if not match:
            value = _patch_matrix(value) if key.endswith("_embedder.proj.weight") else value
            if key.endswith("_embedder.embedding_table.weight") and len(value) == config.num_classes:
                value = torch.cat([value, torch.zeros_like(value[:1])])
            ours[_rename(key, names)] = value
            continue
        index, name = int(match[1]), match[2]
        part, prefix = config.backbone, f"blocks.{index}"
        if config.head and index >= part.depth:
            part, prefix = config.head, f"head_blocks.{index - config.backbone.depth}"
        if name.startswith("attn.qkv."):
            value = torch.cat([*(_halves(x, part) for x in value.chunk(3)[:2]), *value.chunk(3)[2:]])
        elif name.startswith(("attn.q_norm.", "attn.k_norm.")):
            value = _halves(value, part)
        ours[f"{prefix}.{_rename(name, _DENOISER_BLOCK)}"] = value
    return ours


def _denoiser_tables(config: DenoiserConfig) -> dict[str, Tensor]:
    """The fixed tables under their published names and in their published layout."""
    tables = {}
    if config.positions:
        tables["pos_embed"] = sincos_positions(config.backbone.width, config.token_grid)[None]
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


def _fused(state: State) -> dict[str, Tensor]:
    """`state` with the projections of `_FUSED` put together; one that lacks a part is left for `load_strict`."""
    ours = dict(state)
    for key in state:
        for whole, (first, *others) in _FUSED.items():
            prefix, found, kind = key.partition(f".{first}.")
            parts = [f"{prefix}.{part}.{kind}" for part in (first, *others)]
            if found and all(part in ours for part in parts):
                ours[f"{prefix}.{whole}.{kind}"] = torch.cat([ours.pop(part) for part in parts])
    return ours


def _without_tables(state: State, tables: State) -> dict[str, Tensor]:
    """`state` without the fixed tables, which have to be equal to `tables` where they are given."""
    for key in tables.keys() & state.keys():
        given, table = state[key].float(), tables[key]
        if given.shape != table.shape:
            raise UserError(f"{key}: is {tuple(given.shape)}, expected {tuple(table.shape)} for the configured grid")
        if not torch.allclose(given, table, rtol=0, atol=TABLE_TOLERANCE):
            raise UserError(f"{key}: not the fixed sine-cosine table of spec 2.3; learned positions are not supported")
    return {key: value for key, value in state.items() if key not in tables}


def _rename(key: str, names: Mapping[str, str]) -> str:
    """`key` with the beginning that `names` lists replaced; another key stays as it is."""
    for theirs, ours in names.items():
        if key == theirs or key.startswith(theirs + "."):
            return ours + key.removeprefix(theirs)
    return key


def _patch_matrix(kernel: Tensor) -> Tensor:
    """A patch embedding's convolution (d, C, p, p) as a matrix (d, p*p*C) over `layers.patchify`'s order."""
    return kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel


def _halves(rows: Tensor, part: TransformerConfig) -> Tensor:
    """Reorder each head's rows from interleaved rotary pairs (0 1) (2 3) .. to halves (0 2 ..) (1 3 ..).

    Rows that do not divide into heads are left for `load_strict` to report.
    """
    pairs = part.width // part.heads // 2
    return rows if len(rows) % (2 * pairs) else rows.unflatten(0, (-1, pairs, 2)).transpose(1, 2).flatten(0, 2)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


_DISCRIMINATOR = {
    "0.0": "first.0",
    "0.1": "first.1",
    "1.fn.0": "residual.0",
    "1.fn.1": "residual.1",
    "2": "out",
}
_SPECTRAL = {"weight_orig": "weight", "weight_u": "u", "weight_v": "v"}


def discriminator_state(state: State) -> dict[str, Tensor]:
    """Our Discriminator's state dict from the published one, which is that of its heads too (without `heads.`)."""
    ours = {}
    for key, value in state.items():
        head, _, rest = key.removeprefix("heads.").partition(".")
        layer, _, tensor = _rename(rest, _DISCRIMINATOR).rpartition(".")
        ours[f"heads.{head}.{layer}.{_SPECTRAL.get(tensor, tensor)}"] = value
    return ours
