"""Open datasets by their address, `scheme:place`, with random access to (RGB image, label)."""

import os
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from raekit.data.archives import matching_files
from raekit.data.images import EXTENSIONS, files_below, real_path, skipped_in_words
from raekit.data.sources.base import Address, Source, Split, parse_address
from raekit.data.sources.emoji import Emoji
from raekit.data.sources.folders import open_flat, open_folder
from raekit.data.sources.huggingface import HuggingFace
from raekit.data.sources.idx import Idx
from raekit.data.sources.npz import NpzImages
from raekit.data.sources.zip_tar import Archived
from raekit.errors import UserError


def open_source(uri: str, split: Split = "train") -> Source:
    """Open the dataset at `uri`.

    Parts with the usual names are the splits: `train` or `training`, and the first of `validation`, `val`, `valid`,
    `dev`, `test` and `testing`. Append `?train=NAME,heldout=NAME` to the address for other names. A dataset without
    such parts holds out a tenth of its images, chosen by a hash of the relative path or the row number. Image files
    are sorted by path, and hidden files are skipped.

    Args:
        uri: the address of the dataset:

            - `emoji`: the built-in emoji, 64 x 64 pixels, nine classes. A tenth of the code points is held out.
            - `folder:DIR`: image files in one sub-folder for each class, or in DIR/train/CLASS and DIR/val/CLASS.
              Held-out images without class folders, as in ImageNet's `val`, need a label list (`label_lists`).
            - `flat:DIR`: all image files below DIR, without labels.
            - `tar:FILES`, `zip:FILES`: the image files in archives: one file, a folder of archives, or a pattern such
              as `shards/train-{000000..001023}.tar` or `shards/*.tar`. The classes come from WebDataset's `KEY.cls` or
              `KEY.json` (`label` or `cls`), from `dataset.json` as in EDM2, or from the folders in the archives.
            - `idx:DIR`: the four files of MNIST or Fashion-MNIST, gzipped or not. `t10k` is held out.
            - `hf:OWNER/NAME[:CONFIG][@REVISION]`, `hf:DIR`: a Hugging Face dataset on the Hub, saved to disk, or in a
              folder of parquet files. The images are in the first Image column, or in a column of structs, bytes or
              paths; the labels in the first ClassLabel column, or in a column `label` of numbers or names.
            - `npz:FILE`: uint8 images (N, H, W, 3) in `arr_0` and optional labels (N,) in `arr_1`, as ADM writes
              samples. Random access to a compressed file is slow.
        split: the part to open: `train`, `heldout` or `all`. `all` has both splits.

    Raises:
        UserError: the address is unknown, nothing is there, or the split has no images.
    """
    address = parse_address(uri)
    if not is_address(uri):
        known = ", ".join(name + (f":{kind.place}" if kind.place else "") for name, kind in FORMATS.items())
        hint = (
            f"; for this folder, folder:{uri} (a sub-folder for each class) or flat:{uri}" if Path(uri).is_dir() else ""
        )
        raise UserError(f"data source {uri!r} is unknown: use one of {known}{hint}")
    kind = FORMATS[address.scheme]
    if address.splits and not kind.parts:
        raise UserError(f"data source {uri!r}: {address.scheme} has no named parts to use as splits; leave them out")
    if kind.place == "FILE" and not address.path.is_file():
        raise UserError(f"data source {uri!r}: there is no file {address.place}")
    if kind.place == "DIR" and not address.path.is_dir():
        raise UserError(f"data source {uri!r}: there is no folder {address.place}")
    source = kind.open(address, split)
    if not len(source):
        raise UserError(f"data source {uri!r} has no images in the split {split!r}; the split 'all' has every image")
    return source


def in_words(source: Source, uri: str, split: Split) -> str:
    """Return a line about an opened dataset, such as "folder:plants: 267 training and 33 held-out images in 3 classes".

    Args:
        source: the dataset.
        uri: its address.
        split: the part of it that is open.
    """
    if split == "heldout":
        line = f"{uri}: {len(source):,} held-out images"
    else:
        try:
            held_out = len(open_source(uri, "heldout"))
        except UserError:  # a small dataset without held-out images
            held_out = 0
        training = len(source) - (held_out if split == "all" else 0)
        line = f"{uri}: {training:,} training and {held_out:,} held-out images"
    if source.classes:
        line += f" in {len(source.classes)} classes"
    return line + (f", {skipped_in_words(source.skipped)}" if source.skipped else "")


def is_address(name: str) -> bool:
    """Return whether `name` is the address of a data source, as opposed to the name of a model."""
    _, scheme, place, _ = parse_address(name)
    return scheme in FORMATS and bool(place) == bool(FORMATS[scheme].place)


