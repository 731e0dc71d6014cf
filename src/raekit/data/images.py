"""Find image files and decode them safely."""

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from raekit.data.transforms import FITS, Fit, to_rgb
from raekit.errors import UserError

if TYPE_CHECKING:
    from raekit.distributed import World

_log = logging.getLogger(__name__)

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""The formats that are read, whatever the file extension. Other Pillow formats are unsafe: EPS starts Ghostscript."""

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
"""The extensions of the files in a folder that count as images."""

OTHER_EXTENSIONS = (".arw", ".cr2", ".cr3", ".dng", ".eps", ".heic", ".heif", ".jxl", ".nef", ".psd", ".raf", ".svg")
"""The extensions of image files that are not read. A dataset that holds some is read without them, and says so."""

MAX_PIXELS = 89_478_485
"""The largest image, in pixels. Decoding takes up to 16 bytes a pixel. Pillow warns from the same size on."""


_short_side: ContextVar[int] = ContextVar("short side", default=0)


@contextmanager
def reduced(short_side: int) -> Iterator[None]:
    """Let `decode` return JPEGs at a half, a quarter or an eighth of their size, with short sides of at least this.

    A large photo is decoded in about half the time. A pixel is close to the average of the pixels that it stands for.
    The loader sets the size here and not in each call, because only `decode` knows what a source reads.
    """
    token = _short_side.set(short_side)
    try:
        yield
    finally:
        _short_side.reset(token)


class UnreadableImage(Exception):
    """An image cannot be decoded. A reader of many images decides whether to skip it.

    Attributes:
        path: the name of the image.
        reason: why it cannot be decoded.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def decode(file: str | Path | BytesIO, name: str) -> Image.Image:
    """Return the image in `file` as upright 8-bit RGB (see `to_rgb`). Its `info` has its name.

    Args:
        file: a path or the content of a file.
        name: the name of the image in errors.

    Raises:
        UnreadableImage: the file is missing, damaged, too large or of an unknown format.
    """
    with _opened(file, name) as image:
        if short_side := _short_side.get():
            image.draft(None, (short_side, short_side))  # does nothing if the image is not a JPEG
        rgb = to_rgb(image)
        rgb.info["name"] = name
        return rgb


def stored_size(file: str | Path | BytesIO, name: str) -> tuple[int, int]:
    """Return width and height of the image in `file` from its header, before it is turned upright. See `decode`."""
    with _opened(file, name) as image:
        return image.size


@contextmanager
def _opened(file: str | Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """Yield the image in `file` before its pixels are read. An error in the block is an `UnreadableImage`."""
    if not isinstance(file, BytesIO) and not os.path.isfile(file):  # opening a named pipe would block
        raise UnreadableImage(name, "no such file, or not a regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata and large sizes; the size is checked here
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(name, _too_large(f"{image.width} x {image.height} pixels"))
                yield image
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(name, "not a known image format") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(name, _too_large("too many pixels")) from None
    except OSError as error:
        raise UnreadableImage(name, error.strerror or str(error)) from error
    except Exception as error:  # a damaged file can raise almost any type of exception in Pillow
        raise UnreadableImage(name, str(error) or type(error).__name__) from error


def _too_large(size: str) -> str:
    return f"{size}, more than the limit of {MAX_PIXELS:,}; scale the image down first"


def find_images(paths: Sequence[Path], besides: Path | None = None) -> dict[Path, str]:
    """Return the image files in `paths`, in order, each with its name.

    Args:
        paths: files and folders. A folder stands for all image files below it, named by their paths relative to it.
            Any other path stands for itself, whether it is an image or not.
        besides: a folder to leave out.

    Raises:
        UserError: a folder contains no images.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            found.setdefault(path, path.name)
            continue
        names, skipped = image_files(path)
        if skipped:
            log_once(logging.WARNING, "%s: %s; convert them, for example to PNG", str(path), skipped_in_words(skipped))
        files = {path / name: name for name in names}
        if besides is not None:
            place = real_path(besides)
            files = {file: name for file, name in files.items() if not real_path(file).is_relative_to(place)}
        if not files:
            raise UserError(f"{path}: no images found (supported extensions: {', '.join(EXTENSIONS)})")
        found |= files
    return found


def real_path(path: Path) -> Path:
    """Return the path without links. Unlike `Path.resolve`, this allows a link to itself."""
    return Path(os.path.realpath(path))


def image_files(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Find the image files below `folder`, without hidden files and folders.

    Returns:
        The sorted relative paths, and the number of `skipped_formats`.
    """
    files = files_below(folder)
    return sorted(path for path in files if path.lower().endswith(EXTENSIONS)), skipped_formats(files)


def skipped_formats(names: Iterable[str]) -> dict[str, int]:
    """Return how many of the files are images in formats that are not read, by extension."""
    found = Counter(os.path.splitext(name)[1].lower() for name in names)
    return {extension: found[extension] for extension in OTHER_EXTENSIONS if extension in found}


def skipped_in_words(skipped: Mapping[str, int]) -> str:
    """Return, for example, "3 skipped (formats that are not read: .heic, .svg)"."""
    return f"{sum(skipped.values()):,} skipped (formats that are not read: {', '.join(skipped)})"


def warn_of_unreadable(unreadable: Mapping[str, str], world: "World") -> None:
    """Log a warning for each unreadable image {name: reason}, once in all processes.

    Each epoch, another process may read an image.
    """
    for name, reason in unreadable.items():
        if world.is_first(f"unreadable {name}"):
            log_once(logging.WARNING, "unreadable image %s: %s", name, reason)


@cache
def log_once(level: int, message: str, *values: object) -> None:
    """Log a message, once in each process: several loaders may read the same images."""
    _log.log(level, message, *values)


def files_below(folder: Path) -> list[str]:
    """Return the relative paths of all files below `folder`. Follow links, and skip hidden files and folders.

    Each folder is listed once, whatever links lead to it: under its own path if that is below `folder`.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found, seen, waiting = [], set[str](), [str(folder)]
    for place in waiting:  # the list grows by the links that are found
        for parent, folders, files in os.walk(place, onerror=refuse):
            real = os.path.realpath(parent)
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            if real in seen:
                continue
            seen.add(real)
            waiting += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            inside = os.path.relpath(parent, folder)
            found += [os.path.normpath(os.path.join(inside, name)) for name in files if not name.startswith(".")]
    return found


def read_image(path: Path, size: int, fit: Fit = "crop") -> Image.Image:
    """Return the image in `path` as an RGB square.

    Args:
        path: an image file in one of `FORMATS`.
        size: the side of the square, in pixels.
        fit: "crop" keeps the central square, "pad" keeps the complete image on white.

    Raises:
        UserError: the file is missing, unreadable, or larger than `MAX_PIXELS`.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file")
    try:
        return FITS[fit](decode(path, str(path)), size)
    except UnreadableImage as error:
        raise UserError(f"{path}: not a readable image ({error.reason})") from None
