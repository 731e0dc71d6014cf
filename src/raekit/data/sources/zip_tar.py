"""`zip:FILE` and `tar:FILE`: image files in an archive, without labels."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from raekit.data.archives import Entry, read_entry, tar_entries, zip_entries
from raekit.data.images import EXTENSIONS, UnreadableImage, decode
from raekit.data.sources.base import Split, in_split
from raekit.errors import UserError


class Archived:
    """Image files in a zip or tar archive, decoded at each access."""

    def __init__(self, uri: str, path: Path, split: Split):
        self.name, self.classes, self._path = uri, (), path
        entries = (zip_entries if uri.startswith("zip:") else tar_entries)(path)
        names = sorted(name for name in entries if _is_image(name))
        if not names:
            raise UserError(f"{path}: no images found (supported extensions: {', '.join(EXTENSIONS)})")
        chosen = [names[i] for i in in_split(names, split)]
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
