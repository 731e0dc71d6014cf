"""Open datasets by their address, `scheme:place`, with random access to (RGB image, label)."""

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from raekit.data.images import EXTENSIONS, files_below
from raekit.data.sources.base import Source, Split
from raekit.data.sources.emoji import Emoji
from raekit.data.sources.folders import open_flat, open_folder
from raekit.data.sources.huggingface import HuggingFace
from raekit.data.sources.idx import Idx
from raekit.data.sources.npz import NpzImages
from raekit.data.sources.zip_tar import Archived
from raekit.errors import UserError


def open_source(uri: str, split: Split = "train") -> Source:
    """Open the dataset at `uri`.

    A dataset without splits holds out a tenth of its images, chosen by a hash of the relative path or the row number.
    Image files are sorted by path, and hidden files are skipped.

    Args:
        uri: the address of the dataset:

            - `emoji`: the built-in emoji, 64 x 64 pixels, nine classes. A tenth of the code points is held out.
            - `folder:DIR`: image files in one sub-folder for each class. If DIR/train and DIR/val exist, they are the
              splits and contain the sub-folders.
            - `flat:DIR`: all image files below DIR, without labels.
            - `idx:DIR`: the four files of MNIST or Fashion-MNIST, gzipped or not. `t10k` is held out.
            - `hf:DIR`: a Hugging Face dataset saved to disk. The first Image column and the first ClassLabel column
              are read. The splits of a DatasetDict are `train` and the first of `validation`, `val` and `test`.
            - `npz:FILE`: uint8 images (N, H, W, 3) in `arr_0` and optional labels (N,) in `arr_1`, as ADM writes
              samples. Random access to a compressed file is slow.
            - `zip:FILE`, `tar:FILE`: all image files in an archive, without labels.
        split: the part to open: `train`, `heldout` or `all`.

    Raises:
        UserError: the address is unknown, nothing is there, or the split has no images.
    """
    scheme, _, place = uri.partition(":")
    if scheme not in FORMATS or bool(place) != bool(FORMATS[scheme].place):
        known = ", ".join(name + (f":{kind.place}" if kind.place else "") for name, kind in FORMATS.items())
        hint = (
            f"; for this folder, folder:{uri} (a sub-folder for each class) or flat:{uri}" if Path(uri).is_dir() else ""
        )
        raise UserError(f"data source {uri!r} is unknown: use one of {known}{hint}")
    path = Path(place).expanduser()
    if FORMATS[scheme].place == "FILE" and not path.is_file():
        raise UserError(f"data source {uri!r}: there is no file {place}")
    if FORMATS[scheme].place == "DIR" and not path.is_dir():
        raise UserError(f"data source {uri!r}: there is no folder {place}")
    source = FORMATS[scheme].open(uri, path, split)
    if not len(source):
        raise UserError(f"data source {uri!r} has no images in the split {split!r}; the split 'all' has every image")
    return source


def is_address(name: str) -> bool:
    """Return whether `name` is the address of a data source, as opposed to the name of a model."""
    scheme, _, place = name.partition(":")
    return scheme in FORMATS and bool(place) == bool(FORMATS[scheme].place)


def absolute(uri: str) -> str:
    """Return the address `uri` with an absolute path, so that it means the same from any working folder."""
    scheme, colon, place = uri.partition(":")
    return f"{scheme}:{Path(place).expanduser().absolute()}" if colon else uri


def stamp(uri: str) -> str:
    """Return 16 hexadecimal digits that change with the names, sizes and modification times of the files at `uri`."""
    place = Path(uri.partition(":")[2]).expanduser()
    files = files_below(place) if place.is_dir() else [""]
    digest = blake2b(digest_size=8)
    for file in sorted(files) if ":" in uri else ():
        status = (place / file).stat()
        digest.update(os.fsencode(file) + repr((status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


SIZED = 10_000  # files of a source whose sizes are read, because a file system of a cluster takes long for millions


def listing(uri: str) -> tuple[str, str] | None:
    """Return digests that identify the files of a source: of their names, and of their sizes.

    The digests do not depend on the path of the source or on times. In a folder of images only image files count. Of
    more than `SIZED` files, the sizes of `SIZED` evenly spread ones are read.

    Returns:
        Two digests of 16 hexadecimal digits; None if nothing is at the address.
    """
    scheme, _, where = uri.partition(":")
    place = Path(where).expanduser()
    if where and not place.exists():
        return None
    files = files_below(place) if place.is_dir() else [""]
    if scheme in ("folder", "flat"):
        files = [file for file in files if file.lower().endswith(EXTENSIONS)]
    files = sorted(files) if where else []  # the built-in images have no files of their own
    names, sizes = (blake2b(scheme.encode(), digest_size=8) for _ in range(2))
    names.update(b"\0".join(map(os.fsencode, files)))
    for file in files[:: max(-(-len(files) // SIZED), 1)]:
        sizes.update(f" {(place / file).stat().st_size}".encode())
    return names.hexdigest(), sizes.hexdigest()


class Format(NamedTuple):
    """A kind of data source.

    Attributes:
        open: opens a source, given its address, the path in the address, and the split.
        place: the type of path in the address: a folder, a file, or "" for no path.
    """

    open: Callable[[str, Path, Split], Source]
    place: Literal["", "DIR", "FILE"]


FORMATS = {
    "emoji": Format(Emoji, ""),
    "folder": Format(open_folder, "DIR"),
    "flat": Format(open_flat, "DIR"),
    "idx": Format(Idx, "DIR"),
    "hf": Format(HuggingFace, "DIR"),
    "npz": Format(NpzImages, "FILE"),
    "zip": Format(Archived, "FILE"),
    "tar": Format(Archived, "FILE"),
}
"""The kinds of sources by the scheme of their address. To add a kind, write a module in this package and add a row."""
