"""The configuration of a denoiser: sizes and switches."""

import math
from dataclasses import replace
from typing import Literal

from raekit.config import check_sizes, configclass
from raekit.errors import UserError, whole_number
from raekit.models.layers import (
    MLPKind,
    NormKind,
)

PositionKind = Literal["none", "sincos", "learned"]


@configclass
class TransformerConfig:
    """Sizes of a stack of DiT blocks.

    Attributes:
        width: Channels of a token, a multiple of four times `heads`.
        depth: Number of blocks.
        heads: Number of attention heads.
    """

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        check_sizes("denoiser", width=self.width, heads=self.heads)
        check_sizes("denoiser", limit=1024, depth=self.depth)
        if self.width % self.heads or self.width // self.heads % 4:
            raise UserError(f"width: {self.width} over heads = {self.heads} must give a multiple of 4 channels a head")


SIZES = {
    "S": TransformerConfig(width=384, depth=12, heads=6),
    "B": TransformerConfig(width=768, depth=12, heads=12),
    "L": TransformerConfig(width=1024, depth=24, heads=16),
    "XL": TransformerConfig(width=1152, depth=28, heads=16),
    "XXL": TransformerConfig(width=1280, depth=32, heads=16),
    "H": TransformerConfig(width=1536, depth=32, heads=16),
    "G": TransformerConfig(width=2048, depth=40, heads=16),
    "T": TransformerConfig(width=2688, depth=40, heads=21),
}
"""Published sizes of a plain DiT, and of the backbone of a DiT^DH."""


def wide_head(size: str = "G", depth: int = 2) -> TransformerConfig:
    """Return a head for a DiT^DH, as wide as the DiT of this size. The published default is G."""
    return replace(SIZES[size], depth=depth)


@configclass
class ContextConfig:
    """Conditioning in context, as in RAE v2: tokens of time and class follow the image's tokens, and replace adaLN.

    Each token is a learned vector plus the embedding of the time, or of the class.

    Attributes:
        time_tokens: Number of tokens of the time.
        label_tokens: Number of tokens of the class.
    """

    time_tokens: int = 4
    label_tokens: int = 8

    def __post_init__(self) -> None:
        for name in ("time_tokens", "label_tokens"):
            whole_number(f"denoiser.context.{name}", getattr(self, name), 1)


@configclass
class DenoiserSize:
    """The part of a denoiser's configuration that does not depend on the latents.

    Attributes:
        backbone: The blocks of a plain DiT, or of the backbone of a DiT^DH.
        head: The shallow, wide head of a DiT^DH. None makes a plain DiT.
        patch_size: Side of the square of latent positions that make a token.
        mlp_ratio: Hidden width of the MLPs divided by the width; "swiglu" takes 2/3 of it.
        norm: "rms" has weights; "layer" is a LayerNorm without weights.
        mlp: "swiglu", or "gelu" for two layers around a tanh-GELU.
        positions: The positions that are added to the backbone's tokens. "none" adds no positions. "sincos" is the
            fixed sine-cosine table, as in the code that trained the released models. "learned" is a weight that starts
            from this table, as in the published code for GPUs.
        rotary: Whether queries and keys are rotated by their position.
        qk_norm: Whether queries and keys are normalised.
        adaln_shift: Whether the blocks' modulation (adaLN) has shifts, not only scales and gates.
        context: Conditions the backbone by tokens instead of adaLN.
        base_depth: The number of backbone blocks before the base output, for internal guidance. 0: no base output.
        allow_narrow: Allow a width below the token dimension, for experiments on this limit.
        prediction: The quantity that the output predicts.
        label_std: Standard deviation of the initial label embeddings, 0.02 as published. The norm of the time embedding
            soon exceeds 10, so small label embeddings have little effect. With a larger value, a short training learns
            the classes earlier.
    """

    backbone: TransformerConfig
    head: TransformerConfig | None = None
    patch_size: int = 1
    mlp_ratio: float = 4.0
    norm: NormKind = "rms"
    mlp: MLPKind = "swiglu"
    positions: PositionKind = "sincos"
    rotary: bool = True
    qk_norm: bool = False
    adaln_shift: bool = True
    context: ContextConfig | None = None
    base_depth: int = 0
    allow_narrow: bool = False
    prediction: Literal["velocity", "data"] = "velocity"
    label_std: float = 0.02

    def __post_init__(self) -> None:
        if not self.mlp_ratio > 0:
            raise UserError(f"denoiser.mlp_ratio: {self.mlp_ratio} must be positive")
        if self.label_std < 0:
            raise UserError(f"denoiser.label_std: {self.label_std} is negative; it must be at least 0")
        if not 0 <= self.base_depth <= self.backbone.depth:
            raise UserError(
                f"denoiser.base_depth: {self.base_depth} must be at most denoiser.backbone.depth = "
                f"{self.backbone.depth}; 0 means no base output"
            )
        if self.positions == "none" and not self.rotary:
            raise UserError(
                "denoiser.rotary: off, and denoiser.positions is none; switch one on, so that tokens have a position"
            )


@configclass
class DenoiserConfig(DenoiserSize):
    """Complete configuration of a denoiser of latents (channels, *grid).

    Attributes:
        channels: Channels of the latents.
        grid: Height and width of the latents.
        num_classes: 0 makes the denoiser unconditional.
        shift: The time shift of its training, which its sampler needs.
        class_names: Names of the classes, if they are known.
    """

    channels: int
    grid: tuple[int, int]
    num_classes: int = 1000
    shift: float = 1.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("denoiser", channels=self.channels, patch_size=self.patch_size)
        if any(side < 1 or side % self.patch_size for side in self.grid):
            raise UserError(f"denoiser.patch_size: {self.patch_size} does not divide the grid {self.grid}")
        check_sizes("denoiser", tokens=math.prod(self.token_grid), token_dim=self.token_dim)
        if not self.shift > 0:
            raise UserError(f"denoiser.shift: {self.shift} must be positive")
        if self.num_classes < 0:
            raise UserError(f"denoiser.num_classes: {self.num_classes} is negative; 0 means unconditional")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(f"denoiser.class_names: {len(self.class_names)} names for {self.num_classes} classes")
        n, d = self.token_dim, self.output_width
        if d < n and not self.allow_narrow:
            part, more = ("head", "") if self.head else ("backbone", ", add a wide head")
            raise UserError(
                f"denoiser.{part}.width: {d} is below the token dimension {n}. The noise fills all {n} dimensions, "
                f"so no such network gets its mean squared error below {(n - d) / n:.3f} on one image "
                f"(paper, theorem 1). Widen it to {n}{more}, or set denoiser.allow_narrow"
            )

    @property
    def token_dim(self) -> int:
        """Dimension of a token, n in the paper."""
        return self.channels * self.patch_size**2

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return (self.grid[0] // self.patch_size, self.grid[1] // self.patch_size)

    @property
    def output_width(self) -> int:
        """Width of the last blocks. It limits what the output can represent."""
        return (self.head or self.backbone).width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents."""
        return (self.channels, *self.grid)
