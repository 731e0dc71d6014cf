"""The interface of a data source, and the split of a source that has no splits."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, Protocol

import numpy as np
from PIL import Image

Split = Literal["train", "heldout", "all"]


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
    hashes = (blake2b(os.fsencode(key), digest_size=8).digest() for key in keys)
    heldout = [int.from_bytes(digest) % 10 == 0 for digest in hashes]
    return np.flatnonzero(np.array(heldout, bool) == (split == "heldout"))
