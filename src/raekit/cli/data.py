"""Commands about datasets."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.launch import processes
from raekit.errors import whole_number
from raekit.files import check_file, check_folder
from raekit.progress import Display

if TYPE_CHECKING:
    from raekit.evaluation.overview import Overview

MOST = 20
"""The most rows of a table."""


def data(
    source: Positional[str],
    split: Literal["train", "heldout", "all"] = "all",
    count: int = 1000,
    encoder: str | None = "builtin:vit-tiny",
    out: Path | None = None,
) -> None:
    """Look at a dataset: classes, sizes, unreadable images, near-duplicates, montage.

    Example: raekit data folder:images --out montage.png

    To scale a large dataset once, use `raekit data pack`.

    Args:
        source: Images: emoji, folder:DIR, hf:OWNER/NAME, tar:FILES and others (docs/data.md).
        split: Split of the data source.
        count: Number of images to decode and to compare, evenly spread over the dataset.
        encoder: Encoder that finds near-duplicates, such as dinov2-b. An image is a near-duplicate if the distance of
            its features to an earlier image is below a tenth of the median distance of two images. None: do not look
            for near-duplicates.
        out: Output file (.png) for a montage of up to 64 images. None: no montage.
    """
    from raekit.data.sources import check_apart
    from raekit.evaluation.overview import look_at
    from raekit.files import whole

    whole_number("--count", count, 1)
    if out:
        check_file(out, ".png")
        check_apart(out, [source], "--out")
    with Display(console.err) as progress:
        found = look_at(source, split, count, encoder, progress)
    unlabelled = f", {found.unlabelled:,} without a class" if found.classes and found.unlabelled else ""
    console.out.print(found.about + unlabelled)
    _print_classes(found)
    if len(found.sizes):
        table = Table(f"of {found.looked_at:,} images", "smallest", "median", "largest", box=None)
        sides = {"width": found.sizes[:, 0], "height": found.sizes[:, 1], "short side": found.sizes.min(1)}
        for name, values in sides.items():
            ordered = sorted(values.tolist())
            table.add_row(name, *(f"{each:,}" for each in (ordered[0], ordered[len(ordered) // 2], ordered[-1])))
        console.out.print(table)
    console.out.print(f"{len(found.unreadable)} of {found.looked_at:,} images cannot be read")
    for name, reason in [*found.unreadable.items()][:MOST]:
        console.out.print(f"  {name}: {reason}")
    if encoder:
        console.out.print(f"{len(found.duplicates)} of {found.looked_at:,} images nearly equal an earlier image")
        for each in found.duplicates[:MOST]:
            console.out.print(f"  {each.image} = {each.original} ({each.distance:.1%} of the median distance)")
    if out and found.montage:
        with whole(out) as partial:
            found.montage.save(partial, format="PNG")
        console.out.print(f"montage: {out}")


def _print_classes(found: "Overview") -> None:
    """Print the number of images of each class; of many classes, the smallest and the largest."""
    rows = sorted(found.classes.items(), key=lambda row: -row[1])
    cut = len(rows) > MOST
    if cut:
        rows = rows[: MOST // 2] + rows[-MOST // 2 :]
    table = Table("class" + (" (largest and smallest)" if cut else ""), "images", box=None)
    for name, number in rows:
        table.add_row(name, f"{number:,}")
    if rows:
        console.out.print(table)


def data_pack(
    source: Positional[str],
    size: int,
    out: Path,
    format: Literal["jpeg", "png"] = "jpeg",
    quality: int = 95,
    shard_size: int = 1000,
    max_unreadable: float = 0.01,
    workers: int = 0,
) -> None:
    """Pack a dataset into tar shards of images that are scaled once.

    Example: raekit data pack folder:imagenet --size 256 --out imagenet256 --workers 8

    Then train with --data.source tar:imagenet256. Each epoch decodes smaller images. Complete shards are kept, so the
    same command resumes after an interruption. Under torchrun the processes divide the shards among them. Check copies
    of the folder with `sha256sum -c SHA256SUMS`.

    Args:
        source: Images: folder:DIR, hf:OWNER/NAME, tar:FILES and others (docs/data.md).
        size: Short side in pixels that larger images are scaled to, with the filters of ADM's crop. Smaller images keep
            their size.
        out: Output folder: a new folder, or the folder of the interrupted command.
        format: Format of the images: JPEG without chroma subsampling, or PNG without loss.
        quality: Quality of JPEGs, from 1 to 100.
        shard_size: Number of images in a shard.
        max_unreadable: Fraction of the images, from 0 to 1, that may be unreadable. Unreadable images are left out.
        workers: Number of processes that decode and encode images. 0: only the main process.
    """
    from raekit.data.packing import pack
    from raekit.distributed.locks import lock

    check_folder(out)
    with (
        processes("cpu", resumable=True) as here,
        lock(out, here),
        Display(console.err, quiet=not here.is_main) as progress,
    ):
        done = pack(
            source,
            size,
            out,
            format=format,
            quality=quality,
            shard_size=shard_size,
            max_unreadable=max_unreadable,
            workers=workers,
            world=here,
            progress=progress,
        )
    if here.is_main:
        counts = ", ".join(f"{count:,} images in the split {split}" for split, count in done.images.items())
        megabytes = sum(path.stat().st_size for path in out.glob("*.tar")) / 2**20
        left_out = f"; {done.left_out:,} unreadable images were left out" if done.left_out else ""
        console.out.print(
            f"{out}: {counts}; {done.shards} shards, {megabytes:,.1f} MiB{left_out}. Read it as tar:{out}", markup=False
        )
