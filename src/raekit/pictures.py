"""Between image tensors and pictures."""

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

_ORIGIN = "raekit"


def to_pil(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as an 8-bit picture; rounded, never truncated."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """An RGB picture as a float32 tensor (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


PictureFormat = Literal["png", "webp"]
"""Of written pictures, both without loss."""


def write_picture(image: Image.Image, path: Path, origin: object, form: PictureFormat = "png") -> None:
    """Write an 8-bit picture that keeps `origin`, JSON values that tell what it was made from: as a PNG's text, or the
    description in a WebP's EXIF.
    """
    if form == "webp":
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = _ORIGIN + json.dumps(origin)
        image.save(path, format="WEBP", lossless=True, exif=exif)
        return
    text = PngInfo()
    text.add_text(_ORIGIN, json.dumps(origin))
    image.save(path, format="PNG", pnginfo=text)


def save_picture(image: Image.Image, path: Path, form: PictureFormat) -> None:
    """Write a picture to `path`, whatever that is called, without loss."""
    if form == "webp":
        image.save(path, format="WEBP", lossless=True)
    else:
        image.save(path, format="PNG")


def read_origin(path: Path) -> Any:
    """What `write_picture` was told of the picture in `path`; None if that is absent, no such picture, or another's."""
    try:
        with Image.open(path, formats=["PNG", "WEBP"]) as image:
            if image.format == "PNG":
                return json.loads(image.info[_ORIGIN])
            text = image.getexif()[ExifTags.Base.ImageDescription]
            return json.loads(text.removeprefix(_ORIGIN)) if text.startswith(_ORIGIN) else None
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size, tiled row by row on white; as square as possible unless `columns` is given."""
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].width + gap, images[0].height + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * width, gap + i // columns * height))
    return sheet


def quantize(images: Tensor) -> Tensor:
    """Round float images in [0, 1] to the 256 levels of an 8-bit file; values outside are clamped."""
    return images.clamp(0, 1).mul(255).round().div(255)
