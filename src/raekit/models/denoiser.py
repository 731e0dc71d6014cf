"""The diffusion transformer: DiT, DiT^DH with a shallow, wide head (RAE v1), and RAE v2's network."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit import artifacts
from raekit.config import from_dict
from raekit.distributed import World, plain_tensors
from raekit.errors import UserError
from raekit.models.checks import check_latents, check_times
from raekit.models.conditioning import ClassCondition, Condition
from raekit.models.denoiser_config import DenoiserConfig, TransformerConfig
from raekit.models.layers import (
    DiTBlock,
    FinalLayer,
    Rotary,
    TimeEmbedding,
    patchify,
    rotary_table,
    sincos_positions,
    unpatchify,
)
from raekit.models.linear import Linear
from raekit.models.precision import set_dtype
from raekit.weights import load_network


class Features(NamedTuple):
    """Output of the backbone.

    Attributes:
        tokens: (B, N, width), after the last block.
        base: (B, N, width), after block `base_depth`; None without a base output.
        chosen: (B, N, width), after the block that the caller chose; None if there is none.
    """

    tokens: Tensor
    base: Tensor | None
    chosen: Tensor | None = None


class Denoiser(nn.Module):
    """Network that predicts the velocity or the data of noisy latents (`config.prediction`).

    Args:
        config: the sizes and switches.
        condition: a module (see `models.conditioning`) that replaces the class embedding. `config.num_classes` must
            be 0. To load such a denoiser, give `load` a new module.

    Attributes:
        compiled: whether `compile` was called. Generation then keeps to one batch size.
        narrow_residual: whether the tokens between the backbone's blocks have autocast's type. By default they have the
            type of the weights.
    """

    positions: Tensor | None
    compiled = False
    narrow_residual = False
    trained_on: str | None = None
    """The address of the data source that it was trained on, if that is known."""
    ema: float | None = None
    """The decay of the weight average that the weights are, if they are an average. `save` writes it."""

    def __init__(self, config: DenoiserConfig, condition: Condition | None = None) -> None:
        super().__init__()
        if condition is not None and config.num_classes:
            raise UserError(
                f"denoiser.num_classes: {config.num_classes} must be 0, because `condition` replaces classes"
            )
        self.config = config
        width = config.backbone.width
        self.embed = Linear(config.token_dim, width)
        self.time = TimeEmbedding(width)
        self.label = ClassCondition(config.num_classes, width) if config.num_classes else condition
        context = config.context
        self.time_tokens = nn.Parameter(torch.zeros(context.time_tokens, width)) if context else None
        tokens = torch.zeros(context.label_tokens, width) if context and self.label else None
        self.label_tokens = None if tokens is None else nn.Parameter(tokens)
        self.blocks = _blocks(config, config.backbone, adaln=context is None)
        table = None if config.positions == "none" else sincos_positions(width, config.token_grid)
        if config.positions == "learned" and table is not None:
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)
        unplaced = sum(len(p) for p in (self.time_tokens, self.label_tokens) if p is not None)
        self._register_rotary("rotary", config.backbone, unplaced)
        if config.head:
            self.head_embed = Linear(config.token_dim, config.head.width)
            same = config.head.width == width
            self.head_condition = nn.Identity() if same else Linear(width, config.head.width)
            self.head_blocks = _blocks(config, config.head)
            self._register_rotary("head_rotary", config.head)
        self.final = FinalLayer(config.output_width, config.token_dim, config.norm)
        self.base_final = FinalLayer(width, config.token_dim, config.norm) if config.base_depth else None
        _initialise(self)

    @classmethod
    @plain_tensors()
    def load(
        cls,
        name: str | Path,
        ema: float | None = None,
        dtype: torch.dtype = torch.float32,
        condition: Condition | None = None,
    ) -> Self:
        """Load a denoiser.

        Args:
            name: a published name (`raekit.formats.releases.DENOISERS`), `builtin:NAME`, a model folder, a run, or
                OWNER/NAME on the Hub.
            ema: the decay of the average to load. Default: the first average that was trained.
            dtype: float32 or bfloat16, see `set_dtype`.
            condition: for a denoiser with a condition of its own, a module like the one that it was trained with. A
                copy of it gets the saved weights.

        Raises:
            UserError: if a file is missing or damaged.
        """
        found = artifacts.find(name, "denoiser", ema)
        config = from_dict(DenoiserConfig, found.config, found.path / "config.json")
        model = cls.build(config, artifacts.read(found.path), found.path, dtype, condition)
        model.trained_on, model.ema = found.trained_on, found.ema
        return model

    @classmethod
    def build(
        cls,
        config: DenoiserConfig,
        state: Mapping[str, Tensor],
        source: object,
        dtype: torch.dtype = torch.float32,
        condition: Condition | None = None,
    ) -> Self:
        """Return the frozen denoiser with the weights `state`; UserError, naming their `source`, if they do not fit."""
        if condition is None and not config.num_classes and any(name.startswith("label.") for name in state):
            raise UserError(
                f"{source}: has a condition of its own; load it in Python, with Denoiser.load(NAME, condition=MODULE)"
            )
        model = load_network(lambda: cls(config, deepcopy(condition)), state, source)  # called twice
        return model.set_dtype(dtype).requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """The type that the network computes in, unless autocast surrounds it."""
        return self.embed.weight.dtype

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks when they are first used. Takes the arguments of `torch.compile`."""
        self.compiled = True
        for block in [*self.blocks, *(self.head_blocks if self.config.head else [])]:
            block.compile(*args, **kwargs)

    def set_dtype(self, dtype: torch.dtype) -> Self:
        """Hold the weights in `dtype`, in place. Rotary tables and the embeddings of time and condition stay float32.

        Use this instead of `Module.to(dtype)`, which converts the embeddings, too, and leaves a network that fails.
        """
        rotary = [table for name, table in self.named_buffers(recurse=False) if "rotary" in name]
        set_dtype(self, dtype, keep=(self.time, self.label, *rotary))
        return self

    def save(
        self,
        folder: str | Path,
        world: World | None = None,
        dtype: torch.dtype | None = None,
        *,
        beside: bool = False,
    ) -> None:
        """Write FOLDER/denoiser, for `load`.

        Args:
            folder: the model folder.
            world: the processes. All of them call this, the first one writes.
            dtype: the type to store. Default: the weights' own.
            beside: write FOLDER/denoiser-ema-DECAY, next to another average in FOLDER/denoiser.
        """
        target = Path(folder) / (f"denoiser-ema-{self.ema}" if beside else "denoiser")
        artifacts.write(
            target,
            "denoiser",
            self.config,
            self,
            world or World(),
            dtype=dtype,
            ema=self.ema,
            trained_on=self.trained_on,
        )

    def _register_rotary(self, name: str, part: TransformerConfig, unplaced: int = 0) -> None:
        table: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.config.rotary:
            table = rotary_table(part.width // part.heads, self.config.token_grid, unplaced)
        for suffix, values in zip(("cos", "sin"), table, strict=True):
            self.register_buffer(f"{name}_{suffix}", values, persistent=False)

    def _rotary(self, name: str) -> Rotary | None:
        return (self.get_buffer(f"{name}_cos"), self.get_buffer(f"{name}_sin")) if self.config.rotary else None

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        *,
        with_base: Literal[False] = False,
        features: Features | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        *,
        with_base: Literal[True],
        features: Features | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, tokens_after: int
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        *,
        with_base: bool = False,
        features: Features | None = None,
        tokens_after: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the prediction (B, C, H, W), float32.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1]; 1 is noise.
            labels: class ids (B,), or weights (B, num_classes + 1) that mix the class embeddings, the last of which is
                the null class. None is the null class for all.
            with_base: also return the base output (B, C, H, W).
            features: the backbone's output at another time, to use instead of running the backbone. This is DDT's
                approximation, for networks with a head.
            tokens_after: also return the tokens (B, N, width) after this block of the backbone, counted from 1.

        Raises:
            UserError: if `x`, `t` or `labels` has another type or shape, or `with_base` is asked of a network without a
                base output.
        """
        check_latents(x, self.config.latent_shape)
        check_times(t, len(x))
        time, label = self._embed_condition(t, labels)
        features = features or self._features(x, time, label, tokens_after)
        if self.config.head:
            condition = self.head_condition(F.silu(features.tokens + time).to(self.dtype))
            tokens = self.head_embed(self._patches(x))
            for block in self.head_blocks:
                tokens = block(tokens, condition, self._rotary("head_rotary"))
        else:
            tokens, condition = features.tokens, (time + label).to(self.dtype)
        full = self._to_latents(self.final(tokens, condition))
        if features.chosen is not None:
            return full, features.chosen
        if not with_base:
            return full
        if self.base_final is None or features.base is None:
            raise UserError("denoiser.base_depth: 0, so this denoiser has no base output; take a model with one")
        tokens = F.silu(features.base + time).to(self.dtype)
        return full, self._to_latents(self.base_final(tokens, tokens))

    def features(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Features:
        """Run the backbone only, with the arguments of `forward`."""
        check_latents(x, self.config.latent_shape)
        check_times(t, len(x))
        return self._features(x, *self._embed_condition(t, labels))

    def _embed_condition(self, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Return the embeddings (B, 1, width) of time and class. The latter is 0 in an unconditional network."""
        time = self.time(t)[:, None]
        if self.label is None:
            if labels is not None:
                raise UserError(
                    "labels: the denoiser has no classes and no condition, so labels have no effect; give None"
                )
            return time, 0.0
        label = self.label(labels, len(t))
        if label.shape != time[:, 0].shape:
            raise UserError(
                f"labels: their condition gives {tuple(label.shape)} for {len(t)} images, but the denoiser needs "
                f"{tuple(time[:, 0].shape)}: a row of denoiser.backbone.width channels for each image"
            )
        return time, label[:, None]

    def _features(self, x: Tensor, time: Tensor, label: Tensor | float, chosen: int | None = None) -> Features:
        tokens = self.embed(self._patches(x))
        count = tokens.shape[1]
        if self.positions is not None:
            tokens = tokens + self.positions
        # A published DiT^DH applies SiLU to the backbone's condition, and its blocks apply it again.
        condition = (F.silu(time + label) if self.config.head else time + label).to(self.dtype)
        extra = [(self.time_tokens, time), (self.label_tokens, label)]
        if extra := [(learned + given).to(self.dtype) for learned, given in extra if learned is not None]:
            tokens = torch.cat([tokens, *extra], 1)
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type) if self.narrow_residual else self.dtype)
        kept: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens, condition, self._rotary("rotary"))
            if number in (self.config.base_depth, chosen):
                kept[number] = tokens[:, :count]
        return Features(tokens[:, :count], kept.get(self.config.base_depth), kept.get(chosen or 0))

    def _patches(self, x: Tensor) -> Tensor:
        return patchify(x, self.config.patch_size).to(self.dtype)

    def _to_latents(self, patches: Tensor) -> Tensor:
        return unpatchify(patches.float(), self.config.patch_size, self.config.token_grid)


