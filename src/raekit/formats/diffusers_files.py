"""Read and write the folder of a diffusers AutoencoderRAE."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from raekit.config import from_dict, read_json, to_dict, to_json
from raekit.errors import UserError
from raekit.files import whole
from raekit.formats.decoder_files import checked_decoder, to_published_decoder
from raekit.formats.diffusers_keys import (
    DIFFUSERS_ENCODERS,
    DIFFUSERS_GRID,
    DiffusersAutoencoder,
    diffusers_decoder_state,
    from_diffusers,
    statistics_for_diffusers,
    statistics_from_diffusers,
)
from raekit.formats.parts import AutoencoderParts, about, only_last_block
from raekit.formats.states import State
from raekit.models.autoencoder import AutoencoderConfig
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.registry import FAMILIES, REGISTRY
from raekit.weights import is_real, mismatches, read_weights

_log = logging.getLogger(__name__)

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.42.1"
"""The diffusers version whose format `write_diffusers` writes."""


def read_diffusers(folder: Path) -> AutoencoderParts:
    """Read the folder of an AutoencoderRAE.

    Args:
        folder: the folder, with `config.json` and the weights.

    Raises:
        UserError: a file is missing or does not fit the configuration, or the encoder is not a registered encoder.
    """
    path, source = folder / "config.json", folder / DIFFUSERS_WEIGHTS
    with about(path):
        config = from_dict(DiffusersAutoencoder, fields_of(path, "AutoencoderRAE"), "AutoencoderRAE")
        built = config.decoder
    if config.grid != DIFFUSERS_GRID:
        _log.warning(
            "%s: read with v1's position table, which spaces the %dx%d tokens one apart; diffusers spreads them over "
            "16x16, so it decodes the same latents to different images",
            path,
            *config.grid,
        )
    read = {key: value.float() if is_real(value) else value for key, value in read_weights(source).items()}
    decoder, encoder, rest = from_diffusers(read)
    built, ours = checked_decoder(decoder, built, f"{source}: does not fit config.json")
    if built.positions == "learned":
        _log.warning("%s: read with its learned positions; diffusers ignores them and uses the fixed table", source)
    # The statistics may have several shapes. `statistics_from_diffusers` checks them.
    wanted = {key: rest.get(key, torch.empty(1)) for key in ("_latents_mean", "_latents_std")}
    wanted |= dict.fromkeys(("encoder_mean", "encoder_std"), torch.empty(1, 3, 1, 1))
    if faults := mismatches(rest, wanted):
        raise UserError(f"{source}: does not fit AutoencoderRAE: {faults}")
    with about(source):
        mean, var = statistics_from_diffusers(
            rest["_latents_mean"],
            rest["_latents_std"],
            config.scaling_factor,
            (config.encoder_hidden_size, *config.grid),
        )
    name = _registered_name(config, encoder, (rest["encoder_mean"], rest["encoder_std"]), source)
    return AutoencoderParts(
        AutoencoderConfig(encoder=name, encoder_size=config.encoder_input_size, decoder=built), ours, mean, var
    )


def fields_of(path: Path, name: str) -> dict[str, Any]:
    """Return the fields of a config file of diffusers, if it describes the class `name`."""
    values = read_json(path)
    found = values.get("_class_name") if isinstance(values, dict) else None
    if found != name:
        raise UserError(f"{path}: holds {found or 'no class of diffusers'}; only diffusers' {name} is supported")
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _registered_name(config: DiffusersAutoencoder, state: State, colours: tuple[Tensor, Tensor], source: Path) -> str:
    """Return the name of the registered encoder with these weights: a raekit model refers to its encoder by name."""
    family, _ = DIFFUSERS_ENCODERS[config.encoder_type]
    sizes = (family, config.encoder_hidden_size, config.encoder_patch_size)
    names = [name for name, spec in REGISTRY.items() if (spec.family, spec.width, spec.patch_size) == sizes]
    if not names:
        raise UserError(
            f"{source}: no registered encoder is a {config.encoder_type} with {config.encoder_hidden_size} channels "
            f"and patch size {config.encoder_patch_size}"
        )
    failed = None
    for name in names:
        try:
            ours = load_encoder(name, config.encoder_input_size)
        except UserError as error:
            failed = error
            continue
        pairs = zip(colours, (ours.mean[None], ours.std[None]), strict=True)
        # The tolerance allows half precision, but is smaller than the difference between two families.
        if all(torch.allclose(*pair, rtol=0, atol=2e-3) for pair in pairs) and _same_weights(ours, config, state):
            return name
    raise failed or UserError(
        f"{source}: the encoder differs from {', '.join(names)} in weights, mean or standard deviation; only models "
        "with a registered encoder can be read"
    )


def _same_weights(encoder: Encoder, config: DiffusersAutoencoder, state: State) -> bool:
    ours: Any = encoder.model
    if ours.config.num_hidden_layers != config.encoder_num_hidden_layers:
        return False
    norm = FAMILIES[encoder.spec.family].norm  # AutoencoderRAE has no weights for it
    given = {key: value for key, value in state.items() if "head." not in key}
    given |= dict.fromkeys((f"{norm}.weight", f"{norm}.bias"), torch.zeros(config.encoder_hidden_size))
    try:
        # transformers translates the tensor names of its earlier versions, which older folders have.
        theirs = type(ours).from_pretrained(None, config=ours.config, state_dict=given).state_dict()
    except RuntimeError:  # the shapes differ
        return False
    unused = (f"{norm}.", "head.")  # with transformers 5.17, SigLIP2 has a pooling head, which nothing uses
    found = {key: value for key, value in ours.state_dict().items() if not key.startswith(unused)}
    return any(
        all(torch.equal(theirs[key].float(), value.to(dtype).float()) for key, value in found.items())
        for dtype in (torch.float32, torch.float16, torch.bfloat16)  # a folder may be in half precision
    )


def write_diffusers(parts: AutoencoderParts, folder: Path) -> None:
    """Write an autoencoder as a folder for `AutoencoderRAE.from_pretrained`, including the encoder's weights.

    Raises:
        UserError: diffusers does not support the encoder, its layers, or the decoder's token grid.
    """
    only_last_block(parts, "diffusers")
    encoder = load_encoder(parts.config.encoder, parts.config.encoder_size)
    model: Any = encoder.model
    spec, decoder = encoder.spec, parts.config.decoder
    kind = next((kind for kind, (family, _) in DIFFUSERS_ENCODERS.items() if family == spec.family), None)
    if kind is None:
        families = [family for family, _ in DIFFUSERS_ENCODERS.values()]
        named = [name for name, each in REGISTRY.items() if each.family in families]
        raise UserError(
            f"{parts.config.encoder}: diffusers does not support encoders of the family {spec.family}, only of the "
            f"families {', '.join(families)} ({', '.join(named)}); write v1 or raekit files instead"
        )
    if parts.config.encoder not in REGISTRY:
        _log.warning(
            "%s: raekit reads this folder only if the encoder is a registered one, which %s is not; keep the original",
            folder,
            parts.config.encoder,
        )
    if decoder.positions == "learned":
        raise UserError(
            "diffusers: cannot hold the learned positions of this decoder, because its files contain no positions; "
            "write v1 or raekit files instead"
        )
    if decoder.grid != encoder.grid or decoder.norm_eps != 1e-12:
        raise UserError("diffusers: supports only decoders with the encoder's token grid and norm_eps = 1e-12")
    if decoder.grid != DIFFUSERS_GRID:
        raise UserError(
            f"diffusers: would decode this model to different images; it spreads positions over {DIFFUSERS_GRID} "
            f"tokens, but this decoder spaces its {decoder.grid} tokens one apart"
        )
    mean, std = statistics_for_diffusers(parts.mean, parts.var)
    values = {
        "encoder_type": kind,
        "encoder_hidden_size": spec.width,
        "encoder_patch_size": spec.patch_size,
        "encoder_num_hidden_layers": model.config.num_hidden_layers,
        "encoder_input_size": encoder.grid[0] * spec.patch_size,
        "encoder_norm_mean": spec.mean,
        "encoder_norm_std": spec.std,
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.hidden,
        "patch_size": decoder.patch_size,
        "latents_mean": None if parts.mean is None else mean.tolist(),
        "latents_std": std.tolist(),
    }
    config = from_dict(DiffusersAutoencoder, values, folder)
    state = diffusers_decoder_state(to_published_decoder(parts, spec)) | {
        f"encoder.{key}": value for key, value in _diffusers_encoder(encoder, config).items()
    }
    state |= {"encoder_mean": encoder.mean[None], "encoder_std": encoder.std[None]}
    state |= {"_latents_mean": mean, "_latents_std": std}
    header = {"_class_name": "AutoencoderRAE", "_diffusers_version": DIFFUSERS_VERSION}
    with whole(folder, folder=True) as partial:
        partial.mkdir()
        (partial / "config.json").write_text(to_json(header | to_dict(config)), "utf-8")
        save_file({key: value.contiguous() for key, value in state.items()}, partial / DIFFUSERS_WEIGHTS)


def _diffusers_encoder(encoder: Encoder, config: DiffusersAutoencoder) -> dict[str, Tensor]:
    """Return the encoder's weights, if diffusers would build the same network from the few sizes in its config."""
    model: Any = encoder.model
    ours, norm = model.config, FAMILIES[encoder.spec.family].norm  # AutoencoderRAE has no weights for the final norm
    theirs = type(ours)(
        hidden_size=config.encoder_hidden_size,
        patch_size=config.encoder_patch_size,
        image_size=DIFFUSERS_ENCODERS[config.encoder_type][1],
        num_attention_heads=config.encoder_hidden_size // 64,
        num_hidden_layers=config.encoder_num_hidden_layers,
    )
    with torch.device("meta"):
        wanted = type(model)(theirs).state_dict()
    state, wanted = (
        {key: value for key, value in tensors.items() if not key.startswith(f"{norm}.")}
        for tensors in (model.state_dict(), wanted)
    )
    # diffusers includes SigLIP's pooling head, although nothing uses it.
    state |= {k: torch.zeros(v.shape) for k, v in wanted.items() if k.startswith("head.") and k not in state}
    faults = [
        f"{field} = {getattr(ours, field)}, expected {getattr(theirs, field)}"
        for field in ("num_attention_heads", "layer_norm_eps", "hidden_act", "image_size")
        if getattr(ours, field) != getattr(theirs, field)
    ]
    if more := mismatches(state, wanted):
        faults.append(more)
    if faults:
        raise UserError(f"encoder {encoder.name}: diffusers cannot build it: {'; '.join(faults)}")
    return state
