"""Look at a dataset before training: how many images of which classes and sizes, near-duplicates, unreadable files."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raekit.data.images import UnreadableImage
from raekit.data.sources import in_words, open_source
from raekit.data.sources.base import Split
from raekit.data.transforms import center_crop
from raekit.evaluation.features import EncoderFeatures
from raekit.evaluation.manifold import TILE, squared_distances
from raekit.evaluation.streaming import BATCH
from raekit.models.encoders import load_encoder
from raekit.pictures import from_pil, grid
from raekit.progress import Progress, silent

SIDE, SHOWN = 96, 64
"""The side of an image in the montage in pixels, and the most images in it."""
TYPICAL = 1000
"""The most images that the median distance of two images is measured on."""
NEAR = 0.1
"""The distance of a near-duplicate from its original, as a share of the median distance of two images."""


@dataclass(frozen=True)
class Duplicate:
    """An image that is nearly the same as an earlier one.

    Attributes:
        image: its name.
        original: the name of the nearest earlier image.
        distance: the distance of their features, as a share of the median distance of two images of the dataset.
    """

    image: str
    original: str
    distance: float


@dataclass(frozen=True)
class Overview:
    """What a dataset contains.

    Attributes:
        about: a line with the numbers of images and classes (`in_words`).
        classes: the number of images of each class, in the order of the class ids; empty without labels.
        unlabelled: the number of images without a class.
        looked_at: the number of images that were decoded.
        sizes: width and height (looked_at - unreadable, 2) of the images in pixels.
        unreadable: the reason for each image that cannot be decoded, by its name.
        duplicates: the images that are nearly the same as an earlier one, the nearest first.
        montage: images from all over the dataset, cropped to squares; None if none can be read.
    """

    about: str
    classes: dict[str, int]
    unlabelled: int
    looked_at: int
    sizes: np.ndarray
    unreadable: dict[str, str]
    duplicates: list[Duplicate]
    montage: Image.Image | None


def look_at(
    uri: str, split: Split = "all", count: int = 1000, encoder: str | None = None, progress: Progress = silent
) -> Overview:
    """Return what a dataset contains. All labels are counted, and `count` images are decoded.

    Args:
        uri: the address of the dataset, see `open_source`.
        split: the part to look at.
        count: the number of images to decode, evenly spread over the dataset.
        encoder: the encoder to find near-duplicates with, see `load_encoder`. None: do not look for them.
        progress: receives the progress.

    Raises:
        UserError: the address is unknown, nothing is there, or there is no such encoder.
    """
    source = open_source(uri, split)
    network = EncoderFeatures(load_encoder(encoder)) if encoder else None
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    shown = {*chosen[np.linspace(0, len(chosen) - 1, min(SHOWN, len(chosen))).round().astype(int)].tolist()}
    sizes, unreadable, squares, names = [], {}, [], []
    features, waiting = list[Tensor](), list[Tensor]()
    for number, index in enumerate(chosen.tolist()):
        try:
            image, _ = source[index]
        except UnreadableImage as error:
            unreadable[error.path] = error.reason
        else:
            sizes.append(image.size)
            names.append(image.info.get("name", f"image {index}"))
            if index in shown:
                squares.append(center_crop(image, SIDE))
            if network:
                waiting.append(from_pil(center_crop(image, max(network.encoder.input_size))))
        if network and waiting and (len(waiting) == BATCH or number == len(chosen) - 1):
            features.append(network(torch.stack(waiting)))
            waiting.clear()
        progress("look", number + 1, len(chosen))
    labels = Counter(source.labels.tolist())
    return Overview(
        about=in_words(source, uri, split),
        classes={name: labels[number] for number, name in enumerate(source.classes)},
        unlabelled=labels[-1],
        looked_at=len(chosen),
        sizes=np.array(sizes, int).reshape(-1, 2),
        unreadable=unreadable,
        duplicates=near_duplicates(torch.cat(features), names) if features else [],
        montage=grid(squares) if squares else None,
    )


def near_duplicates(features: Tensor, names: list[str]) -> list[Duplicate]:
    """Return the images whose features are nearly the same as the features of an earlier image.

    Args:
        features: the features (N, D) of the images.
        names: the names of the images.
    """
    few = features[torch.linspace(0, len(features) - 1, min(len(features), TYPICAL)).round().long()]
    between = squared_distances(few, few)[tuple(torch.triu_indices(len(few), len(few), 1))]
    typical = between.median().sqrt().item() if len(between) else 0.0
    found = []
    for start in range(0, len(features), TILE):
        rows = features[start : start + TILE]
        best = torch.full([len(rows)], torch.inf, dtype=torch.float64)
        originals = torch.zeros(len(rows), dtype=torch.int64)
        for first in range(0, start + len(rows), TILE):
            others = features[first : min(first + TILE, start + len(rows))]
            earlier = torch.arange(first, first + len(others)) < torch.arange(start, start + len(rows))[:, None]
            near = squared_distances(rows, others).sqrt().where(earlier, torch.inf).min(1)
            originals = torch.where(near.values < best, near.indices + first, originals)
            best = torch.minimum(best, near.values)
        for row in (best <= NEAR * typical).nonzero().flatten().tolist():
            distance = best[row].item() / (typical or 1)
            found.append(Duplicate(names[start + row], names[int(originals[row])], distance))
    return sorted(found, key=lambda each: each.distance)
