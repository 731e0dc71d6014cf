"""Layers and functions that the networks share."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.models.linear import Linear, linear

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the rotation angles of each token, both (N, head_dim / 2)."""
Gelu = Literal["none", "tanh"]
NormKind = Literal["rms", "layer"]
MLPKind = Literal["swiglu", "gelu"]


def patchify(images: Tensor, size: int) -> Tensor:
    """Return the patches (B, H*W, size*size*C) of images (B, C, H*size, W*size).

    Patches are in row-major order. Within a patch the order is row, column, channel.
    """
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, size * size * c)


def unpatchify(patches: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Invert `patchify` for a grid of (H, W) patches."""
    x = patches.unflatten(1, grid).unflatten(-1, (size, size, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return tokens (B, H*W, C) as latents (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(latents: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, H*W, C)."""
    return latents.flatten(2).transpose(1, 2)


def _only_shapes() -> bool:
    """Return whether a network is built on the meta device. To compute a table there, torch imports its compiler."""
    return torch.empty(0).device.type == "meta"


def sincos_positions(width: int, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the fixed 2-D position embedding (H*W, width), on torch's default device if none is given.

    The first half of the channels encodes the column, the second half the row (RAE v1).
    """
    if _only_shapes():
        return torch.empty(grid[0] * grid[1], width)

    def counted(count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float64, device=device)

    frequencies = 10000.0 ** (-counted(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*map(counted, grid), indexing="ij")
    angles = [p.flatten()[:, None] * frequencies for p in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def decoder_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Return a decoder's fixed position embedding (1 + H*W, width), with zeros for the class token in the first row."""
    return F.pad(sincos_positions(width, grid), (0, 0, 1, 0))


def rotary_table(head_dim: int, grid: tuple[int, int], unplaced: int = 0) -> Rotary:
    """Return the table of axial 2-D rotary position embedding (RAE v1).

    Half of a head's channel pairs rotate by the row, the other half by the column.

    Args:
        head_dim: channels of a head, a multiple of 4.
        grid: rows and columns of tokens.
        unplaced: number of tokens that follow the grid's tokens and are not rotated.
    """
    if _only_shapes():
        size = grid[0] * grid[1] + unplaced, head_dim // 2
        return torch.empty(size), torch.empty(size)
    quarter = head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = torch.cat([p.flatten()[:, None] * frequencies for p in (rows, columns)], dim=1)
    angles = F.pad(angles, (0, 0, 0, unplaced))
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate channel i against channel i + head_dim/2 of x (B, heads, N, head_dim).

    A bf16 input is rotated in float32, the type of the table, as in the published code. The result has the type of x.
    The rotated pairs lie in contiguous halves, while the published code interleaves them. The attention is the same
    after a fixed permutation of the query and key channels, which `raekit.formats.denoiser_keys` applies. Halves are
    cheaper in eager mode.
    """
    cos, sin = rotary
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight. Its statistics are float32 for any input type."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def plain_norm(kind: NormKind, width: int) -> nn.Module:
    """Return the norm in a denoiser block: RMSNorm with a weight, or LayerNorm without."""
    return RMSNorm(width) if kind == "rms" else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    `qk_norm` normalises queries and keys, which bounds the attention logits.
    """

    def __init__(self, width: int, heads: int, qk_norm: NormKind | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        norm = {"rms": RMSNorm, "layer": nn.LayerNorm, None: nn.Identity}[qk_norm]
        self.q_norm, self.k_norm = norm(width // heads), norm(width // heads)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        q, k, v = self._project(x, rotary)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, heads, N, head_dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    @torch.no_grad()
    def max_logit(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Return the largest absolute attention logit. Computes one image at a time to save memory."""
        q, k, _ = self._project(x, rotary)
        with torch.autocast(x.device.type, enabled=False):
            largest = [(a.float() @ b.float().mT).abs().amax() for a, b in zip(q, k, strict=True)]
        return torch.stack(largest).amax() / math.sqrt(q.shape[-1])


@contextmanager
def watch_logits(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the largest attention logit of all layers of `module` as `max_logit`.

    Compiled layers are not recorded.
    """
    seen: dict[str, Tensor] = {}

    def look(layer: nn.Module, inputs: tuple) -> None:
        assert isinstance(layer, Attention)
        logit = layer.max_logit(*inputs)
        seen["max_logit"] = torch.maximum(seen["max_logit"], logit) if seen else logit

    hooks = [layer.register_forward_pre_hook(look) for layer in module.modules() if isinstance(layer, Attention)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


ALIGNMENT = 64
"""In bf16, SwiGLU has a multiple of this number of hidden channels."""


class SwiGLU(nn.Module):
    """w_out(silu(gate) * value), with gate and value from one projection, gate first.

    The published hidden widths are often unaligned (5461 for a width of 2048). CPUs multiply such matrices up to a
    tenth more slowly in bf16; an H200 does not. So the bf16 copies of float32 weights in training, and weights that
    `set_dtype` converts to bf16, get zeros up to a multiple of `ALIGNMENT` hidden channels. The function is the same: a
    channel of zeros adds silu(0) * 0 = 0. Trained parameters, gradients, averages and all files have the published
    width.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.w_in = Linear(width, 2 * hidden)
        self.w_out = Linear(hidden, width)
        self.register_state_dict_post_hook(_cut_to_published_width)

    @property
    def padding(self) -> int:
        """The number of hidden channels that are missing for alignment."""
        return -self.w_out.weight.shape[1] % ALIGNMENT

    def forward(self, x: Tensor) -> Tensor:
        project, expand = self.w_in, self.w_out
        if self.padding and torch.is_autocast_enabled(x.device.type) and self.w_in.weight.dtype == torch.float32:
            w_in, b_in, w_out, b_out = self.cast_weights(torch.get_autocast_dtype(x.device.type)).values()
            project, expand = partial(linear, weight=w_in, bias=b_in), partial(linear, weight=w_out, bias=b_out)
        gate, value = project(x).chunk(2, dim=-1)
        return expand(F.silu(gate) * value)

    def cast_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return copies of the parameters in `dtype` by name, with aligned hidden channels."""
        weight, bias = (p.to(dtype).unflatten(0, (2, -1)) for p in (self.w_in.weight, self.w_in.bias))
        return {
            "w_in.weight": F.pad(weight, (0, 0, 0, self.padding)).flatten(0, 1),
            "w_in.bias": F.pad(bias, (0, self.padding)).flatten(),
            "w_out.weight": F.pad(self.w_out.weight.to(dtype), (0, self.padding)),
            "w_out.bias": self.w_out.bias.to(dtype),
        }


def _cut_to_published_width(module: SwiGLU, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Remove the zeros of alignment from a state dict."""
    if module.w_out.weight.shape[1] == module.hidden:
        return
    for name in ("w_in.weight", "w_in.bias"):
        state[prefix + name] = state[prefix + name].unflatten(0, (2, -1))[:, : module.hidden].flatten(0, 1)
    state[prefix + "w_out.weight"] = state[prefix + "w_out.weight"][:, : module.hidden].contiguous()


def gelu_mlp(width: int, hidden: int, approximate: Gelu = "none") -> nn.Sequential:
    """Return two linear layers with a GELU between them."""
    return nn.Sequential(Linear(width, hidden), nn.GELU(approximate), Linear(hidden, width))


class ViTBlock(nn.Module):
    """Pre-norm transformer block with LayerNorm and GELU.

    `gelu` is "none" for the exact function, "tanh" for its approximation.
    """

    def __init__(self, width: int, heads: int, hidden: int, eps: float, gelu: Gelu = "none") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = gelu_mlp(width, hidden, gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x scaled by 1 + scale and shifted."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """LightningDiT block: norm, attention, norm, MLP, modulated by adaLN-zero (RAE v1).

    The condition is (B, 1, width) for all tokens of an image, or (B, N, width) for each token, as in the wide head.

    Args:
        width: channels of a token.
        heads: attention heads.
        hidden: hidden width of the MLP.
        norm: the kind of all norms.
        mlp: the kind of the MLP.
        qk_norm: whether queries and keys are normalised.
        adaln: whether the condition modulates the block. RAE v2's backbone has False; "no shift" omits the shifts.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        norm: NormKind = "rms",
        mlp: MLPKind = "swiglu",
        qk_norm: bool = False,
        adaln: bool | Literal["no shift"] = True,
    ) -> None:
        super().__init__()
        self.norm1 = plain_norm(norm, width)
        self.attention = Attention(width, heads, norm if qk_norm else None)
        self.norm2 = plain_norm(norm, width)
        self.mlp = SwiGLU(width, hidden) if mlp == "swiglu" else gelu_mlp(width, hidden, "tanh")
        self.parts = {True: 6, "no shift": 4, False: 0}[adaln]
        self.modulation = Linear(width, self.parts * width) if self.parts else None

    def forward(self, x: Tensor, condition: Tensor, rotary: Rotary | None) -> Tensor:
        if self.modulation is None:
            x = x + self.attention(self.norm1(x), rotary)
            return x + self.mlp(self.norm2(x))
        parts = self.modulation(F.silu(condition)).chunk(self.parts, dim=-1)
        if self.parts == 4:
            scale_a, gate_a, scale_m, gate_m = parts
            x = x + gate_a * self.attention(self.norm1(x) * (1 + scale_a), rotary)
            return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self.attention(modulate(self.norm1(x), shift_a, scale_a), rotary)
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Norm, modulation by the condition, and projection to the output."""

    def __init__(self, width: int, out: int, norm: NormKind = "rms") -> None:
        super().__init__()
        self.norm = plain_norm(norm, width)
        self.modulation = Linear(width, 2 * width)
        self.out = Linear(width, out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self.out(modulate(self.norm(x), shift, scale))


class TimeEmbedding(nn.Module):
    """Embedding (B, width) of times (B,) in [0, 1]: random Fourier features and a small network.

    It computes in float32, under autocast too.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(frequencies))
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            angles = 2 * math.pi * t.float()[:, None] * self.frequencies
            return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
