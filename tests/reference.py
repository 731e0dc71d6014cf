"""Compare the library with reference cases of the published implementations.

    python -m tests.reference FILE.npz [...]

prints, for each output of each case, the relative error ||ours - theirs|| / ||theirs||, and `ok` or `FAIL`.
The exit status is the number of failures (at most 255).

A case is a file with a configuration (`config`, JSON), inputs and expected outputs. It contains no weights: they are
computed from the published name of each parameter. A case therefore checks the reading of published formats
(`raekit.formats`) as well as the arithmetic. An entry of the file that no check uses counts as a failure.
"""

import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import FeatureNetwork, Images
from raekit.evaluation.frechet import frechet_distance
from raekit.evaluation.manifold import Manifold, PrecisionRecall
from raekit.evaluation.metrics import InceptionScore
from raekit.flow.guidance import Guidance, Method, Predict, guided
from raekit.flow.path import DATA_PREDICTION_FLOOR, shift_factor, to_velocity
from raekit.flow.solvers import euler, time_grid
from raekit.formats.decoder_keys import decoder_config, decoder_state, statistics
from raekit.formats.denoiser_keys import denoiser_config, denoiser_state, denoiser_v2_config
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    dino,
    discriminator_loss,
    generator_loss,
)
from raekit.models.encoders import Encoder
from raekit.models.inception import LOGITS, POOL, SPATIAL, Inception, inception_state
from raekit.models.layers import to_grid
from raekit.models.perceptual import LPIPS, perceptual_state
from raekit.models.registry import FAMILIES, EncoderSpec, LayersConfig, sides
from raekit.moments import Moments
from raekit.training.optim import OptimConfig, learning_rate
from raekit.weights import load_strict
from tests.discriminator_keys import discriminator_state

TOLERANCE = 1e-5
TOLERANCES = {"ode_sample": 1e-4, "fid_A_B": 1e-6, "precision": 0, "recall": 0}

# raekit's family for each published encoder class.
ENCODERS = {"Dinov2withNorm": "dinov2_with_registers", "SigLIP2wNorm": "siglip", "MAEwNorm": "vit_mae"}

NORMS: dict[str, Literal["instance", "group"]] = {"bn": "instance", "gn": "group"}
DINO_SIZES = {192: "T", 384: "S", 768: "B"}


def fill_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of a parameter: normal numbers from a PCG64 seeded with the CRC-32 of its name.

    With two or more dimensions, the numbers are divided by sqrt(fan-in); the fan-in is the product of all dimensions
    except the first. With fewer, they have standard deviation 0.1, and mean 1 if the name ends in "weight", else 0.
    """
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    normals = rng.standard_normal(math.prod(shape), dtype=np.float32).reshape(shape)
    if len(shape) > 1:
        return normals / np.float32(math.sqrt(max(math.prod(shape[1:]), 1)))
    return np.float32(name.endswith("weight")) + np.float32(0.1) * normals


def fixed_table(
    name: str, shape: tuple[int, ...], grid: tuple[int, int] | None = None, context: int = 0
) -> np.ndarray | None:
    """Return the values of a position or rotary table in a published state dict. None for any other parameter.

    This is a second implementation of these tables, independent of `raekit.models.layers`.

    Args:
        name: the published name.
        shape: the table's shape.
        grid: the rows and columns of image tokens. Default: a square.
        context: the number of tokens that follow the image tokens in the backbone of RAE v2. They are not rotated.
    """
    kind = name.rsplit(".", 1)[-1]
    if kind not in ("pos_embed", "decoder_pos_embed", "freqs_cos", "freqs_sin"):
        return None
    tokens, width = shape[-2:]
    trailing = context if name.startswith("enc_rope") else 0
    tokens -= trailing
    height, side = grid or (math.isqrt(tokens), math.isqrt(tokens))
    leading = tokens - height * side  # the class token has a row of zeros
    row, column = np.divmod(np.arange(tokens - leading), side)
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    if kind.startswith("freqs"):
        angles = np.concatenate([np.outer(row, frequency), np.outer(column, frequency)], 1).repeat(2, 1)
        angles = np.concatenate([angles, np.zeros((trailing, width))])
        return (np.cos if kind == "freqs_cos" else np.sin)(angles).astype(np.float32)
    x, y = np.outer(column, frequency), np.outer(row, frequency)
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)
    return np.concatenate([np.zeros((leading, width)), table])[None].astype(np.float32)


def state_dict(
    shapes: Mapping[str, list[int]],
    grid: tuple[int, int] | None = None,
    *,
    context: int = 0,
    fixed_tables: bool = True,
) -> dict[str, Tensor]:
    """Return a published state dict for the names and shapes that a case lists."""
    state = {}
    for name, shape in shapes.items():
        table = fixed_table(name, tuple(shape), grid, context) if fixed_tables else None
        values = torch.from_numpy(fill_array(name, tuple(shape)) if table is None else table)
        state[name] = values.to(torch.get_default_device())
    return state


class Case:
    """The configuration and arrays of a file. `unused` holds the names that have not been read."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self.config: dict[str, Any] = json.loads(str(data["config"]))
            self.arrays = {name: data[name] for name in data.files if name != "config"}
        self.unused = {*self.config, *self.arrays}

    def field(self, name: str) -> Any:
        self.unused.discard(name)
        if name not in self.config:
            raise UserError(f"no field {name} in config")
        return self.config[name]

    def optional(self, name: str, default: Any) -> Any:
        return self.field(name) if name in self.config else default

    def rest(self) -> dict[str, Any]:
        """Return all fields that have not been read."""
        names = self.config.keys() & self.unused
        self.unused -= names
        return {name: self.config[name] for name in self.config if name in names}

    def array(self, name: str) -> Tensor:
        self.unused.discard(name)
        if name not in self.arrays:
            raise UserError(f"no array {name}")
        return torch.from_numpy(np.asarray(self.arrays[name])).to(torch.get_default_device())

    def __contains__(self, name: str) -> bool:
        return name in self.arrays


