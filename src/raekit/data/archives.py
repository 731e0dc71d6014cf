"""Read zip, tar and npz files safely: without unpacking to disk, trusting a stated size, or running code."""

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
"""The largest file, in bytes, that is read from an archive. A few compressed bytes can unpack to any size."""


class Entry(NamedTuple):
    """The place of a file in an archive.

    Attributes:
        offset: where the file starts in the archive: its local header in a zip file, its content in a tar file.
        packed: the size in the archive, in bytes.
        size: the size of the content, in bytes, as the archive states it.
        local_header: whether a local header precedes the content, as in a zip file.
        deflated: whether the content is compressed.
    """

    offset: int
    packed: int
    size: int
    local_header: bool = False
    deflated: bool = False


def zip_entries(path: Path) -> dict[str, Entry]:
    """Return the files of a zip archive by name, without encrypted files and rare compression methods.

    Raises:
        UserError: the file does not exist or is not a zip file.
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
        raise UserError(f"{path}: damaged or not a zip file ({error})") from None


def tar_entries(path: Path) -> dict[str, Entry]:
    """Return the regular files of an uncompressed tar archive by name.

    Raises:
        UserError: the file does not exist or is not an uncompressed tar file.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            return {info.name: Entry(info.offset_data, info.size, info.size) for info in archive if info.isreg()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or not an uncompressed tar file ({error}); decompress it first") from None


def read_entry(path: Path, entry: Entry) -> bytes:
    """Return the content of one file.

    Raises:
        ValueError: the file is damaged or larger than `MAX_FILE`.
        OSError: the archive cannot be read.
    """
    if max(entry.size, entry.packed) > MAX_FILE:
        raise ValueError(f"{max(entry.size, entry.packed):,} bytes, more than the limit of {MAX_FILE:,}")
    with path.open("rb") as file:
        file.seek(_start(file, entry))
        content = file.read(entry.packed)
    if entry.deflated:
        try:  # one extra byte shows that the content is too long
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged ({error})") from None
    if len(content) != entry.size:
        raise ValueError(f"damaged: its size is not the {entry.size} bytes that the archive states")
    return content


def _start(file: BinaryIO, entry: Entry) -> int:
    """Return the offset of the content. A zip file's local header states its own length."""
    if not entry.local_header:
        return entry.offset
    file.seek(entry.offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("damaged: there is no file header where the archive states one")
    return entry.offset + 30 + sum(struct.unpack("<HH", header[26:30]))


class Npz:
    """The arrays of an `.npz` file. Their types and shapes are read at once, their rows on request.

    The object can be pickled. It keeps the file open only to read compressed arrays, which is fastest in row order.

    Attributes:
        path: the file.
        arrays: maps the name of each array to (dtype, shape).

    Raises:
        UserError: the file is missing or damaged, or an array holds Python objects (reading them could run code)
            or is in Fortran order.
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
            except Exception as error:  # a damaged header can raise many types of exception
                raise UserError(f"{path}: {name} is damaged or not an array ({error})") from None
            if dtype.hasobject:
                raise UserError(f"{path}: {name} holds Python objects, and reading them could run code; save numbers")
            if fortran and len(shape) > 1:
                raise UserError(f"{path}: {name} is in Fortran order; save numpy.ascontiguousarray of it")
            if entry.size != self._offsets[name] + math.prod(shape) * dtype.itemsize:
                raise UserError(f"{path}: {name} is damaged: its size does not fit shape {shape} and type {dtype}")
            self.arrays[name] = (dtype, shape)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_streams": {}}

    def row(self, name: str, index: int) -> np.ndarray:
        """Return one row of an array.

        Raises:
            ValueError: the array is damaged.
            OSError: the file cannot be read.
        """
        dtype, shape = self.arrays[name]
        return self._read(name, index, shape[1:], dtype)

    def read(self, name: str) -> np.ndarray:
        """Return a complete array. The caller must check its size in `arrays` first.

        Raises:
            UserError: the array is damaged or the file cannot be read.
        """
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
        key = (os.getpid(), name)  # a forked process must not share the file position
        try:
            if key not in self._streams:
                self._streams[key] = self._open(name)
            self._streams[key].seek(offset)
            return self._streams[key].read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"damaged ({error})") from None

    def _open(self, name: str) -> BinaryIO:
        with zipfile.ZipFile(self.path) as archive:  # the open entry keeps the file open
            return cast(BinaryIO, archive.open(f"{name}.npy"))
