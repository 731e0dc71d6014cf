"""From any image file's pixels to the square RGB images that are trained on (PIL in, PIL out)."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

_UPRIGHT = {  # EXIF orientation -> what undoes it
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
    """Return `image` as 8-bit RGB: upright by its EXIF orientation, on white, 16 bits scaled to 8.

    Of 16 bits of a colour image Pillow reads the upper 8; of an animation it is the first frame. Raises what PIL
    raises for damaged files, and ValueError for pixels without a known range (floating point, or integers beyond
    16 bits).
    """
    image.load()  # some formats tell their orientation only after the pixels
    # ImageOps.exif_transpose also writes the EXIF anew, and fails on the damaged ones that cameras leave.
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
    low, high = image.getextrema()
    if low < 0 or high > 65535:  # type: ignore[operator]
        raise ValueError("integer pixels outside of 16 bits have no known range")
    image = image.convert("I")
    grey = image.point(_TO_8_BITS, "L")
    transparent = grey.info.pop("transparency", None)  # a level of the 16 bits
    if transparent is not None:
        grey.putalpha(image.point([255 * (level != transparent) for level in range(65536)], "L"))
    return grey


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central `size` x `size` of `image`, its short side scaled to `size`, as ADM does.

    The short side is halved by a box filter while it is at least twice `size`, then both sides are scaled
    bicubically to their rounded lengths (guided-diffusion, `image_datasets.py`).
    """
    image = _scale(_shorten(image), size, min)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def pad(image: Image.Image, size: int) -> Image.Image:
    """Return all of `image` in the middle of a white `size` x `size`, its long side scaled to `size`.

    Scaled as in `center_crop`.
    """
    image = _scale(image, size, max)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


Fit = Literal["crop", "pad"]

FITS: dict[Fit, Callable[[Image.Image, int], Image.Image]] = {"crop": center_crop, "pad": pad}
"""How an image of any shape becomes a square."""


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """Return a uniformly placed `size` x `size` of `image`, its short side first scaled to 1.5 `size`.

    Bicubic; the long side's length is rounded down, as torchvision's `Resize` does it.
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
    """`image` with its short (`min`) or long (`max`) side scaled to `size`."""
    while side(image.size) >= 2 * size:
        image = image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.BOX)
    scale = size / side(image.size)
    sides = (max(round(length * scale), 1) for length in image.size)
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)  # type: ignore[arg-type]


def _shorten(image: Image.Image) -> Image.Image:
    """The middle of a strip more than 32 times as long as wide: scaled whole, one pixel by 65,535 fills the memory."""
    width, height = (min(length, 32 * min(image.size)) for length in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
