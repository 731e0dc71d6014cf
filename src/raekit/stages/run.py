"""One run, from a configuration to an artifact: the same code for every stage."""

from pathlib import Path

import torch

from raekit.config import differences, read_json, to_dict, to_json
from raekit.distributed import World
from raekit.errors import UserError
from raekit.files import whole
from raekit.progress import Progress, silent
from raekit.stages import generation, reconstruction, representation
from raekit.stages.stage import Stage
from raekit.train.trainer import Report, Trainer

StageConfig = representation.RepresentationConfig | reconstruction.ReconstructionConfig | generation.GenerationConfig
_BUILDERS = {
    representation.RepresentationConfig: representation.build,
    reconstruction.ReconstructionConfig: reconstruction.build,
    generation.GenerationConfig: generation.build,
}


def build(config: StageConfig, run: Path, world: World) -> Stage:
    """Build the stage of `config`. Initial weights depend on its seed alone."""
    torch.manual_seed(config.train.seed)
    return _BUILDERS[type(config)](config, run, world)  # type: ignore[operator]


def train(
    config: StageConfig,
    run: Path,
    world: World,
    report: Report = lambda step, metrics: None,
    progress: Progress = silent,
) -> bool:
    """Train `config` in the folder `run`, or go on where a run of the same configuration stopped.

    `report` is told of steps, `progress` of what precedes them.

    False if a signal stopped it. Either way RUN/artifact holds the present model. Raises UserError, listing
    the fields, if `run` belongs to another configuration, or if its disk is full.
    """
    check(run, config)
    stage = build(config, run, world)
    trainer = Trainer(run, config.train, stage.objectives, stage.batches, world, stage.periodics)
    # Now that all of it could be built: a mistake in the configuration does not occupy the folder.
    with world.main_first():
        claim(run, config, world)
    stage.prepare(progress)
    finished = trainer.fit(report)
    stage.export(run / "artifact")
    world.barrier()  # written by the first process, it may be read by all
    return finished


def check(run: Path, config: StageConfig) -> None:
    """Raise UserError, listing the differences, if RUN/config.json is of another configuration."""
    path = run / "config.json"
    if path.is_file() and (changed := list(differences(read_json(path), to_dict(config)))):
        raise UserError(
            f"{run}: belongs to another configuration:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --run, or undo these"
        )


def claim(run: Path, config: StageConfig, world: World) -> None:
    """Write RUN/config.json, unless it is there."""
    path = run / "config.json"
    if world.is_main and not path.is_file():
        with whole(path) as partial:
            partial.write_text(to_json(to_dict(config)))