Outputs = Iterator[tuple[str, Tensor]]


def denoiser(case: Case) -> Outputs:
    """Check DiT and DiT^DH. The outputs v, v_cfg and ode_sample are optional."""
    state = state_dict(case.field("shapes"))
    if "state_dict_keys" in case.config and set(case.field("state_dict_keys")) != state.keys():
        raise UserError("state_dict_keys differ from the names in shapes")
    config = denoiser_config(case.rest())
    model = Denoiser(config).eval()
    load_strict(model, denoiser_state(state, config), "reference case")
    if "v" in case:
        yield "v", model(case.array("x"), case.array("t"), case.array("y"))
    if "v_cfg" in case:
        yield "v_cfg", _guided(model, case)
    if "ode_sample" in case:
        z, labels = case.array("z"), case.array("y")
        alpha = shift_factor(config.latent_shape, int(case.array("shift_base").item()))
        if "shift" in case and abs(case.array("shift").item() - alpha) > 1e-6 * alpha:
            raise UserError(f"shift is {case.array('shift').item()}, but shift_base and the latent shape give {alpha}")
        times = time_grid(int(case.array("ode_num_steps").item()), alpha, "published")
        yield "ode_sample", euler(lambda x, t: model(x, torch.full((len(x),), t), labels), z, times)


def denoiser_v2(case: Case) -> Outputs:
    """Check the denoiser of RAE v2: the x-predictions of both outputs, and a sample with internal guidance."""
    if case.field("t_eps") != DATA_PREDICTION_FLOOR:
        raise UserError(f"t_eps is {case.config['t_eps']}, but raekit has {DATA_PREDICTION_FLOOR}")
    shapes = case.field("shapes")
    alpha = case.field("shift")
    settings = {name: case.field(name) for name in ("ig_scale", "ig_interval", "num_steps", "shift_base")}
    values = case.rest()
    state = state_dict(shapes, context=values.get("num_t_tokens", 4) + values.get("num_c_tokens", 8))
    config = denoiser_v2_config(values)
    if abs(shift_factor(config.latent_shape, settings["shift_base"]) - alpha) > 1e-6 * alpha:
        raise UserError(f"shift is {alpha}, but shift_base and the latent shape give another value")
    model = Denoiser(config).eval()
    load_strict(model, denoiser_state(state, config), "reference case")
    labels = case.array("y")
    full, base = model(case.array("x"), case.array("t"), labels, with_base=True)
    yield "full", full
    yield "base", base
    if "ode_sample" in case:
        rules = _rules("internal", settings["ig_scale"], settings["ig_interval"])
        times = time_grid(settings["num_steps"], alpha)
        yield "ode_sample", euler(guided(_predictions(model, labels), rules), case.array("z"), times)


