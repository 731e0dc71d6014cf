"""What a denoiser is told of an image beside the time: the seam at which conditions other than classes come in.

A condition is a module that a `Denoiser` holds as `label`. What is given of each image (here its class; a text's
embedding, say) passes to it from the data and from the callers of `raekit.flow.sampling`. Nothing between looks inside:
not the trainer, the loss, the solvers, or guidance, for which None means that nothing is given.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Condition(Protocol):
    """What a denoiser's `label` is, an nn.Module besides."""

    def __call__(self, given: Tensor | None, count: int) -> Tensor:
        """An embedding (count, width), one for each of `count` images; None gives that of nothing, for CFG."""
        ...

    def without(self, given: Tensor, dropped: Tensor) -> Tensor:
        """`given`, with nothing for the images that `dropped` (B,) names: for training without a condition at times."""
        ...


class ClassCondition(nn.Module):
    """One of `classes` ids (B,), or weights (B, classes + 1) over the classes and nothing, which mix embeddings.

    The last row of its table stands for no class.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.null = classes
        self.weight = nn.Parameter(torch.randn(classes + 1, width))

    def forward(self, given: Tensor | None, count: int) -> Tensor:
        if given is None:
            given = torch.full((count,), self.null, device=self.weight.device)
        return given @ self.weight if given.is_floating_point() else F.embedding(given, self.weight)

    def without(self, given: Tensor, dropped: Tensor) -> Tensor:
        """See `Condition.without`. Ids below 0 stand for an unknown class and become nothing, too."""
        if given.is_floating_point():
            nothing = F.one_hot(torch.tensor(self.null, device=given.device), self.null + 1).to(given)
            return torch.where(dropped[:, None], nothing, given)
        return given.masked_fill(dropped | (given < 0), self.null)