def _blocks(config: DenoiserConfig, part: TransformerConfig, adaln: bool = True) -> nn.ModuleList:
    hidden = int(part.width * config.mlp_ratio)
    return nn.ModuleList(
        DiTBlock(
            part.width,
            part.heads,
            int(2 / 3 * hidden) if config.mlp == "swiglu" else hidden,
            norm=config.norm,
            mlp=config.mlp,
            qk_norm=config.qk_norm,
            adaln="no shift" if adaln and not config.adaln_shift else adaln,
        )
        for _ in range(part.depth)
    )


@torch.no_grad()
def _initialise(model: Denoiser) -> None:
    """Initialise the weights as published: Xavier-uniform in a plain DiT, torch's default in a DiT^DH, zero outputs.

    RAE v2's paper does not give the initialisation of the learned tokens. Here they start like the labels of v1.
    """
    if model.config.head is None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    embeds = [model.embed] + ([model.head_embed] if model.config.head else [])
    for embed in embeds:
        nn.init.xavier_uniform_(embed.weight)
        nn.init.zeros_(embed.bias)
    if isinstance(model.label, ClassCondition):
        nn.init.normal_(model.label.weight, std=model.config.label_std)
    for layer in model.time.mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    for learned in (model.time_tokens, model.label_tokens):
        if learned is not None:
            nn.init.normal_(learned, std=0.02)
    for module in model.modules():
        zeros = [module.modulation] if isinstance(module, DiTBlock | FinalLayer) else []
        zeros += [module.out] if isinstance(module, FinalLayer) else []
        for layer in zeros:
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
