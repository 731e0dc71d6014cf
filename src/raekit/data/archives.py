"""Reading what lies in zip, tar and npz files: nothing is unpacked to disk, no size is taken on trust, no code runs."""

import math
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from raekit.errors import UserError

MAX_FILE = 256 * 2**20
"""Larger files of an archive are not read: no image needs as much, and a few bytes may unpack to any size."""


class Entry(NamedTuple):
    """Where a file of an archive lies: after a local header, if it is of a zip file, which may have packed it."""

    offset: int
    packed: int
    size: int
    local_header: bool = False
    deflated: bool = False


def zip_entries(path: Path) -> dict[str, Entry]:
    """The files of a zip archive by name; those that are encrypted or packed in rare ways are left out.

    UserError if it is no zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename: Entry(
                    info.header_offset,
                    info.compress_size,
                    info.file_size,
                    local_header=True,
                    deflated=info.compress_type == zipfile.ZIP_DEFLATED,
                )
                for info in archive.infolist()
                if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                and not (info.is_dir() or info.flag_bits & 1)
            }
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, OSError, ValueError, struct.error) as error:
        raise UserError(f"{path}: damaged or no zip file ({error})") from None


def tar_entries(path: Path) -> dict[str, Entry]:
    """The regular files of an uncompressed tar archive by name; UserError if it is none."""
    try:
        with tarfile.open(path, "r:") as archive:
            return {info.name: Entry(info.offset_data, info.size, info.size) for info in archive if info.isreg()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or no uncompressed tar file ({error}); unpack it first") from None


def read_entry(path: Path, entry: Entry) -> bytes:
    """The content of one file; ValueError with the reason if it is too large or damaged, or OSError."""
    if max(entry.size, entry.packed) > MAX_FILE:
        raise ValueError(f"{max(entry.size, entry.packed):,} bytes, more than {MAX_FILE:,}")
    with path.open("rb") as file:
        file.seek(_start(file, entry))
        content = file.read(entry.packed)
    if entry.deflated:
        try:  # one byte more than it should have is enough to see that it has more
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged ({error})") from None
    if len(content) != entry.size:
        raise ValueError(f"damaged: its size is not the {entry.size} bytes that the archive tells")
    return content


def _start(file: BinaryIO, entry: Entry) -> int:
    """Where the content begins; a zip file's local header has names of its own length."""
    if not entry.local_header:
        return entry.offset
    file.seek(entry.offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("damaged: no header where the archive tells one")
    return entry.offset + 30 + sum(struct.unpack("<HH", header[26:30]))


class Npz:
    """The arrays of an `.npz` file: their types and shapes at once, their rows when asked for.

    `arrays` maps names to (dtype, shape). UserError for what is no such file, and for arrays of Python objects,
    whose reading would run code. It can be pickled and holds no open file but, of a compressed array, its place
    in it, so that such rows should be read in order.
    """

    def __init__(self, path: Path):
        self.path = path
        self.arrays: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._entries = {
            name.removesuffix(".npy"): entry for name, entry in zip_entries(path).items() if name.endswith(".npy")
        }
        self._offsets: dict[str, int] = {}
        self._streams: dict[tuple[int, str], BinaryIO] = {}
        for name, entry in self._entries.items():
            try:
                with self._open(name) as file:
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)  # type: ignore[index]
                    self._offsets[name] = file.tell()
            except Exception as error:  # damaged headers bring many types of exception
                raise UserError(f"{path}: {name} is damaged or no array ({error})") from None
            if dtype.hasobject:
                raise UserError(f"{path}: refused, {name} holds Python objects, whose reading may run code")
            if fortran and len(shape) > 1:
                raise UserError(f"{path}: {name} is stored by columns; write it with numpy.ascontiguousarray")
            if entry.size != self._offsets[name] + math.prod(shape) * dtype.itemsize:
                raise UserError(f"{path}: {name} is damaged, its size is not that of an array {shape} of {dtype}")
            self.arrays[name] = (dtype, shape)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_streams": {}}

    def row(self, name: str, index: int) -> np.ndarray:
        """One row of an array; ValueError or OSError if it cannot be read."""
        dtype, shape = self.arrays[name]
        return self._read(name, index, shape[1:], dtype)

    def read(self, name: str) -> np.ndarray:
        """A whole array, whose shape the caller has looked at; UserError if it is damaged."""
        dtype, shape = self.arrays[name]
        try:
            return self._read(name, 0, shape, dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error})") from None

    def _read(self, name: str, index: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        offset, entry = self._offsets[name] + index * size, self._entries[name]
        if entry.deflated:
            content = self._unpacked(name, offset, size)
        else:
            with self.path.open("rb") as file:
                file.seek(_start(file, entry) + offset)
                content = file.read(size)
        if len(content) != size:
            raise ValueError("damaged: it ends too early")
        return np.frombuffer(content, dtype).reshape(shape)

    def _unpacked(self, name: str, offset: int, size: int) -> bytes:
        key = (os.getpid(), name)  # a forked process must not share the place in the file
        try:
            if key not in self._streams:
                self._streams[key] = self._open(name)
            self._streams[key].seek(offset)
            return self._streams[key].read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"damaged ({error})") from None

    def _open(self, name: str) -> BinaryIO:
        with zipfile.ZipFile(self.path) as archive:  # what is open keeps the file open
            return cast(BinaryIO, archive.open(f"{name}.npy"))
