"""Commands that train."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from raekit.cli import console
from raekit.cli.console import Device
from raekit.progress import Display


def demo(run: Path = Path("runs/demo"), minutes: float = 12, quick: bool = False) -> None:
    """Train the whole pipeline on built-in images, sample, score, and write RUN/report.html.

    Example: raekit demo --minutes 12
    Ctrl-C stops it; the same command goes on where it stopped.

    Args:
        run: folder of the results.
        minutes: time to train and score in, on this machine.
        quick: all of it in under two minutes, at poor quality.
    """
    from raekit.demo import run_demo

    with Display(console.err) as progress:
        finished = run_demo(run, minutes, quick, progress)
    if not finished:
        console.stopped()
    console.out.print(f"report: {run / 'report.html'}")


def recipes() -> None:
    """List the recipes.

    Example: raekit recipes
    """
    from raekit.recipes import find, names

    table = Table("recipe", "what it is", box=None)
    for name in names():
        table.add_row(name, find(name).summary)
    console.out.print(table)


def train(arguments: list[str]) -> None:
    """Train a recipe, or go on with its run.

    Example: raekit train emoji_decoder --run runs/decoder --train.steps 500
    `raekit train RECIPE --help` lists all that can be overridden; --dry-run shows what would run.
    Under torchrun: torchrun --nproc-per-node 8 -m raekit -- train RECIPE
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

    def command(
        run: Path = Path("runs") / recipe.name, dry_run: bool = False, device: Device | None = None, config: Any = None
    ) -> None:
        from raekit.distributed import world
        from raekit.inspection import describe_config
        from raekit.stages.run import train as fit

        with world(device) as here:
            if dry_run:
                console.out.print(describe_config(config, run, here), markup=False)
                return
            total, batch = config.train.steps, config.train.batch_size
            with Display(console.err, quiet=not here.is_main) as progress:

                def report(step: int, values: dict[str, float]) -> None:
                    progress(recipe.name, step, total, _headline(values), batch)

                finished = fit(config, run, here, report)
            if not finished:
                console.stopped()
            if here.is_main:
                console.out.print(f"artifact: {run / 'artifact'}")

    # tyro derives the options from the recipe's own type and values.
    command.__annotations__["config"] = Annotated[type(recipe.config), tyro.conf.arg(name="")]
    command.__defaults__ = (*(command.__defaults__ or ())[:-1], recipe.config)
    command.__doc__ = recipe.about
    # An optional part, such as a head, is overridden field by field like the others; else tyro asks for subcommands.
    tyro.cli(command, prog=f"raekit train {recipe.name}", args=arguments[1:], config=(tyro.conf.AvoidSubcommands,))


def _headline(values: dict[str, float]) -> str:
    """The losses among a step's metrics."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("/loss"))
