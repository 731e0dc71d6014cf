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
) -> None:
    """Convert an autoencoder from or to the published formats and diffusers' AutoencoderRAE.

    Example: raekit convert rae-dinov2-b rae-for-diffusers --to diffusers
    A decoder or training checkpoint: raekit convert model.pt out --encoder dinov2-b --statistics stat.pt

    Args:
        source: a published name, a YAML, a decoder or checkpoint file, a diffusers folder, a raekit model, OWNER/NAME.
        dest: the folder to write, new or empty.
        to: raekit; v1, the official files (model.pt, stat.pt, config.yaml); diffusers, an AutoencoderRAE.
        encoder: of a decoder file, a registered name or a folder.
        encoder_size: of a decoder file, side that the encoder resizes to, or height and width. Default: its own.
        layers: of a decoder file, the layers of RAE v2 that its latents are made of. Default: the last alone.
        statistics: of a decoder file, the file of its latents' mean and variance. Default: not whitened.
        decoder_config: of a decoder file of no published size, its config.json or the folder of it.
        output: of a decoder file, what the decoder gives; pixels for RAE v2.
    """
    from raekit import conversion
    from raekit.models.encoders import LAYERS, LayersConfig

    options = conversion.FileOptions(
        encoder=encoder,
        encoder_size=encoder_size,
        layers=LAYERS[layers] if layers else LayersConfig(),
        statistics=statistics,
        decoder_config=decoder_config,
        output=output,
    )
    parts = conversion.convert(source, dest, to, options)
    size = "x".join(map(str, parts.var.shape))
    numbers = sum(value.numel() for value in parts.decoder.values())
    console.out.print(f"{dest}: encoder {parts.config.encoder}, latents {size}, a decoder of {numbers:,} parameters")


def info(name: Positional[str], reach: tuple[str, float] | None = None) -> None:
    """Tell what a model, an artifact or a run is.

    Example: raekit info builtin:emoji

    Args:
        name: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        reach: a metric of a run and a value, as in evaluation/fid 2: the epochs until it first was as low.
    """
    from raekit.inspection import describe_folder

    console.out.print(describe_folder(name, reach), markup=False)
