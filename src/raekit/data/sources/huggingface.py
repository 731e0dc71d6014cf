"""`hf:DIR`: a Hugging Face dataset saved to disk."""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from raekit.data.images import UnreadableImage, decode
from raekit.data.sources.base import Address, Split, in_split
from raekit.errors import UserError


class HuggingFace:
    """The rows of a `datasets.Dataset`, memory-mapped and decoded at each access."""

    def __init__(self, address: Address, split: Split):
        uri, folder = address.uri, address.path
        try:
            import datasets
        except ImportError:
            raise UserError(f"{uri}: needs the package datasets; run pip install 'raekit[data]'") from None
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # from datasets, pyarrow or the file system
            raise UserError(f"{folder}: not a dataset saved by datasets' save_to_disk ({error})") from None
        parts = {str(part): saved[part] for part in saved} if isinstance(saved, dict) else {"train": saved}
        if "train" not in parts:
            raise UserError(f"{folder}: has no split 'train', only {', '.join(parts)}")
        heldout = next((part for part in ("validation", "val", "test") if part in parts), None)
        if heldout is None:
            rows = parts["train"]
            self._numbers = in_split([str(row) for row in range(len(rows))], split)
        else:
            wanted = {"train": ["train"], "heldout": [heldout], "all": ["train", heldout]}[split]
            rows = datasets.concatenate_datasets([parts[part] for part in wanted])
            self._numbers = np.arange(len(rows))
        self._image = _first_column(rows.features, datasets.Image)
        self._label = _first_column(rows.features, datasets.ClassLabel)
        if self._image is None:
            raise UserError(f"{folder}: has no image column, only {', '.join(rows.column_names)}")
        self.name = uri
        self.classes: tuple[str, ...] = tuple(rows.features[self._label].names) if self._label else ()
        rows = rows.with_format(None).select_columns([c for c in (self._image, self._label) if c])
        # This class decodes the images, so that an error can name the row.
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
