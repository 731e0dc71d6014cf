"""Conditions: the input of a denoiser in addition to the noisy latents and the time.

A `Denoiser` holds its condition as the module `label`. The data and the callers of `raekit.flow.sampling` provide the
module's input for each image. The built-in condition is a class. A condition of your own may take any float tensor with
a row for each image, such as a text embedding. The trainer, the loss, the solvers, guidance and `raekit.generate` pass
this input on without looking inside; for them, None means unconditional.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.models.checks import check_labels


class Condition(Protocol):
    """The interface of a denoiser's `label`, which is also an nn.Module."""

    def __call__(self, given: Tensor | None, count: int) -> Tensor:
        """Embed the condition of `count` images as one vector each, (count, width).

        None means that no image has a condition.
        """
        ...

    def without(self, given: Tensor, dropped: Tensor) -> Tensor:
        """Return `given` without the conditions of the images in the mask `dropped` (B,), for dropout and for CFG."""
        ...


class ClassCondition(nn.Module):
    """A table of class embeddings, whose last row stands for "no class".

    The input is class ids (B,), or weights (B, classes + 1) that mix the rows of the table.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.null = classes
        self.weight = nn.Parameter(torch.randn(classes + 1, width))

    def forward(self, given: Tensor | None, count: int) -> Tensor:
        if given is None:
            given = torch.full((count,), self.null, device=self.weight.device)
        check_labels(given, count, self.null)
        return given @ self.weight if given.is_floating_point() else F.embedding(given, self.weight)

    def without(self, given: Tensor, dropped: Tensor) -> Tensor:
        """Replace dropped ids by "no class", and also ids below 0, which mark images of unknown class."""
        if given.is_floating_point():
            nothing = F.one_hot(torch.tensor(self.null, device=given.device), self.null + 1).to(given)
            return torch.where(dropped[:, None], nothing, given)
        return given.masked_fill(dropped | (given < 0), self.null)


def same_classes(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Return whether a label means the same in two lists of class names.

    A list without names, or with the ids as names, fits every list. ImageNet's folders, named by WordNet ids, fit the
    names of as many classes: the labels of ImageNet count the sorted ids.
    """
    numbered = any(list(names) == [str(label) for label in range(len(names))] for names in (ours, theirs))
    wordnet = [all(re.fullmatch(r"n\d{8}", name) for name in names) for names in (ours, theirs)]
    translated = wordnet[0] != wordnet[1] and len(ours) == len(theirs)
    return numbered or translated or list(ours) == list(theirs)
