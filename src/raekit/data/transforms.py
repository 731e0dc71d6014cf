"""From any image file's pixels to the square RGB images that are trained on (PIL in, PIL out)."""

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


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as 8-bit RGB: upright by its EXIF orientation, on white, 16 bits scaled to 8.

    Of an animation it is the first frame. Raises what PIL raises for damaged files, and ValueError for
    pixels without a known range (floating point, or integers beyond 16 bits).
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
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer pixels outside of 16 bits have no known range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central `size` x `size` of `image`, its short side scaled to `size`, as ADM does.

    The short side is halved by a box filter while it is at least twice `size`, then both sides are scaled
    bicubically to their rounded lengths (guided-diffusion, `image_datasets.py`).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """Return a uniformly placed `size` x `size` of `image`, its short side first scaled to 1.5 `size`.

    Bicubic; the long side's length is rounded down, as torchvision's `Resize` does it.
    """
    short, target = min(image.size), int(1.5 * size)
    image = image.resize((image.width * target // short, image.height * target // short), Image.Resampling.BICUBIC)
    left, top = generator.integers(0, (image.width - size, image.height - size), endpoint=True).tolist()
    return _crop(image, left, top, size)


def flip(image: Image.Image) -> Image.Image:
    """Return `image` mirrored left to right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))
