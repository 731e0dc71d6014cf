"""`npz:FILE`: an array of images, as ADM writes samples."""

import math

import numpy as np
from PIL import Image

from raekit.data.archives import MAX_FILE, Npz
from raekit.data.images import UnreadableImage
from raekit.data.sources.base import MAX_CLASSES, Address, Split, in_split
from raekit.errors import UserError


class NpzImages:
    """The rows of an array of images, read at each access."""

    def __init__(self, address: Address, split: Split):
        path = address.path
        self.name, self._npz = address.uri, Npz(path)
        self.skipped: dict[str, int] = {}
        dtype, shape = self._npz.arrays.get("arr_0", (None, ()))
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            found = ", ".join(f"{name} {kind} {sizes}" for name, (kind, sizes) in self._npz.arrays.items())
            raise UserError(f"{path}: arr_0 must be images, uint8 (N, H, W, 3); the file holds {found or 'no arrays'}")
        if math.prod(shape[1:]) > MAX_FILE or shape[0] > 2**24:
            raise UserError(f"{path}: {shape[0]:,} images of {shape[1]} x {shape[2]} pixels are too many or too large")
        self._numbers = in_split([str(row) for row in range(shape[0])], split)
        labels = np.full(shape[0], -1)
        self.classes: tuple[str, ...] = ()
        kind, length = self._npz.arrays.get("arr_1", (None, ()))
        if kind is not None and math.prod(length) != shape[0]:
            raise UserError(
                f"{path}: arr_1 has shape {length}, and must have one label for each of {shape[0]:,} images"
            )
        if kind is not None:
            if kind.kind not in "iu":
                raise UserError(f"{path}: arr_1 has type {kind}, and must have the numbers of classes (integers)")
            labels = self._npz.read("arr_1").astype(np.int64).reshape(-1)
            if not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
                raise UserError(f"{path}: the labels in arr_1 must be from 0 to {MAX_CLASSES - 1:,}")
            self.classes = tuple(map(str, range(int(labels.max()) + 1)))
        elif alike := [
            name for name, (kind, sizes) in self._npz.arrays.items() if kind.kind in "iu" and sizes == shape[:1]
        ]:
            raise UserError(
                f"{path}: there are no labels in arr_1, but {alike[0]} has a number for each image; name it arr_1 if "
                "they are the classes, or leave it out"
            )
        self.labels = labels[self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number = int(self._numbers[index])
        try:
            return Image.fromarray(self._npz.row("arr_0", number)), int(self.labels[index])
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"{self.name} row {number}", str(error)) from None
