"""Commands that train models."""

import copy
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, get_args, get_type_hints

import tyro
from rich.table import Table

from raekit.cli import console
from raekit.cli.console import Device
from raekit.progress import Display

_RUN = "Folder of the run, for checkpoints, metrics and the trained artifact. An existing run is resumed."
_DRY_RUN = "Show the config and the cost without training."
_DEVICE = "Device to train on. None: the GPU if there is one, else the CPU."


def demo(run: Path = Path("runs/demo"), minutes: float = 12, quick: bool = False) -> None:
    """Train all stages on built-in images, generate and score samples, and write RUN/report.html.

    Example: raekit demo --minutes 12

    Ctrl-C stops the demo. The same command resumes it.

    Args:
        run: Output folder for all results.
        minutes: Time for training and scoring on this machine, in minutes.
        quick: Finish in under two minutes, with poor image quality.
    """
    from raekit.demo import run_demo

    with Display(console.err) as progress:
        finished = run_demo(run, minutes, quick, progress)
    if not finished:
        console.stopped()
    console.out.print(f"report: {run / 'report.html'}")


def recipes() -> None:
    """List the training recipes by purpose, with what they cost.

    Example: raekit recipes

    `raekit train RECIPE --dry-run` measures parameters, FLOPs and memory. `--data.source` takes your own images.
    """
    from raekit.recipes import Purpose, find, names

    every = [find(name) for name in names()]
    for purpose in Purpose:
        table = Table("recipe", "what", "cost", title=f"\n{purpose}", title_justify="left", box=None)
        for recipe in every:
            if recipe.purpose == purpose:
                table.add_row(recipe.name, recipe.summary, recipe.cost)
        console.out.print(table)


def train(arguments: list[str]) -> None:
    """Train a recipe, or resume its run.

    Example: raekit train emoji_decoder --run runs/decoder --train.steps 500

    `raekit train RECIPE --help` lists all options of a recipe. --dry-run shows config and cost without training.
    To add an optional part to a recipe, set one of its options, such as --selection.every 100. To remove an optional
    part, set the part to None, such as --perceptual None.

    To train on 8 GPUs: torchrun --nproc-per-node 8 -m raekit -- train RECIPE
    """
    from raekit.recipes import find, names

    if not arguments or arguments[0].startswith("-"):
        console.out.print(
            f"usage: raekit train RECIPE [--run DIR] [--dry-run] [--FIELD VALUE ...]\n\n{console.about(train)}\n"
        )
        console.out.print("recipes: " + ", ".join(names()))
        if arguments not in (["--help"], ["-h"]):
            sys.exit(2)
        return
    recipe = find(arguments[0])
    default, rest = _with_parts(recipe.config, arguments[1:])

    def command(
        run: Annotated[Path, tyro.conf.arg(help=_RUN)] = Path("runs") / recipe.name,
        dry_run: Annotated[bool, tyro.conf.arg(help=_DRY_RUN)] = False,
        device: Annotated[Device | None, tyro.conf.arg(help=_DEVICE)] = None,
        config: Any = None,
    ) -> None:
        from raekit.distributed import world
        from raekit.stages.inspection import describe_config
        from raekit.stages.run import train as fit

        with world(device) as here:
            if dry_run:
                console.out.print(describe_config(config, run, here), markup=False)
                return
            total, batch = config.train.steps, config.train.batch_size
            with Display(console.err, quiet=not here.is_main) as progress:

                def report(step: int, values: dict[str, float]) -> None:
                    progress(recipe.name, step, total, _headline(values), batch)

                finished = fit(config, run, here, report, progress)
            if not finished:
                console.stopped()
            if here.is_main:
                console.out.print(f"artifact: {run / 'artifact'}")

    # tyro derives the options and their defaults from the type and the values of the recipe's config.
    command.__annotations__["config"] = Annotated[type(recipe.config), tyro.conf.arg(name="")]
    command.__defaults__ = (*(command.__defaults__ or ())[:-1], default)
    # Without AvoidSubcommands, tyro turns an optional part into subcommands instead of options for its fields.
    tyro.cli(
        command,
        prog=f"raekit train {recipe.name}",
        description=indent(recipe.about, " "),  # tyro joins lines that are not indented
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _with_parts(config: Any, arguments: list[str], prefix: str = "--") -> tuple[Any, list[str]]:
    """Add and remove the optional parts of a config as the arguments demand.

    An option of a part that `config` lacks, such as --selection.every 100, adds the part with its defaults. The
    arguments --selection None remove the part.

    Returns:
        A copy of the config, and the arguments without those that removed a part.
    """
    config, given = copy.copy(config), [argument.replace("_", "-") for argument in arguments]
    for field, kind in get_type_hints(type(config)).items():
        option, part = f"{prefix}{field.replace('_', '-')}", getattr(config, field)
        kinds = [each for each in get_args(kind) if is_dataclass(each)]
        if kinds and (at := _find(arguments, option, "None")) is not None:
            part, arguments = None, arguments[:at] + arguments[at + 2 :]
        elif kinds and part is None and any(argument.startswith(f"{option}.") for argument in given):
            part = _unset(kinds[0])
        if is_dataclass(part):
            part, arguments = _with_parts(part, arguments, f"{option}.")
        object.__setattr__(config, field, part)
    return config, arguments


def _find(arguments: list[str], *wanted: str) -> int | None:
    """Return the index at which `wanted` occur in sequence; None if they do not."""
    return next((i for i in range(len(arguments)) if arguments[i : i + len(wanted)] == [*wanted]), None)


def _unset(kind: Any) -> Any:
    """Return a config with all defaults; tyro then requires the fields without a default."""
    config = object.__new__(kind)
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.default is not MISSING:
            value = field.default
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        else:
            value = _unset(hints[field.name]) if is_dataclass(hints[field.name]) else tyro.MISSING
        object.__setattr__(config, field.name, value)
    return config


def _headline(values: dict[str, float]) -> str:
    """Return the losses among the metrics of a step as text."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("/loss"))
