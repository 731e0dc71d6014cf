"""Where images come from: random access to (RGB image, label) behind one address, `scheme:place`."""

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from raekit.data.images import files_below
from raekit.data.sources.base import Source, Split
from raekit.data.sources.emoji import Emoji
from raekit.data.sources.folders import open_flat, open_folder
from raekit.data.sources.huggingface import HuggingFace
from raekit.data.sources.idx import Idx
from raekit.data.sources.npz import NpzImages
from raekit.data.sources.zip_tar import Archived
from raekit.errors import UserError


def open_source(uri: str, split: Split = "train") -> Source:
    """Open the images at `uri`:

    - `emoji`: the built-in emoji, 64 x 64, nine classes; held out is a tenth of the code points.
    - `folder:DIR`: a sub-folder for each class. The splits are DIR/train and DIR/val where both exist.
    - `flat:DIR`: unlabelled, everything below DIR.
    - `idx:DIR`: the four files of MNIST and its likes, gzipped or not; held out is `t10k`.
    - `hf:DIR`: a Hugging Face dataset saved on disk, its first Image column and its ClassLabel column. Of a
      DatasetDict, the splits are `train` and the first of `validation`, `val`, `test`.
    - `npz:FILE`: uint8 images (N, H, W, 3) in `arr_0`, as ADM writes samples, with labels (N,) in `arr_1` if there
      are any. Compressed ones are slow to read in any other order than their own.
    - `zip:FILE`, `tar:FILE`: unlabelled, all images in it, in the order of their names.

    Where there are no splits, held out is a tenth of the images, by a hash of the path within DIR or of the
    row's number. Folders are read in the order of their names; hidden files are left out.

    Raises UserError if there is no such place, or no image in it.
    """
    scheme, _, place = uri.partition(":")
    if scheme not in FORMATS or bool(place) != bool(FORMATS[scheme].place):
        known = ", ".join(name + (f":{kind.place}" if kind.place else "") for name, kind in FORMATS.items())
        raise UserError(f"data source {uri!r} is unknown: use one of {known}")
    path = Path(place).expanduser()
    if FORMATS[scheme].place == "FILE" and not path.is_file():
        raise UserError(f"data source {uri!r}: there is no file {place}")
    if FORMATS[scheme].place == "DIR" and not path.is_dir():
        raise UserError(f"data source {uri!r}: there is no folder {place}")
    source = FORMATS[scheme].open(uri, path, split)
    if not len(source):
        raise UserError(f"data source {uri!r} has no image in its split {split!r}; its split 'all' has every image")
    return source


def is_address(name: str) -> bool:
    """Return whether `name` has the form of a data source's address, and not of a model's name."""
    scheme, _, place = name.partition(":")
    return scheme in FORMATS and bool(place) == bool(FORMATS[scheme].place)


def absolute(uri: str) -> str:
    """Return the address `uri` with an absolute path, so that it means the same from any working folder."""
    scheme, colon, place = uri.partition(":")
    return f"{scheme}:{Path(place).expanduser().absolute()}" if colon else uri


def stamp(uri: str) -> str:
    """16 digits that change with the files at `uri`: their names, sizes and times, without reading them."""
    place = Path(uri.partition(":")[2]).expanduser()
    files = files_below(place) if place.is_dir() else [""]
    digest = blake2b(digest_size=8)
    for file in sorted(files) if ":" in uri else ():
        status = (place / file).stat()
        digest.update(os.fsencode(file) + repr((status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


class Format(NamedTuple):
    """How to open one kind of source: `open(uri, path, split)`, and what its address names."""

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
"""The kinds of sources by the scheme of their address. A new one is a module beside these and a row here."""
