"""`folder:DIR` and `flat:DIR`: image files, in one sub-folder for each class or without classes."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from raekit.data.images import EXTENSIONS, decode, image_files
from raekit.data.sources.base import Split, in_split
from raekit.errors import UserError


class Files:
    """Image files in a folder, decoded at each access."""

    def __init__(self, uri: str, folder: Path, paths: list[str], labels: list[int], classes: tuple[str, ...]):
        self.name, self.classes = uri, classes
        self._folder = str(folder)
        # An array and not a list: reference counts would copy the pages of a million strings into every forked worker.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = os.path.join(self._folder, os.fsdecode(self._paths[index]))
        return decode(path, path), int(self.labels[index])


def open_flat(uri: str, folder: Path, split: Split) -> Files:
    """Open all image files below `folder`, without labels."""
    paths = image_files(folder)
    if not paths:
        raise UserError(f"{folder}: no images found (supported extensions: {', '.join(EXTENSIONS)})")
    chosen = in_split(paths, split)
    return Files(uri, folder, [paths[i] for i in chosen], [-1] * len(chosen), ())


def open_folder(uri: str, folder: Path, split: Split) -> Files:
    """Open `folder`, with one sub-folder for each class. If `train` and `val` exist, they are the splits."""
    paths = [path for path in image_files(folder) if os.sep in path]
    train, heldout = f"train{os.sep}", f"val{os.sep}"
    has_splits = (folder / train).is_dir() and (folder / heldout).is_dir()
    if has_splits:
        paths = [path for path in paths if path.startswith((train, heldout)) and path.count(os.sep) > 1]
        top = {"train": train, "heldout": heldout, "all": ""}[split]
        chosen = [path for path in paths if path.startswith(top)]
    else:
        chosen = [paths[i] for i in in_split(paths, split)]
    if not paths:
        raise UserError(
            f"{folder}: no images found in class sub-folders (supported extensions: {', '.join(EXTENSIONS)}); "
            f"for images without classes, use flat:{folder}"
        )
    depth = 1 if has_splits else 0
    classes = tuple(sorted({path.split(os.sep)[depth] for path in paths}))
    label = {name: number for number, name in enumerate(classes)}
    return Files(uri, folder, chosen, [label[path.split(os.sep)[depth]] for path in chosen], classes)
