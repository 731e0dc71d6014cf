"""Commands that use a trained autoencoder."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.sampling import dtype_of
from raekit.errors import UserError
from raekit.progress import Display

if TYPE_CHECKING:
    from raekit.inference.reconstruction_folders import Reconstructions


def reconstruct(
    model: Positional[str],
    paths: Positional[tuple[Path, ...]],
    out: Path,
    fit: Literal["crop", "pad"] = "crop",
    lpips: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 32,
    device: Device | None = None,
) -> None:
    """Encode and decode images, and score what comes back: PNGs, scores.csv, scores.json, contact-sheet.png.

    Example: raekit reconstruct builtin:emoji photo.jpg holidays --out reconstructions
    The same command goes on where it stopped: what is there is kept, unless the model, an option or the
    original has changed.

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        paths: image files, and folders with whatever is below them.
        out: folder for the results, another than the originals'.
        fit: to the model's square, cut to the middle, or padded with white.
        lpips: score LPIPS too, with VGG16's weights from this file; auto: from torchvision's cache or the Hub.
        precision: the type that the model is loaded and computes in.
        batch_size: images at once.
        device: default is the best there is.
    """
    from raekit.distributed import world
    from raekit.evaluation.pairs import reconstruction_metrics
    from raekit.inference.reconstruction_folders import reconstruct_folder
    from raekit.models.autoencoder import load_autoencoder

    if not paths:
        raise UserError("reconstruct: give at least one image file or folder")
    with world(device) as here, Display(console.err) as progress:
        if here.size > 1:
            raise UserError("reconstruct: works in one process, not under torchrun")
        autoencoder = load_autoencoder(model, dtype_of(precision)).to(here.device)
        metrics = reconstruction_metrics(lpips, here.device)
        results = reconstruct_folder(
            autoencoder, paths, out, fit=fit, batch_size=batch_size, metrics=metrics, progress=progress
        )
    if results.pictures:
        console.out.print(_reconstructions_table(results))
        console.out.print(f"{len(results.pictures)} images: {out}")
    console.fail_for(results.unreadable, len(results.pictures))


def encode(
    model: Positional[str],
    paths: Positional[tuple[Path, ...]],
    out: Path,
    fit: Literal["crop", "pad"] = "crop",
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 32,
    shard_size: int = 512,
    device: Device | None = None,
) -> None:
    """Write the whitened latents of images as safetensors, with what they are of; raekit.read_latents reads them.

    Example: raekit encode builtin:emoji holidays --out latents
    In a folder, shards that are there and would become the same are kept.

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        paths: image files, and folders with whatever is below them.
        out: a .safetensors file, or a folder for shards.
        fit: to the model's square, cut to the middle, or padded with white.
        precision: the type that the model is loaded and computes in.
        batch_size: images at once.
        shard_size: images in a shard, held in memory until it is written.
        device: default is the best there is.
    """
    from raekit.distributed import world
    from raekit.inference.latents import encode_files
    from raekit.models.autoencoder import load_autoencoder

    if not paths:
        raise UserError("encode: give at least one image file or folder")
    with world(device) as here, Display(console.err) as progress:
        if here.size > 1:
            raise UserError("encode: works in one process, not under torchrun")
        autoencoder = load_autoencoder(model, dtype_of(precision)).to(here.device)
        encoded, unreadable = encode_files(
            autoencoder,
            model,
            paths,
            out,
            fit=fit,
            batch_size=batch_size,
            shard_size=shard_size,
            progress=progress,
        )
    console.out.print(f"{encoded} images: {out}")
    console.fail_for(unreadable, encoded)


def _reconstructions_table(results: "Reconstructions") -> Table:
    """A row for each of the first pictures, and the means."""
    means = results.means()
    table = Table("image", *means)
    for picture in results.pictures[:20]:
        table.add_row(str(picture.output), *(f"{picture.scores[name]:.4g}" for name in means))
    if (more := len(results.pictures) - 20) > 0:
        table.add_row(f"and {more} more", *("" for _ in means))
    table.add_row("mean", *(f"{value:.4g}" for value in means.values()))
    return table
