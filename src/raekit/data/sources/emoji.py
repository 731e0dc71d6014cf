"""`emoji`: the built-in images of emoji."""

import io
import zipfile
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from raekit.data.images import decode
from raekit.data.sources.base import Address, Split, in_split

NAMES = "names.txt"  # a line "CODEPOINTS NAME" for each emoji, the short names of Unicode's CLDR


class Emoji:
    """The built-in images. Each process decodes an image once and then keeps it (46 MB for all images).

    Attributes:
        files: the names of the images in the archive, CLASS/DRAWING-CODEPOINTS.webp.
    """

    def __init__(self, address: Address, split: Split):
        self.name = address.uri
        self.skipped: dict[str, int] = {}
        files = list(_emoji())
        self.files = [files[i] for i in in_split([code_points(file) for file in files], split)]
        self.classes = tuple(sorted({file.split("/")[0] for file in files}))
        self.labels = np.array([self.classes.index(file.split("/")[0]) for file in self.files])

    @property
    def captions(self) -> list[str]:
        """The name of each image's emoji in Unicode, such as "smiling cat with heart-eyes"."""
        return [_names()[code_points(file)] for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return _emoji_image(self.files[index]).copy(), int(self.labels[index])


def code_points(file: str) -> str:
    """Return the code points in the name of a file, CLASS/DRAWING-CODEPOINTS.webp, without the variation selector."""
    return "-".join(point for point in Path(file).stem.split("-")[1:] if point != "fe0f")


@cache
def _emoji() -> dict[str, bytes]:
    packed = resources.files("raekit").joinpath("assets/emoji/data/emoji64.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@cache
def _names() -> dict[str, str]:
    text = resources.files("raekit").joinpath(f"assets/emoji/data/{NAMES}").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines())


@cache
def _emoji_image(file: str) -> Image.Image:
    return decode(io.BytesIO(_emoji()[file]), file)
