"""Scores that compare reconstructions with their originals: PSNR, SSIM, LPIPS."""

from collections.abc import Callable

import torch
from torch import Tensor

from raekit.distributed import World
from raekit.evaluation.features import Images, PairScore
from raekit.models.perceptual import load_perceptual
from raekit.moments import Moments


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of images in [0, 1]. The largest value is 100 dB."""
    error = (images.double() - originals.double()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Return the structural similarity (B,) of images in [0, 1] (Wang et al., 2004; Gaussian window 11, sigma 1.5)."""
    # This import takes seconds.
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity = structural_similarity_index_measure(images, originals, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)  # it is a tuple only with optional outputs
    return similarity.reshape(len(images))


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
"""Scores of reconstructions, by name: (images, originals), both (B, 3, S, S) in [0, 1] -> (B,)."""


def reconstruction_metrics(lpips: str | None, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return METRICS and, unless `lpips` is None, LPIPS.

    Args:
        lpips: the file of VGG16's weights, or "auto" to find one (`load_perceptual`).
        device: where to load VGG16.
    """
    return METRICS | ({"lpips": load_perceptual(None if lpips == "auto" else lpips).to(device)} if lpips else {})


class PairMean:
    """The mean of a score of images and their originals, such as PSNR. The metric has the name of the score."""

    def __init__(self, pair: PairScore):
        self.pair = pair
        self.moments = Moments(1, diagonal=True)

    def update(self, batch: Images) -> None:
        self.moments.update(batch.features(self.pair))

    def reduce(self, world: World) -> None:
        self.moments.reduce(world)

    def result(self) -> dict[str, float]:
        return {self.pair.name: float(self.moments.mean)}
