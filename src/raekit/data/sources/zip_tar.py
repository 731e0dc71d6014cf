"""`zip:FILES` and `tar:FILES`: image files in archives, with classes if the archives have them."""

import io

from PIL import Image

from raekit.data.archives import read_from
from raekit.data.images import UnreadableImage, decode, stored_size
from raekit.data.sources.archive_index import open_index
from raekit.data.sources.base import Address, Split
from raekit.errors import UserError


class Archived:
    """Image files in zip or tar archives, decoded at each access."""

    def __init__(self, address: Address, split: Split):
        self.name = address.uri
        self._index = open_index(address.scheme, address.path, address.splits)
        self._numbers = self._index.numbers(split)
        self.classes, self.labels = self._index.classes, self._index.labels[self._numbers]
        self.skipped = self._index.skipped
        if self.classes and self.labels.min(initial=0) < 0:
            first = self._index.name(int(self._numbers[self.labels < 0][0]))
            raise UserError(
                f"{self.name}: {int((self.labels < 0).sum()):,} images of the split {split!r} have no class, such as "
                f"{first}; unpack the archive, and open it as folder: with a label list"
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content, name = self.file(index)
        return decode(io.BytesIO(content), name), int(self.labels[index])

    def stored_size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image from its header."""
        content, name = self.file(index)
        return stored_size(io.BytesIO(content), name)

    def file(self, index: int) -> tuple[bytes, str]:
        """Return the content of an image's file and its name.

        Raises:
            UnreadableImage: the archive is damaged there.
        """
        number = int(self._numbers[index])
        path = self._index.archive(number)
        name = f"{path}/{self._index.name(number)}"
        try:
            with path.open("rb") as archive:
                return read_from(archive, self._index.entry(number)), name
        except (OSError, ValueError) as error:
            raise UnreadableImage(name, str(error)) from None
