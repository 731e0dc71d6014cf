"""A training run from a config to an artifact, for every stage."""

from pathlib import Path

import torch

from raekit.artifacts import STATISTICS
from raekit.config import Mark, replaced, to_dict
from raekit.data.sources import check_apart
from raekit.distributed import World, check_shared
from raekit.distributed.locks import lock
from raekit.errors import UserError
from raekit.models.registry import absolute
from raekit.progress import Progress, silent
from raekit.stages import classification, compression, generation, reconstruction, record, representation
from raekit.stages.cost import memory_advice
from raekit.stages.record import StageConfig
from raekit.stages.stage import Stage
from raekit.training.signals import stop_signals
from raekit.training.trainer import Report, Trainer

_BUILDERS = {
    classification.ClassificationConfig: classification.build,
    representation.RepresentationConfig: representation.build,
    compression.CompressionConfig: compression.build,
    reconstruction.ReconstructionConfig: reconstruction.build,
    generation.GenerationConfig: generation.build,
}


def build(config: StageConfig, run: Path, world: World) -> Stage:
    """Build the stage of `config`. The initial weights depend only on the seed of `config`."""
    torch.manual_seed(config.train.seed)
    return _BUILDERS[type(config)](config, run, world)  # type: ignore[operator]


def train(
    config: StageConfig,
    run: Path,
    world: World,
    report: Report = lambda step, metrics: None,
    progress: Progress = silent,
    change: bool = False,
) -> None:
    """Train `config` in the folder `run`, and write the model to RUN/artifact.

    If `run` holds a stopped run, the training resumes from its newest checkpoint. The type of each field of a config
    says whether the field may differ from the run's (`raekit.config.Mark`). The images and the encoder are compared by
    their content. A run without a checkpoint and a model is replaced. RUN/artifact holds the model of the newest
    checkpoint, and RUN/milestones the models of `train.milestones`.

    Args:
        config: The config of any stage.
        run: Folder of the run.
        world: The processes that train.
        report: Receives the step and the metrics of each log record.
        progress: Receives the progress of the preparation before the first step.
        change: Allows changes of fields that are changed on purpose, such as `train.steps`, and of the images.

    Raises:
        Stopped: If a signal stopped the training. The state is saved.
        UserError: If another process uses `run`, if `run` belongs to a different training (the message lists the
            differences) or has a model but no checkpoint, or if the disk is full.
    """
    config = replaced(config, Mark.PLACE, absolute)
    check_apart(run, [config.data.source], "run")
    with stop_signals(world) as stop, lock(run, world):
        check_shared(run, world)
        record.check_folders(run)
        record.check(run, record.config_changes(run, config), change)  # before the stage is built, which takes time
        stage = build(config, run, world)
        inputs = world.gather(stage.inputs() if world.is_main else None)[0]
        changed = record.check_start(run, config, inputs, change)
        trainer = Trainer(
            run,
            config.train,
            stage.objectives,
            stage.batches,
            world,
            stage.periodics,
            stage.export,
            about=to_dict(config),
        )
        # Recorded only now, so that a mistake in the config does not occupy the folder.
        with world.main_first():
            if world.is_main and not record.is_begun(run) and not record.is_same(run, config, inputs):
                for leftover in (STATISTICS, "selected.json"):
                    (run / leftover).unlink(missing_ok=True)
            record.write(run, config, inputs, trainer.step, changed, world)
        stage.prepare(progress)
        short = False
        try:
            trainer.fit(report, stop)
        except torch.OutOfMemoryError:
            short = True
        if short:  # outside the handler, because its traceback keeps the tensors of the step alive
            torch.cuda.empty_cache()
            raise UserError(memory_advice(stage, config.train, trainer.micro_batch, world))
