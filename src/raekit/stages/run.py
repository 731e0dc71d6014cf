"""A training run from a config to an artifact, for every stage."""

from pathlib import Path

import torch

from raekit.config import differences, read_json, to_dict, to_json
from raekit.distributed import World, check_shared
from raekit.errors import UserError
from raekit.files import whole
from raekit.progress import Progress, silent
from raekit.stages import generation, reconstruction, representation
from raekit.stages.stage import Stage
from raekit.train.signals import stop_signals
from raekit.train.trainer import Report, Trainer

StageConfig = representation.RepresentationConfig | reconstruction.ReconstructionConfig | generation.GenerationConfig
_BUILDERS = {
    representation.RepresentationConfig: representation.build,
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
) -> None:
    """Train `config` in the folder `run`, and write the model to RUN/artifact.

    If `run` holds a stopped run of the same config, the training resumes from its newest checkpoint.

    Args:
        config: The config of any stage.
        run: Folder of the run.
        world: The processes that train.
        report: Receives the step and the metrics of each log record.
        progress: Receives the progress of the preparation before the first step.

    RUN/artifact holds the model of the newest checkpoint, and RUN/milestones the models of `train.milestones`.

    Raises:
        Stopped: If a signal stopped the training. The state is saved.
        UserError: If `run` belongs to a different config (the message lists the fields), or if the disk is full.
    """
    with stop_signals(world) as stop:
        check(run, config)
        check_shared(run, world)
        stage = build(config, run, world)
        trainer = Trainer(run, config.train, stage.objectives, stage.batches, world, stage.periodics, stage.export)
        # Claimed only after the build, so that a mistake in the config does not occupy the folder.
        with world.main_first():
            claim(run, config, world)
        stage.prepare(progress)
        trainer.fit(report, stop)


def check(run: Path, config: StageConfig) -> None:
    """Check that RUN/config.json, if it exists, equals `config`.

    Raises:
        UserError: If the two differ. The message lists the fields.
    """
    path = run / "config.json"
    if path.is_file() and (changed := list(differences(read_json(path), to_dict(config)))):
        raise UserError(
            f"{run}: belongs to a run with a different config:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --run, or undo these changes"
        )


def claim(run: Path, config: StageConfig, world: World) -> None:
    """Write RUN/config.json if it does not exist yet."""
    path = run / "config.json"
    if world.is_main and not path.is_file():
        with whole(path) as partial:
            partial.write_text(to_json(to_dict(config)))
