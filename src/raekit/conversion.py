"""Files of other formats: autoencoders of RAE v1 and v2 and of diffusers, read, written, and found by name.

Names of published models are converted once into a cache: the folder `RAEKIT_CACHE`, by default `raekit` in
Hugging Face's `HF_HOME`. The formats themselves stand in `raekit.published`.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save_file
from torch import Tensor

from raekit import artifacts
from raekit.config import from_dict, read_json, to_dict, to_json
from raekit.distributed import World
from raekit.errors import UserError
from raekit.files import whole
from raekit.models.autoencoder import AutoencoderConfig, Output
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.encoders import (
    FAMILIES,
    LAYERS,
    REGISTRY,
    Encoder,
    EncoderSpec,
    LayersConfig,
    Size,
    grid_of,
    load_encoder,
)
from raekit.published import (
    DECODERS,
    DIFFUSERS_ENCODERS,
    DIFFUSERS_GRID,
    ENCODER_CLASSES,
    DiffusersAutoencoder,
    State,
    decoder_config,
    decoder_part,
    decoder_sizes,
    decoder_state,
    diffusers_decoder_state,
    encoder_colours,
    from_diffusers,
    guess,
    published_autoencoder,
    published_decoder_config,
    published_decoder_state,
    statistics,
    statistics_for_diffusers,
    statistics_from_diffusers,
    unwrap,
)
from raekit.weights import MADE, find_folder, load_strict, mismatches, read_weights

_log = logging.getLogger(__name__)

Format = Literal["raekit", "v1", "diffusers"]
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.42.1"
"""Whose format is written."""


@dataclass(frozen=True)
class Parts:
    """An autoencoder without its encoder's weights: our decoder's state dict, and the statistics (C, H, W)."""

    config: AutoencoderConfig
    decoder: dict[str, Tensor]
    mean: Tensor | None
    var: Tensor


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What a decoder's or checkpoint's file does not tell.

    `decoder_config`, a ViT-MAE style config.json or its folder, is needed for sizes other than those published;
    without `statistics` latents are not whitened; `output` is "pixels" for RAE v2, `layers` its latent.
    """

    encoder: str | None = None
    encoder_size: Size | None = None
    layers: LayersConfig = dataclasses.field(default_factory=LayersConfig)
    statistics: Path | None = None
    decoder_config: Path | None = None
    output: Output = "encoder-colours"


