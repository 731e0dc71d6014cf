"""Describe what a config costs to train, and what a model or run folder contains."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from raekit import artifacts
from raekit.config import Mark, read_json, replaced, to_dict, to_json
from raekit.data.sources import check_apart
from raekit.distributed import World
from raekit.distributed.locks import lock
from raekit.errors import UserError
from raekit.hub import find_folder
from raekit.models.registry import absolute
from raekit.stages import record
from raekit.stages.cost import cost_of
from raekit.stages.run import StageConfig, build
from raekit.training import checkpoint
from raekit.training.recompute import checkpoint_blocks
from raekit.training.tracking import read_metrics, steps_to
from raekit.training.trainer import check_settings


def describe_config(config: StageConfig, run: Path, world: World, change: bool = False) -> str:
    """Describe `config` without training: all fields, parameters, FLOPs, memory, steps and images.

    FLOPs and memory are measured in a training step on two images per process, with all losses of the last step. The
    backward pass costs about twice the FLOPs of the forward pass. The last lines say why the training would not
    start, if it would not.
    """
    few = replace(config.train, batch_size=2 * world.size, micro_batch=None)
    stage = build(replace(config, train=few, data=replace(config.data, workers=0)), run, world)
    lines = [to_json(to_dict(config)).rstrip(), ""]
    batch = next(stage.batches(0)).to(world.device)
    given = config.train.micro_batch
    share = given if isinstance(given, int) else config.train.batch_size // world.size
    for objective in stage.objectives:
        if config.train.checkpointing:
            checkpoint_blocks(objective.blocks)
        cost = cost_of(objective, batch, config.train, world)
        lines += [
            f"{objective.name}: {cost.parameters:,} parameters",
            f"  {cost.flops / 1e9:,.2f} GFLOPs per image in the forward pass, including frozen parts",
            f"  memory: about {cost.state / 2**30:,.2f} GiB of state, {cost.fixed / 2**30:,.2f} GiB of frozen networks "
            f"and copies of weights, and {cost.image * share / 2**30:,.2f} GiB of activations for {share} images at a "
            f"time, {cost.image / 2**30:,.3f} GiB for each",
        ]
    images = config.train.steps * config.train.batch_size
    lines.append(f"{config.train.steps:,} steps of {config.train.batch_size} images: {images:,} images")
    try:
        check_settings(config.train, world)
        check_apart(run, [config.data.source], "run")
        record.check_folders(run)
        with lock(run, world) if run.is_dir() else nullcontext():
            if record.is_begun(run):
                record.check_start(run, replaced(config, Mark.PLACE, absolute), stage.inputs(), change)
    except UserError as error:
        lines += ["", f"This training would not start. {error}"]
    return "\n".join(lines)


def describe_folder(name: str, reach: tuple[str, float] | None = None) -> str:
    """Describe the contents of a model, an artifact or a run.

    Args:
        name: Folder or name of the model, artifact or run.
        reach: A logged metric, such as evaluation/fid, and a target value. The description of a run then also says
            after how many epochs the metric first reached the target or less.

    Raises:
        UserError: If `name` is none of the three, or if `reach` is given and `name` is not a run.
    """
    folder = find_folder(name)
    lines = [str(name)]
    if (folder / "checkpoints").is_dir():
        saved = [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]
        records = read_metrics(folder)
        lines.append(f"  run: checkpoints {', '.join(saved) or 'none'}")
        if records:
            of_steps = (each for each in reversed(records) if "images_per_second" in each)  # with the losses
            lines.append(f"  last record: {json.dumps(next(of_steps, records[-1]))}")
        if reach:
            lines.append(f"  {_reached(folder, records, *reach)}")
    elif reach:
        raise UserError(f"{name}: not a run, so it has no metrics; name the folder of a run")
    for kind in artifacts.ARTICLES:
        try:
            path, values, _, trained_on = artifacts.find(name, kind)
        except artifacts.MissingArtifact:
            continue
        if "baseline" in values:
            lines.append(f"  {kind}: no weights of its own, uses {values['baseline']}")
        else:
            state = artifacts.read_stored(path)
            types = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
            count = sum(tensor.numel() for tensor in state.values())
            lines.append(f"  {kind}: {len(state)} tensors, {count:,} numbers, {types}")
        if trained_on:
            lines.append(f"    trained on {trained_on}")
        if known := artifacts.averages(path, kind):
            lines.append(f"    averages of decay {', '.join(map(str, known))}")
        lines += [f"    {line}" for line in to_json(values).rstrip().splitlines()]
    if len(lines) == 1:
        raise UserError(f"{name}: neither a model, an artifact nor a run (no config.json of a known kind in {folder})")
    return "\n".join(lines)


def _reached(run: Path, records: list[dict[str, float]], metric: str, target: float) -> str:
    steps = steps_to(records, metric, target)
    if steps is None:
        best = min(record[metric] for record in records if metric in record)
        return f"{metric} has not reached {target:g}; its lowest is {best:g}"
    images = read_json(run / "inputs.json")["data"]["count"]
    epochs = steps * read_json(run / "config.json")["train"]["batch_size"] / images
    return f"{metric} reached {target:g} after {epochs:.4g} epochs of {images:,} images ({steps:,.0f} steps)"
