"""The index of a dataset in zip or tar archives: the place, label and split of each image.

A large dataset keeps its index in a file, next to the archives or in the cache. The file is memory-mapped, so that
it opens at once and all processes share its memory.
"""

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from raekit.data.archives import Entry, Listing, list_tar, list_zip, matching_files, read_from
from raekit.data.images import EXTENSIONS, log_once, skipped_formats
from raekit.data.sources.base import MAX_CLASSES, Split, check_classes, class_name, held_out, part_of_file, parts_of
from raekit.errors import UserError
from raekit.files import whole
from raekit.hub import cache_folder, cache_lock

_log = logging.getLogger(__name__)

KEPT_FROM = 64 * 2**20
"""The size of the archives, in bytes, from which the index is kept in a file. Smaller ones are read in a moment."""
CLASSES = "classes.txt"
"""A file next to the archives with the names of numbered classes, a line for each."""
_SPLITS = {"train": 0, "heldout": 1}
_UNUSED = 2
_FORMAT = "raekit archive index 2"


@dataclass(frozen=True)
class ArchiveIndex:
    """The images of a dataset in archives, sorted by archive and name.

    Attributes:
        root: the folder that the names of the archives are relative to.
        files: the name, size and modification time of each archive.
        classes: the names of the classes.
        skipped: the number of images in formats that are not read, by extension.
        shards: the number of the archive of each image, int32 (N,).
        places: the `Entry` of each image, int64 (N, 5).
        labels: the label of each image, int64 (N,), -1 without a label.
        splits: 0 for a training image, 1 for a held-out image, 2 for an image of another part, uint8 (N,).
        captions: the `Entry` of each image's caption, int64 (N, 5) or (0, 5); the offset is -1 without a caption.
        names: the names of all images in one array of bytes.
        ends: where each name ends, int64 (N,).
        kept: the file of the index, if there is one.
    """

    root: Path
    files: list[tuple[str, int, int]]
    classes: tuple[str, ...]
    skipped: dict[str, int]
    shards: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    captions: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    kept: Path | None = None

    def __reduce__(self) -> tuple:
        if self.kept:  # the file and not the arrays, which would be copied for each process
            return _reopened, (self.kept, self.root, self.classes)
        return ArchiveIndex, tuple(vars(self).values())

    def numbers(self, split: Split) -> np.ndarray:
        """Return the numbers of the images in `split`."""
        return np.flatnonzero(self.splits != _UNUSED if split == "all" else self.splits == _SPLITS[split])

    def archive(self, number: int) -> Path:
        """Return the archive of an image."""
        return self.root / self.files[self.shards[number]][0]

    def name(self, number: int) -> str:
        """Return the name of an image in its archive."""
        start = int(self.ends[number - 1]) if number else 0
        return os.fsdecode(self.names[start : self.ends[number]].tobytes())

    def entry(self, number: int) -> Entry:
        """Return the place of an image in its archive."""
        return _entry(self.places[number])

    def caption(self, number: int) -> Entry | None:
        """Return the place of an image's caption in its archive; None if it has no caption."""
        return _entry(self.captions[number]) if len(self.captions) and self.captions[number][0] >= 0 else None


def open_index(scheme: str, place: Path, splits: Mapping[str, str]) -> ArchiveIndex:
    """Return the index of a dataset in archives.

    Args:
        scheme: "zip" or "tar".
        place: an archive, a folder of archives, or a pattern (`matching_files`).
        splits: {split: part} if the user named the parts: names of the top folders, or of several archives.

    Raises:
        UserError: an archive is missing or damaged, or its images or labels cannot be read.
    """
    root, paths = _archives(scheme, place)
    return _with_names(_index(scheme, root, paths, splits))


