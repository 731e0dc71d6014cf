"""Commands about files of models."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from raekit.cli import console


def convert(
    source: Positional[str],
    dest: Positional[Path],
    to: Literal["raekit", "v1", "diffusers"] = "raekit",
    encoder: str | None = None,
    encoder_size: int | tuple[int, int] | None = None,
    layers: Literal["k1", "k7", "k23"] | None = None,
    statistics: Path | None = None,
    decoder_config: Path | None = None,
    output: Literal["encoder-colours", "pixels"] = "encoder-colours",
    denoiser_config: Path | None = None,
    prediction: Literal["velocity", "data"] | None = None,
    autoencoder: str | None = None,
) -> None:
    """Convert a model from the published formats, or its autoencoder to them and to diffusers' AutoencoderRAE.

    Example: raekit convert rae-dinov2-b rae-for-diffusers --to diffusers
    A decoder or its training checkpoint: raekit convert model.pt out --encoder dinov2-b --statistics stat.pt
    A denoiser, with the autoencoder of its latents: raekit convert stage2_model.pt out --autoencoder rae-dinov2-b

    Args:
        source: a published name, a YAML, a file of weights, a diffusers folder, a raekit model, OWNER/NAME.
        dest: the folder to write, new or empty.
        to: raekit; v1, the official files (model.pt, stat.pt, config.yaml); diffusers, an AutoencoderRAE.
        encoder: of a decoder file, a registered name or a folder.
        encoder_size: of a decoder file, side that the encoder resizes to, or height and width. Default: its own.
        layers: of a decoder file, the layers of RAE v2 that its latents are made of. Default: the last alone.
        statistics: of a decoder file, the file of its latents' mean and variance. Default: not whitened.
        decoder_config: of a decoder file of no published size, its config.json or the folder of it.
        output: of a decoder file, what the decoder gives; pixels for RAE v2.
        denoiser_config: of a denoiser file whose shapes leave something open, the YAML with its stage_2.
        prediction: of a denoiser file, what it predicts. Default: velocity, for RAE v2 data.
        autoencoder: of a denoiser file, any source of the autoencoder to put beside it.
    """
    from raekit.formats import conversion as conversion
    from raekit.models.registry import LAYERS, LayersConfig

    options = conversion.FileOptions(
        encoder=encoder,
        encoder_size=encoder_size,
        layers=LAYERS[layers] if layers else LayersConfig(),
        statistics=statistics,
        decoder_config=decoder_config,
        output=output,
        denoiser_config=denoiser_config,
        prediction=prediction,
        autoencoder=autoencoder,
    )
    parts = conversion.convert(source, dest, to, options)
    if found := parts.autoencoder:
        size, numbers = "x".join(map(str, found.var.shape)), sum(value.numel() for value in found.decoder.values())
        told = f"{dest}: encoder {found.config.encoder}, latents {size}, a decoder of {numbers:,} parameters"
        console.out.print(told, markup=False)
    if made := parts.denoiser:
        size, numbers = (
            "x".join(map(str, made.config.latent_shape)),
            sum(value.numel() for value in made.state.values()),
        )
        classes = made.config.num_classes
        told = f"{dest}: a denoiser of {numbers:,} parameters for latents {size}, {classes} classes"
        console.out.print(told, markup=False)


def info(name: Positional[str], reach: tuple[str, float] | None = None) -> None:
    """Tell what a model, an artifact or a run is.

    Example: raekit info builtin:emoji

    Args:
        name: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        reach: a metric of a run and a value, as in evaluation/fid 2: the epochs until it first was as low.
    """
    from raekit.stages.inspection import describe_folder

    console.out.print(describe_folder(name, reach), markup=False)
