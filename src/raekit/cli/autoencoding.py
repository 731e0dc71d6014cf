"""Commands that encode and reconstruct images."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.launch import processes
from raekit.cli.sampling import dtype_of
from raekit.errors import UserError
from raekit.files import check_file
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
    """Encode and decode images, and write the reconstructions with their scores.

    Example: raekit reconstruct builtin:emoji photo.jpg holidays --out reconstructions

    The output folder gets a PNG file for each image, scores.csv, scores.json, and contact-sheet.png with originals
    above their reconstructions. The same command resumes after an interruption: reconstructions are kept unless the
    model, an option or the original has changed.

    Args:
        model: Autoencoder to use: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        paths: Image files, and folders to search for images.
        out: Output folder. It must not contain the original images.
        fit: How to make an image square. crop: cut out the middle; pad: add white borders.
        lpips: VGG16 weights for LPIPS: a file, or auto (torchvision's cache or the Hub). None: no LPIPS score.
        precision: Precision that the model is loaded and computes in.
        batch_size: Number of images to process at once.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.distributed.locks import lock
    from raekit.evaluation.pairs import reconstruction_metrics
    from raekit.inference.reconstruction_folders import reconstruct_folder
    from raekit.models.autoencoder import load_autoencoder

    if not paths:
        raise UserError("reconstruct: give at least one image file or folder")
    with processes(device, "reconstruct", resumable=True) as here, lock(out, here), Display(console.err) as progress:
        autoencoder = load_autoencoder(model, dtype_of(precision)).to(here.device)
        metrics = reconstruction_metrics(lpips, here.device)
        results = reconstruct_folder(
            autoencoder, paths, out, fit=fit, batch_size=batch_size, metrics=metrics, progress=progress
        )
    if results.pictures:
        _print_scores(results)
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
    """Write the whitened latents of images to safetensors files.

    Example: raekit encode builtin:emoji holidays --out latents

    The files also record the model and the paths of the images. `raekit.read_latents` reads them. In a folder, existing
    shards are kept unless the model, an option or an image has changed, so the same command resumes after an
    interruption. A folder with latents of other images is an error.

    Args:
        model: Autoencoder to use: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        paths: Image files, and folders to search for images.
        out: A .safetensors file for at most SHARD_SIZE images, or a folder for shards.
        fit: How to make an image square. crop: cut out the middle; pad: add white borders.
        precision: Precision that the model is loaded and computes in.
        batch_size: Number of images to process at once.
        shard_size: Number of images in a shard. One shard is held in memory until it is written.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.distributed.locks import lock
    from raekit.inference.latents import encode_files
    from raekit.models.autoencoder import load_autoencoder

    if not paths:
        raise UserError("encode: give at least one image file or folder")
    single = out.suffix.lower() == ".safetensors"
    if single:
        check_file(out)
    with (
        processes(device, "encode", resumable=not single) as here,
        nullcontext() if single else lock(out, here),
        Display(console.err) as progress,
    ):
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


def _print_scores(results: "Reconstructions") -> None:
    """Print a table of the scores of the first pictures, and the means of all."""
    means = results.means()
    rows = [[str(p.output), *(f"{p.scores[name]:.4g}" for name in means)] for p in results.pictures[:20]]
    if (more := len(results.pictures) - 20) > 0:
        rows.append([f"and {more} more", *("" for _ in means)])
    console.print_table(["image", *means], [*rows, ["mean", *(f"{value:.4g}" for value in means.values())]])
