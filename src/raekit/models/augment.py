"""Differentiable augmentation of what a discriminator sees (Zhao et al., 2020; as published, spec 1.7)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from raekit import randomness
from raekit.config import configclass
from raekit.errors import UserError


@configclass
class AugmentConfig:
    """`prob` is the chance, drawn once a batch, of each of three policies: translation, colour and cutout.

    `translation` is the largest shift and `cutout` the side of the square that is cut out, as shares of the
    image's side; 0 turns the policy off.
    """

    prob: float = 1.0
    translation: float = 0.125
    cutout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prob", "translation", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name}: {getattr(self, name)} must be between 0 and 1")


def augment(images: Tensor, config: AugmentConfig, *, seed: int, stream: str, step: int, positions: Tensor) -> Tensor:
    """Augmented images (B, 3, H, W), in [0, 1] on entry; colours may leave it. Differentiable.

    Which policies fire is addressed by `step`, what they do to an image by its position: neither depends on the
    other images. `stream` names the use: real and generated images are augmented independently.
    """
    fires = randomness.uniform(seed, f"{stream} policies", [step], (3,))[0] < config.prob
    draws = randomness.uniform(seed, stream, positions, (7,)).to(images.device, non_blocking=True).mT
    x = 2 * images - 1  # what is moved in or cut out is grey
    if fires[0] and config.translation:
        x = _translate(x, config.translation, draws[0], draws[1])
    if fires[1]:
        brightness, saturation, contrast = draws[2:5, :, None, None, None]
        x = x + (brightness - 0.5)
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * (2 * saturation)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * (contrast + 0.5)
    if fires[2] and config.cutout:
        x = x * _cutout(x, config.cutout, draws[5], draws[6])
    return (x + 1) / 2


def _translate(x: Tensor, share: float, down: Tensor, right: Tensor) -> Tensor:
    """Shift each image by whole pixels, up to `share` of its sides; `down` and `right` (B,) are uniform draws."""
    for dim, draw in ((2, down), (3, right)):
        size = x.shape[dim]
        reach = round(size * share)
        start = (draw * (2 * reach + 1)).long()  # in the padded image
        index = start[:, None] + torch.arange(size, device=x.device)
        padded = F.pad(x, (0, 0, reach, reach) if dim == 2 else (reach, reach))
        x = padded.gather(dim, (index[:, None, :, None] if dim == 2 else index[:, None, None, :]).expand(x.shape))
    return x


def _cutout(x: Tensor, share: float, down: Tensor, right: Tensor) -> Tensor:
    """A mask (B, 1, H, W) that is zero in a square, the part of it inside the image; its centre is drawn evenly."""
    inside = []
    for size, draw in ((x.shape[2], down), (x.shape[3], right)):
        side = round(size * share)
        start = (draw * (size + 1 - side % 2)).long() - side // 2
        offset = torch.arange(size, device=x.device) - start[:, None]
        inside.append((offset >= 0) & (offset < side))
    return ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
