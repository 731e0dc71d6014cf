"""Read zip, tar and npz files safely: without unpacking to disk, trusting a stated size, or running code."""

import glob
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
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


class Listing(NamedTuple):
    """The files of an archive by name.

    Attributes:
        entries: the files that can be read. Of several files with one name, the last counts.
        others: why each other file or link cannot be read.
        repeated: the names of several files.
    """

    entries: dict[str, Entry]
    others: dict[str, str]
    repeated: set[str]


_METHODS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA", 9: "Deflate64", 93: "Zstandard"}


def list_zip(path: Path) -> Listing:
    """List the files of a zip archive. Backslashes are slashes if no name has a slash: old packers write them.

    Raises:
        UserError: the file does not exist or is not a zip file.
    """
    listing = Listing({}, {}, set())
    try:
        with zipfile.ZipFile(path) as archive:
            slash = "/" if any("/" in name for name in archive.namelist()) else "\\"
            for info in archive.infolist():
                name = info.filename.replace(slash, "/")
                if name.endswith("/"):
                    continue
                if name in listing.entries or name in listing.others:
                    listing.repeated.add(name)
                if info.flag_bits & 1:
                    listing.others[name] = "encrypted"
                elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    listing.others[name] = f"compressed with {_METHODS.get(info.compress_type, 'a rare method')}"
                else:
                    listing.entries[name] = Entry(
                        info.header_offset,
                        info.compress_size,
                        info.file_size,
                        local_header=True,
                        deflated=info.compress_type == zipfile.ZIP_DEFLATED,
                    )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise UserError(f"{path}: damaged or not a zip file ({error})") from None
    return listing


def list_tar(path: Path) -> Listing:
    """List the files of an uncompressed tar archive. Links to files in the archive are followed.

    Raises:
        UserError: the file does not exist or is not an uncompressed tar file.
    """
    listing, links = Listing({}, {}, set()), dict[str, str]()
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for kind, name, target, entry in _tar_members(file, size):
                for known in (listing.entries, listing.others, links):
                    if known.pop(name, None) is not None:  # a later member replaces an earlier one
                        listing.repeated.add(name)
                if kind == "file":
                    listing.entries[name] = entry
                elif kind == "link":
                    links[name] = target
                else:
                    listing.others[name] = kind
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: damaged or not an uncompressed tar file ({reason}); decompress it first") from None
    plain = {os.path.normpath(name): entry for name, entry in listing.entries.items()} if links else {}
    for name, target in links.items():
        seen = {name}
        while target in links and target not in seen:
            seen.add(target)
            target = links[target]
        if target in plain:
            listing.entries[name] = plain[target]
        else:
            listing.others[name] = "a link to a file that is not in the archive"
    return listing