def absolute(uri: str) -> str:
    """Return the address `uri` with an absolute path, so that it means the same from any working folder."""
    address = parse_address(uri)
    if not address.place or (FORMATS[address.scheme].place == "DIR or OWNER/NAME" and not address.path.exists()):
        return uri
    return f"{address.scheme}:{address.path.absolute()}{uri[len(address.scheme) + 1 + len(address.place) :]}"


def stamp(uri: str) -> str:
    """Return 16 hexadecimal digits that change with the names, sizes and modification times of the files at `uri`."""
    address = parse_address(uri)
    place = address.path
    if not address.place:  # the built-in images have no files of their own
        files = []
    elif place.is_dir():
        files = [place / file for file in sorted(files_below(place))]
    else:
        files = matching_files(place)
    digest = blake2b(digest_size=8)
    for file in files:
        status = file.stat()
        name = os.path.relpath(file, place) if place.is_dir() else file.name
        digest.update(os.fsencode(name) + repr((status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


SIZED = 10_000  # files of a source whose sizes are read, because a file system of a cluster takes long for millions


def listing(uri: str) -> tuple[str, str] | None:
    """Return digests that identify the files of a source: of their names, and of their sizes.

    The digests do not depend on the path of the source or on times. In a folder of images only image files count. Of
    more than `SIZED` files, the sizes of `SIZED` evenly spread ones are read.

    Returns:
        Two digests of 16 hexadecimal digits; None if nothing is at the address.
    """
    address = parse_address(uri)
    scheme, place, found = address.scheme, address.path, list[Path]()
    if not address.place:  # the built-in images have no files of their own
        found = []
    elif place.is_dir():
        found = sorted(place / file for file in files_below(place))
        if scheme in ("folder", "flat"):
            found = [file for file in found if file.name.lower().endswith(EXTENSIONS)]
    elif not (found := sorted(matching_files(place))):
        return None
    # Without the path of the source; the files of a pattern may lie in several folders.
    if place.is_dir():
        known = [str(file.relative_to(place)) for file in found]
    else:
        known = [file.name for file in found] if found != [place] else [""]
    names, sizes = (blake2b(scheme.encode(), digest_size=8) for _ in range(2))
    names.update(b"\0".join(map(os.fsencode, known)))
    for file in found[:: max(-(-len(found) // SIZED), 1)]:
        sizes.update(f" {file.stat().st_size}".encode())
    return names.hexdigest(), sizes.hexdigest()


class Format(NamedTuple):
    """A kind of data source.

    Attributes:
        open: opens a source, given its address and the split.
        place: the type of path in the address: a folder, a file, files (one file, a folder or a pattern), a folder or a
            repository, or "".
        parts: whether the address may name the parts that are the splits.
    """

    open: Callable[[Address, Split], Source]
    place: Literal["", "DIR", "FILE", "FILES", "DIR or OWNER/NAME"]
    parts: bool = False


FORMATS = {
    "emoji": Format(Emoji, ""),
    "folder": Format(open_folder, "DIR", parts=True),
    "flat": Format(open_flat, "DIR", parts=True),
    "idx": Format(Idx, "DIR"),
    "hf": Format(HuggingFace, "DIR or OWNER/NAME", parts=True),
    "npz": Format(NpzImages, "FILE"),
    "zip": Format(Archived, "FILES", parts=True),
    "tar": Format(Archived, "FILES", parts=True),
}
"""The kinds of sources by the scheme of their address. To add a kind, write a module in this package and add a row."""


def is_copy(there: str, known: tuple[str | None, str | None], here: str) -> bool:
    """Return whether the data source `here` has the files that were at `there`, perhaps at another place.

    Args:
        there: the address of the files then.
        known: their digests (`listing`); None if they are not known.
        here: the address now.
    """
    then, now = parse_address(there), parse_address(here)
    return (then.scheme, then.splits) == (now.scheme, now.splits) and None not in known and listing(here) == known


def check_apart(out: Path, addresses: Iterable[str], option: str) -> None:
    """Raise UserError if pictures would be written to the folder of a data source, and so become images of it.

    Args:
        out: the folder or the file.
        addresses: the addresses of the data sources.
        option: the name of the setting that names `out`, for the error message.
    """
    for uri in addresses:
        address = parse_address(uri)
        inside = address.place and address.path.is_dir() and real_path(out).is_relative_to(real_path(address.path))
        if inside:
            raise UserError(
                f"{out}: lies in the folder of {uri}, so its pictures would become images of it; give a place "
                f"elsewhere ({option})"
            )
