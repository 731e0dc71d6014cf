"""Look at a dataset before training: how many images of which classes and sizes, and what cannot be read."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from raekit.data.images import UnreadableImage
from raekit.data.sources import open_source
from raekit.data.sources.base import Split
from raekit.data.transforms import center_crop
from raekit.pictures import grid
from raekit.progress import Progress, silent

SIDE, SHOWN = 96, 64
"""The side of an image in the montage in pixels, and the most images in it."""


@dataclass(frozen=True)
class Overview:
    """What a dataset contains.

    Attributes:
        images: the number of images.
        classes: the number of images of each class, in the order of the class ids; empty without labels.
        unlabelled: the number of images without a class.
        skipped: the number of images in formats that are not read, by extension.
        looked_at: the number of images that were decoded.
        sizes: width and height (looked_at - unreadable, 2) of the images in pixels.
        unreadable: the reason for each image that cannot be decoded, by its name.
        montage: images from all over the dataset, cropped to squares; None if none can be read.
    """

    images: int
    classes: dict[str, int]
    unlabelled: int
    skipped: dict[str, int]
    looked_at: int
    sizes: np.ndarray
    unreadable: dict[str, str]
    montage: Image.Image | None


def look_at(uri: str, split: Split = "all", count: int = 1000, progress: Progress = silent) -> Overview:
    """Return what a dataset contains. All labels are counted, and `count` images are decoded.

    Args:
        uri: the address of the dataset, see `open_source`.
        split: the part to look at.
        count: the number of images to decode, evenly spread over the dataset.
        progress: receives the progress.

    Raises:
        UserError: the address is unknown, or nothing is there.
    """
    source = open_source(uri, split)
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    shown = {*chosen[np.linspace(0, len(chosen) - 1, min(SHOWN, len(chosen))).round().astype(int)].tolist()}
    sizes, unreadable, squares = [], {}, []
    for number, index in enumerate(chosen.tolist()):
        try:
            image, _ = source[index]
        except UnreadableImage as error:
            unreadable[error.path] = error.reason
        else:
            sizes.append(image.size)
            if index in shown:
                squares.append(center_crop(image, SIDE))
        progress("look", number + 1, len(chosen))
    labels = Counter(source.labels.tolist())
    return Overview(
        images=len(source),
        classes={name: labels[number] for number, name in enumerate(source.classes)},
        unlabelled=labels[-1],
        skipped=source.skipped,
        looked_at=len(chosen),
        sizes=np.array(sizes, int).reshape(-1, 2),
        unreadable=unreadable,
        montage=grid(squares) if squares else None,
    )