def _rules(method: Method, scale: float, interval: Sequence[float]) -> list[Guidance]:
    """Return at most one rule. A scale of 1 means no guidance, and `Guidance` rejects it."""
    return [Guidance(method=method, scale=scale, start=interval[0], end=interval[1])] if scale != 1 else []


def _predictions(model: Denoiser, labels: Tensor) -> Predict:
    def predict(x: Tensor, t: float, methods: Collection[Method]) -> tuple[Tensor, dict[Method, Tensor]]:
        times = torch.full((len(x),), t)
        found: dict[Method, Tensor] = {}
        if "internal" in methods:
            full, found["internal"] = model(x, times, labels, with_base=True)
        else:
            full = model(x, times, labels)
        if "cfg" in methods:
            found["cfg"] = model(x, times)
        prediction = model.config.prediction
        return to_velocity(x, full, times, prediction), {
            name: to_velocity(x, output, times, prediction) for name, output in found.items()
        }

    return predict


def _guided(model: Denoiser, case: Case) -> Tensor:
    """Apply classifier-free guidance sample by sample, because `guided` takes one time for a batch."""
    interval = case.array("cfg_interval").tolist() if "cfg_interval" in case else (0.0, 1.0)
    rules = _rules("cfg", case.array("cfg_scale").item(), interval)
    rows = []
    for x, t, label in zip(case.array("x"), case.array("t"), case.array("y"), strict=True):
        rows.append(guided(_predictions(model, label[None]), rules)(x[None], t.item()))
    return torch.cat(rows)


def timegrid(case: Case) -> Outputs:
    alpha = shift_factor((case.field("dim"),), case.field("base"))
    yield "t", torch.tensor(time_grid(case.field("num_steps"), alpha, "published"))


def decoder(case: Case) -> Outputs:
    """Check the decoder. `grid` is the side of its position table. The latents may have another grid."""
    state = state_dict(case.field("shapes"))
    side = case.field("grid")
    config = DecoderConfig(
        token_dim=case.field("token_dim"),
        grid=(side, side),
        patch_size=case.field("patch"),
        width=case.field("decoder_hidden_size"),
        depth=case.field("layers"),
        heads=case.field("heads"),
        hidden=case.field("intermediate"),
        norm_eps=case.field("layer_norm_eps"),
    )
    model = Decoder(config).eval()
    load_strict(model, decoder_state(state, config), "reference case")
    yield "img", model(case.array("z"))


def rae(case: Case) -> Outputs:
    """Check the complete autoencoder: whitened latents, and the reconstruction without clamping."""
    encoder = _rae_encoder(case)
    state = state_dict(case.field("decoder_shapes"), encoder.grid)
    config = AutoencoderConfig(
        encoder=encoder.name,
        encoder_size=encoder.input_size,
        decoder=decoder_config(
            case.field("decoder"), encoder.spec.width, encoder.grid, case.field("decoder_patch_size")
        ),
    )
    model = Autoencoder(config, encoder).eval()
    load_strict(model.decoder, decoder_state(state, config.decoder), "reference case: decoder")
    model.set_statistics(*_statistics(case, model.latent_shape))
    z = model.encode(case.array("x"))
    yield "z", z
    if "rec" in case:
        yield "rec", model.to_pixels(model.decoder(model.unwhiten(z)))


def _rae_encoder(case: Case) -> Encoder:
    name = case.field("encoder")
    if name not in ENCODERS:
        raise UserError(f"encoder {name} is not one of {', '.join(ENCODERS)}")
    size = _size(case.field("encoder_input_size"))
    return _encoder(name, ENCODERS[name], case.field("encoder_config"), case.field("encoder_shapes"), size)


def _size(value: int | list[int]) -> tuple[int, int]:
    return sides(value if isinstance(value, int) else (value[0], value[1]))


