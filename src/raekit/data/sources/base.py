"""What a data source is, and how one without splits is split."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, Protocol

import numpy as np
from PIL import Image

Split = Literal["train", "heldout", "all"]


class Source(Protocol):
    """Images by index. A source can be pickled and holds no open file, so worker processes may share it."""

    @property
    def name(self) -> str:
        """The address that opened it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, the same for every split; () if unlabelled."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """The labels (N,) of all images, int64, read without decoding any; -1 where there is none."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and its label (-1 without one); raises UnreadableImage."""
        ...


def in_split(keys: Sequence[str], split: Split) -> np.ndarray:
    """Indices of the `keys` that belong to `split`; a tenth is held out, by a hash."""
    if split == "all":
        return np.arange(len(keys))
    hashes = (blake2b(os.fsencode(key), digest_size=8).digest() for key in keys)
    heldout = [int.from_bytes(digest) % 10 == 0 for digest in hashes]
    return np.flatnonzero(np.array(heldout, bool) == (split == "heldout"))
