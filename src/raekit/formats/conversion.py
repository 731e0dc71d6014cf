"""Files of other formats: models of RAE v1 and v2 and of diffusers, read, written, and found by name.

Names of published models are converted once into a cache: the folder `RAEKIT_CACHE`, by default `raekit` in
Hugging Face's `HF_HOME`. The formats themselves stand in `raekit.formats`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raekit.config import read_json, to_dict
from raekit.errors import UserError
from raekit.flow.path import Prediction
from raekit.formats import releases
from raekit.formats.decoder_files import read_decoder, write_v1
from raekit.formats.decoder_keys import decoder_part, decoder_sizes
from raekit.formats.denoiser_files import read_denoiser
from raekit.formats.diffusers_files import read_diffusers, write_diffusers
from raekit.formats.native import read_model, write_model
from raekit.formats.parts import AutoencoderParts, Parts, about
from raekit.formats.states import unwrap
from raekit.formats.yaml_files import read_denoiser_config, read_yaml
from raekit.hub import find_folder
from raekit.models.autoencoder import Output
from raekit.models.registry import LayersConfig, Size
from raekit.weights import read_weights

Format = Literal["raekit", "v1", "diffusers"]


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What a decoder's, denoiser's or training checkpoint's file does not tell.

    Of a decoder: `decoder_config`, a ViT-MAE style config.json or its folder, is needed for sizes other than those
    published; without `statistics` latents are not whitened; `output` is "pixels" for RAE v2, `layers` its latent.

    Of a denoiser: `denoiser_config`, a YAML, is needed where the shapes leave something open; `prediction` is by
    default the version's own; `autoencoder`, any source of one, makes a whole model of it.
    """

    encoder: str | None = None
    encoder_size: Size | None = None
    layers: LayersConfig = dataclasses.field(default_factory=LayersConfig)
    statistics: Path | None = None
    decoder_config: Path | None = None
    output: Output = "encoder-colours"
    denoiser_config: Path | None = None
    prediction: Prediction | None = None
    autoencoder: str | None = None

    def given(self) -> set[str]:
        """The names of the options that are not the defaults."""
        default = FileOptions()
        return {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(default, f.name)}


_OF_DENOISERS = {"denoiser_config", "prediction", "autoencoder"}


def convert(source: str, folder: Path, to: Format = "raekit", options: FileOptions | None = None) -> Parts:
    """Write `source` to the new or empty `folder`, in the format `to`; UserError if either does not suit.

    `source` is a published name, a decoder's, denoiser's or training checkpoint's file (with `options`), a YAML, a
    folder of diffusers or of v1 as written here, or a model of ours, each local or on the Hub. The formats of others
    hold the autoencoder alone.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder}: is there already, and not empty; give a new folder")
    parts = read(source, options, denoiser=to == "raekit")
    if to == "raekit":
        write_model(parts, folder)
    else:
        assert parts.autoencoder
        WRITERS[to](parts.autoencoder, folder)
    return parts


WRITERS: dict[Format, Callable[[AutoencoderParts, Path], None]] = {"v1": write_v1, "diffusers": write_diffusers}


def read(source: str, options: FileOptions | None = None, *, denoiser: bool = True) -> Parts:
    """Read a model of any format, as `convert` does; without `denoiser` an autoencoder, or UserError."""
    path = Path(source)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        return _read_file(path, options or FileOptions(), denoiser)
    if options and options.given():
        raise UserError(f"{source}: describes itself; encoder, statistics and so on are only for a decoder's file")
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path, denoiser)
    if path.is_file():
        raise UserError(f"{source}: no model; files read end in .safetensors, .pt, .pth, .ckpt, .bin, .yaml or .yml")
    if source in releases.DENOISERS:
        return read_model(source, denoiser)
    folder = find_folder(source)
    if (folder / "config.yaml").is_file():
        return read_yaml(folder / "config.yaml", denoiser)
    config = folder / "config.json"
    if config.is_file() and isinstance(values := read_json(config), dict) and "_class_name" in values:
        return Parts(read_diffusers(folder, values))
    if (folder / "model.pt").is_file() and not (folder / "autoencoder").is_dir():
        raise UserError(
            f"{source}: has a v1 decoder, and no config.yaml that tells its encoder; name its files: raekit convert "
            f"{folder / 'model.pt'} DEST --encoder ENCODER --statistics {folder / 'stat.pt'} --decoder-config {folder}"
        )
    return read_model(source, denoiser)


def _read_file(path: Path, options: FileOptions, denoiser: bool) -> Parts:
    """A file of one network: its names tell which."""
    weights = read_weights(path)
    with about(path):
        state = decoder_part(unwrap(weights))
    of_decoder = not any(key.startswith(("x_embedder.", "s_embedder.")) for key in state)
    if of_decoder and decoder_sizes(state):
        _refuse(path, "a decoder", options.given() & _OF_DENOISERS)
        return Parts(_read_decoder(path, weights, options))
    if of_decoder:
        return Parts(_read_decoder(path, weights, options))  # which says what it is instead
    _refuse(path, "a denoiser", options.given() - _OF_DENOISERS)
    if not denoiser:
        raise UserError(f"{path}: holds a denoiser, and other formats hold autoencoders alone; convert it to raekit")
    config = read_denoiser_config(options.denoiser_config) if options.denoiser_config else None
    read_one = read_denoiser(path, config, weights=weights, prediction=options.prediction)
    return Parts(read(options.autoencoder, denoiser=False).autoencoder if options.autoencoder else None, read_one)


def _refuse(path: Path, kind: str, options: set[str]) -> None:
    if options:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(options))
        raise UserError(f"{path}: holds {kind}, which {names} would have no effect on")


def _read_decoder(path: Path, weights: dict[str, Any], options: FileOptions) -> AutoencoderParts:
    if options.encoder is None:
        raise UserError(f"{path}: a decoder's file does not tell its encoder; give it, as in --encoder dinov2-b")
    return read_decoder(
        {
            "encoder": options.encoder,
            "encoder_size": options.encoder_size,
            "layers": to_dict(options.layers),
            "output": options.output,
        },
        path,
        options.statistics,
        weights=weights,
        config=options.decoder_config,
    )
