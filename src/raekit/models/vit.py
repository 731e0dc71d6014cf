"""The library's own small ViT encoder."""

from torch import Tensor, nn

from raekit.config import check_sizes, configclass
from raekit.errors import UserError
from raekit.models.layers import ViTBlock, patchify, sincos_positions
from raekit.models.linear import Linear
from raekit.models.registry import HALF, MAX_DEPTH, Colours, EncoderSpec


@configclass
class ViTConfig:
    """The small ViT that `stages.representation` pretrains: sine-cosine positions, no class token.

    Attributes:
        image_size: Side of the square images in pixels.
        patch_size: Side of a patch in pixels.
        width: Channels of a token, a multiple of 4 and of `heads`.
        depth: Number of blocks.
        heads: Number of attention heads.
        mlp_ratio: Hidden width of the MLPs, as a multiple of `width`.
        mean: Mean colour that is subtracted from images in [0, 1].
        std: Standard deviation of the colours, by which images are divided.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    mean: Colours = HALF[0]
    std: Colours = HALF[1]

    def __post_init__(self) -> None:
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size, "width": self.width}
        check_sizes("vit", **sizes, heads=self.heads)
        check_sizes("vit", tokens=max(self.image_size // self.patch_size, 1) ** 2)
        check_sizes("vit", limit=MAX_DEPTH, depth=self.depth)
        if not self.mlp_ratio > 0:
            raise UserError(f"vit.mlp_ratio: {self.mlp_ratio} must be positive")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"vit.width: {self.width} must be a multiple of 4 and of vit.heads = {self.heads}")

    @property
    def spec(self) -> EncoderSpec:
        return EncoderSpec(
            family="raekit",
            width=self.width,
            patch_size=self.patch_size,
            image_size=self.image_size,
            prefix_tokens=0,
            mean=self.mean,
            std=self.std,
        )


class ViT(nn.Module):
    """A ViT: normalised pixels (B, 3, H, W) -> tokens (B, N, width), normalised over the channels.

    With `keep` (B, K), indices of patches, the network runs only on these patches (masked pretraining).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Linear(3 * config.patch_size**2, config.width)
        self.blocks = nn.ModuleList(
            ViTBlock(config.width, config.heads, int(config.width * config.mlp_ratio), eps=1e-6)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.register_buffer("positions", sincos_positions(config.width, self.grid), persistent=False)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Embed the patches (B, N, width) and add their positions, as the input of the first block."""
        size = self.config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        if grid == self.grid:
            positions = self.get_buffer("positions")
        else:
            positions = sincos_positions(self.config.width, grid, pixels.device)  # a copy would wait for the GPU
        return self.embed(patchify(pixels, size)) + positions.to(pixels)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.tokens(pixels)
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