def _encoder(
    name: str,
    family: str,
    values: dict[str, Any],
    shapes: Mapping[str, list[int]],
    size: tuple[int, int],
    layers: LayersConfig | None = None,
) -> Encoder:
    """Build an encoder with transformers, and fill it with weights for its parameter names."""
    import transformers

    kind = FAMILIES[family]
    model_class = getattr(transformers, kind.model_class)
    config = model_class.config_class(**values.get("vision_config", values) | kind.config)
    model = model_class(config, **kind.arguments)
    state = state_dict(shapes)
    for tower in ("vision_model.", "vit."):  # keep only the image tower of a complete model
        if any(key.startswith(tower) for key in state):
            state = {key.removeprefix(tower): value for key, value in state.items() if key.startswith(tower)}
    if "encoder.layer.0.attention.attention.query.weight" in model.state_dict():  # an older transformers
        state = {_older(key): value for key, value in state.items()}
    if family == "vit_mae":  # its positions are a fixed table, which the cases keep
        for key in [key for key in state if key.endswith("position_embeddings")]:
            table = fixed_table("pos_embed", tuple(state[key].shape))
            assert table is not None
            state[key] = torch.from_numpy(table)
    # A case may list pooling heads and a MAE's decoder, which nothing here uses.
    state = {key: value for key, value in state.items() if not key.startswith(("head.", "pooler.", "decoder."))}
    load_strict(model, state, "reference case: encoder")
    spec = EncoderSpec(
        family=family,
        width=config.hidden_size,
        patch_size=config.patch_size,
        image_size=size,
        prefix_tokens=kind.prefix_tokens + getattr(config, "num_register_tokens", 0),
        mean=kind.colours[0],
        std=kind.colours[1],
    )
    return Encoder(name, spec, model, layers=layers)


def _older(key: str) -> str:
    """Return the name that older releases of transformers give to a weight of DINOv2's attention."""
    names = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    return re.sub(r"attention\.([qkvo]_proj)", lambda match: f"attention.{names[match[1]]}", key)


def encoder_layers(case: Case) -> Outputs:
    """Check the latents of an encoder's last layer, and of several layers as RAE v2 combines them (RAE v2).

    RAE v2 adds the token mean for DINOv3. Images keep their size.
    """
    values, shapes, x = case.field("config"), case.field("shapes"), case.array("x")
    family = values["model_type"].removesuffix("_vision_model")
    if family not in FAMILIES:
        raise UserError(f"model_type {family} is not one of {', '.join(FAMILIES)}")
    choices: dict[str, LayersConfig | None] = {"z_last": None}
    if "layers" in case.config:
        blocks = tuple(case.field("layers"))
        choices["z_layers"] = LayersConfig(blocks=blocks, token_mean=family == "dinov3_vit")
    for output, layers in choices.items():
        if output in case:
            encoder = _encoder(family, family, values, shapes, (x.shape[2], x.shape[3]), layers)
            yield output, to_grid(encoder(x), encoder.grid)


