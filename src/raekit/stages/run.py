"""A training run from a config to an artifact, for every stage."""

from pathlib import Path

import torch

from raekit.config import differences, read_json, to_dict, to_json
from raekit.distributed import World
from raekit.errors import UserError
from raekit.files import whole
from raekit.progress import Progress, silent
from raekit.stages import classification, generation, reconstruction, representation
from raekit.stages.stage import Stage
from raekit.train.signals import stop_signals
from raekit.train.trainer import Report, Trainer

StageConfig = (
    classification.ClassificationConfig
    | representation.RepresentationConfig
    | reconstruction.ReconstructionConfig
    | generation.GenerationConfig
)
_BUILDERS = {
    classification.ClassificationConfig: classification.build,
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

    RUN/artifact holds the present model at the end.

    Raises:
        Stopped: If a signal stopped the training. The state is saved.
        UserError: If `run` belongs to a different config (the message lists the fields), or if the disk is full.
    """
    with stop_signals(world) as stop:
        check(run, config)
        stage = build(config, run, world)
        trainer = Trainer(run, config.train, stage.objectives, stage.batches, world, stage.periodics)
        # Claimed only after the build, so that a mistake in the config does not occupy the folder.
        with world.main_first():
            claim(run, config, world)
        stage.prepare(progress)
        trainer.fit(report, stop)
        stage.export(run / "artifact")
        world.barrier()  # the first process writes the artifact, and then all may read it


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
