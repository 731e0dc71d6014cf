"""Scores that compare reconstructions with their originals: PSNR, SSIM, LPIPS."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from raekit.distributed import World
from raekit.evaluation.features import Images, PairScore
from raekit.models.perceptual import load_perceptual
from raekit.moments import Moments


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of images in [0, 1]. The largest value is 100 dB."""
    error = (images.double() - originals.double()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Return the structural similarity (B,) of images (B, C, H, W) in [0, 1].

    A Gaussian window of 11 pixels with sigma 1.5, on images that are mirrored at their borders, as in torchmetrics.
    Sides must have at least 6 pixels (Wang et al., 2004, equation 13).
    """
    x, y = images.double(), originals.double()
    channels = x.shape[1]
    line = torch.exp(-torch.arange(-5.0, 6.0, dtype=x.dtype, device=x.device).square() / (2 * 1.5**2))
    window = (torch.outer(line, line) / line.sum() ** 2).expand(channels, 1, 11, 11)

    def mean(values: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(values, (5, 5, 5, 5), mode="reflect"), window, groups=channels)

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


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
