"""Pretraining of a small encoder on your own data: masked modelling (He et al., 2021), distillation, or both."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit import randomness
from raekit.config import Interval, Operation, Place, check_sizes, configclass
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.data.sources import open_source
from raekit.data.sources.base import Split
from raekit.distributed import World
from raekit.distributed.sharding import full_state
from raekit.errors import UserError
from raekit.evaluation.features import EncoderFeatures, FeatureNetwork
from raekit.evaluation.metrics import NearestNeighbours
from raekit.evaluation.probe import untrained
from raekit.evaluation.streaming import BATCH, feature_bank, images_of, score_stream
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.layers import ViTBlock, patchify, sincos_positions, watch_logits
from raekit.models.registry import LayersConfig
from raekit.models.vit import ViT, ViTConfig
from raekit.stages.inputs import Inputs, describe_images
from raekit.stages.stage import Stage
from raekit.training.objective import Metrics, Objective, Periodic
from raekit.training.optim import OptimConfig
from raekit.training.precision import compute_dtype
from raekit.training.trainer import TrainConfig

TARGET_VARIANCE_EPS = 1e-2
"""Added to the variance of a target patch, so that flat patches (a white background) are not scaled up."""

SCORED: tuple[Split, Split] = ("train", "heldout")
"""The splits on which the class accuracy is measured: the neighbours, and the images whose classes they predict."""
MOST = 50_000
"""The most images of a split that the class accuracy reads, as many as ImageNet's validation images."""


@configclass
class TeacherConfig:
    """A larger, frozen encoder whose tokens the encoder learns to predict (distillation).

    The teacher runs at the image size that gives the token grid of the encoder that is trained.

    Attributes:
        encoder: Name of the teacher (`load_encoder`).
        layers: The teacher's blocks that make the tokens. A middle block often has more detail than the last one.
        weight: Factor of the error on the teacher's tokens in the loss, above 0.
    """

    encoder: Place
    layers: LayersConfig = LayersConfig()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(f"teacher.weight: {self.weight} must be positive; leave out teacher for none")


