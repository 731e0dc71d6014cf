"""REPA: align the tokens of a denoiser with the tokens of an encoder (arXiv 2410.06940), which RAE does without."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.config import Place, check_sizes, configclass
from raekit.errors import UserError
from raekit.models.denoiser import Denoiser
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.registry import Size


@configclass
class AlignmentConfig:
    """The alignment term of a denoiser's loss.

    Attributes:
        encoder: Name of the frozen encoder (`load_encoder`) whose tokens of the clean image are the target.
        encoder_size: Size in pixels to which the encoder resizes images, so that it has as many tokens as the denoiser.
            None is the encoder's default size.
        block: The block of the denoiser's backbone, from 1, whose output is aligned.
        weight: Factor of the term, which is minus the mean cosine similarity.
        hidden: Hidden width of the projector, which has three layers. The projector is not exported.
    """

    encoder: Place
    encoder_size: Size | None = None
    block: int = 8
    weight: float = 0.5
    hidden: int = 2048

    def __post_init__(self) -> None:
        check_sizes("alignment", block=self.block, hidden=self.hidden)
        if not self.weight >= 0:
            raise UserError(f"alignment.weight: {self.weight} must not be negative")


class Aligned(nn.Module):
    """A denoiser with the projector of REPA."""

    def __init__(self, denoiser: Denoiser, config: AlignmentConfig, width: int) -> None:
        """Add a projector to `width` channels.

        Raises:
            UserError: If the denoiser has no such block, or a base output.
        """
        super().__init__()
        depth = len(denoiser.blocks)
        if config.block > depth:
            raise UserError(f"alignment.block: {config.block}, but the backbone has {depth} blocks; name one of them")
        if denoiser.config.base_depth:
            raise UserError("alignment: not with a base output; leave it out, or set denoiser.base_depth to 0")
        self.denoiser, self.block, self.weight = denoiser, config.block, config.weight
        backbone, hidden = denoiser.config.backbone.width, config.hidden
        self.projector = nn.Sequential(
            nn.Linear(backbone, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the prediction of `Denoiser.forward`, and the projected tokens (B, N, width)."""
        prediction, tokens = self.denoiser(x, t, labels, tokens_after=self.block)
        return prediction, self.projector(tokens)


def load_target(config: AlignmentConfig, grid: tuple[int, int], dtype: torch.dtype) -> Encoder:
    """Load the encoder to align with.

    Args:
        config: The alignment.
        grid: The grid of the denoiser's tokens.
        dtype: Type that the encoder computes in.

    Raises:
        UserError: If the encoder's grid is not `grid`.
    """
    encoder = load_encoder(config.encoder, config.encoder_size, dtype=dtype)
    if encoder.grid != grid:
        raise UserError(
            f"alignment.encoder_size: {config.encoder} has a grid of {encoder.grid} tokens at {encoder.input_size} "
            f"pixels, but the denoiser has {grid}; set it to {grid[0] * encoder.spec.patch_size}"
        )
    return encoder


def similarity(projected: Tensor, target: Tensor) -> Tensor:
    """Return the mean cosine similarity of the tokens `projected` and `target`, each (B, N, width), in float32."""
    return F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()
