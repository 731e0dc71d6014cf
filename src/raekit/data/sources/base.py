"""The interface of a data source, its address, and how a source is divided into splits."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from raekit.errors import UserError, some
from raekit.hub import expanded

Split = Literal["train", "heldout", "all"]

USUAL = {"train": ("train", "training"), "heldout": ("validation", "val", "valid", "dev", "test", "testing")}
"""The usual names of the parts of a dataset, by the split that each is read as. The first name that is found counts."""

MAX_CLASSES = 2**20
"""The largest number of classes."""

_SPLITS = re.compile(r"\?((?:train|heldout)=.*)$")


class Address(NamedTuple):
    """The address of a dataset, `SCHEME:PLACE` or `SCHEME:PLACE?train=NAME,heldout=NAME`.

    Attributes:
        uri: the complete address.
        scheme: the kind of source.
        place: the folder, file, pattern or repository.
        splits: the names of the parts that are the splits, if the address names them.
    """

    uri: str
    scheme: str
    place: str
    splits: dict[str, str]

    @property
    def path(self) -> Path:
        """The place as a path."""
        return expanded(self.place)


def parse_address(uri: str) -> Address:
    """Return the parts of an address.

    Raises:
        UserError: the splits are not of the form train=NAME,heldout=NAME.
    """
    found = _SPLITS.search(uri)
    scheme, _, place = (uri[: found.start()] if found else uri).partition(":")
    splits: dict[str, str] = {}
    for item in found[1].split(",") if found else ():
        split, _, name = item.partition("=")
        if split not in USUAL or not name or split in splits:
            raise UserError(f"splits {found[1]!r}: must be train=NAME, heldout=NAME, or both with a comma")  # type: ignore[index]
        if name in splits.values():
            raise UserError(f"splits {found[1]!r}: must be two different parts; held-out images are not for training")  # type: ignore[index]
        splits[split] = name
    return Address(uri, scheme, place, splits)


class Source(Protocol):
    """Images by index. A source can be pickled, so that every worker process gets a copy."""

    @property
    def name(self) -> str:
        """The address of the source."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in label order, the same for every split; empty if there are no labels."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """The labels of all images, int64 (N,), -1 for an image without a label. No image is decoded."""
        ...

    @property
    def skipped(self) -> dict[str, int]:
        """The number of images of all splits that are left out because their format is not read, by extension."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the RGB image and its label (-1 without a label).

        Raises:
            UnreadableImage: the image cannot be decoded.
        """
        ...


def in_split(keys: Sequence[str], split: Split) -> np.ndarray:
    """Return the indices of the `keys` in `split`. A hash of the key holds out a tenth."""
    if split == "all":
        return np.arange(len(keys))
    return np.flatnonzero(held_out(keys) == (split == "heldout"))


def held_out(keys: Iterable[str]) -> np.ndarray:
    """Return which of the `keys` are held out, bool (N,): a tenth, chosen by a hash of the key."""
    hashes = (blake2b(os.fsencode(key), digest_size=8).digest() for key in keys)
    return np.array([int.from_bytes(digest) % 10 == 0 for digest in hashes], bool)


def parts_of(names: Iterable[str], wanted: Mapping[str, str], place: object) -> dict[str, str]:
    """Return the parts of a dataset that are its splits.

    Names count as parts if they are `wanted`, if both a usual training name and a usual held-out name occur, or if
    all of them are usual names.

    Args:
        names: the names of the parts, such as folders.
        wanted: {split: name} if the user named the splits.
        place: the dataset, for the error message.

    Returns:
        {"train": name, "heldout": name}, with one entry if there is one part; empty if `names` are not splits.

    Raises:
        UserError: a wanted part does not exist.
    """
    names = sorted(set(names))
    if missing := [name for name in wanted.values() if name not in names]:
        raise UserError(f"{place}: has no part {missing[0]!r} to use as a split; its parts are {some(names) or 'none'}")
    if wanted:
        return dict(wanted)
    by_usual = {name.lower(): name for name in names}
    found = {
        split: by_usual[part] for split, usual in USUAL.items() if (part := next(filter(by_usual.get, usual), None))
    }
    known = [name for usual in USUAL.values() for name in usual]
    return found if len(found) == 2 or all(name in known for name in by_usual) else {}


def part_of_file(name: str, wanted: Mapping[str, str]) -> str:
    """Return the part of a dataset that a file of many images belongs to.

    Args:
        name: the path of the file, relative to the dataset.
        wanted: {split: name} if the user named the splits; a name may be a pattern.

    Returns:
        The wanted name that matches, the usual name of a split in the path, the top folder, or "".
    """
    *folders, file = name.split("/")
    for pattern in wanted.values():
        if fnmatch(name, pattern) or pattern in folders:
            return pattern
    usual = {part for names in USUAL.values() for part in names}
    words = [*(folder.lower() for folder in folders), *re.findall("[a-z]+", file.lower())]
    return next((word for word in words if word in usual), folders[0] if folders else "")


def class_name(folder: str) -> str:
    """Return the name of a folder's class. Macs decompose the accents in the names of files (NFD)."""
    return unicodedata.normalize("NFC", folder)


def check_classes(heldout: Iterable[str], train: Iterable[str], place: object) -> None:
    """Check that the held-out images have no other classes than the training images. Fewer are fine.

    Args:
        heldout: the classes of the held-out images.
        train: the classes of the training images.
        place: the dataset, for the error message.

    Raises:
        UserError: a class has held-out images only.
    """
    if unknown := sorted({*heldout} - {*train}):
        raise UserError(
            f"{place}: the held-out images have classes that no training image has: {some(unknown)}; rename these "
            "classes as in the training images, or add training images of them"
        )
