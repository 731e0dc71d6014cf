"""One run, from a configuration to an artifact: the same code for every stage."""

from pathlib import Path

import torch

from raekit.config import differences, read_json, to_dict, to_json
from raekit.distributed import World
from raekit.errors import UserError
from raekit.files import whole
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


def train(config: StageConfig, run: Path, world: World, report: Report = lambda step, metrics: None) -> bool:
    """Train `config` in the folder `run`, or go on where a run of the same configuration stopped.

    False if a signal stopped it. Either way RUN/artifact holds the present model. Raises UserError, listing
    the fields, if `run` belongs to another configuration, or if its disk is full.
    """
    with world.main_first():
        claim(run, config, world)
    stage = build(config, run, world)
    stage.prepare()
    trainer = Trainer(run, config.train, stage.objectives, stage.batches, world, stage.periodics)
    finished = trainer.fit(report)
    stage.export(run / "artifact")
    return finished


def claim(run: Path, config: StageConfig, world: World) -> None:
    """Write RUN/config.json, or check that it is the same."""
    path, values = run / "config.json", to_dict(config)
    if path.is_file():
        if changed := list(differences(read_json(path), values)):
            raise UserError(
                f"{run}: belongs to another configuration:\n  "
                + "\n  ".join(changed)
                + "\nChoose another --run, or undo these"
            )
        return
    if world.is_main:
        with whole(path) as partial:
            partial.write_text(to_json(values))
