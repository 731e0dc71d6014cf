"""The commands `raekit convert` and `raekit info`."""

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
    """Convert a model between raekit, RAE v1, RAE v2 and diffusers.

    Example: raekit convert rae-dinov2-b rae-for-diffusers --to diffusers

    A decoder file or training checkpoint: raekit convert model.pt out --encoder dinov2-b --statistics stat.pt

    A denoiser with its autoencoder: raekit convert stage2_model.pt out --autoencoder rae-dinov2-b

    Args:
        source: a published name, a YAML, a file of weights, a diffusers folder, a raekit model, OWNER/NAME.
        dest: the folder to write, new or empty.
        to: the format to write: raekit, v1 (the official files) or diffusers (an AutoencoderRAE). v1 and diffusers
            contain only the autoencoder.
        encoder: for a decoder file, its encoder: a registered name, builtin:NAME, a folder, or FAMILY:WHERE for a
            transformers checkpoint.
        encoder_size: for a decoder file, the size to which the encoder resizes images, in pixels: the side of a
            square, or height and width. Default: the encoder's own size.
        layers: for a decoder file, the encoder layers that form the latents, as in RAE v2. Default: only the last.
        statistics: for a decoder file, the file with the mean and variance of the latents. Default: no whitening.
        decoder_config: for a decoder file of an unpublished size, the decoder's config.json or its folder.
        output: for a decoder file, the colours that the decoder produces: pixels for RAE v2.
        denoiser_config: for a denoiser file whose shapes leave the architecture open, a YAML with a stage_2 section.
        prediction: for a denoiser file, the quantity that it predicts. Default: velocity for v1, data for v2.
        autoencoder: for a denoiser file, the autoencoder to include, in any form that SOURCE accepts.
    """
    from raekit.formats import conversion
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
        line = f"{dest}: encoder {found.config.encoder}, latents {size}, a decoder of {numbers:,} parameters"
        console.out.print(line)
    if made := parts.denoiser:
        size, numbers = (
            "x".join(map(str, made.config.latent_shape)),
            sum(value.numel() for value in made.state.values()),
        )
        classes = made.config.num_classes
        line = f"{dest}: a denoiser of {numbers:,} parameters for latents {size}, {classes} classes"
        console.out.print(line)


def info(name: Positional[str], reach: tuple[str, float] | None = None) -> None:
    """Describe a model, an artifact or a run.

    Example: raekit info builtin:emoji

    Args:
        name: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        reach: for a run, a metric and a value, for example evaluation/fid 2. Also report the number of epochs
            until the metric first fell to the value or below.
    """
    from raekit.stages.inspection import describe_folder

    console.out.print(describe_folder(name, reach))
