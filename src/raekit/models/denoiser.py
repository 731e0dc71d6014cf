"""The diffusion transformer: DiT, and DiT^DH with its shallow, wide head (spec 2.3, 2.4)."""

from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit import artifacts
from raekit.config import check_sizes, configclass, from_dict
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.layers import (
    DiTBlock,
    FinalLayer,
    TimeEmbedding,
    patchify,
    rotary_table,
    sincos_positions,
    unpatchify,
)
from raekit.weights import check_fit, load_strict


@configclass
class TransformerConfig:
    """A stack of DiT blocks."""

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        check_sizes("denoiser", width=self.width, heads=self.heads)
        check_sizes("denoiser", limit=1024, depth=self.depth)
        if self.width % self.heads or self.width // self.heads % 4:
            raise UserError(f"width: {self.width} over heads = {self.heads} must give a multiple of 4 channels a head")


@configclass
class DenoiserConfig:
    """A denoiser of latents (channels, *grid). Without `head` it is a plain DiT, with it a DiT^DH.

    `num_classes` = 0 makes it unconditional. `allow_narrow` lifts the refusal of a width below the token
    dimension, for experiments on that very limit. For its sampler it keeps `shift`, the time shift that it is
    trained with, and `prediction`, what its output stands for; for its users `class_names`, if they are known.
    `label_std` is the spread of the label embeddings at the start, as published. They are added to a time
    embedding whose norm soon exceeds ten: in a short training, larger ones are heard sooner.
    """

    channels: int
    grid: tuple[int, int]
    backbone: TransformerConfig
    head: TransformerConfig | None = None
    num_classes: int = 1000
    patch_size: int = 1
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    allow_narrow: bool = False
    shift: float = 1.0
    prediction: Literal["velocity", "data"] = "velocity"
    label_std: float = 0.02
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        height, width = self.grid
        check_sizes("denoiser", channels=self.channels, patch_size=self.patch_size, tokens=height * width)
        if any(side % self.patch_size for side in self.grid):
            raise UserError(f"denoiser.patch_size: {self.patch_size} does not divide the grid {self.grid}")
        if self.num_classes < 0:
            raise UserError(f"denoiser.num_classes: {self.num_classes} is negative; 0 means unconditional")
        if self.label_std < 0:
            raise UserError(f"denoiser.label_std: {self.label_std} is negative")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(f"denoiser.class_names: {len(self.class_names)} names for {self.num_classes} classes")
        n, d = self.token_dim, self.output_width
        if d < n and not self.allow_narrow:
            part = "head" if self.head else "backbone"
            raise UserError(
                f"denoiser.{part}.width: {d} is below the token dimension {n}. The noise fills all {n} dimensions, "
                f"so no such network gets its mean squared error below {(n - d) / n:.3f} on one image "
                f"(paper, theorem 1). Widen it to {n}, add a wide head, or set denoiser.allow_narrow"
            )

    @property
    def token_dim(self) -> int:
        """Dimension of one token, n of the paper."""
        return self.channels * self.patch_size**2

    @property
    def output_width(self) -> int:
        """Width of the last blocks, which must hold the velocity."""
        return (self.head or self.backbone).width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.grid)

    @property
    def null_label(self) -> int:
        """The label that stands for 'no class'."""
        return self.num_classes


class Denoiser(nn.Module):
    """Predicts the velocity of noisy latents, or the data behind them (`config.prediction`)."""

    positions: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor
    head_rotary_cos: Tensor
    head_rotary_sin: Tensor

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        width = config.backbone.width
        tokens = (config.grid[0] // config.patch_size, config.grid[1] // config.patch_size)
        self.embed = nn.Linear(config.token_dim, width)
        self.time = TimeEmbedding(width)
        self.label = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.blocks = _blocks(config, config.backbone)
        self.register_buffer("positions", sincos_positions(width, tokens), persistent=False)
        self._register_rotary("rotary", config.backbone, tokens)
        if config.head:
            self.head_embed = nn.Linear(config.token_dim, config.head.width)
            same = config.head.width == width
            self.head_condition = nn.Identity() if same else nn.Linear(width, config.head.width)
            self.head_blocks = _blocks(config, config.head)
            self._register_rotary("head_rotary", config.head, tokens)
        self.final = FinalLayer(config.output_width, config.token_dim)
        self.token_grid = tokens
        _initialise(self)

    @classmethod
    def load(cls, name: str) -> Self:
        """Load `builtin:NAME`, a model folder, a run, or OWNER/NAME on the Hub; UserError if it is not whole."""
        path, values = artifacts.find(name, "denoiser")
        config, state = from_dict(DenoiserConfig, values, path / "config.json"), artifacts.read(path)
        check_fit(lambda: cls(config), state, path)
        model = cls(config)
        load_strict(model, state, path)
        return model.eval()

    def save(self, folder: Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/denoiser, for `load`."""
        artifacts.write(folder / "denoiser", "denoiser", self.config, self, world or World(), dtype=dtype)

    def _register_rotary(self, name: str, part: TransformerConfig, tokens: tuple[int, int]) -> None:
        for suffix, table in zip(("cos", "sin"), rotary_table(part.width // part.heads, tokens), strict=True):
            self.register_buffer(f"{name}_{suffix}", table, persistent=False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noisy latents (B, C, H, W), times (B,) in [0, 1] (1 is noise), class ids (B,) -> prediction (B, C, H, W).

        `labels` None means the null class for all.
        """
        size = self.config.patch_size
        patches = patchify(x, size)
        time = self.time(t)[:, None]
        condition = time
        if self.label is not None:
            if labels is None:
                labels = torch.full((len(x),), self.config.null_label, device=x.device)
            condition = time + self.label(labels)[:, None]
        tokens = self.embed(patches) + self.positions
        if not self.config.head:
            tokens = _run(self.blocks, tokens, condition, (self.rotary_cos, self.rotary_sin))
            out = self.final(tokens, condition)
        else:
            # The published network passes the backbone's condition through SiLU before the blocks do so again.
            tokens = _run(self.blocks, tokens, F.silu(condition), (self.rotary_cos, self.rotary_sin))
            condition = self.head_condition(F.silu(tokens + time))
            tokens = self.head_embed(patches)
            tokens = _run(self.head_blocks, tokens, condition, (self.head_rotary_cos, self.head_rotary_sin))
            out = self.final(tokens, condition)
        return unpatchify(out.float(), size, self.token_grid)


def _blocks(config: DenoiserConfig, part: TransformerConfig) -> nn.ModuleList:
    hidden = int(2 / 3 * int(part.width * config.mlp_ratio))
    return nn.ModuleList(DiTBlock(part.width, part.heads, hidden, config.qk_norm) for _ in range(part.depth))


def _run(blocks: nn.ModuleList, x: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    for block in blocks:
        x = block(x, condition, rotary)
    return x


@torch.no_grad()
def _initialise(model: Denoiser) -> None:
    """As published: a plain DiT has Xavier-uniform matrices, a DiT^DH torch's default; both output zero."""
    if model.config.head is None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    embeds = [model.embed] + ([model.head_embed] if model.config.head else [])
    for embed in embeds:
        nn.init.xavier_uniform_(embed.weight)
        nn.init.zeros_(embed.bias)
    if model.label is not None:
        nn.init.normal_(model.label.weight, std=model.config.label_std)
    for layer in model.time.mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    blocks = [*model.blocks, *(model.head_blocks if model.config.head else [])]
    for zero in [block.modulation for block in blocks] + [model.final.modulation, model.final.out]:
        nn.init.zeros_(zero.weight)
        nn.init.zeros_(zero.bias)
