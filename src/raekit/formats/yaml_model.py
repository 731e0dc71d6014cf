"""The schema of published YAML files of RAE v1 (RAE v1's code) and v2: the sections that describe a model.

Training sections are accepted and ignored. In all other sections, an unknown field or an unsupported value is a
UserError that names the field. `yaml_sampling` holds the sections that describe sampling.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from raekit.config import configclass, from_dict, to_dict
from raekit.errors import UserError
from raekit.flow.path import SHIFT_BASE, Prediction
from raekit.formats.denoiser_keys import denoiser_config, denoiser_v2_config
from raekit.models.denoiser_config import DenoiserConfig
from raekit.models.registry import REGISTRY, LayersConfig
from raekit.weights import VARIANCE_EPS

YAML_SECTIONS = (
    "stage_1",
    "stage_2",
    "transport",
    "sampler",
    "guidance",
    "misc",
    "training",
    "eval",
    "gan",
    "conditioning",
    "dataset",
)


def check_sections(values: Any, source: str | Path) -> Mapping[str, Any]:
    """Return the contents of a YAML unchanged, after checking that they have the sections of a published YAML.

    Args:
        values: the contents of the file.
        source: the file's name for error messages.

    Raises:
        UserError: there is no section `stage_1`, or a section is unknown.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("stage_1"), Mapping):
        raise UserError(f"{source}: not a published YAML, because it has no section stage_1")
    if unknown := sorted(str(key) for key in values.keys() - set(YAML_SECTIONS)):
        raise UserError(f"{source}: unknown section {', '.join(unknown)}; expected {', '.join(YAML_SECTIONS)}")
    return values


# Stage 1.

EncoderClass = Literal["Dinov2withNorm", "SigLIP2wNorm", "MAEwNorm"]
ENCODER_CLASSES: dict[EncoderClass, str] = {
    "Dinov2withNorm": "dinov2_with_registers",
    "SigLIP2wNorm": "siglip",
    "MAEwNorm": "vit_mae",
}
"""raekit's family for each published encoder class."""


@configclass
class PublishedEncoder:
    """`encoder_params` of a v1 YAML. One of the two paths names the encoder. raekit supports only `normalize: true`."""

    dinov2_path: str | None = None
    model_name: str | None = None
    normalize: Literal[True] = True


@configclass
class PublishedAutoencoder:
    """`stage_1.params` of a v1 YAML (RAE v1's code), with the published defaults. `noise_tau` only affects training."""

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

    def fields(self) -> dict[str, Any]:
        """Return the AutoencoderConfig fields, except `decoder`."""
        path = self.encoder_params.dinov2_path or self.encoder_params.model_name or self.encoder_config_path
        if path is None:
            raise UserError("names no encoder; set stage_1.params.encoder_params or encoder_config_path")
        family = ENCODER_CLASSES[self.encoder_cls]
        names = [name for name, spec in REGISTRY.items() if (spec.family, spec.hub_id) == (family, path)]
        return {"encoder": names[0] if names else f"{family}:{path}", "encoder_size": self.encoder_input_size}


@configclass
class PublishedAutoencoderV2:
    """`stage_1.params` of a v2 YAML, with the published defaults. `encoder_name` names the encoder and its layers."""

    encoder_name: str
    resolution: int = 256
    decoder_config_path: str
    decoder_patch_size: int = 16
    pretrained_decoder_path: str | None = None
    noise_tau: float = 0.0
    normalization_stat_path: str | None = None
    eps: float = VARIANCE_EPS

    def fields(self) -> dict[str, Any]:
        """Return the AutoencoderConfig fields, except `decoder`."""
        match = re.fullmatch(r"dinov3(mls)?-vit-([sbl])16(?:\[layers=(\d+(?:\.\d+)*)\])?", self.encoder_name)
        if not match or bool(match[1]) != bool(match[3]):
            raise UserError(
                f"stage_1.params.encoder_name = {self.encoder_name} is not supported, only dinov3-vit-l16, -b16, "
                "-s16, and dinov3mls-vit-l16[layers=11.13]"
            )
        layers = LayersConfig()
        if match[3]:
            layers = LayersConfig(blocks=tuple(map(int, match[3].split("."))), token_mean=True)
        return {
            "encoder": f"dinov3-{match[2]}",
            "encoder_size": self.resolution,
            "layers": to_dict(layers),
            "output": "pixels",
        }


@configclass
class PublishedStage1:
    """`stage_1` of a v1 YAML. `ckpt` is a complete autoencoder, and overrides `params.pretrained_decoder_path`."""

    target: str
    params: PublishedAutoencoder
    ckpt: str | None = None


@configclass
class PublishedStage1V2:
    """`stage_1` of a v2 YAML. `ckpt` is as in v1."""

    target: str
    params: PublishedAutoencoderV2
    ckpt: str | None = None


