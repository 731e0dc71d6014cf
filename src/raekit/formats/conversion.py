"""Convert models between raekit, RAE v1, RAE v2 and diffusers (`raekit convert`).

`read` recognises the format of a source and passes it to that format's reader. `convert` also writes the result.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from raekit.config import read_json, to_dict
from raekit.errors import UserError, check_choice
from raekit.files import as_path, check_folder, whole
from raekit.flow.path import Prediction
from raekit.formats import releases
from raekit.formats.decoder_files import read_decoder, write_v1
from raekit.formats.decoder_keys import decoder_part, decoder_sizes
from raekit.formats.denoiser_files import read_denoiser
from raekit.formats.diffusers_files import read_diffusers, write_diffusers
from raekit.formats.diffusers_pipeline import INDEX, read_pipeline, write_pipeline
from raekit.formats.native import read_model, write_model
from raekit.formats.parts import AutoencoderParts, Parts, about, reject_code
from raekit.formats.states import unwrap
from raekit.formats.yaml_files import read_denoiser_config, read_yaml
from raekit.hub import find_folder
from raekit.models.autoencoder import Output
from raekit.models.registry import LayersConfig, Size
from raekit.weights import read_weights

Format = Literal["raekit", "v1", "diffusers"]


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Facts that a decoder, denoiser or training checkpoint file does not contain.

    Attributes:
        encoder: for a decoder file, the name of its encoder, as for `load_encoder`. Required.
        encoder_size: for a decoder file, the size in pixels to which the encoder resizes images: the side of a
            square, or (height, width). Default: the encoder's own size.
        layers: for a decoder file, the encoder layers that form the latent. Default: only the last layer.
        statistics: for a decoder file, the file of latent statistics. Without it, latents are not whitened.
        decoder_config: for a decoder file, a ViT-MAE style `config.json` or its folder. Required if the decoder
            has no published size.
        output: for a decoder file, the colours that the decoder produces: "pixels" for RAE v2.
        denoiser_config: for a denoiser file, a published YAML with a `stage_2` section. Required if the shapes in
            the file leave the architecture open.
        prediction: for a denoiser file, the quantity that it predicts. Default: "velocity" for RAE v1, "data" for v2.
        autoencoder: for a denoiser file, any source that contains an autoencoder, to convert along with it.
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
        """Return the names of the options that differ from their defaults."""
        default = FileOptions()
        return {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(default, f.name)}


_DENOISER_OPTIONS = {"denoiser_config", "prediction", "autoencoder"}


def convert(source: str | Path, folder: str | Path, to: Format = "raekit", options: FileOptions | None = None) -> Parts:
    """Convert a model and write it to a folder.

    Args:
        source: a published name, a decoder, denoiser or training checkpoint file, a published YAML, a diffusers
            folder, a v1 folder that raekit wrote, a raekit model folder or run, or OWNER/NAME on the Hub.
        folder: the folder to write. It must be new or empty.
        to: the format to write. "v1" contains only the autoencoder. "diffusers" is a pipeline if the source has a
            denoiser, and an AutoencoderRAE otherwise.
        options: facts that the file does not contain. Only for decoder, denoiser and training checkpoint files.

    Returns:
        The converted configurations and weights.

    Raises:
        UserError: the source cannot be read, the folder is not empty, or the format cannot represent the model.
    """
    check_choice("to", to, get_args(Format))
    source, folder = str(as_path("source", source)), as_path("folder", folder)
    if not isinstance(options, FileOptions | None):
        raise UserError(f"options: {options!r} is no `FileOptions`")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not empty; give a new folder")
    check_folder(folder)
    parts = read(source, options, denoiser=to != "v1")
    parts.check_finite(source)
    if to == "raekit":
        with whole(folder, folder=True) as partial:
            write_model(parts, partial)
    elif to == "diffusers" and parts.denoiser:
        write_pipeline(parts, folder)
    else:
        assert parts.autoencoder
        (write_v1 if to == "v1" else write_diffusers)(parts.autoencoder, folder)
    return parts


def read(source: str, options: FileOptions | None = None, *, denoiser: bool = True) -> Parts:
    """Read a model of any format.

    Args:
        source: as for `convert`.
        options: as for `convert`.
        denoiser: if False, read only the autoencoder.

    Raises:
        UserError: the source cannot be read, or lacks the autoencoder that `denoiser=False` requires.
    """
    path = Path(source)
    suffix = "" if path.is_dir() else path.suffix  # a folder may have any name
    if suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        return _read_file(path, options or FileOptions(), denoiser)
    if options and options.given():
        raise UserError(f"{source}: describes itself; leave out {_flags(options.given())}")
    if suffix in (".yaml", ".yml"):
        return read_yaml(path, denoiser)
    if path.is_file():
        raise UserError(
            f"{source}: not a model file; give a file that ends in .safetensors, .pt, .pth, .ckpt, .bin, .yaml or .yml"
        )
    if source in releases.DENOISERS:
        return read_model(source, denoiser)
    folder = find_folder(source)
    if (folder / "config.yaml").is_file():
        return read_yaml(folder / "config.yaml", denoiser)
    if (folder / INDEX).is_file():
        return read_pipeline(folder, denoiser)
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else None
    reject_code(config, values)
    if isinstance(values, dict) and "_class_name" in values:
        return Parts(read_diffusers(folder))
    if (folder / "model.pt").is_file() and not (folder / "autoencoder").is_dir():
        raise UserError(
            f"{source}: holds a v1 decoder, but no config.yaml that names its encoder; give its files: raekit convert "
            f"{folder / 'model.pt'} DEST --encoder ENCODER [--encoder-size SIZE] --statistics {folder / 'stat.pt'} "
            f"--decoder-config {folder}"
        )
    return read_model(source, denoiser)


def _read_file(path: Path, options: FileOptions, denoiser: bool) -> Parts:
    """Read a file that holds one network. The tensor names show whether it is a decoder or a denoiser."""
    weights = read_weights(path)
    with about(path):
        state = decoder_part(unwrap(weights))
    if not any(key.startswith(("x_embedder.", "s_embedder.")) for key in state):
        if decoder_sizes(state):
            _reject(path, "a decoder", options.given() & _DENOISER_OPTIONS)
        return Parts(_read_decoder(path, weights, options))  # of another file it says what the file looks like
    _reject(path, "a denoiser", options.given() - _DENOISER_OPTIONS)
    if not denoiser:
        raise UserError(
            f"{path}: holds a denoiser, where an autoencoder is needed; --to v1 writes only autoencoders, so convert a "
            "denoiser with --to raekit"
        )
    config = read_denoiser_config(options.denoiser_config) if options.denoiser_config else None
    read_one = read_denoiser(path, config, weights=weights, prediction=options.prediction)
    return Parts(read(options.autoencoder, denoiser=False).autoencoder if options.autoencoder else None, read_one)


def _reject(path: Path, kind: str, options: set[str]) -> None:
    """Raise a UserError if any options are given that do not apply to the kind of file."""
    if options:
        raise UserError(f"{path}: holds {kind}; leave out {_flags(options)}, which would have no effect")


def _flags(options: set[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(options))


def _read_decoder(path: Path, weights: dict[str, Any], options: FileOptions) -> AutoencoderParts:
    if options.encoder is None:
        raise UserError(f"{path}: a decoder file does not name its encoder; add it, for example --encoder dinov2-b")
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
