"""Turn the pixels of any image file into square RGB images (PIL in, PIL out)."""

from collections.abc import Callable
from typing import Literal

import numpy as np
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


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side of `image` to `size` and return the central `size` x `size` square, as ADM does.

    A box filter halves the image while its short side is at least twice `size`. A bicubic filter then scales it to
    the rounded final size (guided-diffusion, `image_datasets.py`).
    """
    image = _scale(_shorten(image), size, min)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


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


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """Scale the short side of `image` to 1.5 `size` and return a `size` x `size` square at a uniformly random place.

    The filter is bicubic. The long side is rounded down, as in torchvision's `Resize`.
    """
    image = _shorten(image)
    short, target = min(image.size), int(1.5 * size)
    image = image.resize((image.width * target // short, image.height * target // short), Image.Resampling.BICUBIC)
    left, top = generator.integers(0, (image.width - size, image.height - size), endpoint=True).tolist()
    return _crop(image, left, top, size)


def flip(image: Image.Image) -> Image.Image:
    """Return `image` mirrored left to right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _scale(image: Image.Image, size: int, side: Callable[[tuple[int, int]], int]) -> Image.Image:
    """Scale the short (`side=min`) or long (`side=max`) side of `image` to `size`."""
    while side(image.size) >= 2 * size:
        image = image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.BOX)
    scale = size / side(image.size)
    sides = (max(round(length * scale), 1) for length in image.size)
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)  # type: ignore[arg-type]


def _shorten(image: Image.Image) -> Image.Image:
    """Cut a strip down to an aspect ratio of 32. Scaling a strip of 1 x 65,535 pixels would fill the memory."""
    width, height = (min(length, 32 * min(image.size)) for length in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