def _tar_members(file: BinaryIO, end: int) -> Iterator[tuple[str, str, str, Entry]]:
    """Yield (kind, name, target of a link, place) of each file and link. A kind other than file or link is a reason.

    The module tarfile needs 50 microseconds a member, which are minutes for a dataset of millions of files.

    Raises:
        ValueError: the archive is damaged.
    """
    offset = 0
    extended: dict[str, str] = {}  # fields of the next member that do not fit into its header
    while offset < end:
        file.seek(offset)
        header = file.read(512)
        if len(header) < 512:
            break
        if not header.strip(b"\0"):  # the mark of the end
            if offset == 0:
                raise ValueError("it starts with zeros")
            return
        if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError(f"there is no file header at byte {offset:,}")
        size = int(extended.get("size", _octal(header[124:136])))
        content, flag = offset + 512, header[156:157]
        if flag in _EMPTY:
            size = 0
        offset = content + -(-size // 512) * 512
        if size < 0 or content + size > end:
            raise ValueError("it ends too early")
        if flag in (b"x", b"L", b"K"):
            if size > 2**20:
                raise ValueError(f"a name of {size:,} bytes")
            text = file.read(size)
            extended |= _pax(text) if flag == b"x" else {"path" if flag == b"L" else "linkpath": _text(text)}
            continue
        if flag == b"g":
            continue
        name, target = _text(header[:100]), _text(header[157:257])
        if header[257:263] == b"ustar\0" and (above := header[345] and _text(header[345:500])):
            name = f"{above}/{name}"
        name, target = extended.get("path", name), extended.get("linkpath", target)
        is_sparse = flag == b"S" or any(key.startswith("GNU.sparse.") for key in extended)
        extended = {}
        if is_sparse:
            yield "a sparse file", name, "", Entry(0, 0, 0)
        elif flag in (b"0", b"\0", b"7") and not name.endswith("/"):
            yield "file", name, "", Entry(content, size, size)
        elif flag == b"1":
            yield "link", name, os.path.normpath(target), Entry(0, 0, 0)
        elif flag == b"2":
            yield "link", name, os.path.normpath(os.path.join(os.path.dirname(name), target)), Entry(0, 0, 0)
    raise ValueError("it ends too early")


_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices and folders have no content, whatever their size says


def _octal(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):  # a number in base 256, for files of 8 GB and more
        return int.from_bytes(field[1:], signed=field[0] == 0xFF)
    return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return os.fsdecode(field.split(b"\0", 1)[0])


def _pax(records: bytes) -> dict[str, str]:
    """Return the records `LENGTH KEY=VALUE\\n` of an extended header."""
    found = {}
    while records.strip(b"\0"):
        length, _, _ = records.partition(b" ")
        end = int(length)
        key, equals, value = records[len(length) + 1 : end - 1].partition(b"=")
        if not equals or not len(length) + 3 <= end <= len(records):
            raise ValueError("an extended header is not readable")
        records = records[end:]
        found[os.fsdecode(key)] = os.fsdecode(value)
    return found


def matching_files(place: Path) -> list[Path]:
    """Return the files that a path or pattern stands for, sorted.

    `{a,b}` stands for each of its parts, and `{000..123}` for each number; `*`, `?` and `[..]` match names.

    Raises:
        UserError: some files of a pattern in braces do not exist.
    """
    if place.is_file():
        return [place]
    literal = expand_braces(str(place))
    found = sorted({Path(match) for text in literal for match in _glob(text)})
    missing = [text for text in literal if not _is_pattern(text) and not os.path.isfile(text)]
    if found and missing:
        raise UserError(
            f"{place}: {len(missing):,} of its {len(literal):,} files do not exist, such as {missing[0]}; "
            "name only files that exist"
        )
    return found


def _is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def _glob(text: str) -> list[str]:
    matches = glob.glob(text, recursive=True) if _is_pattern(text) else [text]
    return [match for match in matches if os.path.isfile(match)]


def expand_braces(text: str) -> list[str]:
    """Return the texts that a pattern with `{a,b}` and `{000..123}` stands for.

    Raises:
        UserError: the pattern stands for more than 100,000 texts.
    """
    found = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", text)
    if not found:
        return [text]
    parts, ends = found[1].split(","), re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends:
        first, last = int(ends[1]), int(ends[2])
        if last - first >= 100_000:
            raise UserError(f"{text}: stands for {last - first + 1:,} files, more than the limit of 100,000")
        parts = [str(number).zfill(len(ends[1])) for number in range(first, last + 1)]
    rest = expand_braces(text[found.end() :])
    if len(parts) * len(rest) > 100_000:
        raise UserError(f"{text}: stands for {len(parts) * len(rest):,} files, more than the limit of 100,000")
    return [text[: found.start()] + part + end for part in parts for end in rest]


def read_from(file: BinaryIO, entry: Entry) -> bytes:
    """Return the content of one file in an open archive.

    Raises:
        ValueError: the file is damaged or larger than `MAX_FILE`.
        OSError: the archive cannot be read.
    """
    if max(entry.size, entry.packed) > MAX_FILE:
        raise ValueError(f"{max(entry.size, entry.packed):,} bytes, more than the limit of {MAX_FILE:,}")
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
            name.removesuffix(".npy"): entry for name, entry in list_zip(path).entries.items() if name.endswith(".npy")
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
