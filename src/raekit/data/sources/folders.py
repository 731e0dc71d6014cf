"""`folder:DIR` and `flat:DIR`: image files, in one sub-folder for each class or without classes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from raekit.data.images import EXTENSIONS, decode, image_files, log_once, stored_size
from raekit.data.sources.base import Address, Split, check_classes, class_name, in_split, parts_of
from raekit.data.sources.label_lists import find_labels
from raekit.errors import UserError


class Files:
    """Image files in a folder, decoded at each access."""

    def __init__(
        self,
        uri: str,
        folder: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        classes: tuple[str, ...],
        skipped: dict[str, int],
    ):
        self.name, self.classes, self.skipped = uri, classes, skipped
        self._folder = str(folder)
        # An array and not a list: reference counts would copy the pages of a million strings into every forked worker.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self._path(index)
        return decode(path, path), int(self.labels[index])

    def stored_size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image from its header."""
        path = self._path(index)
        return stored_size(path, path)

    def _path(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(self._paths[index]))


def open_flat(address: Address, split: Split) -> Files:
    """Open all image files below a folder, without labels. `all` has every image, also of parts that are no split."""
    folder = address.path
    paths, skipped = image_files(folder)
    if not paths:
        raise UserError(f"{folder}: no images found (supported extensions: {', '.join(EXTENSIONS)})")
    parts = _parts(address, paths)
    chosen = paths if split == "all" else _in_part(paths, parts, split)
    return Files(address.uri, folder, chosen, [-1] * len(chosen), (), skipped)


def open_folder(address: Address, split: Split) -> Files:
    """Open a folder with one sub-folder for each class, or with parts such as `train` and `val` that contain them.

    Held-out images without class folders, as in ImageNet's own `val`, get their classes from a label list.
    """
    folder = address.path
    paths, skipped = image_files(folder)
    parts = _parts(address, paths)
    depth = 1 if parts else 0
    tops = tuple(name + os.sep for name in parts.values())
    used = [path for path in paths if path.startswith(tops)] if parts else paths
    classed = [path for path in used if path.count(os.sep) > depth]
    if not classed:
        raise UserError(
            f"{folder}: no images found in class sub-folders (supported extensions: {', '.join(EXTENSIONS)}); "
            f"for images without classes, use flat:{folder}"
        )
    names = {path: class_name(path.split(os.sep)[depth]) for path in classed}
    classes = tuple(sorted(set(names.values())))
    heldout = parts.get("heldout", "") + os.sep
    if len(parts) == 2:
        trained = (name for path, name in names.items() if not path.startswith(heldout))
        check_classes(classes, trained, folder)
    if "train" in parts and not any(path.startswith(heldout) for path in classed):
        listed = [path for path in used if path.startswith(heldout)]
        if listed and split != "train":
            names |= find_labels(folder, parts["heldout"], listed, classes)
            classed = sorted(names)
    if loose := [path for path in used if path.count(os.sep) == depth and not path.startswith(heldout)]:
        message = "%s: leaves out the images in no class folder (%s, such as %s); move them into one to use them"
        log_once(logging.WARNING, message, str(folder), str(len(loose)), loose[0])
    number = {name: i for i, name in enumerate(classes)}
    chosen = classed if split == "all" else _in_part(classed, parts, split)
    return Files(address.uri, folder, chosen, [number[names[path]] for path in chosen], classes, skipped)


def _parts(address: Address, paths: Sequence[str]) -> dict[str, str]:
    return parts_of((path.split(os.sep)[0] for path in paths if os.sep in path), address.splits, address.path)


def _in_part(paths: list[str], parts: dict[str, str], split: Split) -> list[str]:
    """Return the paths of a split: of its folder, or chosen by a hash if the held-out images have no folder."""
    if "heldout" in parts:
        return [path for path in paths if split in parts and path.startswith(parts[split] + os.sep)]
    if "train" in parts:
        paths = [path for path in paths if path.startswith(parts["train"] + os.sep)]
    return [paths[i] for i in in_split(paths, split)]
