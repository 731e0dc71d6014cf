"""The classes that samples are generated of."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from raekit.errors import UserError
from raekit.randomness import numpy_generator

Labels = Literal["balanced", "random", "reference"]
"""Each class equally often, as in the literature; uniform and independent; or in the proportions of the reference."""


def draw_labels(kind: Labels, classes: int, count: int, seed: int, of_reference: Sequence[int] | None) -> list[int]:
    """`count` labels of `classes` classes, in an order that is a function of the seed.

    `of_reference` are the numbers of the reference's images by class. UserError if they are needed and not there, or
    are of another number of classes.
    """
    generator = numpy_generator(seed, "labels", 0)
    if kind == "random":
        return generator.integers(classes, size=count).tolist()
    images = np.ones(classes)
    if kind == "reference":
        if of_reference is None or len(of_reference) != classes or not sum(of_reference):
            told = "none" if of_reference is None else f"{len(of_reference)} classes"
            raise UserError(
                f"labels: the reference tells the proportions of {told}, the model has {classes} classes; take "
                "balanced labels, or a reference that raekit reference made of labelled images"
            )
        images = np.array(of_reference)
    shares = images / images.sum() * count
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: count - counts.sum()]] += 1  # the largest remainders
    return generator.permutation(np.repeat(np.arange(classes), counts)).tolist()