@configclass
class RepresentationConfig:
    """The config of encoder pretraining.

    A light decoder predicts pixels, and the tokens of a `teacher` if there is one, at all patches from the visible
    patches. The decoder is discarded after the training.

    Attributes:
        stage: Name of the stage in config.json.
        data: Training images.
        encoder: The encoder to pretrain.
        mask_ratio: Fraction of the patches that is hidden, from 0 to below 1. Without a teacher it must be above 0.
        visible_weight: Weight of the pixel error on the visible patches. The original method has no such term; the
            term keeps pixel detail in the tokens, which helps reconstruction.
        normalize_patches: Whether the pixels of each target patch are normalised by their own mean and variance, as in
            the original method. Without this, the tokens also keep the colours of the patches.
        teacher: The encoder to distill; None trains on pixels only.
        decoder_width: Channels of the pixel decoder, a multiple of 4 and of `decoder_heads`.
        decoder_depth: Number of blocks of the pixel decoder.
        decoder_heads: Number of attention heads of the pixel decoder.
        train: Settings of the training loop.
        optim: Optimizer and learning rate schedule.
        ema: Decays of the weight averages. The artifact holds the average of the first decay.
        score_every: Number of steps between two measurements of the class accuracy, the share of held-out images whose
            nearest training images have the same class. An image is compared by the mean of its tokens. For
            comparison, the accuracy is also measured with random weights, and with the pixels of small images. At most
            50,000 images of each split are read, spread evenly over it. Data without classes is not measured.
    """

    stage: Literal["representation"] = "representation"
    data: DataConfig
    encoder: ViTConfig
    mask_ratio: float = 0.75
    visible_weight: float = 0.0
    normalize_patches: bool = True
    teacher: TeacherConfig | None = None
    decoder_width: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    train: TrainConfig
    optim: OptimConfig
    ema: tuple[float, ...] = (0.999,)
    score_every: Operation[Interval] = 1000

    def __post_init__(self) -> None:
        if self.encoder.image_size % self.encoder.patch_size:
            raise UserError(
                f"encoder.patch_size: {self.encoder.patch_size} must divide encoder.image_size = "
                f"{self.encoder.image_size}"
            )
        patches = (self.encoder.image_size // self.encoder.patch_size) ** 2
        hidden = round(self.mask_ratio * patches) if 0 <= self.mask_ratio < 1 else patches
        if hidden == patches or (hidden == 0 and self.teacher is None):
            raise UserError(
                f"mask_ratio: {self.mask_ratio} hides {hidden} of the {patches} patches; hide some but not all, or set "
                "teacher.encoder and hide none"
            )
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
    """The encoder, which sees only the visible patches, and a light decoder that predicts all patches.

    Args:
        config: The config of the stage.
        teacher_width: Channels of a token of the teacher; 0 for no teacher.
    """

    positions: Tensor

    def __init__(self, config: RepresentationConfig, teacher_width: int = 0) -> None:
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
        self.split = (3 * size**2, teacher_width)
        self.out = nn.Linear(width, sum(self.split))

    def forward(self, pixels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Predict all patches of pixels (B, 3, H, W) from only the patches `keep` (B, K).

        Returns:
            The pixels of the patches (B, N, 3 * patch_size^2), and the teacher's tokens (B, N, teacher_width).
        """
        visible = self.embed(self.encoder(pixels, keep))
        x = self.mask_token.to(visible.dtype).expand(len(pixels), len(self.positions), -1)
        x = x.scatter(1, keep[:, :, None].expand(-1, -1, x.shape[2]), visible) + self.positions
        for block in self.blocks:
            x = block(x)
        pixels, tokens = self.out(self.norm(x)).float().split(self.split, dim=-1)
        return pixels, tokens


def load_teacher(config: TeacherConfig, grid: tuple[int, int], dtype: torch.dtype) -> Encoder:
    """Load the teacher at the image size that gives `grid` tokens.

    Raises:
        UserError: The teacher cannot be loaded.
    """
    native = load_encoder(config.encoder, layers=config.layers, dtype=dtype)
    height, width = (side * native.spec.patch_size for side in grid)
    return Encoder(native.name, native.spec, native.model, (height, width), native.layers)


def build(config: RepresentationConfig, run: Path, world: World) -> Stage:
    """Build the stage. Its artifact is the encoder with averaged weights.

    Raises:
        UserError: The images have classes, but the splits that the class accuracy is measured on are not there.
    """
    loader = Loader(config.data, config.train.seed)
    loader.announce(world)
    if loader.classes:
        for split in SCORED:
            open_source(config.data.address, split)  # fail now, and not at the first score
    teacher = None
    if config.teacher:
        side = config.encoder.image_size // config.encoder.patch_size
        dtype = compute_dtype(config.train.precision, world.device)
        teacher = load_teacher(config.teacher, (side, side), dtype).to(world.device)
    model = MaskedAutoencoder(config, teacher.width if teacher else 0)
    mean, std = (torch.tensor(v, device=world.device).view(3, 1, 1) for v in (config.encoder.mean, config.encoder.std))
    patches = len(model.positions)
    visible = patches - round(config.mask_ratio * patches)

    def loss(batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = batch.pixels()
        pixels = (images - mean) / std
        order = randomness.uniform(config.train.seed, "mask", batch.positions, (patches,), world.device).argsort(1)
        predicted, tokens = model(pixels, order[:, :visible])
        target = patchify(pixels, config.encoder.patch_size)
        if config.normalize_patches:
            centred = target - target.mean(-1, keepdim=True)
            target = centred / (target.var(-1, keepdim=True, correction=0) + TARGET_VARIANCE_EPS).sqrt()
        error = (predicted - target).square().mean(-1).gather(1, order)
        metrics = {"visible": error[:, :visible].mean()}
        total = config.visible_weight * metrics["visible"]
        if visible < patches:
            metrics["hidden"] = error[:, visible:].mean()
            total = total + metrics["hidden"]
        if teacher and config.teacher:
            # Normalised tokens have unit variance, so that this is the fraction of the variance not predicted.
            metrics["teacher"] = F.mse_loss(tokens, teacher(images))
            total = total + config.teacher.weight * metrics["teacher"]
        return total, metrics

    def trained(name: str) -> Encoder:
        """Return a copy of the averaged encoder. A part of a module that is sharded over processes cannot run."""
        prefix, vit = "encoder.", ViT(config.encoder)
        state = full_state(objective.averaged)
        vit.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        return Encoder(name, config.encoder.spec, vit).to(world.device)

    baselines: dict[str, float] = {}

    def accuracy(step: int) -> dict[str, float]:
        encoder = trained("trained")
        if not baselines:
            for network in (EncoderFeatures(untrained(encoder)), Pixels()):
                baselines.update(class_accuracy(network, config.data, world))
        return class_accuracy(EncoderFeatures(encoder), config.data, world) | baselines

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
        inputs=lambda: Inputs(data=describe_images(config.data, loader)),
        batches=lambda start: loader.stream(start, config.train.batch_size, world),
        export=export,
        periodics=[Periodic(every=config.score_every, call=accuracy)] if loader.classes else [],
    )


@dataclass(frozen=True)
class Pixels:
    """The pixels of a reduced image as features (B, 3 * size^2) around zero, a baseline for encoders."""

    size: int = 16
    name: str = "pixels"

    @property
    def width(self) -> int:
        return 3 * self.size**2

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, self.size).flatten(1) - 0.5


def class_accuracy(network: FeatureNetwork, data: DataConfig, world: World) -> dict[str, float]:
    """Measure how well the nearest training images, 10 if there are as many, predict the classes of held-out images.

    Returns:
        The fraction of correct predictions in the features of `network`, as `knn_accuracy_NAME`.
    """
    train, heldout = (Loader(replace(data, split=split), seed=0) for split in SCORED)
    bank, labels = feature_bank(images_of(train.once(BATCH, world, MOST), world), network, world)
    neighbours = NearestNeighbours(network, bank, labels, min(10, len(bank)))
    scores = score_stream(images_of(heldout.once(BATCH, world, MOST), world), [neighbours], world)
    return {name: value for name, value in scores.items() if name.startswith("knn_accuracy")}
