"""Differentiable augmentation of a discriminator's input (Zhao et al., 2020; as published)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from raekit import randomness
from raekit.config import configclass
from raekit.errors import UserError


@configclass
class AugmentConfig:
    """Settings of the three augmentation policies: translation, colour and cutout.

    Attributes:
        prob: Probability that a policy is applied, drawn for each policy once per batch.
        translation: Largest shift, as a fraction of the image's side; 0 turns translation off.
        cutout: Side of the erased square, as a fraction of the image's side; 0 turns cutout off.
    """

    prob: float = 1.0
    translation: float = 0.125
    cutout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prob", "translation", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name}: {getattr(self, name)} must be between 0 and 1")


def augment(images: Tensor, config: AugmentConfig, *, seed: int, stream: str, step: int, positions: Tensor) -> Tensor:
    """Augment images differentiably.

    `step` determines which policies are applied. An image's position determines how they change the image. The
    result for one image therefore does not depend on the other images of the batch.

    Args:
        images: Images (B, 3, H, W) in [0, 1].
        config: The policies.
        seed: Seed of the run.
        stream: Name of the random stream. Real and generated images use different streams, so that they are
            augmented independently.
        step: The training step.
        positions: Positions (B,) of the images in the data stream.

    Returns:
        Images (B, 3, H, W). Changed colours may lie outside [0, 1].
    """
    applied = randomness.uniform(seed, f"{stream} policies", [step], (3,))[0] < config.prob
    draws = randomness.uniform(seed, stream, positions, (7,)).to(images.device, non_blocking=True).mT
    x = 2 * images - 1  # zero, the value of padding and of the erased square, is grey
    if applied[0] and config.translation:
        x = _translate(x, config.translation, draws[0], draws[1])
    if applied[1]:
        brightness, saturation, contrast = draws[2:5, :, None, None, None]
        x = x + (brightness - 0.5)
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * (2 * saturation)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * (contrast + 0.5)
    if applied[2] and config.cutout:
        x = x * _cutout(x, config.cutout, draws[5], draws[6])
    return (x + 1) / 2


def _translate(x: Tensor, share: float, down: Tensor, right: Tensor) -> Tensor:
    """Shift each image by up to `share` of its sides, in full pixels; `down` and `right` (B,) are uniform draws."""
    for dim, draw in ((2, down), (3, right)):
        size = x.shape[dim]
        reach = round(size * share)
        start = (draw * (2 * reach + 1)).long()  # offset of the crop in the padded image
        index = start[:, None] + torch.arange(size, device=x.device)
        padded = F.pad(x, (0, 0, reach, reach) if dim == 2 else (reach, reach))
        x = padded.gather(dim, (index[:, None, :, None] if dim == 2 else index[:, None, None, :]).expand(x.shape))
    return x


def _cutout(x: Tensor, share: float, down: Tensor, right: Tensor) -> Tensor:
    """Return a mask (B, 1, H, W) that is False inside a square with a side of `share` of the image's side.

    The centre of the square is uniform over the image, so that part of the square may lie outside.
    """
    inside = []
    for size, draw in ((x.shape[2], down), (x.shape[3], right)):
        side = round(size * share)
        start = (draw * (size + 1 - side % 2)).long() - side // 2
        offset = torch.arange(size, device=x.device) - start[:, None]
        inside.append((offset >= 0) & (offset < side))
    return ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
