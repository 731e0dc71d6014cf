"""Convert between image tensors and PIL images, and write image files."""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from raekit.errors import UserError
from raekit.files import whole

_ORIGIN = "raekit"
GAP = 2
"""Pixels between the images of a grid, and around them."""
MAX_WEBP = 16_383
"""The longest side of a WebP picture in pixels."""
MAX_SHEET = 500_000_000
"""The largest grid in pixels. It takes 3 bytes for each pixel, and again as many while it is written."""


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [0, 1] to an 8-bit PIL image. Values are rounded, not truncated."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """Convert an RGB PIL image to a float32 tensor (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


PictureFormat = Literal["png", "webp"]
"""The file formats for written images. Both are lossless."""


def write_picture(image: Image.Image, path: Path, origin: object, form: PictureFormat = "png") -> None:
    """Write an 8-bit image together with `origin`, JSON values that record how the image was made.

    A PNG file keeps `origin` as text, a WebP file as the description in its EXIF data.
    """
    if form == "webp":
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = _ORIGIN + json.dumps(origin)
        image.save(path, format="WEBP", lossless=True, exif=exif)
        return
    text = PngInfo()
    text.add_text(_ORIGIN, json.dumps(origin))
    image.save(path, format="PNG", pnginfo=text)


def read_origin(path: Path) -> Any:
    """Return the `origin` that `write_picture` stored in `path`, or None if the file is missing or has no origin."""
    if not path.is_file():  # opening a named pipe would block
        return None
    try:
        with Image.open(path, formats=["PNG", "WEBP"]) as image:
            if image.format == "PNG":
                return json.loads(image.info[_ORIGIN])
            text = image.getexif()[ExifTags.Base.ImageDescription]
            return json.loads(text.removeprefix(_ORIGIN)) if text.startswith(_ORIGIN) else None
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Tile images of one size row by row on white. By default, the grid is as square as possible."""
    columns, rows = _layout(len(images), columns)
    width, height = images[0].width + GAP, images[0].height + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (GAP + i % columns * width, GAP + i // columns * height))
    return sheet


def save_grid(images: Sequence[Image.Image], path: Path, columns: int | None = None) -> None:
    """Write the `grid` of images without loss, as WebP if the suffix of `path` is .webp, otherwise as PNG."""
    form = "WEBP" if path.suffix.lower() == ".webp" else "PNG"
    with whole(path) as partial:
        grid(images, columns).save(partial, format=form, lossless=True)


def check_grid(path: Path, count: int, shape: tuple[int, int], columns: int | None = None) -> None:
    """Check, before any work starts, that `save_grid` can write a grid of `count` images.

    Args:
        path: the file of the picture, for its format and for the error message.
        count: the number of images.
        shape: the height and width of an image in pixels.
        columns: as for `grid`.

    Raises:
        UserError: the picture has too many pixels.
    """
    columns, rows = _layout(count, columns)
    height, width = rows * (shape[0] + GAP) + GAP, columns * (shape[1] + GAP) + GAP
    size = f"{path}: {count:,} images make a picture of {width:,} x {height:,} pixels"
    if width * height > MAX_SHEET:
        raise UserError(f"{size}, more than {MAX_SHEET:,}; make fewer images, or write them to a folder")
    if path.suffix.lower() == ".webp" and max(width, height) > MAX_WEBP:
        raise UserError(f"{size}, but a side of a WebP picture has at most {MAX_WEBP:,}; give a .png file")


def _layout(count: int, columns: int | None) -> tuple[int, int]:
    """Return the columns and rows of a grid. UserError if there is no image."""
    if not count:
        raise UserError("there are no images to put into a grid")
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    return columns, math.ceil(count / columns)


def quantize(images: Tensor) -> Tensor:
    """Clamp float images to [0, 1] and round them to the 256 levels of an 8-bit file."""
    return images.clamp(0, 1).mul(255).round().div(255)


def embed(png: bytes) -> str:
    """Return a PNG image as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
