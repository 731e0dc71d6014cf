"""Where images come from: random access to (RGB image, label) behind one address, `scheme:place`."""

import gzip
import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from raekit.data.archives import MAX_FILE, Entry, Npz, read_entry, tar_entries, zip_entries
from raekit.data.images import EXTENSIONS, UnreadableImage, decode, files_below, image_files
from raekit.errors import UserError

Split = Literal["train", "heldout", "all"]


class Source(Protocol):
    """Images by index. A source can be pickled and holds no open file, so worker processes may share it."""

    @property
    def name(self) -> str:
        """The address that opened it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, the same for every split; () if unlabelled."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """The labels (N,) of all images, int64, read without decoding any; -1 where there is none."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and its label (-1 without one); raises UnreadableImage."""
        ...


def open_source(uri: str, split: Split = "train") -> Source:
    """Open the images at `uri`:

    - `emoji`: the built-in emoji, 64 x 64, nine classes; held out is a tenth of the code points.
    - `folder:DIR`: a sub-folder for each class. The splits are DIR/train and DIR/val where both exist.
    - `flat:DIR`: unlabelled, everything below DIR.
    - `idx:DIR`: the four files of MNIST and its likes, gzipped or not; held out is `t10k`.
    - `hf:DIR`: a Hugging Face dataset saved on disk, its first Image column and its ClassLabel column. Of a
      DatasetDict, the splits are `train` and the first of `validation`, `val`, `test`.
    - `npz:FILE`: uint8 images (N, H, W, 3) in `arr_0`, as ADM writes samples, with labels (N,) in `arr_1` if there
      are any. Compressed ones are slow to read in any other order than their own.
    - `zip:FILE`, `tar:FILE`: unlabelled, all images in it, in the order of their names.

    Where there are no splits, held out is a tenth of the images, by a hash of the path within DIR or of the
    row's number. Folders are read in the order of their names; hidden files are left out.

    Raises UserError if there is no such place, or no image in it.
    """
    scheme, _, place = uri.partition(":")
    if scheme not in _OPENERS or bool(place) == (scheme == "emoji"):
        forms = {"emoji": ""} | dict.fromkeys(_OF_FILES, ":FILE")
        known = ", ".join(name + forms.get(name, ":DIR") for name in _OPENERS)
        raise UserError(f"data source {uri!r} is unknown: use one of {known}")
    path = Path(place).expanduser()
    if scheme in _OF_FILES and not path.is_file():
        raise UserError(f"data source {uri!r}: there is no file {place}")
    if place and scheme not in _OF_FILES and not path.is_dir():
        raise UserError(f"data source {uri!r}: there is no folder {place}")
    source = _OPENERS[scheme](uri, path, split)
    if not len(source):
        raise UserError(f"data source {uri!r} has no image in its split {split!r}; its split 'all' has every image")
    return source


def is_address(name: str) -> bool:
    """Whether `name` has the form of an address of images, and not of a model."""
    scheme, _, place = name.partition(":")
    return scheme in _OPENERS and bool(place) != (scheme == "emoji")


