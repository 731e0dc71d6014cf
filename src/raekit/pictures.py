"""Between image tensors and pictures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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


def write_png(image: Image.Image, path: Path, origin: object) -> None:
    """Write an 8-bit PNG that keeps `origin`, JSON values that tell what it was made from, as its text."""
    text = PngInfo()
    text.add_text(_ORIGIN, json.dumps(origin))
    image.save(path, format="PNG", pnginfo=text)


def read_origin(path: Path) -> Any:
    """What `write_png` was told of the PNG in `path`; None if that is absent, no PNG, or another's."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return json.loads(image.info[_ORIGIN])
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, RecursionError):
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
