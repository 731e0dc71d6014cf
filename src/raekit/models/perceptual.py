"""LPIPS, the perceptual distance of Zhang et al. (2018), version 0.1 on VGG16 (RAE v1)."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.hub import get_dir

from raekit.errors import UserError
from raekit.hub import ASSETS, find_file
from raekit.weights import load_strict, read_weights

HEADS = ASSETS / "lpips" / "heads.safetensors"
VGG_CHECKPOINT = "vgg16-397923af.pth"  # its name in torchvision's cache
VGG_HUB = ("timm/vgg16.tv_in1k", "model.safetensors")  # torchvision's weights under the same names

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
EPS = 1e-10


class LPIPS(nn.Module):
    """The LPIPS distances (B,) between images and targets, (B, 3, H, W) in [0, 1] with sides of at least 16 pixels.

    The network is frozen and always in evaluation mode. The distances are differentiable with respect to the images.
    Under autocast, only the convolutions run in lower precision.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        taps: list[int] = []
        channels = 3
        for widths in STAGES:
            if taps:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # numbered as in torchvision
        self.taps = frozenset(taps)
        for index, widths in enumerate(STAGES):
            self.register_parameter(f"lin{index}", nn.Parameter(torch.zeros(1, widths[-1], 1, 1)))
        # The published constants, for colours in [-1, 1]. They differ slightly from ImageNet's.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode, the only mode of a frozen network."""
        return self

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        if min(images.shape[2:]) < 16:
            raise UserError(
                f"LPIPS: images of {images.shape[2]} x {images.shape[3]} pixels are too small for VGG16; "
                "use sides of at least 16"
            )
        total = torch.zeros(len(images), device=images.device)
        for index, (a, b) in enumerate(zip(self._directions(images), self._directions(targets), strict=True)):
            with torch.autocast(images.device.type, enabled=False):
                distance = F.conv2d((a - b).square(), self.get_parameter(f"lin{index}"))
                total = total + distance.mean((1, 2, 3))
        return total

    def stages(self, images: Tensor) -> list[Tensor]:
        """Return the features (B, C, h, w) of the last layer of each of VGG16's five stages, after ReLU."""
        # Channels last is 1.2 times as fast on a CPU. The convolutions adapt to the layout of their input.
        x = ((2 * images.float() - 1 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x.float())
        return found

    def _directions(self, images: Tensor) -> list[Tensor]:
        """Return the features after each stage, normalised to unit length over the channels."""
        return [x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS) for x in self.stages(images)]


def load_perceptual(source: str | None = None) -> LPIPS:
    """Load LPIPS.

    Args:
        source: A file with VGG16's convolutions under torchvision's names (`features.N.weight`) and, optionally,
            LPIPS's heads (`linI.model.1.weight`). Heads that the file does not contain come from the package, version
            0.1. None takes VGG16 from torchvision's cache, then from the Hub.

    Raises:
        UserError: If there is no file, or if a tensor is missing, unexpected or misshapen.
    """
    path = Path(source) if source else _find_vgg()
    model = LPIPS()
    load_strict(model, perceptual_state(read_weights(path)), path)
    return model


def perceptual_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a published state dict: drop VGG's classifier, and add the package's heads if `state` has none."""
    classifier = ("classifier.", "pre_logits.", "head.")  # the name in torchvision, and the two on the Hub
    ours = {key: value for key, value in state.items() if not key.startswith(classifier)}
    if not any(key.startswith("lin") for key in ours):
        ours |= read_weights(HEADS)
    return {key.removesuffix(".model.1.weight"): value for key, value in ours.items()}


def _find_vgg() -> Path:
    path = Path(get_dir(), "checkpoints", VGG_CHECKPOINT)
    if path.is_file():
        return path
    try:
        return find_file(*VGG_HUB)
    except UserError as error:
        raise UserError(
            f"LPIPS needs VGG16's weights; download https://download.pytorch.org/models/{VGG_CHECKPOINT} to {path}, "
            f"or name a file that holds them (not found on the Hub either: {error})"
        ) from None