def _statistics(case: Case, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
    """Return mean and variance. Without a mean nothing is subtracted. Without a variance it is one."""
    eps = case.field("eps") if "eps" in case.config else 1e-5
    values = {name: case.array(name) for name in ("mean", "var") if name in case}
    for name in {"mean", "var"} - values.keys():
        if name in case.config and case.field(name) is not None:
            raise UserError(f"{name} is in config and is not null")
    return statistics({"var": torch.ones(shape), **values}, eps if values else 0.0)


def lpips(case: Case) -> Outputs:
    """Check LPIPS on images in [-1, 1].

    The convolution weights are 1.4 times the values of `fill_array`. The heads have the released weights.
    """
    shapes = {key: list(value.shape) for key, value in LPIPS().features.state_dict(prefix="features.").items()}
    state = {key: value * (1.4 if key.endswith("weight") else 1) for key, value in state_dict(shapes).items()}
    model = LPIPS()
    load_strict(model, perceptual_state(state), "reference case")
    yield "value", model(*((case.array(name) + 1) / 2 for name in "ab"))


def disc(case: Case) -> Outputs:
    """Check the discriminator's logits for images in [-1, 1], in eval mode, with unit singular vectors."""
    # The backbone's positions are learned. The heads' weights depend on their names in the complete discriminator.
    backbone = dino(state_dict(case.field("dino_shapes"), fixed_tables=False), "reference case: DINO")
    shapes = {f"heads.{key.removeprefix('heads.')}": shape for key, shape in case.field("head_shapes").items()}
    recipe = f"{DINO_SIZES.get(backbone.width)}_{backbone.embed.kernel_size[0]}"
    if case.field("recipe") != recipe:
        raise UserError(f"recipe is {case.config['recipe']}, but dino_shapes belong to {recipe}")
    state = {key: _unit(key, value) for key, value in state_dict(shapes).items()}
    spectral = any(key.endswith("weight_orig") for key in state)
    if case.optional("using_spec_norm", spectral) != spectral:
        raise UserError("using_spec_norm contradicts head_shapes")
    if (norm := case.optional("norm_type", "bn")) not in NORMS:
        raise UserError(f"norm_type {norm} is not one of {', '.join(NORMS)}")
    config = DiscriminatorConfig(
        blocks=tuple(case.optional("key_depths", (2, 5, 8, 11))),
        kernel_size=case.field("kernel_size"),
        norm=NORMS[norm],
        spectral_norm=spectral,
    )
    model = Discriminator(config, backbone).to(torch.get_default_device()).eval()
    load_strict(model, discriminator_state(state), "reference case: heads")
    yield "logits", model((case.array("x") + 1) / 2)


def _unit(key: str, value: Tensor) -> Tensor:
    return value / value.norm() if key.endswith(("weight_u", "weight_v")) else value


def gan(case: Case) -> Outputs:
    """Check the adversarial losses for given logits."""
    real, fake = case.array("real"), case.array("fake")
    if "hinge_d" in case:
        yield "hinge_d", discriminator_loss(real, fake, "hinge")
    if "vanilla_d" in case:
        yield "vanilla_d", discriminator_loss(real, fake, "softplus")
    if "g" in case:
        yield "g", generator_loss(fake)


def lr(case: Case) -> Outputs:
    """Check the published learning rate schedules (RAE v1), with epochs converted to steps."""
    epoch, every = case.field("steps_per_epoch"), case.field("every")
    schedules = {
        "stage1": OptimConfig(warmup_steps=epoch, warmup_from_zero=True, decay="cosine", decay_end=16 * epoch),
        "stage2": OptimConfig(warmup_steps=40 * epoch, decay="linear", decay_end=800 * epoch),
    }
    for name, config in schedules.items():
        if name in case:
            steps = range(0, every * case.array(name).numel(), every)
            yield name, torch.tensor([learning_rate(config, step) for step in steps], dtype=torch.float64)


def inception_weights() -> dict[str, Tensor]:
    """Return weights for FID's network by published name.

    Kernels are 1.4 times the values of `fill_array`, and running variances are their magnitude plus 0.5, so that the
    features stay in range.
    """
    shapes: dict[str, list[int]] = {}
    with torch.device("meta"):
        wanted = Inception().state_dict()
    for key, value in wanted.items():
        layer, _, kind = key.rpartition(".")
        if layer == "fc":
            shapes[key] = list(value.shape)
        elif kind == "weight":
            shapes[f"{layer}.conv.weight"] = list(value.shape)
            parts = ("weight", "bias", "running_mean", "running_var")
            shapes |= {f"{layer}.bn.{part}": [len(value)] for part in parts}
    state = state_dict(shapes)
    for key, value in state.items():
        if key.endswith("conv.weight"):
            state[key] = value * 1.4
        elif key.endswith("running_var"):
            state[key] = value.abs() + 0.5
    return state


def inception(case: Case) -> Outputs:
    """Check FID's network."""
    state = inception_weights()
    if state.keys() != set(case.field("keys")):
        raise UserError("keys differ from the names of the published Inception")
    with torch.device("meta"):
        model = Inception()
    load_strict(model, inception_state(state, "reference case"), "reference case")
    model.to(torch.get_default_device())
    features = model(case.array("x").float() / 255).split([POOL, LOGITS, SPATIAL], 1)
    for name, ours in zip(("pool", "logits_unbiased", "spatial"), features, strict=True):
        if name in case:
            yield name, ours


@dataclass(frozen=True)
class Given:
    """A stand-in for a feature network. The case contains the features."""

    width: int
    name: str = "inception"

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def given_batch(features: Tensor, network: FeatureNetwork) -> Images:
    """Return a batch of images with the given features."""
    indices = torch.arange(len(features))
    batch = Images(torch.zeros(len(features), 3, 1, 1), torch.full_like(indices, -1), indices)
    batch._features[network] = features
    return batch


def metrics(case: Case) -> Outputs:
    """Check the Frechet distance of A and B, precision and recall of C against A, and the Inception Score of L.

    The Inception Score is the mean over ten splits.
    """
    if "fid_A_B" in case:
        moments = []
        for rows in (case.array("A"), case.array("B")):
            moments.append(Moments(rows.shape[1]))
            moments[-1].update(rows)
        yield "fid_A_B", torch.tensor(frechet_distance(*moments), dtype=torch.float64)
    if "precision" in case or "recall" in case:
        real, fake = case.array("A"), case.array("C")
        network = Given(real.shape[1])
        metric = PrecisionRecall(network, Manifold(real))
        metric.update(given_batch(fake, network))
        metric.reduce(World())
        for name, value in metric.result().items():
            if name in case:
                yield name, torch.tensor(value, dtype=torch.float64)
    if "isc" in case:
        logits = case.array("L")
        network = Given(logits.shape[1], "inception_logits")
        scores = []
        for split in range(10):
            score = InceptionScore(network, len(logits), split_size=len(logits))
            part = slice(split * len(logits) // 10, (split + 1) * len(logits) // 10)
            score.update(given_batch(logits[part], network))
            scores += score.result().values()
        yield "isc", torch.tensor(scores, dtype=torch.float64).mean()


KINDS: dict[str, Callable[[Case], Outputs]] = {
    "ditdh": denoiser,
    "ditdh_v2": denoiser_v2,
    "dit": denoiser,
    "timegrid": timegrid,
    "decoder": decoder,
    "rae": rae,
    "lpips": lpips,
    "disc": disc,
    "gan": gan,
    "lr": lr,
    "inception": inception,
    "metrics": metrics,
    "encoder_layers": encoder_layers,
}


@torch.no_grad()
def check(path: Path) -> Iterator[tuple[str, str, str]]:
    """Check a case.

    The models run on torch's default device: `with torch.device("cuda"):` checks them on a GPU.

    Yields:
        For each output: the status `ok` or `FAIL`, the output's name, and its relative error. A note in the case gives
        the status `note` and its text. A case that cannot be run gives the status `FAIL` and the reason.
    """
    done = set()
    try:
        case = Case(path)
        if "note" in case.config:
            yield "note", "", str(case.config.pop("note"))
            case.unused.discard("note")
        kind = case.field("kind") if "kind" in case.config else None
        if kind is None and case.config.keys() == {"dim", "base", "num_steps"}:
            kind = "timegrid"
        if kind not in KINDS:
            raise UserError(f"kind {kind!r} is unknown")
        for name, ours in KINDS[kind](case):
            done.add(name)
            theirs = case.array(name)
            if ours.shape != theirs.shape:
                yield "FAIL", name, f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
                continue
            ours, theirs = ours.double().cpu(), theirs.double().cpu()
            error = ((ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
            yield ("ok" if error <= TOLERANCES.get(name, TOLERANCE) else "FAIL"), name, f"{error:.2e}"
        if case.unused:
            raise UserError(f"unused entries: {', '.join(sorted(case.unused))}")
        if not done:
            raise UserError("no output to compare")
    except Exception as error:  # a case that cannot be run is a failure, and the next case runs
        yield "FAIL", "", f"{type(error).__name__}: {error}"


def main(paths: list[str]) -> int:
    """Check the files, print the table, and return the number of failures."""
    failures = 0
    for path in paths:
        for status, what, detail in check(Path(path)):
            failures += status == "FAIL"
            print(f"{status:5} {Path(path).stem:24} {what:11} {detail}", flush=True)
    print(f"{failures} failed")
    return failures


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(min(main(sys.argv[1:]), 255))
