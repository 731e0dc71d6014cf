"""Pretraining of a small encoder on your own data, as a masked autoencoder (He et al., 2021)."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from raekit import randomness
from raekit.config import check_sizes, configclass
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.distributed import World, full_state
from raekit.errors import UserError
from raekit.evaluation.features import EncoderFeatures
from raekit.evaluation.metrics import NearestNeighbours
from raekit.evaluation.probe import untrained
from raekit.evaluation.streaming import BATCH, feature_bank, images_of, score_stream
from raekit.models.encoders import Encoder
from raekit.models.layers import ViTBlock, patchify, sincos_positions, watch_logits
from raekit.models.vit import ViT, ViTConfig
from raekit.stages.stage import Stage
from raekit.train.objective import Metrics, Objective, Periodic
from raekit.train.optim import OptimConfig
from raekit.train.trainer import TrainConfig

TARGET_VARIANCE_EPS = 1e-2
"""Added to the variance of a target patch, so that flat patches (a white background) are not scaled up."""


@configclass
class RepresentationConfig:
    """The config of encoder pretraining.

    A pixel decoder predicts the hidden patches from the visible ones. The decoder is discarded after the training.

    Attributes:
        stage: Name of the stage in config.json.
        data: Training images.
        encoder: The encoder to pretrain.
        mask_ratio: Fraction of the patches that is hidden, above 0 and below 1.
        visible_weight: Weight of the error on the visible patches. The original method has no such term; the term
            keeps pixel detail in the tokens, which helps reconstruction.
        decoder_width: Channels of the pixel decoder, a multiple of 4 and of `decoder_heads`.
        decoder_depth: Number of blocks of the pixel decoder.
        decoder_heads: Number of attention heads of the pixel decoder.
        train: Settings of the training loop.
        optim: Optimizer and learning rate schedule.
        ema: Decays of the weight averages. The artifact holds the average of the first decay.
        score_every: Number of steps between two measurements of the class accuracy. Data without classes is not
            measured.
    """

    stage: Literal["representation"] = "representation"
    data: DataConfig
    encoder: ViTConfig
    mask_ratio: float = 0.75
    visible_weight: float = 0.0
    decoder_width: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    train: TrainConfig
    optim: OptimConfig
    ema: tuple[float, ...] = (0.999,)
    score_every: int = 1000

    def __post_init__(self) -> None:
        if self.encoder.image_size % self.encoder.patch_size:
            raise UserError(
                f"encoder.patch_size: {self.encoder.patch_size} must divide encoder.image_size = "
                f"{self.encoder.image_size}"
            )
        patches = (self.encoder.image_size // self.encoder.patch_size) ** 2
        if not 0 < self.mask_ratio < 1 or round(self.mask_ratio * patches) in (0, patches):
            raise UserError(f"mask_ratio: {self.mask_ratio} must hide some but not all of the {patches} patches")
        check_sizes("representation", decoder_width=self.decoder_width, decoder_heads=self.decoder_heads)
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise UserError(
                f"decoder_width: {self.decoder_width} must be a multiple of 4 and of decoder_heads = "
                f"{self.decoder_heads}"
            )
        if self.data.image_size != self.encoder.image_size:
            raise UserError(
                f"data.image_size: {self.data.image_size} must equal encoder.image_size = {self.encoder.image_size}"
            )


class MaskedAutoencoder(nn.Module):
    """The encoder, which sees only the visible patches, and a light decoder that predicts all patches."""

    positions: Tensor

    def __init__(self, config: RepresentationConfig) -> None:
        super().__init__()
        self.encoder = ViT(config.encoder)
        size = config.encoder.patch_size
        side = config.encoder.image_size // size
        width = config.decoder_width
        self.embed = nn.Linear(config.encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_positions(width, (side, side)), persistent=False)
        self.blocks = nn.ModuleList(
            ViTBlock(width, config.decoder_heads, 4 * width, eps=1e-6) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, 3 * size**2)

    def forward(self, pixels: Tensor, keep: Tensor) -> Tensor:
        """Predict all patches (B, N, 3 * patch_size^2) of pixels (B, 3, H, W) from only the patches `keep` (B, K)."""
        visible = self.embed(self.encoder(pixels, keep))
        x = self.mask_token.to(visible.dtype).expand(len(pixels), len(self.positions), -1)
        x = x.scatter(1, keep[:, :, None].expand(-1, -1, x.shape[2]), visible) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)).float()


def build(config: RepresentationConfig, run: Path, world: World) -> Stage:
    """Build the stage. Its artifact is the encoder with averaged weights."""
    loader = Loader(config.data, config.train.seed)
    model = MaskedAutoencoder(config)
    mean, std = (torch.tensor(v, device=world.device).view(3, 1, 1) for v in (config.encoder.mean, config.encoder.std))
    patches = len(model.positions)
    visible = patches - round(config.mask_ratio * patches)

    def loss(batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        pixels = (batch.pixels() - mean) / std
        order = randomness.uniform(config.train.seed, "mask", batch.positions, (patches,), world.device).argsort(1)
        predicted = model(pixels, order[:, :visible])
        target = patchify(pixels, config.encoder.patch_size)
        centred = target - target.mean(-1, keepdim=True)
        target = centred / (target.var(-1, keepdim=True, correction=0) + TARGET_VARIANCE_EPS).sqrt()
        error = (predicted - target).square().mean(-1).gather(1, order)
        seen, hidden = error[:, :visible].mean(), error[:, visible:].mean()
        return hidden + config.visible_weight * seen, {"hidden": hidden, "visible": seen}

    def trained(name: str) -> Encoder:
        """Return a copy of the averaged encoder. A part of a module that is sharded over processes cannot run."""
        prefix, vit = "encoder.", ViT(config.encoder)
        state = full_state(objective.averaged)
        vit.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        return Encoder(name, config.encoder.spec, vit).to(world.device)

    def accuracy(step: int) -> dict[str, float]:
        return class_accuracy(trained("trained"), config.data, world)

    objective = Objective(
        name="encoder",
        module=model,
        loss=loss,
        optim=config.optim,
        blocks=[*model.encoder.blocks, *model.blocks],
        convolutions=[model.encoder.embed],
        ema=config.ema,
        monitor=partial(watch_logits, model),
    )

    def export(folder: Path) -> None:
        trained(str(folder)).save(folder, world)

    return Stage(
        objectives=[objective],
        batches=lambda start: loader.stream(start, config.train.batch_size, world),
        export=export,
        periodics=[Periodic(every=config.score_every, call=accuracy)] if loader.classes else [],
    )


@dataclass(frozen=True)
class Pixels:
    """Raw pixels as features (B, 3 * size^2) around zero, a baseline for encoders."""

    size: int
    name: str = "pixels"

    @property
    def width(self) -> int:
        return 3 * self.size**2

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1) - 0.5


def class_accuracy(encoder: Encoder, data: DataConfig, world: World) -> dict[str, float]:
    """Measure how well the 10 nearest training images predict the classes of the held-out images of `data`.

    Returns:
        The fraction of correct predictions in three feature spaces: the mean tokens of `encoder`, the mean tokens of
        the same network with random weights, and raw pixels.
    """
    scores = {}
    for network in (EncoderFeatures(encoder), EncoderFeatures(untrained(encoder)), Pixels(data.image_size)):
        train, heldout = (Loader(replace(data, split=split), seed=0) for split in ("train", "heldout"))
        bank, labels = feature_bank(images_of(train.once(BATCH, world), world), network, world)
        neighbours = NearestNeighbours(network, bank, labels)
        scores |= score_stream(images_of(heldout.once(BATCH, world), world), [neighbours], world)
    return {name: value for name, value in scores.items() if name.startswith("knn_accuracy")}
