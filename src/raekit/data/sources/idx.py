"""`idx:DIR`: the grey images of MNIST and Fashion-MNIST, in IDX files."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from raekit.data.sources.base import Address, Split
from raekit.errors import UserError


class Idx:
    """Grey images from IDX files, kept in memory."""

    def __init__(self, address: Address, split: Split):
        self.name, folder = address.uri, address.path
        self.skipped: dict[str, int] = {}
        wanted = {"train": ("train",), "heldout": ("t10k",), "all": ("train", "t10k")}[split]
        parts = {part: _read_idx_pair(folder, part) for part in ("train", "t10k")}
        top = max(int(labels.max(initial=0)) for _, labels in parts.values())
        self.classes = tuple(map(str, range(max(10, top + 1))))
        try:
            self._images = np.concatenate([parts[part][0] for part in wanted])
        except ValueError:
            raise UserError(f"{folder}: train and t10k have images of different sizes; use only one split") from None
        self.labels = np.concatenate([parts[part][1] for part in wanted]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]).convert("RGB"), int(self.labels[index])


def _read_idx_pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(folder / f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {part} has {len(images)} images but {len(labels)} labels")
    return images, labels


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read the array in `path` or `path`.gz: a magic number, the shape as big-endian 32-bit integers, the bytes."""
    is_packed = not path.exists()
    if is_packed:
        path = path.with_name(path.name + ".gz")
    try:
        content = gzip.decompress(path.read_bytes()) if is_packed else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, with or without .gz") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise UserError(f"{path}: not an IDX file of bytes with {dimensions} dimension(s)")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) - header != math.prod(shape):
        raise UserError(f"{path}: has {len(content) - header} bytes of data, but its header says {math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