def convert(source: str, folder: Path, to: Format = "raekit", options: FileOptions | None = None) -> Parts:
    """Write `source` to the new or empty `folder`, in the format `to`; UserError if either does not suit.

    `source` is a published name, a decoder's or training checkpoint's file (with `options`), a YAML of v1, a folder
    of diffusers or of v1 as written here, or a model of ours, each local or on the Hub.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder}: is there already, and not empty; give a new folder")
    parts = read(source, options)
    WRITERS[to](parts, folder)
    return parts


def read(source: str, options: FileOptions | None = None) -> Parts:
    """Read an autoencoder of any format, as `convert` does."""
    path = Path(source)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        return _read_file(path, options or FileOptions())
    if options and options != FileOptions():
        raise UserError(f"{source}: describes itself; encoder, statistics and so on are only for a decoder's file")
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path)
    folder = find_folder(source)
    if (folder / "config.yaml").is_file():
        return _read_yaml(folder / "config.yaml")
    config = folder / "config.json"
    if config.is_file() and isinstance(values := read_json(config), dict) and "_class_name" in values:
        return _read_diffusers(folder, values)
    return _read_artifact(source)


# Version 1 and 2.


def _read_file(path: Path, options: FileOptions) -> Parts:
    if options.encoder is None:
        raise UserError(f"{path}: a decoder's file does not tell its encoder; give it, as in --encoder dinov2-b")
    return _from_files(
        {
            "encoder": options.encoder,
            "encoder_size": options.encoder_size,
            "layers": to_dict(options.layers),
            "output": options.output,
        },
        path,
        options.statistics,
        config=options.decoder_config,
    )


def _read_yaml(path: Path) -> Parts:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    config, decoder = published_autoencoder(values, path)
    if decoder is None:
        raise UserError(f"{path}: names no decoder, neither in stage_1.params.pretrained_decoder_path nor stage_1.ckpt")

    def find(name: str) -> Path:
        # Published files give paths from the root of their repository, in some folder of which they stand.
        for folder in (*path.resolve().parents, Path()):
            if (folder / name).exists():
                return folder / name
        raise UserError(f"{path}: {name} is neither in the working folder nor in one above this file")

    family, encoder = ENCODER_CLASSES[config.encoder_cls], config.encoder_path
    if encoder is None:
        raise UserError(f"{path}: names no encoder, neither in stage_1.params.encoder_params nor encoder_config_path")
    names = [name for name, spec in REGISTRY.items() if (spec.family, spec.hub_id) == (family, encoder)]
    return _from_files(
        {"encoder": names[0] if names else f"{family}:{encoder}", "encoder_size": config.encoder_input_size},
        find(decoder),
        find(config.normalization_stat_path) if config.normalization_stat_path else None,
        config=find(config.decoder_config_path),
        patch_size=config.decoder_patch_size,
        eps=config.eps,
    )


def _from_files(
    fields: Mapping[str, Any],
    decoder: Path,
    stats: Path | None,
    *,
    config: Path | None = None,
    patch_size: int | None = None,
    eps: float | None = None,
) -> Parts:
    """Read the files of v1 or v2. `fields` are those of AutoencoderConfig but `decoder`.

    Without `config` the decoder is the published one of its width, without `patch_size` it has that of its shapes.
    """
    name = fields["encoder"]
    spec, grid = _geometry(name, fields.get("encoder_size"))
    with _about(decoder):
        state = decoder_part(unwrap(read_weights(decoder)))
    sizes = decoder_sizes(state)
    if not sizes:
        raise UserError(f"{decoder}: holds no published decoder{_guessed(state)}")
    patch_size = patch_size or sizes["patch_size"]
    if config:
        path = config / "config.json" if config.is_dir() else config
        with _about(path):
            built = decoder_config(read_json(path), spec.width, grid, patch_size)
    elif known := next((size for size in DECODERS.values() if size["width"] == sizes["width"]), None):
        built = DecoderConfig(token_dim=spec.width, grid=grid, patch_size=patch_size, **known)
    else:
        widths = ", ".join(f"{name} {size['width']}" for name, size in DECODERS.items())
        raise UserError(
            f"{decoder}: a decoder of width {sizes['width']} is none of the published ({widths}), and its shapes do "
            "not tell the number of heads; give its config.json, as in --decoder-config DIR"
        )
    mean, var = _read_statistics(stats, (spec.width, *grid), eps)
    whole_config = from_dict(AutoencoderConfig, {**fields, "decoder": to_dict(built)}, decoder)
    return Parts(whole_config, _checked(state, built, f"{decoder}: does not fit {name}"), mean, var)


def _checked(state: State, config: DecoderConfig, fault: str) -> dict[str, Tensor]:
    """Our state dict of a published decoder; UserError that lists what does not fit, and says what it is instead."""
    with torch.device("meta"):
        wanted = published_decoder_state(Decoder(config).state_dict(), config)
    if "decoder_pos_embed" not in state:
        wanted.pop("decoder_pos_embed")
    if faults := mismatches(state, wanted):
        raise UserError(f"{fault}: {faults}{_guessed(state)}")
    return decoder_state(state, config)


def _guessed(state: State) -> str:
    kind = guess(state)
    return f"; this looks like {kind}" if kind else ""


def _read_statistics(
    path: Path | None, shape: tuple[int, ...], eps: float | None = None
) -> tuple[Tensor | None, Tensor]:
    if path is None:
        return statistics({"var": torch.ones(shape)}, eps=0.0)  # which leaves latents as they are
    with _about(path):
        mean, var = statistics(read_weights(path), *([] if eps is None else [eps]))
    if var.shape != shape:
        raise UserError(f"{path}: statistics of latents {tuple(var.shape)}, but the encoder gives {shape}")
    return mean, var


def _write_v1(parts: Parts, folder: Path) -> None:
    """`model.pt`, `stat.pt`, the decoder's `config.json`, and `config.yaml` if v1 has a class for the encoder."""
    _only_last_block(parts, "v1")
    spec, grid = _geometry(parts.config.encoder, parts.config.encoder_size)
    if grid[0] != grid[1]:
        raise UserError(f"v1: holds square images alone, this model's latents are {grid[0]} x {grid[1]}")
    with whole(folder) as partial:
        partial.mkdir()
        torch.save(_published_decoder(parts, spec), partial / "model.pt")
        torch.save({"mean": parts.mean, "var": parts.var}, partial / "stat.pt")
        (partial / "config.json").write_text(to_json(published_decoder_config(parts.config.decoder)))
        if cls := next((cls for cls, family in ENCODER_CLASSES.items() if family == spec.family), None):
            import yaml

            encoder = {"dinov2_path" if cls == "Dinov2withNorm" else "model_name": spec.hub_id, "normalize": True}
            params = {
                "encoder_cls": cls,
                "encoder_config_path": spec.hub_id,
                "encoder_input_size": grid[0] * spec.patch_size,
                "encoder_params": encoder,
                "decoder_config_path": ".",
                "decoder_patch_size": parts.config.decoder.patch_size,
                "pretrained_decoder_path": "model.pt",
                "noise_tau": 0.0,
                "reshape_to_2d": True,
                "normalization_stat_path": "stat.pt",
            }
            values = {"stage_1": {"target": "stage1.RAE", "params": params}}
            (partial / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _published_decoder(parts: Parts, spec: EncoderSpec) -> dict[str, Tensor]:
    ours = parts.decoder
    if parts.config.output == "pixels":
        ours = encoder_colours(ours, torch.tensor(spec.mean), torch.tensor(spec.std))
    return {key: value.contiguous() for key, value in published_decoder_state(ours, parts.config.decoder).items()}


# diffusers.


def _read_diffusers(folder: Path, values: dict[str, Any]) -> Parts:
    path, source = folder / "config.json", folder / DIFFUSERS_WEIGHTS
    if values["_class_name"] != "AutoencoderRAE":
        raise UserError(f"{path}: a {values['_class_name']} of diffusers is not supported, only AutoencoderRAE")
    with _about(path):
        config = from_dict(
            DiffusersAutoencoder, {k: v for k, v in values.items() if not k.startswith("_")}, "AutoencoderRAE"
        )
        built = config.decoder
    if config.grid != DIFFUSERS_GRID:
        _log.warning(
            "%s: read as v1's decoder, which counts the positions of its %dx%d tokens by ones; diffusers spreads them "
            "over 16x16, and decodes to other images",
            path,
            *config.grid,
        )
    decoder, encoder, rest = from_diffusers(read_weights(source))
    ours = _checked(decoder, built, f"{source}: does not fit config.json")
    # The statistics are of one of several shapes, which are looked at below.
    wanted = {key: rest.get(key, torch.empty(1)) for key in ("_latents_mean", "_latents_std")}
    wanted |= dict.fromkeys(("encoder_mean", "encoder_std"), torch.empty(1, 3, 1, 1))
    if faults := mismatches(rest, wanted):
        raise UserError(f"{source}: does not fit AutoencoderRAE: {faults}")
    with _about(source):
        mean, var = statistics_from_diffusers(
            rest["_latents_mean"],
            rest["_latents_std"],
            config.scaling_factor,
            (config.encoder_hidden_size, *config.grid),
        )
    name = _registered(config, encoder, (rest["encoder_mean"], rest["encoder_std"]), source)
    return Parts(
        AutoencoderConfig(encoder=name, encoder_size=config.encoder_input_size, decoder=built), ours, mean, var
    )


def _registered(config: DiffusersAutoencoder, state: State, colours: tuple[Tensor, Tensor], source: Path) -> str:
    """The registered encoder that has the weights `state`: our models hold an encoder by its name."""
    family, _ = DIFFUSERS_ENCODERS[config.encoder_type]
    sizes = (family, config.encoder_hidden_size, config.encoder_patch_size)
    names = [name for name, spec in REGISTRY.items() if (spec.family, spec.width, spec.patch_size) == sizes]
    if not names:
        raise UserError(
            f"{source}: no encoder is registered that is a {config.encoder_type} of {config.encoder_hidden_size} "
            f"channels with patches of {config.encoder_patch_size}"
        )
    failed = None
    for name in names:
        try:
            ours = load_encoder(name, config.encoder_input_size)
        except UserError as error:
            failed = error
            continue
        if all(map(torch.allclose, colours, (ours.mean[None], ours.std[None]))) and _same_weights(ours, config, state):
            return name
    raise failed or UserError(f"{source}: its encoder has other weights, mean or deviation than {', '.join(names)}")


def _same_weights(encoder: Encoder, config: DiffusersAutoencoder, state: State) -> bool:
    ours: Any = encoder.model
    if ours.config.num_hidden_layers != config.encoder_num_hidden_layers:
        return False
    norm = FAMILIES[encoder.spec.family].norm  # whose weights play no part
    given = {key: value for key, value in state.items() if "head." not in key}
    given |= dict.fromkeys((f"{norm}.weight", f"{norm}.bias"), torch.zeros(config.encoder_hidden_size))
    try:
        # transformers knows its own earlier names, which older folders have.
        theirs = type(ours).from_pretrained(None, config=ours.config, state_dict=given).state_dict()
    except RuntimeError:  # of other shapes
        return False
    return all(
        torch.equal(theirs[key], value) for key, value in ours.state_dict().items() if not key.startswith(f"{norm}.")
    )


def _write_diffusers(parts: Parts, folder: Path) -> None:
    """A folder for `AutoencoderRAE.from_pretrained`, with the encoder's weights in it."""
    _only_last_block(parts, "diffusers")
    encoder = load_encoder(parts.config.encoder, parts.config.encoder_size)
    model: Any = encoder.model
    spec, decoder = encoder.spec, parts.config.decoder
    kind = next((kind for kind, (family, _) in DIFFUSERS_ENCODERS.items() if family == spec.family), None)
    if kind is None:
        raise UserError(f"{parts.config.encoder}: diffusers has no such encoder, only {', '.join(DIFFUSERS_ENCODERS)}")
    if decoder.grid != encoder.grid or decoder.norm_eps != 1e-12:
        raise UserError("diffusers: the decoder must be built for the encoder's grid, with norm_eps = 1e-12")
    if decoder.grid != DIFFUSERS_GRID:
        raise UserError(
            f"diffusers: it would decode this to other images, as it spreads positions over {DIFFUSERS_GRID} tokens "
            f"where the decoder counts {decoder.grid} by ones"
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
    state = diffusers_decoder_state(_published_decoder(parts, spec)) | {
        f"encoder.{key}": value for key, value in _diffusers_encoder(encoder, config).items()
    }
    state |= {"encoder_mean": encoder.mean[None], "encoder_std": encoder.std[None]}
    state |= {"_latents_mean": mean, "_latents_std": std}
    header = {"_class_name": "AutoencoderRAE", "_diffusers_version": DIFFUSERS_VERSION}
    with whole(folder) as partial:
        partial.mkdir()
        (partial / "config.json").write_text(to_json(header | to_dict(config)))
        save_file({key: value.contiguous() for key, value in state.items()}, partial / DIFFUSERS_WEIGHTS)


def _diffusers_encoder(encoder: Encoder, config: DiffusersAutoencoder) -> dict[str, Tensor]:
    """The encoder's weights, if it is as diffusers would build it: its configuration tells only a few sizes."""
    model: Any = encoder.model
    ours, norm = model.config, FAMILIES[encoder.spec.family].norm  # the final norm, without weights there
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
    # SigLIP's pooling, which nobody uses but diffusers has.
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


# Ours.


def _read_artifact(name: str) -> Parts:
    path, values = artifacts.find(name, "autoencoder")
    config = from_dict(AutoencoderConfig, values, path / "config.json")
    if (own := path.parent / "encoder").is_dir():
        config = dataclasses.replace(config, encoder=str(own))
    spec, grid = _geometry(config.encoder, config.encoder_size)
    state = artifacts.read(path)
    with torch.device("meta"):
        decoder = Decoder(config.decoder)
    if faults := mismatches(state, decoder.state_dict()):
        raise UserError(f"{path}: the weights do not fit its configuration: {faults}")
    return Parts(config, state, *artifacts.read_statistics(path / artifacts.STATISTICS, (spec.width, *grid)))


def _write_raekit(parts: Parts, folder: Path) -> None:
    with torch.device("meta"):
        decoder = Decoder(parts.config.decoder)
    load_strict(decoder, parts.decoder, folder)
    statistics = {"var": parts.var} | ({} if parts.mean is None else {"mean": parts.mean})
    artifacts.write(folder / "autoencoder", "autoencoder", parts.config, decoder, World(), statistics=statistics)


WRITERS: dict[Format, Callable[[Parts, Path], None]] = {
    "raekit": _write_raekit,
    "v1": _write_v1,
    "diffusers": _write_diffusers,
}


def _geometry(encoder: str, size: Size | None) -> tuple[EncoderSpec, tuple[int, int]]:
    """What the encoder is, and its grid; a registered one is not loaded."""
    spec = REGISTRY.get(encoder) or load_encoder(encoder).spec
    return spec, grid_of(spec, encoder, size)


def _only_last_block(parts: Parts, form: Format) -> None:
    if parts.config.layers != LayersConfig():
        raise UserError(
            f"{parts.config.encoder}, {parts.config.layers}: {form} has the latents of an encoder's last block alone"
        )


@contextmanager
def _about(source: Path) -> Iterator[None]:
    """Let a UserError within say which file it is about."""
    try:
        yield
    except UserError as error:
        raise (error if str(source) in str(error) else UserError(f"{source}: {error}")) from None


# Published models by name.


@dataclass(frozen=True, kw_only=True)
class Release:
    """Where a published autoencoder lies on the Hub, and the fields of its AutoencoderConfig but `decoder`."""

    repository: str
    decoder: str
    statistics: str | None
    fields: dict[str, Any]

    @property
    def files(self) -> list[str]:
        return [self.decoder, *([self.statistics] if self.statistics else [])]


def _v1(decoder: str, statistics: str | None, **fields: Any) -> Release:
    return Release(
        repository="nyu-visionx/RAE-collections",
        decoder=f"decoders/{decoder}/model.pt",
        statistics=statistics and f"stats/{statistics}/stat.pt",
        fields=fields,
    )


def _v2(domain: str, layers: str) -> Release:
    folder = f"stage1/{domain}/dinov3l-{layers}"
    return Release(
        repository="nyu-visionx/RAEv2-models",
        decoder=f"{folder}/decoder.pt",
        statistics=f"{folder}/stats.pt",
        fields={"encoder": "dinov3-l", "layers": to_dict(LAYERS[layers]), "output": "pixels"},
    )


RELEASES = {
    "rae-dinov2-s": _v1("dinov2/wReg_small/ViTXL_n08", None, encoder="dinov2-s"),
    "rae-dinov2-b": _v1("dinov2/wReg_base/ViTXL_n08", "dinov2/wReg_base/imagenet1k", encoder="dinov2-b"),
    "rae-dinov2-b-512": _v1(
        "dinov2/wReg_base/ViTXL_n08_i512", "dinov2/wReg_base/imagenet1k_512", encoder="dinov2-b", encoder_size=448
    ),
    "rae-siglip2-b": _v1("siglip2/base_p16_i256/ViTXL_n08", "siglip2/base_p16_i256/ImageNet1k", encoder="siglip2-b"),
    "rae-mae-b": _v1("mae/base_p16/ViTXL_n08", "mae/base_p16/ImageNet1k", encoder="mae-b"),
    **{f"raev2-dinov3-l-{k}": _v2("imagenet", k) for k in ("k1", "k7", "k23")},
    **{f"raev2-dinov3-l-{k}-general": _v2("general", k) for k in ("k1", "k7", "k23")},
}
"""The published autoencoders (spec 7.1, II.9). No statistics are published for DINOv2-S."""


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("RAEKIT_CACHE") or Path(constants.HF_HOME, "raekit")).expanduser()


def cached(name: str) -> Path:
    """The folder of the published model `name`, downloaded and converted if this is the first time.

    UserError, with the command to run, if the Hub does not deliver.
    """
    folder = cache_folder() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder.parent}: {error.strerror}; set RAEKIT_CACHE to a folder to write to") from None
    with WeakFileLock(folder.with_name(f"{name}.lock")):  # of several processes, one converts
        if not (folder / "autoencoder").is_dir():
            release = RELEASES[name]
            paths = [_download(name, release, file) for file in release.files]
            _write_raekit(_from_files(release.fields, paths[0], paths[1] if release.statistics else None), folder)
    return folder


def _download(name: str, release: Release, file: str) -> Path:
    try:
        return Path(hf_hub_download(release.repository, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        command = f"hf download {release.repository} {' '.join(release.files)}"
        raise UserError(
            f"{name}: the Hub did not deliver {file} of {release.repository} ({type(error).__name__}); run "
            f"`{command}`, and `hf download {REGISTRY[release.fields['encoder']].hub_id}` for its encoder, where there "
            "is a network"
        ) from None


MADE.update(dict.fromkeys(RELEASES, cached))
