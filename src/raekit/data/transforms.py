"""Turn the pixels of any image file into square RGB images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

_UPRIGHT = {  # EXIF orientation -> the transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TO_8_BITS = [(level + 128) // 257 for level in range(65536)]


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as 8-bit RGB.

    The image is turned upright by its EXIF orientation, transparency becomes white, and 16-bit grey is scaled to 8
    bits. Pillow reads only the upper 8 bits of a 16-bit colour image. An animation gives its first frame.

    Raises:
        ValueError: the pixels have no known range (floating point, or integers beyond 16 bits).
        Exception: the file is damaged. Pillow raises many types of exception.
    """
    image.load()  # some formats store the orientation after the pixels
    # ImageOps.exif_transpose also rewrites the EXIF data, and fails on the damaged EXIF that some cameras write.
    upright = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":  # converting would copy
        image = image.convert("RGB")
    return image if upright is None else image.transpose(upright)


def _from_16_bits(image: Image.Image) -> Image.Image:
    image = image.convert("I")  # also from big-endian pixels, which give no extrema
    low, high = image.getextrema()
    if low < 0 or high > 65535:  # type: ignore[operator]
        raise ValueError("integer pixels beyond 16 bits have no known range")
    grey = image.point(_TO_8_BITS, "L")
    transparent = grey.info.pop("transparency", None)  # a 16-bit level
    if transparent is not None:
        grey.putalpha(image.point([255 * (level != transparent) for level in range(65536)], "L"))
    return grey


@dataclass(frozen=True)
class Window:
    """A square part of an image that is still to be scaled.

    Attributes:
        image: the RGB image.
        sides: the width and height to scale the complete image to.
        corner: the left and top side of the square in the scaled image.
        size: the side of the square.
    """

    image: Image.Image
    sides: tuple[int, int]
    corner: tuple[int, int]
    size: int

    def exact(self) -> Image.Image:
        """Scale the image with Pillow's bicubic filter, as ADM does, and return the square."""
        left, top = self.corner
        scaled = self.image.resize(self.sides, Image.Resampling.BICUBIC)
        return scaled.crop((left, top, left + self.size, top + self.size))

    def fast(self) -> np.ndarray:
        """Return the pixels of `exact` as uint8 (3, S, S), in less time.

        The filter is the same. Values differ by at most 1, and by more only where the filter overshoots black or white.
        Pillow can scale only the part that is kept. If that is more than half of the image, torch is faster, although
        it scales the complete image.
        """
        if self.image.size == self.sides:  # nothing to scale
            return np.asarray(self.exact()).transpose(2, 0, 1)
        (width, height), (left, top), size = self.sides, self.corner, self.size
        if 2 * size * size <= width * height:
            x, y = self.image.width / width, self.image.height / height
            box = (left * x, top * y, (left + size) * x, (top + size) * y)
            square = self.image.resize((size, size), Image.Resampling.BICUBIC, box=box)
            return np.asarray(square).transpose(2, 0, 1)
        pixels = torch.from_numpy(np.array(self.image)).permute(2, 0, 1)[None]
        scaled = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
        return scaled[:, top : top + size, left : left + size].numpy()


def center_window(image: Image.Image, size: int) -> Window:
    """Return the central square of `image` after its short side is scaled to `size`, as ADM does.

    A box filter halves the image while its short side is at least twice `size`. A bicubic filter then scales it to
    the rounded final size (guided-diffusion, `image_datasets.py`).
    """
    image, (width, height) = _halved(_shorten(image), size, min)
    return Window(image, (width, height), ((width - size) // 2, (height - size) // 2), size)


def random_window(image: Image.Image, size: int, generator: np.random.Generator) -> Window:
    """Return a square at a uniformly random place of `image` after its short side is scaled to 1.5 `size`.

    The filter is bicubic. The long side is rounded down, as in torchvision's `Resize`.
    """
    image = _shorten(image)
    short, target = min(image.size), random_window_side(size)
    width, height = image.width * target // short, image.height * target // short
    left, top = generator.integers(0, (width - size, height - size), endpoint=True).tolist()
    return Window(image, (width, height), (left, top), size)


def random_window_side(size: int) -> int:
    """Return the short side to which `random_window` scales an image."""
    return int(1.5 * size)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the square of `center_window` with the exact pixels of ADM."""
    return center_window(image, size).exact()


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side of a larger image to `size`, with the filters of `center_crop`. Strips are cut."""
    return _scale(_shorten(image), size, min) if min(image.size) > size else image


def pad(image: Image.Image, size: int) -> Image.Image:
    """Scale the long side of `image` to `size` and return it in the middle of a white `size` x `size` square.

    The filters are the same as in `center_crop`.
    """
    image = _scale(image, size, max)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


Fit = Literal["crop", "pad"]

FITS: dict[Fit, Callable[[Image.Image, int], Image.Image]] = {"crop": center_crop, "pad": pad}
"""The ways to make a square from an image of any shape."""


Side = Callable[[tuple[int, int]], int]
"""Chooses the short (min) or the long (max) side of an image."""


def _scale(image: Image.Image, size: int, side: Side) -> Image.Image:
    """Scale a side of `image` to `size`."""
    image, sides = _halved(image, size, side)
    return image.resize(sides, Image.Resampling.BICUBIC)


def _halved(image: Image.Image, size: int, side: Side) -> tuple[Image.Image, tuple[int, int]]:
    """Halve `image` by a box filter while the side is at least twice `size`. Return it and the sides to scale it to."""
    while side(image.size) >= 2 * size:
        image = image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.BOX)
    scale = size / side(image.size)
    width, height = (max(round(length * scale), 1) for length in image.size)
    return image, (width, height)


def _shorten(image: Image.Image) -> Image.Image:
    """Cut a strip down to an aspect ratio of 32. Scaling a strip of 1 x 65,535 pixels would fill the memory."""
    width, height = (min(length, 32 * min(image.size)) for length in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