def published_autoencoder(
    values: Mapping[str, Any], source: str | Path
) -> tuple[PublishedAutoencoder | PublishedAutoencoderV2, str]:
    """Return the autoencoder that a published YAML describes, and the path of its decoder's file.

    Args:
        values: the contents of the YAML.
        source: the file's name for error messages.

    Raises:
        UserError: a field is unknown, missing or not supported.
    """
    section = values["stage_1"]
    params = section.get("params")
    second = isinstance(params, Mapping) and "encoder_name" in params
    stage = from_dict(PublishedStage1V2 if second else PublishedStage1, section, f"{source}: stage_1")
    if class_name(stage.target) != "RAE":
        raise UserError(f"{source}: stage_1.target = {stage.target} is not supported, only stage1.RAE")
    if not (decoder := stage.ckpt or stage.params.pretrained_decoder_path):
        raise UserError(f"{source}: names no decoder; set stage_1.params.pretrained_decoder_path or stage_1.ckpt")
    return stage.params, decoder


# Stage 2.


@configclass
class PublishedStage2:
    """`stage_2` or `guidance.guidance_model` of a YAML: a denoiser."""

    target: str
    params: dict[str, Any]
    ckpt: str | None = None


@configclass
class PublishedTransport:
    """`transport` of a v2 YAML, or `transport.params` of a v1 YAML. `time_dist_type` only affects training."""

    path_type: Literal["Linear"] = "Linear"
    prediction: Literal["velocity", "x"] = "velocity"
    loss_weight: None = None
    time_dist_type: str = "uniform"


@configclass
class PublishedMisc:
    """`misc` of a YAML.

    The time shift is sqrt(`time_dist_shift_dim` / `time_dist_shift_base`). By default, the dimension is the number
    of values in a latent.
    """

    latent_size: tuple[int, int, int] | None = None
    num_classes: int | None = None
    null_label: int | None = None
    time_dist_shift_dim: int | None = None
    time_dist_shift_base: int = SHIFT_BASE


@configclass
class PublishedContext:
    """`conditioning.arch` of a v2 YAML."""

    num_t_tokens: int = 4
    num_c_tokens: int = 8


@configclass
class PublishedConditioning:
    """`conditioning` of a v2 YAML. `cfg_dropout_prob` only affects training."""

    type: Literal["label"] = "label"
    cfg_dropout_prob: float = 0.1
    arch: PublishedContext = PublishedContext()


VERSIONS = {"DiTwDDTHead": 1, "LightningDiT": 1, "DiTwDDTHeadIG": 2}
"""The RAE version of each published denoiser class."""


def published_denoiser(values: Mapping[str, Any], source: str | Path) -> tuple[DenoiserConfig, str | None] | None:
    """Return the denoiser that a published YAML describes, and its file (None if the YAML names none).

    Without a section `stage_2`, return None. The arguments are as for `published_autoencoder`.
    """
    if values.get("stage_2") is None:
        return None
    return described_denoiser(values, values["stage_2"], f"{source}: stage_2", source)


def described_denoiser(
    values: Mapping[str, Any], section: Any, where: str, source: str | Path
) -> tuple[DenoiserConfig, str | None]:
    """Return the denoiser that one section of a published YAML describes, and its file (None if it names none).

    Args:
        values: the contents of the YAML. The sections `transport`, `misc` and `conditioning` apply too.
        section: the contents of `stage_2`, or of `guidance.guidance_model`.
        where: the section's name for error messages.
        source: the file's name for error messages.

    Raises:
        UserError: a field is unknown or not supported, or two sections contradict each other.
    """
    stage = from_dict(PublishedStage2, section, where)
    if not (version := VERSIONS.get(class_name(stage.target))):
        raise UserError(f"{where}: target = {stage.target} is not supported, only {', '.join(VERSIONS)}")
    misc = from_dict(PublishedMisc, values.get("misc") or {}, f"{source}: misc")
    given: Any = values.get("transport") or {}
    if version == 1 and isinstance(given, Mapping):
        given = given["params"] if given.keys() == {"params"} else given
    transport = from_dict(PublishedTransport, given or {}, f"{source}: transport")
    try:
        if version == 1:
            if transport.prediction != "velocity":
                raise UserError(
                    f"{class_name(stage.target)} with transport.prediction = x is not supported, only velocity"
                )
            config = denoiser_config(stage.params)
        else:
            context = from_dict(PublishedConditioning, values.get("conditioning") or {}, f"{source}: conditioning").arch
            prediction: Prediction = "data" if transport.prediction == "x" else "velocity"
            classes = 1000 if misc.num_classes is None else misc.num_classes
            config = denoiser_v2_config({"num_classes": classes, **vars(context), **stage.params}, prediction)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for name, ours in (("latent_size", config.latent_shape), ("num_classes", config.num_classes)):
        if (theirs := getattr(misc, name)) not in (None, ours):
            raise UserError(f"{source}: misc.{name} = {theirs}, but the denoiser of {where} has {ours}")
    if misc.null_label not in (None, config.num_classes):
        raise UserError(f"{source}: misc.null_label = {misc.null_label} is not supported, only {config.num_classes}")
    dimension = math.prod(config.latent_shape) if misc.time_dist_shift_dim is None else misc.time_dist_shift_dim
    if min(misc.time_dist_shift_base, dimension) < 1:
        raise UserError(f"{source}: misc.time_dist_shift_dim and time_dist_shift_base must be positive")
    return replace(config, shift=math.sqrt(dimension / misc.time_dist_shift_base)), stage.ckpt


def class_name(target: str) -> str:
    """Return the class name at the end of a dotted path."""
    return target.rsplit(".", 1)[-1]
