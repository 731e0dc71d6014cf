"""The images that a pipeline returns, with what they were made from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from raekit.files import as_path, check_file, check_folder, whole
from raekit.inference.sample_folders import numbers_there
from raekit.pictures import check_grid, embed, grid, save_grid, to_pil, write_picture

SHOWN = 64
"""The most images that a notebook shows of one result."""


@dataclass(frozen=True, repr=False)
class Pictures(Sequence[Any]):
    """Images, and what they were made from. A sequence of the images; a slice is `Pictures`, too.

    Attributes:
        images: PIL images; or float32 in [0, 1], as a tensor (N, 3, H, W) or an array (N, H, W, 3).
        labels: the class of each image, None without a class.
        seeds: the seed of each image, None for an image that was not made from a seed.
        columns: the width of the grid. None makes the grid as square as possible.
    """

    images: Any
    labels: tuple[str | None, ...]
    seeds: tuple[int | None, ...]
    columns: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice) -> Any:
        images = self.images[index]
        if isinstance(index, slice):
            return replace(self, images=images, labels=self.labels[index], seeds=self.seeds[index])
        return images

    def __repr__(self) -> str:
        classes = ", ".join(sorted({label for label in self.labels if label is not None}))
        return f"{len(self)} images" + (f" of {classes}" if classes else "")

    def pil(self) -> list[Image.Image]:
        """Return the images as PIL images, whatever `output` was."""
        if isinstance(self.images, list):
            return self.images
        tensors = self.images if isinstance(self.images, Tensor) else torch.from_numpy(self.images).permute(0, 3, 1, 2)
        return [to_pil(image) for image in tensors]

    def grid(self) -> Image.Image:
        """Return one image with all images side by side."""
        return grid(self.pil(), self.columns)

    def save(self, path: str | Path) -> None:
        """Write the grid to a .png or .webp file, or every image to a folder, as 000000.png and so on.

        An existing grid is replaced. In a folder, nothing is overwritten: the same pictures are kept, and others are an
        error.

        Args:
            path: the file, or the folder.

        Raises:
            UserError: the folder has a file with the name of an image that is another picture, the grid is too large
                for its format, or the path cannot be written.
        """
        path = as_path("path", path)
        if path.suffix.lower() in (".png", ".webp"):
            check_file(path)
            images = self.pil()
            width, height = images[0].size if images else (0, 0)
            check_grid(path, len(images), (height, width), self.columns)
            save_grid(images, path, self.columns)
            return
        check_folder(path)
        images = self.pil()

        def place(number: int) -> Path:
            return path / f"{number:06d}.png"

        def origin(number: int) -> object:
            if number >= len(images):
                return {}
            image = images[number]
            pixels = blake2b(image.tobytes(), digest_size=8).hexdigest()
            return {"class": self.labels[number], "seed": self.seeds[number], "pixels": [*image.size, pixels]}

        for number in {*range(len(images))} - numbers_there(path, place, origin):
            with whole(place(number)) as partial:
                write_picture(images[number], partial, origin(number))

    def _repr_html_(self) -> str:
        """Return the images with their classes and seeds, for notebooks."""
        cells = []
        for image, label, seed in zip(self.pil()[:SHOWN], self.labels[:SHOWN], self.seeds[:SHOWN], strict=True):
            file = BytesIO()
            image.save(file, format="PNG")
            facts = [*([label] if label is not None else []), *([f"seed {seed}"] if seed is not None else [])]
            cells.append(
                f'<figure style="margin:0"><img src="{embed(file.getvalue())}" style="width:100%">'
                f'<figcaption style="font-size:smaller">{escape(", ".join(facts))}</figcaption></figure>'
            )
        across = min(self.columns or math.ceil(math.sqrt(len(cells))), 12) or 1
        more = f"<p>and {len(self) - SHOWN} more</p>" if len(self) > SHOWN else ""
        style = f"display:grid;grid-template-columns:repeat({across},minmax(0,160px));gap:4px"
        return f'<div style="{style}">{"".join(cells)}</div>{more}'
