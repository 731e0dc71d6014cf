"""The ViT decoder from encoder tokens to pixels (RAE v1)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.config import check_sizes, configclass
from raekit.errors import UserError
from raekit.models.layers import ViTBlock, decoder_positions, to_grid, to_tokens, unpatchify
from raekit.models.linear import Linear

DecoderPositions = Literal["sincos", "learned"]
"""Positions of a decoder: the fixed sine-cosine table, or a weight that starts from the table."""


@configclass
class DecoderConfig:
    """Sizes of a decoder, a plain ViT with the architecture of ViT-MAE's decoder.

    Attributes:
        token_dim: channels of the encoder's tokens.
        grid: rows and columns of the token grid.
        patch_size: side in pixels of the patch that a token becomes.
        width: channels of the decoder's tokens.
        depth: number of blocks.
        heads: attention heads.
        hidden: hidden width of the MLPs.
        norm_eps: epsilon of the norms.
        positions: "sincos" is the fixed sine-cosine table, as in the code that trained the released models. "learned"
            is a weight that starts from this table, as in the published code for GPUs.
    """

    token_dim: int
    grid: tuple[int, int]
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    norm_eps: float = 1e-12
    positions: DecoderPositions = "sincos"

    def __post_init__(self) -> None:
        check_sizes("decoder", token_dim=self.token_dim, width=self.width, heads=self.heads, hidden=self.hidden)
        height, width = self.grid
        check_sizes("decoder", patch_size=self.patch_size, rows=height, tokens=height * width)
        check_sizes("decoder", limit=1024, depth=self.depth)
        if self.width % self.heads or self.width % 4:
            raise UserError(f"decoder.width: {self.width} must be a multiple of 4 and of decoder.heads = {self.heads}")


class Decoder(nn.Module):
    """Decoder from tokens to pixels, in the colours that `AutoencoderConfig.output` names."""

    positions: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Linear(config.token_dim, config.width)
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        table = decoder_positions(config.width, config.grid)
        if config.positions == "learned":
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.ModuleList(
            ViTBlock(config.width, config.heads, config.hidden, config.norm_eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.out = Linear(config.width, 3 * config.patch_size**2)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks when they are first used. Takes the arguments of `torch.compile`."""
        for block in self.blocks:
            block.compile(*args, **kwargs)

    def forward(self, latents: Tensor, last_input: list[Tensor] | None = None) -> Tensor:
        """Return images (B, 3, height, width), neither de-normalised nor clamped.

        Computes in the type of the weights, or of the surrounding autocast.

        Args:
            latents: (B, token_dim, H, W), not whitened. A grid other than `config.grid` is resampled bilinearly after
                the embedding (RAE v1).
            last_input: a list to which the input (B, N, width) of the last layer is appended, for the adaptive weight.
        """
        x = self.embed(to_tokens(latents).to(self.embed.weight.dtype))
        if latents.shape[2:] != self.config.grid:
            grid = (latents.shape[2], latents.shape[3])
            x = to_tokens(F.interpolate(to_grid(x, grid), self.config.grid, mode="bilinear", align_corners=False))
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.positions.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, 1:])
        if last_input is not None:
            last_input.append(x.detach())
        return unpatchify(self.out(x), self.config.patch_size, self.config.grid)
