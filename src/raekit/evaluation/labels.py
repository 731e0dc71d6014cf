"""Class labels of the samples to evaluate."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from raekit.errors import UserError, check_choice
from raekit.randomness import numpy_generator

Labels = Literal["balanced", "random", "reference"]
"""How labels are drawn: "balanced" has each class equally often, as in the literature; "random" draws uniformly and
independently; "reference" has the classes in the proportions of the reference."""


def draw_labels(kind: Labels, classes: int, count: int, seed: int, of_reference: Sequence[int] | None) -> list[int]:
    """Return `count` labels from 0 to `classes` - 1. Their order is a function of the seed.

    Args:
        kind: how the labels are drawn.
        classes: number of classes.
        count: number of labels.
        seed: seed of the labels.
        of_reference: number of images of each class in the reference, for "reference".

    Raises:
        UserError: `kind` is none of the three; or it is "reference", and the reference does not count its classes or
            has another number of classes.
    """
    check_choice("labels", kind, get_args(Labels))
    generator = numpy_generator(seed, "labels", 0)
    if kind == "random":
        return generator.integers(classes, size=count).tolist()
    images = np.ones(classes)
    if kind == "reference":
        if of_reference is None or len(of_reference) != classes or not sum(of_reference):
            known = of_reference or ()
            raise UserError(
                f"labels: the reference has {sum(known)} labelled images of {len(known)} classes, but the model has "
                f"{classes} classes; use balanced labels, or make a reference of labelled images (raekit reference)"
            )
        images = np.array(of_reference)
    shares = images / images.sum() * count
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: count - counts.sum()]] += 1  # the largest remainders
    return generator.permutation(np.repeat(np.arange(classes), counts)).tolist()