def stamp(uri: str) -> str:
    """16 digits that change with the files at `uri`: their names, sizes and times, without reading them."""
    place = Path(uri.partition(":")[2]).expanduser()
    files = files_below(place) if place.is_dir() else [""]
    digest = blake2b(digest_size=8)
    for file in sorted(files) if ":" in uri else ():
        status = (place / file).stat()
        digest.update(os.fsencode(file) + repr((status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _chosen(keys: Sequence[str], split: Split) -> np.ndarray:
    """Indices of the `keys` that belong to `split`; a tenth is held out, by a hash."""
    if split == "all":
        return np.arange(len(keys))
    hashes = (blake2b(os.fsencode(key), digest_size=8).digest() for key in keys)
    heldout = [int.from_bytes(digest) % 10 == 0 for digest in hashes]
    return np.flatnonzero(np.array(heldout, bool) == (split == "heldout"))


class Emoji:
    """The built-in images, decoded once per process and then kept (46 MB in all); `files` names them."""

    def __init__(self, uri: str, _: Path, split: Split):
        self.name = uri
        files = list(_emoji())
        self.files = [files[i] for i in _chosen([code_points(file) for file in files], split)]
        self.classes = tuple(sorted({file.split("/")[0] for file in files}))
        self.labels = np.array([self.classes.index(file.split("/")[0]) for file in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return _emoji_image(self.files[index]).copy(), int(self.labels[index])


def code_points(file: str) -> str:
    """What a file CLASS/DRAWING-CODEPOINTS.webp draws: its code points without the variation selector."""
    return "-".join(point for point in Path(file).stem.split("-")[1:] if point != "fe0f")


@cache
def _emoji() -> dict[str, bytes]:
    packed = resources.files("raekit").joinpath("assets/emoji/data/emoji64.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@cache
def _emoji_image(file: str) -> Image.Image:
    return decode(io.BytesIO(_emoji()[file]), file)


class Files:
    """Image files in a folder, decoded at each access."""

    def __init__(self, uri: str, folder: Path, paths: list[str], labels: list[int], classes: tuple[str, ...]):
        self.name, self.classes = uri, classes
        self._folder = str(folder)
        # Arrays: the reference counts of a million strings would copy their pages into each forked worker.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = os.path.join(self._folder, os.fsdecode(self._paths[index]))
        return decode(path, path), int(self.labels[index])


def _open_flat(uri: str, folder: Path, split: Split) -> Files:
    paths = image_files(folder)
    if not paths:
        raise UserError(f"{folder}: no image found in it (files read: {', '.join(EXTENSIONS)})")
    chosen = _chosen(paths, split)
    return Files(uri, folder, [paths[i] for i in chosen], [-1] * len(chosen), ())


def _open_folder(uri: str, folder: Path, split: Split) -> Files:
    paths = [path for path in image_files(folder) if os.sep in path]
    train, heldout = f"train{os.sep}", f"val{os.sep}"
    has_splits = (folder / train).is_dir() and (folder / heldout).is_dir()
    if has_splits:
        paths = [path for path in paths if path.startswith((train, heldout)) and path.count(os.sep) > 1]
        top = {"train": train, "heldout": heldout, "all": ""}[split]
        chosen = [path for path in paths if path.startswith(top)]
    else:
        chosen = [paths[i] for i in _chosen(paths, split)]
    if not paths:
        raise UserError(
            f"{folder}: no image found in a sub-folder for each class (files read: {', '.join(EXTENSIONS)}); "
            f"for images without classes, use flat:{folder}"
        )
    depth = 1 if has_splits else 0
    classes = tuple(sorted({path.split(os.sep)[depth] for path in paths}))
    label = {name: number for number, name in enumerate(classes)}
    return Files(uri, folder, chosen, [label[path.split(os.sep)[depth]] for path in chosen], classes)


class Idx:
    """Grey images of IDX files, kept in memory."""

    def __init__(self, uri: str, folder: Path, split: Split):
        self.name = uri
        wanted = {"train": ("train",), "heldout": ("t10k",), "all": ("train", "t10k")}[split]
        parts = {part: _read_idx_pair(folder, part) for part in ("train", "t10k")}
        top = max(int(labels.max(initial=0)) for _, labels in parts.values())
        self.classes = tuple(map(str, range(max(10, top + 1))))
        try:
            self._images = np.concatenate([parts[part][0] for part in wanted])
        except ValueError:
            raise UserError(f"{folder}: the images of train and t10k differ in size; use one split") from None
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
    """The array in `path` or `path`.gz: a magic number, the lengths as big-endian 32 bits, the bytes."""
    is_packed = not path.exists()
    if is_packed:
        path = path.with_name(path.name + ".gz")
    try:
        content = gzip.decompress(path.read_bytes()) if is_packed else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, nor one without .gz") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise UserError(f"{path}: not an IDX file of bytes in {dimensions} dimension(s)")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) - header != math.prod(shape):
        raise UserError(f"{path}: has {len(content) - header} bytes of data, its header says {math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


class HuggingFace:
    """Rows of a `datasets.Dataset`, mapped from disk and decoded at each access."""

    def __init__(self, uri: str, folder: Path, split: Split):
        try:
            import datasets
        except ImportError:
            raise UserError(f"{uri} needs the package datasets: pip install 'raekit[data]'") from None
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # of datasets, pyarrow or the file system
            raise UserError(f"{folder}: not a dataset written by datasets' save_to_disk ({error})") from None
        parts = {str(part): saved[part] for part in saved} if isinstance(saved, dict) else {"train": saved}
        if "train" not in parts:
            raise UserError(f"{folder}: has no split 'train', only {', '.join(parts)}")
        heldout = next((part for part in ("validation", "val", "test") if part in parts), None)
        if heldout is None:
            rows = parts["train"]
            self._numbers = _chosen([str(row) for row in range(len(rows))], split)
        else:
            wanted = {"train": ["train"], "heldout": [heldout], "all": ["train", heldout]}[split]
            rows = datasets.concatenate_datasets([parts[part] for part in wanted])
            self._numbers = np.arange(len(rows))
        self._image = _first_column(rows.features, datasets.Image)
        self._label = _first_column(rows.features, datasets.ClassLabel)
        if self._image is None:
            raise UserError(f"{folder}: has no column of images, only {', '.join(rows.column_names)}")
        self.name = uri
        self.classes: tuple[str, ...] = tuple(rows.features[self._label].names) if self._label else ()
        rows = rows.with_format(None).select_columns([c for c in (self._image, self._label) if c])
        # Decoded here, not there, to name what fails.
        self._rows = rows.cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number = int(self._numbers[index])
        row, name = self._rows[number], f"{self.name} row {number}"
        image, label = row[self._image], row.get(self._label)
        if image is None:
            raise UnreadableImage(name, "no image in this row")
        file = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
        return decode(file, name), -1 if label is None else label

    @property
    def labels(self) -> np.ndarray:
        if self._label is None:
            return np.full(len(self), -1)
        column = self._rows.select_columns([self._label])[:][self._label]
        return np.array([-1 if label is None else label for label in column])[self._numbers]


def _first_column(features: Mapping[str, object], kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


class NpzImages:
    """Rows of an array of images, read at each access."""

    def __init__(self, uri: str, path: Path, split: Split):
        self.name, self._npz = uri, Npz(path)
        dtype, shape = self._npz.arrays.get("arr_0", (None, ()))
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            found = ", ".join(f"{name} {kind} {sizes}" for name, (kind, sizes) in self._npz.arrays.items())
            raise UserError(f"{path}: needs images in arr_0, uint8 (N, H, W, 3); it holds {found or 'no array'}")
        if math.prod(shape[1:]) > MAX_FILE or shape[0] > 2**24:
            raise UserError(f"{path}: {shape[0]:,} images of {shape[1]} x {shape[2]} pixels are too many or too large")
        self._numbers = _chosen([str(row) for row in range(shape[0])], split)
        labels = np.full(shape[0], -1)
        self.classes: tuple[str, ...] = ()
        kind, length = self._npz.arrays.get("arr_1", (None, ()))
        if kind is not None and kind.kind in "iu" and length == shape[:1]:
            labels = self._npz.read("arr_1").astype(np.int64)
            if not 0 <= labels.min() <= labels.max() < 2**20:
                raise UserError(f"{path}: labels in arr_1 must be class numbers from 0")
            self.classes = tuple(map(str, range(int(labels.max()) + 1)))
        self.labels = labels[self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number = int(self._numbers[index])
        try:
            return Image.fromarray(self._npz.row("arr_0", number)), int(self.labels[index])
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"{self.name} row {number}", str(error)) from None


class Archived:
    """Image files in a zip or tar archive, decoded at each access."""

    def __init__(self, uri: str, path: Path, split: Split):
        self.name, self.classes, self._path = uri, (), path
        entries = (zip_entries if uri.startswith("zip:") else tar_entries)(path)
        names = sorted(name for name in entries if _is_image(name))
        if not names:
            raise UserError(f"{path}: no image found in it (files read: {', '.join(EXTENSIONS)})")
        chosen = [names[i] for i in _chosen(names, split)]
        self._names = np.array([os.fsencode(name) for name in chosen])
        self._entries = np.array([entries[name] for name in chosen], np.int64).reshape(len(chosen), -1)
        self.labels = np.full(len(chosen), -1)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = f"{self._path}/{os.fsdecode(self._names[index])}"
        try:
            content = read_entry(self._path, Entry(*self._entries[index].tolist()))
        except (OSError, ValueError) as error:
            raise UnreadableImage(name, str(error)) from None
        return decode(io.BytesIO(content), name), -1


def _is_image(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts if part != ".") or parts[0] == "__MACOSX"
    return name.lower().endswith(EXTENSIONS) and not hidden


_OPENERS: dict[str, Callable[[str, Path, Split], Source]] = {
    "emoji": Emoji,
    "folder": _open_folder,
    "flat": _open_flat,
    "idx": Idx,
    "hf": HuggingFace,
    "npz": NpzImages,
    "zip": Archived,
    "tar": Archived,
}
_OF_FILES = ("npz", "zip", "tar")
