"""Training of a small classifier, which judges generated images (`--features`)."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raekit import artifacts
from raekit.config import Interval, Operation, configclass
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.data.sources import absolute
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.streaming import BATCH
from raekit.models.augment import AugmentConfig, augment
from raekit.models.classifier import Classifier, ClassifierConfig
from raekit.stages.inputs import Inputs, describe_images, labels_digest
from raekit.stages.stage import Stage
from raekit.training.objective import Metrics, Objective, Periodic
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig


@configclass
class ClassificationConfig:
    """The config of classifier training.

    Attributes:
        stage: Name of the stage in config.json.
        data: Training images with classes.
        widths: Channels of the classifier's levels.
        augment: Augmentation of the training images: shifts, colours and erased squares.
        train: Settings of the training loop.
        optim: Optimizer and learning rate schedule.
        ema: Decays of the weight averages. The artifact holds the average of the first decay.
        score_every: Number of steps between two measurements of the accuracy on the held-out images.
    """

    stage: Literal["classification"] = "classification"
    data: DataConfig
    widths: tuple[int, ...] = ClassifierConfig.widths
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig
    optim: OptimConfig
    ema: tuple[float, ...] = (0.99,)
    score_every: Operation[Interval] = 500


def build(config: ClassificationConfig, run: Path, world: World) -> Stage:
    """Build the stage. Its artifact is the classifier with averaged weights.

    Raises:
        UserError: If there are fewer than two classes, an image has no class, or there are no held-out images.
    """
    loader = Loader(config.data, config.train.seed)
    loader.announce(world)
    if (count := len(loader.classes)) < 2:
        known = "one class" if count else "no classes"
        raise UserError(f"data.source: {config.data.source} has {known}, and a classifier needs at least two")
    heldout = Loader(replace(config.data, split="heldout"), 0)
    for split in (loader, heldout):
        if unlabelled := int((split.source.labels < 0).sum()):
            raise UserError(
                f"data.source: {unlabelled:,} of {len(split):,} {split.config.split} images of {config.data.source} "
                "have no class; label them or remove them"
            )
    model = Classifier(
        ClassifierConfig(
            image_size=config.data.image_size,
            num_classes=len(loader.classes),
            widths=config.widths,
            class_names=loader.classes,
        )
    )

    def loss(batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = augment(
            batch.pixels(),
            config.augment,
            seed=config.train.seed,
            stream="classifier",
            step=step,
            positions=batch.positions,
        )
        logits = model(images).float()
        right = (logits.argmax(1) == batch.labels).float().mean()
        return F.cross_entropy(logits, batch.labels), {"accuracy": right}

    objective = Objective(name="classifier", module=model, loss=loss, optim=config.optim, ema=config.ema)

    @torch.no_grad()
    def accuracy(step: int) -> dict[str, float]:
        network = objective.averaged.eval()
        counts = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch in heldout.once(BATCH, world):
            batch = batch.to(world.device)
            counts[0] += (network(batch.pixels()).argmax(1) == batch.labels).sum()
            counts[1] += len(batch)
        counts = world.sum(counts)
        return {"heldout_accuracy": (counts[0] / counts[1]).item()}

    def export(folder: Path) -> None:
        artifacts.write(
            folder / "classifier",
            "classifier",
            model.config,
            objective.averaged,
            world,
            ema=config.ema[0] if config.ema else None,
            trained_on=absolute(config.data.address),
        )

    return Stage(
        objectives=[objective],
        inputs=lambda: Inputs(data=describe_images(config.data, loader), labels=labels_digest(loader.classes)),
        batches=lambda start: loader.stream(start, config.train.batch_size, world),
        export=export,
        periodics=[Periodic(every=config.score_every, call=accuracy)],
    )
