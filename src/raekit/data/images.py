"""Image files: which there are in a folder, and what is in them, decoded within bounds."""

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from raekit.data.transforms import FITS, Fit, to_rgb
from raekit.errors import UserError

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""What is read, whatever a file is called. Of Pillow's others, some start programs, as EPS does Ghostscript."""

EXTENSIONS = (
    ".avif",
    ".bmp",
    ".gif",
    ".ico",
    ".j2k",
    ".jfif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pcx",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".qoi",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)
"""The files of a folder that are taken for images."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded, which takes up to 16 bytes a pixel; Pillow warns from here on."""


class UnreadableImage(Exception):
    """One image cannot be decoded; whoever reads several decides what follows."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def decode(file: str | Path | BytesIO, name: str) -> Image.Image:
    """The upright 8-bit RGB image in `file` (`to_rgb`), or UnreadableImage with `name` and the reason."""
    if not isinstance(file, BytesIO) and not os.path.isfile(file):  # a named pipe would be waited for
        raise UnreadableImage(name, "no such file, or not a regular one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata; the size is looked at here
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(name, _too_large(f"{image.width} x {image.height} pixels"))
                return to_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(name, "no known image format") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(name, _too_large("too many pixels")) from None
    except OSError as error:
        raise UnreadableImage(name, error.strerror or str(error)) from error
    except Exception as error:  # damaged files bring nearly every type of exception out of Pillow
        raise UnreadableImage(name, str(error) or type(error).__name__) from error


def _too_large(size: str) -> str:
    return f"{size}, more than {MAX_PIXELS:,} in all; scale it down first"


def find_images(paths: Sequence[Path], besides: Path | None = None) -> dict[Path, str]:
    """The image files that `paths` mean, each with its name, in order.

    A folder means the image files anywhere below it, by their paths within it; what is below `besides` is left
    out. Any other path means itself, image or not, by its own name. UserError for a folder without images.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            found.setdefault(path, path.name)
            continue
        files = {path / name: name for name in image_files(path)}
        if besides is not None:
            place = besides.resolve()
            files = {file: name for file, name in files.items() if not file.resolve().is_relative_to(place)}
        if not files:
            raise UserError(f"{path}: no image found in it (files read: {', '.join(EXTENSIONS)})")
        found |= files
    return found


def image_files(folder: Path) -> list[str]:
    """Paths, within `folder` and sorted, of the image files below it; hidden ones and hidden folders are left out."""
    return sorted(path for path in files_below(folder) if path.lower().endswith(EXTENSIONS))


def files_below(folder: Path) -> list[str]:
    """All files below `folder`, as paths within it, through links as well; without hidden ones and hidden folders."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_loop(parent, name)]
        inside = os.path.relpath(parent, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in files if not name.startswith(".")]
    return found


def _is_loop(parent: str, name: str) -> bool:
    """Whether the folder `name` is a link to one that `parent` lies in."""
    path = Path(parent, name)
    return path.is_symlink() and Path(parent).resolve().is_relative_to(path.resolve())


def read_image(path: Path, size: int, fit: Fit = "crop") -> Image.Image:
    """The picture in `path`, of any format and mode, as size x size: cropped to its middle, or whole on white.

    UserError if it is unreadable, or larger than `data.images.MAX_PIXELS`.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file")
    try:
        return FITS[fit](decode(path, str(path)), size)
    except UnreadableImage as error:
        raise UserError(f"{path}: not a readable image ({error.reason})") from None
