"""`hf:PLACE`: a Hugging Face dataset on the Hub, saved to disk, or in a folder of parquet files."""

import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from raekit.data.images import UnreadableImage, decode, log_once
from raekit.data.sources.base import MAX_CLASSES, USUAL, Address, Split, check_classes, in_split, part_of_file, parts_of
from raekit.errors import UserError

IMAGES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_path", "file", "path", "file_name")
"""The names of columns of bytes or paths that are read as images."""

LABELS = ("label", "labels", "cls", "class", "class_id", "class_label", "class_name", "target", "category", "y")
"""The names of columns of numbers or texts that are read as labels."""

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?::([^@:]+))?(?:@(.+))?")
"""OWNER/NAME[:CONFIG][@REVISION]"""


class HuggingFace:
    """The rows of a `datasets.Dataset`, memory-mapped and decoded at each access."""

    def __init__(self, address: Address, split: Split):
        self.name = address.uri
        self.skipped: dict[str, int] = {}
        saved = _load(address)
        found = parts_of(saved, address.splits, address.place)
        if "train" not in found and (split == "train" or not found):
            raise UserError(
                f"{address.place}: has no split 'train', only {', '.join(saved)}; name the splits "
                "(data.splits train=NAME,heldout=NAME)"
            )
        parts = {each: saved[name] for each, name in found.items()}
        self._folder = str(address.path)
        self._image = _image_column(address.place, next(iter(parts.values())).features)
        labels = _labels(address.place, parts)
        self.classes, codes = labels or ((), {})
        wanted = [each for each in parts if split in (each, "all") or "heldout" not in parts]
        self._parts = [_only_images(address.place, parts[each], self._image) for each in wanted]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        total = int(self._starts[-1])
        self._numbers = np.arange(total) if "heldout" in parts else in_split([str(row) for row in range(total)], split)
        values = [codes[each] if labels else np.full(len(parts[each]), -1) for each in wanted]
        self.labels = np.concatenate([np.empty(0, np.int64), *values])[self._numbers].astype(np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number = int(self._numbers[index])
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        name = f"{self.name} row {number}"
        image = self._parts[part][number - int(self._starts[part])][self._image]
        if isinstance(image, Mapping):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if image is None:
            raise UnreadableImage(name, "no image in this row")
        file = io.BytesIO(image) if isinstance(image, bytes) else os.path.join(self._folder, image)
        return decode(file, name), int(self.labels[index])


def _load(address: Address) -> dict[str, Any]:
    """Return the parts of a dataset by name."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{address.uri}: needs the package datasets; run pip install 'raekit[data]'") from None
    place, folder, repository = address.place, address.path, REPOSITORY.fullmatch(address.place)
    if folder.is_dir():
        try:
            if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
                found = datasets.load_from_disk(str(folder))
            else:
                return _load_parquet(folder, address.splits)
        except Exception as error:  # from datasets, pyarrow or the file system
            raise UserError(
                f"{place}: not a dataset saved by datasets' save_to_disk, nor a folder of parquet files "
                f"({_line(error)})"
            ) from None
    elif repository and not place.startswith((".", "~")):
        try:
            found = datasets.load_dataset(repository[1], repository[2], revision=repository[3])
        except Exception as error:  # from datasets, the Hub or the file system
            raise UserError(
                f"data source {address.uri!r}: there is no folder {place}, and the Hub did not deliver the dataset "
                f"({_line(error)}); run it once where there is a network, or give a folder"
            ) from None
    else:
        raise UserError(
            f"data source {address.uri!r}: there is no folder {place}; a dataset on the Hub is "
            "OWNER/NAME[:CONFIG][@REVISION]"
        )
    return {str(name): found[name] for name in found} if isinstance(found, dict) else {"train": found}


def _load_parquet(folder: Path, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Return the rows of parquet files by part. `datasets` copies them into its cache once, for random access."""
    import datasets

    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        files.setdefault(part_of_file(path.relative_to(folder).as_posix(), wanted), []).append(str(path.absolute()))
    if not files:
        raise ValueError("no state.json, no dataset_dict.json and no parquet files")
    keys = {part: f"part{i}" for i, part in enumerate(files)}  # datasets does not take every name
    found: Any = datasets.load_dataset("parquet", data_files={keys[part]: paths for part, paths in files.items()})
    if len(keys) == 1 and not wanted and next(iter(keys)) not in USUAL["heldout"]:
        keys = {"train": "part0"}
    return {part: found[key] for part, key in keys.items()}


def _line(error: Exception) -> str:
    """Return the type and the first line of an error of another library."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _image_column(place: object, features: Mapping[str, Any]) -> str:
    """Return the column with the images: the first Image column, or the only one of structs, bytes or paths.

    Of several columns of structs or bytes, one has to have a name in `IMAGES`; a column of paths always has to.
    """
    import datasets

    kinds: list[list[str]] = [[], [], []]
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            return name
        if isinstance(feature, dict) and "bytes" in feature:
            kinds[0].append(name)
        elif getattr(feature, "dtype", None) in ("binary", "large_binary"):
            kinds[1].append(name)
        elif getattr(feature, "dtype", None) in ("string", "large_string") and name.lower() in IMAGES:
            kinds[2].append(name)
    for names in kinds:
        usual = [name for name in names if name.lower() in IMAGES]
        if len(names) == 1 or usual:
            return min(usual, key=lambda name: IMAGES.index(name.lower())) if usual else names[0]
        if names:
            raise UserError(f"{place}: which column has the images, {' or '.join(names)}? Rename it to `image`")
    raise UserError(f"{place}: has no image column, only {', '.join(features)}; rename the column to `image`")


def _only_images(place: object, rows: Any, column: str) -> Any:
    """Return the rows with the encoded images only. This class decodes them, so that an error can name the row."""
    import datasets

    if column not in rows.features:
        raise UserError(f"{place}: the splits have different columns: {column} is not in all of them")
    rows = rows.with_format(None).select_columns([column])
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


class _Codes(NamedTuple):
    """The labels of a part: `values`, -1 for none, count `names`; without names, they are the numbers of classes."""

    column: str
    kind: str
    values: np.ndarray
    names: tuple[str, ...] | None


def _labels(place: object, parts: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, np.ndarray]] | None:
    """Return the classes and the labels of each part; None without labels.

    Raises:
        UserError: the parts have different classes or kinds of labels.
    """
    columns = {part: _label_column(rows.features) for part, rows in parts.items()}
    if not any(columns.values()):
        kinds = [n for n, f in next(iter(parts.values())).features.items() if _is_number(f) or _is_text(f)]
        if kinds:
            message = "%s: no labels; none of the columns %s is named %s"
            log_once(logging.WARNING, message, str(place), ", ".join(kinds), ", ".join(LABELS))
        return None
    codes: dict[str, _Codes] = {}
    for part, column in columns.items():
        if column is None:
            known = next(name for name in columns.values() if name)
            raise UserError(f"{place}: the split {part} has no labels, but another split has the column {known}")
        codes[part] = _codes(parts[part], column)
    kinds = sorted({each.kind for each in codes.values()})
    if "number" in kinds and len(kinds) > 1:
        listed = ", ".join(f"{part}.{each.column} is a {each.kind}" for part, each in codes.items())
        raise UserError(f"{place}: which number is which class? {listed}; use ClassLabel in every split")
    if kinds == ["number"]:
        top = max(int(each.values.max(initial=-1)) for each in codes.values())
        if top >= MAX_CLASSES:
            raise UserError(f"{place}: the labels reach {top:,}, and must be below {MAX_CLASSES:,}")
        return tuple(map(str, range(top + 1))), {part: np.maximum(each.values, -1) for part, each in codes.items()}
    declared = [each.names or () for each in codes.values() if each.kind == "ClassLabel"]
    classes = declared[0] if declared else tuple(sorted({n for each in codes.values() for n in each.names or ()}))
    if kinds == ["text"] and "train" in codes:
        check_classes(classes, codes["train"].names or (), place)
    number = {name: i for i, name in enumerate(classes)}
    labels = {}
    for part, each in codes.items():
        if unknown := [name for name in each.names or () if name not in number]:
            raise UserError(
                f"{place}: the split {part} has classes that the other split lacks, such as {unknown[0]!r}; give both "
                "splits the same classes"
            )
        table = np.array([*(number[name] for name in each.names or ()), -1], np.int64)
        labels[part] = table[np.where(each.values < len(table) - 1, each.values, -1)]
    return classes, labels


def _label_column(features: Mapping[str, Any]) -> str | None:
    """Return the first ClassLabel column, or the column of numbers or texts with a name in `LABELS`."""
    import datasets

    declared = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [n for n, f in features.items() if n.lower() in LABELS and (_is_number(f) or _is_text(f))]
    return declared[0] if declared else min(usual, key=lambda name: LABELS.index(name.lower()), default=None)


def _is_number(feature: Any) -> bool:
    return re.fullmatch(r"u?int\d+", str(getattr(feature, "dtype", ""))) is not None


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _codes(rows: Any, column: str) -> _Codes:
    """Read the labels of a part, without its images."""
    feature = rows.features[column]
    values = rows.with_format("arrow").select_columns([column])[:][column].combine_chunks()
    names: Sequence[str] | None = getattr(feature, "names", None)
    kind = "ClassLabel" if names is not None else "number"
    if _is_text(feature):
        encoded = values.dictionary_encode()
        values, names, kind = encoded.indices, encoded.dictionary.to_pylist(), "text"
    numbers = values.cast("int64").fill_null(-1).to_numpy(zero_copy_only=False)
    return _Codes(column, kind, numbers, None if names is None else tuple(names))