def _with_names(index: ArchiveIndex) -> ArchiveIndex:
    """Replace the numbers of the classes by the names in `CLASSES`, if there is such a file."""
    path = index.root / CLASSES
    if not index.classes or not _are_numbers(index.classes) or not path.is_file():
        return index
    try:
        names = tuple(path.read_text("utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    if len(names) < len(index.classes) or len(set(names)) < len(names) or "" in names:
        raise UserError(
            f"{path}: must have a line with a different name for each of the {len(index.classes):,} classes, and has "
            f"{len(names):,} lines; complete or remove the file"
        )
    return replace(index, classes=names)


def _are_numbers(classes: Sequence[str]) -> bool:
    return tuple(classes) == tuple(map(str, range(len(classes))))


def _index(scheme: str, root: Path, paths: Sequence[Path], splits: Mapping[str, str]) -> ArchiveIndex:
    """Return the index of these archives. A large dataset is indexed once; other processes wait for the first."""
    stats = [path.stat() for path in paths]
    files = [(os.path.relpath(path, root), s.st_size, s.st_mtime_ns) for path, s in zip(paths, stats, strict=True)]
    if sum(size for _, size, _ in files) < KEPT_FROM:
        return _build(scheme, root, files, splits)
    content = json.dumps([scheme, [name for name, _, _ in files], sorted(splits.items())])
    name = f".raekit-index-{blake2b(content.encode(), digest_size=8).hexdigest()}.safetensors"
    candidates = [root / name, cache_folder() / "indexes" / name[1:]]
    if found := _kept(candidates, root, files):
        return found
    with cache_lock(candidates[1].with_suffix(".lock")):
        if found := _kept(candidates, root, files):
            return found
        built = _build(scheme, root, files, splits)
        for path in candidates:
            try:
                _write(built, path)
            except UserError:  # a read-only folder of archives
                continue
            return _read(path, root)
    return built


def _archives(scheme: str, place: Path) -> tuple[Path, list[Path]]:
    """Return the folder that names are relative to, and the archives."""
    if place.is_dir():
        paths = sorted(place.rglob(f"*.{scheme}"))
        if not paths:
            raise UserError(f"{place}: contains no .{scheme} files; name an archive, a folder of archives or a pattern")
        return place, paths
    paths = matching_files(place)
    if not paths:
        raise UserError(f"data source '{scheme}:{place}': there is no file, folder or match of a pattern at {place}")
    return Path(os.path.commonpath([path.parent for path in paths])), paths


def _kept(candidates: Sequence[Path], root: Path, files: Sequence[tuple[str, int, int]]) -> ArchiveIndex | None:
    """Return the first index of `files` that is up to date."""
    for path in candidates:
        try:
            index = _read(path, root)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            continue  # missing or damaged: it is made again
        if index.files == list(files):
            return index
    return None


def _write(index: ArchiveIndex, path: Path) -> None:
    described = {name: json.dumps(getattr(index, name)) for name in ("files", "classes", "skipped")}
    with whole(path) as partial:
        save_file({name: getattr(index, name) for name in _ARRAYS}, partial, {"format": _FORMAT, **described})


def _reopened(path: Path, root: Path, classes: tuple[str, ...]) -> ArchiveIndex:
    return replace(_read(path, root), classes=classes)


_ARRAYS = {
    "shards": np.int32,
    "places": np.int64,
    "labels": np.int64,
    "splits": np.uint8,
    "captions": np.int64,
    "names": np.uint8,
    "ends": np.int64,
}


def _read(path: Path, root: Path) -> ArchiveIndex:
    """Map the index in `path`. ValueError, KeyError or TypeError if it is damaged."""
    with safe_open(path, "pt") as file:  # in torch's form, because only that is memory-mapped
        about = file.metadata() or {}
        arrays = {name: file.get_tensor(name).numpy() for name in _ARRAYS}
    files = [(str(name), int(size), int(modified)) for name, size, modified in json.loads(about["files"])]
    classes, skipped = tuple(json.loads(about["classes"])), dict(json.loads(about["skipped"]))
    index = ArchiveIndex(root, files, classes, skipped, **arrays, kept=path)
    shapes = {name: (len(index.shards),) for name in _ARRAYS} | {"names": index.names.shape}
    shapes |= {"places": (len(index.shards), 5), "captions": (len(index.captions), 5)}
    labels = (index.labels.min(initial=0), index.labels.max(initial=-1))
    if (
        about["format"] != _FORMAT
        or any(arrays[name].shape != shapes[name] or arrays[name].dtype != kind for name, kind in _ARRAYS.items())
        or len(index.captions) not in (0, len(index.shards))
        or not (labels[0] >= -1 and labels[1] < len(index.classes))
        or index.shards.max(initial=0) >= len(files)
    ):
        raise ValueError("damaged")
    return index


class _Scanned(NamedTuple):
    """What one archive contains: its images, and by key (see `_key`) the labels and captions in other files."""

    images: list[tuple[str, Entry]]
    skipped: dict[str, int]
    numbers: dict[str, Any]  # of KEY.cls
    fields: dict[str, Any]  # of KEY.json
    captions: dict[str, Entry]
    table: dict[str, Any] | None  # of dataset.json: name -> label


def _build(scheme: str, root: Path, files: list[tuple[str, int, int]], wanted: Mapping[str, str]) -> ArchiveIndex:
    list_one = list_zip if scheme == "zip" else list_tar
    scanned, said = [], time.monotonic()
    with ThreadPoolExecutor(min(16, len(files))) as pool:
        for found in pool.map(lambda file: _scan(root / file[0], list_one), files):
            scanned.append(found)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                _log.warning("%s: %d of %d archives are indexed", root, len(scanned), len(files))
    paths = [root / name for name, _, _ in files]
    shards = [shard for shard, found in enumerate(scanned) for _ in found.images]
    images = [image for found in scanned for image in found.images]
    if not images:
        where = paths[0] if len(paths) == 1 else root
        raise UserError(f"{where}: no images found (supported extensions: {', '.join(EXTENSIONS)})")
    folders = [os.path.normpath(name).split("/")[:-1] for name, _ in images]
    while len(folders[0]) > 1 and all(len(f) > 1 and f[0] == folders[0][0] for f in folders):
        folders = [folder[1:] for folder in folders]  # a folder around the dataset
    parts, part_of, depth = _parts(files, shards, folders, wanted, root)
    classes_of = [class_name(folder[depth]) if len(folder) > depth else None for folder in folders]
    unclassed = {part for part, name in zip(part_of, classes_of, strict=True) if name is None}
    if unclassed and (depth == 0 or parts.get("train") in unclassed):
        classes_of = [None] * len(images)
    labels, classes = _labels(paths, scanned, classes_of)
    if "heldout" in parts:
        number = {part: _SPLITS[split] for split, part in parts.items()}
        splits = np.array([number.get(part, _UNUSED) for part in part_of], np.uint8)
        if "train" in parts and not _are_numbers(classes):  # a few shards need not have every number
            found = {split: labels[splits == number] for split, number in _SPLITS.items()}
            of_split = {split: {classes[i] for i in set(each.tolist()) - {-1}} for split, each in found.items()}
            check_classes(of_split["heldout"], of_split["train"], root)
    else:
        shown = [f"{files[shard][0]}/" if len(files) > 1 else "" for shard in range(len(files))]
        tenth = held_out(shown[shard] + name for shard, (name, _) in zip(shards, images, strict=True))
        used = [not parts or part == parts["train"] for part in part_of]
        splits = np.where(used, tenth, _UNUSED).astype(np.uint8)
    encoded = [os.fsencode(name) for name, _ in images]
    none = Entry(-1, 0, 0)
    captions = [scanned[shard].captions.get(_key(name), none) for shard, (name, _) in zip(shards, images, strict=True)]
    return ArchiveIndex(
        root=root,
        files=files,
        classes=classes,
        skipped=dict(sum((Counter(each.skipped) for each in scanned), Counter())),
        shards=np.array(shards, np.int32),
        places=np.array([entry for _, entry in images], np.int64),
        labels=labels,
        splits=splits,
        captions=np.array(captions if any(c is not none for c in captions) else [], np.int64).reshape(-1, 5),
        names=np.frombuffer(b"".join(encoded), np.uint8),
        ends=np.cumsum([len(name) for name in encoded], dtype=np.int64),
    )


def _parts(
    files: Sequence[tuple[str, int, int]],
    shards: Sequence[int],
    folders: Sequence[Sequence[str]],
    wanted: Mapping[str, str],
    root: Path,
) -> tuple[dict[str, str], list[str], int]:
    """Return the parts that are the splits, the part of each image, and how many folders name parts (0 or 1).

    Several archives are parts by their folders or names; the images of one archive by their top folders.
    """
    if len(files) > 1:
        of_file = [part_of_file(name, wanted) for name, _, _ in files]
        if parts := parts_of(of_file, wanted, root):
            return parts, [of_file[shard] for shard in shards], 0
    tops = [folder[0] if folder else "" for folder in folders]
    parts = parts_of(tops, wanted, root / files[0][0])
    return parts, tops if parts else [""] * len(tops), 1 if parts else 0


def _scan(path: Path, list_one: Any) -> _Scanned:
    listing: Listing = list_one(path)
    for name in [name for name in listing.entries if os.path.normpath(name).split("/")[0] == ".."]:
        listing.others[name] = "its path leads out of the archive"
        del listing.entries[name]
    if repeated := sorted(filter(_is_image, listing.repeated)):
        message = "%s: has several files under one name for %s of its images, such as %s; only the last of each is used"
        log_once(logging.WARNING, message, str(path), f"{len(repeated):,}", repeated[0])
    if lost := [name for name in listing.others if _is_image(name) or name.lower().endswith((".cls", ".json"))]:
        known = sum(map(_is_image, (*listing.entries, *listing.others)))
        raise UserError(
            f"{path}: {len(lost):,} of its files with images or labels cannot be read ({known:,} images in all), such "
            f"as {lost[0]} ({listing.others[lost[0]]}); pack the archive again with plain files"
        )
    images = sorted((name, entry) for name, entry in listing.entries.items() if _is_image(name))
    keys = {_key(name) for name, _ in images}
    scanned = _Scanned(images, skipped_formats(filter(_is_visible, listing.entries)), {}, {}, {}, None)
    table = min((name for name in listing.entries if os.path.basename(name) == "dataset.json"), key=len, default=None)
    with path.open("rb") as file:
        for name, entry in listing.entries.items():
            stem, extension = os.path.splitext(name)
            extension = extension.lower()
            if extension not in (".cls", ".json", ".txt") or stem not in keys:
                continue
            if extension == ".txt":
                scanned.captions[stem] = entry
                continue
            where = f"{path}/{name}"
            text = _content(file, entry, where)
            if extension == ".cls":
                if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
                    raise UserError(f"{where}: must be the number of a class, not {text[:40]!r}")
                scanned.numbers[stem] = int(text)
            else:
                values = _json(text, where)
                label = values.get("label", values.get("cls")) if isinstance(values, dict) else None
                if label is not None:
                    scanned.fields[stem] = _checked(label, where)
        if table:
            scanned = scanned._replace(table=_table(file, listing.entries, path, table))
    if scanned.numbers or scanned.fields or scanned.captions:  # KEY.seg.png belongs to the image KEY.png
        direct = {_key(name) for name, _ in images if os.path.splitext(name)[0] == _key(name)}
        kept = [(n, e) for n, e in images if os.path.splitext(n)[0] == _key(n) or _key(n) not in direct]
        scanned = scanned._replace(images=kept)
    return scanned


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and _is_visible(name)


def _is_visible(name: str) -> bool:
    parts = name.split("/")
    return parts[0] != "__MACOSX" and not any(part.startswith(".") for part in parts if part not in (".", ".."))


def _key(name: str) -> str:
    """Return the key that the files of one WebDataset sample share: the name up to the first dot of the file."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _content(file: Any, entry: Entry, where: str) -> bytes:
    try:
        return read_from(file, entry)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from None


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None


def _checked(label: Any, where: str) -> int | str:
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise UserError(f"{where}: a label must be the number or the name of a class, not {str(label)[:40]!r}")
    return label


def _table(file: Any, entries: Mapping[str, Entry], path: Path, name: str) -> dict[str, Any]:
    """Return {name of an image: label} of a `dataset.json` as EDM2 writes it; empty if its labels are null."""
    where = f"{path}/{name}"
    values = _json(_content(file, entries[name], where), where)
    if not isinstance(values, dict) or "labels" not in values:
        raise UserError(f"{where}: has no field `labels`, a list of [file, label] or null")
    rows = values["labels"]
    if rows is None:
        return {}
    pairs = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 for row in rows)
    if not pairs or not all(isinstance(row[0], str) for row in rows):
        raise UserError(f"{where}: `labels` must be a list of [file, label]")
    folder = os.path.dirname(name)
    labels: dict[str, Any] = {}
    for row in rows:
        image = os.path.normpath(os.path.join(folder, row[0]))
        if labels.setdefault(image, label := _checked(row[1], where)) != label:
            raise UserError(f"{where}: gives {row[0]} the labels {labels[image]} and {label}; give it one")
    if missing := sorted(labels.keys() - set(map(os.path.normpath, entries))):
        raise UserError(
            f"{where}: lists {len(missing):,} files that are not in the archive, such as {missing[0]}; pack it again"
        )
    return labels


def _entry(row: np.ndarray) -> Entry:
    offset, packed, size, local_header, deflated = row.tolist()
    return Entry(offset, packed, size, bool(local_header), bool(deflated))


def _labels(
    paths: Sequence[Path], scanned: Sequence[_Scanned], folders: Sequence[str | None]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels of all images and the names of the classes.

    They come from KEY.cls, KEY.json, dataset.json or the folders, in this order, if any image has such a label.
    """
    found: list[int | str | None]
    origin = ""
    if any(each.numbers for each in scanned):
        found, origin = [each.numbers.get(_key(name)) for each in scanned for name, _ in each.images], ".cls file"
    elif any(each.fields for each in scanned):
        found = [each.fields.get(_key(name)) for each in scanned for name, _ in each.images]
        origin = "label in a .json file"
    elif any(each.table is not None for each in scanned):
        found = [(each.table or {}).get(os.path.normpath(name)) for each in scanned for name, _ in each.images]
        origin = "label in dataset.json" if any(each.table for each in scanned) else ""
    else:
        found = list(folders)
    if origin and None in found:
        names = [f"{path}/{name}" for path, each in zip(paths, scanned, strict=True) for name, _ in each.images]
        raise UserError(
            f"{names[found.index(None)]}: has no {origin}, and neither have {found.count(None) - 1:,} others of "
            f"{len(found):,} images; label all images or none"
        )
    given = {label for label in found if label is not None}
    if all(isinstance(label, int) for label in given):
        numbers = {label for label in given if isinstance(label, int)}
        if given and not 0 <= min(numbers) <= max(numbers) < MAX_CLASSES:
            raise UserError(
                f"{paths[0]}: the labels are from {min(numbers)} to {max(numbers)}, and must be from 0 to "
                f"{MAX_CLASSES - 1:,}"
            )
        classes = tuple(map(str, range(max(numbers) + 1))) if given else ()
        return np.array([-1 if label is None else label for label in found], np.int64), classes
    if any(isinstance(label, int) for label in given):
        raise UserError(f"{paths[0]}: some labels are numbers and others are names; use one kind")
    classes = tuple(sorted(map(str, given)))
    number = {name: i for i, name in enumerate(classes)}
    return np.array([-1 if label is None else number[str(label)] for label in found], np.int64), classes
