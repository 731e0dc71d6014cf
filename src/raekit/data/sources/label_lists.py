"""Find the classes of images that lie in one folder, in the label lists that ImageNet's `val` comes with."""

import os
from collections.abc import Sequence
from pathlib import Path

from raekit.errors import UserError

LISTS = ("LOC_val_solution.csv", "labels.txt", "labels.csv", "imagenet_2012_validation_synset_labels.txt")
"""The names of the label lists. For a folder PART, PART_labels.txt, PART_map.txt and PART.txt are read too."""


def find_labels(folder: Path, part: str, paths: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Return the class of each image in `part` from a label list there, in `folder`, or up to three folders above.

    A list has a line for each image: the file (with or without extension) and its class, as a name or as a number in
    the order of `classes`. A list of one column has class names, in the order of the file names.

    Args:
        folder: the folder of the dataset.
        part: the folder with the images, relative to `folder`.
        paths: the sorted images, relative to `folder`.
        classes: the names of the classes, in order.

    Raises:
        UserError: there is no list, or the list does not fit the images or the classes.
    """
    names = (*LISTS, *(f"{part}{end}" for end in ("_labels.txt", "_map.txt", ".txt")))
    root = folder.absolute()
    places = (place / name for place in (root / part, root, *list(root.parents)[:3]) for name in names)
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise UserError(
            f"{folder / part}: has {len(paths):,} images without class folders or a label list; move the images into "
            f"class folders, or put a list (lines FILE CLASS) into {folder} as one of {', '.join(names)}"
        )
    try:
        rows = [line.replace(",", " ").split() for line in place.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: cannot be read as text ({error})") from None
    if rows and rows[0][0] == "ImageId":  # the head of LOC_val_solution.csv
        rows = rows[1:]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(paths):
            raise UserError(f"{place}: has {len(rows):,} classes, but {folder / part} has {len(paths):,} images")
        found = {path: row[0] for path, row in zip(paths, rows, strict=True)}
    else:
        listed = {os.path.splitext(os.path.basename(row[0]))[0]: row[1] for row in rows if len(row) > 1}
        stems = {path: os.path.splitext(os.path.basename(path))[0] for path in paths}
        if missing := [path for path, stem in stems.items() if stem not in listed]:
            few = f"{len(missing):,} of {len(paths):,} images, such as {missing[0]}"
            raise UserError(f"{place}: has no class for {few}; complete the list")
        numbers = {} if any(map(str.isdigit, classes)) else {str(i): name for i, name in enumerate(classes)}
        found = {path: numbers.get(listed[stem], listed[stem]) for path, stem in stems.items()}
    known = set(classes)
    if unknown := next((name for name in found.values() if name not in known), None):
        raise UserError(
            f"{place}: the class {unknown!r} is none of the {len(known):,} classes of the training images; give class "
            "names, or lines FILE NUMBER with the numbers of the sorted classes (the development kit's are others)"
        )
    return found
