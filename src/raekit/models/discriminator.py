"""The stage-1 discriminator, heads on the features of a frozen ViT, and the adversarial losses (RAE v1)."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.config import Place, configclass
from raekit.errors import UserError
from raekit.hub import find_file
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.layers import ViTBlock, to_tokens
from raekit.models.registry import IMAGENET
from raekit.weights import is_real, load_strict, read_weights

DINO_S8 = ("nyu-visionx/RAE-collections", "discs/dino_vit_small_patch8_224.pth")
NORM_EPS = 1e-6
HEAD_DIM = 64  # in every DINO ViT
GROUPS = 32


class Dino(nn.Module):
    """The frozen ViT of DINO (Caron et al., 2021).

    Images are resized to the network's own size with bilinear interpolation. Like the published discriminator, this
    network uses the tanh approximation of GELU, although DINO was trained with the exact GELU.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, depth: int, patch_size: int, grid: int) -> None:
        super().__init__()
        self.width, self.image_size = width, grid * patch_size
        self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = nn.ModuleList(
            ViTBlock(width, width // HEAD_DIM, 4 * width, NORM_EPS, gelu="tanh") for _ in range(depth)
        )
        mean, std = torch.tensor(IMAGENET, device="cpu").view(2, 3, 1, 1)  # with values even under a meta device
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.requires_grad_(False)

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the patch tokens (B, N, width) after each of `blocks` (from 0), for images (B, 3, H, W) in [0, 1]."""
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        x = to_tokens(self.embed((images - self.mean) / self.std))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x[:, 1:])
        return [outputs[index] for index in blocks]


_DINO = {
    "pos_embed": "positions",
    "patch_embed.proj": "embed",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


def dino(state: Mapping[str, Tensor], source: object) -> Dino:
    """Build the network of a DINO checkpoint.

    Args:
        state: The checkpoint's tensors under `timm`'s names. Their shapes give the network's sizes. The final norm
            is not used.
        source: Name of the checkpoint in error messages.

    Raises:
        UserError: If a tensor is missing, unexpected or misshapen.
    """
    positions, kernel = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    tensors = all(is_real(value) for value in state.values())
    if not tensors or positions is None or kernel is None or positions.ndim != 3 or kernel.ndim != 4:
        raise UserError(f"{source}: not a DINO ViT: needs only tensors, including pos_embed (1, 1 + N, D), patch_embed")
    if positions.shape[1] < 2 or kernel.shape[0] % HEAD_DIM:
        raise UserError(f"{source}: not a DINO ViT: needs at least one patch and a width divisible by {HEAD_DIM}")
    found = (re.match(r"blocks\.(\d+)\.", key) for key in state)
    depth = len({match[1] for match in found if match})
    with torch.device("meta"):
        model = Dino(kernel.shape[0], depth, kernel.shape[3], math.isqrt(positions.shape[1] - 1))
    ours = {}
    for key, value in state.items():
        if key.startswith("norm."):
            continue
        if key.endswith("attn.qkv.bias") and value.ndim:
            value = value.clone()
            value[model.width : 2 * model.width] = 0  # as published; the key bias shifts all scores of a query equally
        ours[re.sub("|".join(map(re.escape, _DINO)), lambda match: _DINO[match[0]], key)] = value.float()
    load_strict(model, ours, source)
    return model


Backbone = Encoder | Dino


def load_backbone(name: str) -> Backbone:
    """Load the frozen network under the discriminator's heads.

    Args:
        name: `dino-s8` (the published backbone, from the Hub), a file of DINO weights (.pth, .pt or .safetensors), or
            the name of an encoder (`load_encoder`).

    Raises:
        UserError: If there is no such network, or if its weights are missing or damaged.
    """
    path = find_file(*DINO_S8) if name == "dino-s8" else Path(name)
    if path.suffix in (".pth", ".pt", ".safetensors"):
        return dino(read_weights(path), path)
    return load_encoder(name)


@configclass
class DiscriminatorConfig:
    """The backbone of a discriminator and its heads.

    Attributes:
        backbone: `dino-s8` (the published backbone, from the Hub), a file of DINO weights (.pth, .pt or .safetensors),
            or the name of an encoder.
        blocks: Blocks of the backbone, from 0 and increasing, whose outputs get a head each. The last block always
            gets one more head.
        kernel_size: Odd kernel size of each head's residual convolution along the tokens.
        norm: `instance` normalises each channel of each image separately (published as "bn", batch norm with a
            virtual batch of 1). `group` normalises 32 groups of channels ("gn").
        spectral_norm: Divides the weights of the heads' convolutions by their largest singular value.
    """

    backbone: Place = "dino-s8"
    blocks: tuple[int, ...] = (2, 5, 8, 11)
    kernel_size: int = 9
    norm: Literal["instance", "group"] = "instance"
    spectral_norm: bool = True

    def __post_init__(self) -> None:
        if list(self.blocks) != sorted(set(self.blocks)) or min(self.blocks, default=0) < 0:
            raise UserError(f"discriminator.blocks: {self.blocks} must be increasing and not negative")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(f"discriminator.kernel_size: {self.kernel_size} must be odd and positive")


class SpectralConv1d(nn.Conv1d):
    """A convolution whose weight W is divided by its largest singular value, u' W v.

    The state dict holds the estimates of the singular vectors `u` and `v`. Each forward pass in training mode improves
    the estimates with one power iteration.
    """

    u: Tensor
    v: Tensor

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        matrix = self.weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", torch.zeros(matrix.shape[1]))
        for _ in range(10):  # random vectors would give an arbitrary scale and sign
            self._iterate(matrix)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        self.v.copy_(F.normalize(matrix.mT @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            if self.training:
                self._iterate(matrix)
            u, v = self.u.clone(), self.v.clone()  # the backward pass needs the present values
            weight = self.weight / (u @ (matrix @ v))
        return self._conv_forward(input, weight, self.bias)


class Head(nn.Module):
    """A small convolutional network along the tokens: features (B, channels, N) -> logits (B, N)."""

    def __init__(self, channels: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        conv = SpectralConv1d if config.spectral_norm else nn.Conv1d
        groups = GROUPS if config.norm == "group" else channels

        def block(kernel_size: int) -> nn.Sequential:
            mode = "circular" if kernel_size > 1 else "zeros"
            return nn.Sequential(
                conv(channels, channels, kernel_size, padding=kernel_size // 2, padding_mode=mode),
                nn.GroupNorm(groups, channels, NORM_EPS),
                nn.LeakyReLU(0.2),
            )

        self.first = block(1)
        self.residual = block(config.kernel_size)
        self.out = conv(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.first(features)
        return self.out((self.residual(x) + x) * 0.5**0.5).squeeze(1)


class Discriminator(nn.Module):
    """A frozen backbone and trained heads: images (B, 3, H, W) in [0, 1] -> logits (B, (1 + blocks) * N), float32.

    Each head gives one logit per patch, high for real images. The logits of the last block's head come first. The
    heads of `config.blocks` follow.

    The backbone is not a submodule: it moves to another device or dtype with the heads, but its weights are neither in
    `parameters()` nor in the state dict. Training mode affects only the power iterations of the spectral norm.
    """

    backbone: Backbone

    def __init__(self, config: DiscriminatorConfig, backbone: Backbone) -> None:
        super().__init__()
        depth, width = len(backbone.blocks), backbone.width
        if (deepest := max(config.blocks, default=0)) >= depth:
            raise UserError(
                f"discriminator.blocks: {config.backbone} has no block {deepest}; its blocks are 0 to {depth - 1}"
            )
        if config.norm == "group" and width % GROUPS:
            raise UserError(
                f"discriminator.norm: group needs a width divisible by {GROUPS}, but {config.backbone} has {width}; "
                "use instance"
            )
        self.config = config
        object.__setattr__(self, "backbone", backbone)
        self.heads = nn.ModuleList(Head(width, config) for _ in range(1 + len(config.blocks)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.backbone._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone.features(images, (-1, *self.config.blocks))
        return torch.cat([head(x.mT).float() for head, x in zip(self.heads, features, strict=True)], dim=1)


def discriminator_loss(real: Tensor, fake: Tensor, kind: Literal["hinge", "softplus"] = "hinge") -> Tensor:
    """Return the discriminator's loss, from its logits (any shape) for real and for generated images."""
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """Return the generator's loss; it is the same for both discriminator losses."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, maximum: float = 1e4) -> Tensor:
    """Return the factor that scales the adversarial gradient to the norm of the reconstruction gradient.

    The arguments are the norms of the two gradients at the last layer. `maximum` limits the factor.
    """
    return (reconstruction / (adversarial + 1e-6)).clamp(0, maximum).detach()
