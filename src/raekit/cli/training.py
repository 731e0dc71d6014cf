"""Commands that train models."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.launch import launch, processes, without
from raekit.errors import UserError
from raekit.files import check_file
from raekit.progress import Display
from raekit.training.signals import stop_signals

_RUN = "Folder of the run, for checkpoints, metrics and the trained artifact. An existing run is resumed."
_EPOCHS = (
    "Train for this many passes over the images, and scale schedules, starts and intervals of the recipe to them. "
    "Options that you give are not scaled."
)
_DRY_RUN = "Show the config and the cost without training, and whether the run could start."
_CHANGE = (
    "Allow changes to an existing run: steps, learning rates, schedules, clipping, starts of losses, VGG16's weights, "
    "precision, residual, latents, images."
)
_PROCESSES = "Train in this number of processes on this machine."
_GPUS = "Train on this number of GPUs of this machine, with one process for each GPU."
_DEVICE = "Device to train on. None: the GPU if there is one, else the CPU."


def demo(run: Path = Path("runs/demo"), minutes: float = 12, images: Path | None = None, quick: bool = False) -> None:
    """Show the built-in models, train for some minutes, and write RUN/report.html.

    Example: raekit demo --minutes 12

    The demo measures the speed of this machine while it trains, and adapts the number of steps to the time. Ctrl-C
    stops the demo, and the same command resumes it.

    Args:
        run: Output folder for all results.
        minutes: Time for the complete demo on this machine, in minutes.
        images: Folder with images of your own, in a sub-folder for each class or without classes. The demo fine-tunes
            the built-in models on them. None: the built-in images.
        quick: Finish in under two minutes, with poor image quality.
    """
    from raekit.experiments.demo import run_demo

    with stop_signals(), Display(console.err) as progress:
        run_demo(run, minutes, quick, progress, images)
    console.out.print(f"report: {run / 'report.html'}")


def recipes(recipe: Positional[str | None] = None) -> None:
    """List the recipes by purpose, with size, memory and time, or print one.

    Example: raekit recipes emoji_decoder > my_recipe.py

    To train the recipe in a file, use `raekit train my_recipe.py`. The file may also register encoders.
    To measure parameters, FLOPs and memory, use `raekit train RECIPE --dry-run`. To train on your own images, add
    `--data.source folder:images`.

    Args:
        recipe: Recipe to print. None: list all recipes.
    """
    from raekit.recipes import Purpose, find, names

    if recipe is not None:
        console.out.print(find(recipe).path.read_text(encoding="utf-8"), end="")
        return
    every = [find(name) for name in names()]
    for purpose in Purpose:
        console.out.print(f"\n{purpose}\n")
        for each in every:
            if each.purpose == purpose:
                console.out.print(f"  {each.name}\n    {each.summary}")
                for what, value in (("size", each.size), ("memory", each.memory), ("cost", each.cost)):
                    console.out.print(f"    {what + ':':8}{value}")


def study(
    name: Positional[str | None] = None,
    out: Path | None = None,
    quick: bool = False,
    only: str | None = None,
    device: Device | None = None,
) -> None:
    """Check a claim of the paper by experiments, or list the studies.

    Example: raekit study width --out studies/width

    A study trains small models, measures them, and writes study.md, study.json and a figure for each claim to OUT. Each
    claim gets a verdict: shown here, not shown here, or undecided. The same command resumes an interrupted study.

    Args:
        name: Study to run. None: list all studies.
        out: Folder of the study. None: studies/NAME.
        quick: Only test that everything runs. The numbers then say nothing about the claims.
        only: Do part K of N of the runs, written K/N, such as 3/8. Several machines can do the parts in one shared OUT.
            The part that ends last writes the report.
        device: Device to train on. None: the GPU if there is one, else the CPU.
    """
    from raekit.experiments.studies import find, names, run_study

    if name is None:
        console.print_table(
            ("study", "claim", "cost"), [(each.name, each.summary, each.cost) for each in map(find, names())]
        )
        return
    out = out or Path("studies") / name
    with stop_signals(), Display(console.err) as progress:
        claims = run_study(name, out, quick=quick, only=only, device=device, progress=progress)
    if isinstance(claims, int):
        console.out.print(f"{out}: {claims} runs are left; the part that finishes the last run writes the report")
        return
    for claim in claims:
        console.out.print(f"{claim.text}: {claim.verdict}\n  {claim.found}")
    console.out.print(f"report: {out / 'study.md'}")


def train(arguments: list[str]) -> None:
    """Train a recipe, or resume a run.

    Example: raekit train emoji_decoder --run runs/decoder --train.steps 500

    RECIPE is a name or a Python file (see `raekit recipes --help`). The same command resumes an interrupted run, and so
    does `raekit train --resume RUN`, with the settings of the run. Settings that define the training must not change;
    steps, learning rates and precision may change with --change. docs/training.md has the details.

    `raekit train RECIPE --help` lists the options of the recipe and of its optional parts that are set. To see the
    options of another part, set one of them before --help: --evaluation.every 100 --help. --dry-run shows config and
    cost without training. To add an optional part to a recipe, set one of its options, such as --evaluation.every 100.
    To remove an optional part, set the part to None, such as --perceptual None.

    To train on 8 GPUs: raekit train RECIPE --gpus 8. On several machines: srun raekit train RECIPE, or torchrun.
    """
    from raekit.recipes import find, names

    first, *rest = arguments or ["--help"]
    if first == "--resume" and rest[:1] and not rest[0].startswith("-"):
        from raekit.stages.record import read_config

        run = Path(rest.pop(0))
        _train(["--resume", str(run)], run.name, f"Resume the run in {run}.", read_config(run), run, rest)
    elif first.startswith("-"):
        console.out.print(
            "usage: raekit train RECIPE [--run DIR] [--change] [--epochs N] [--dry-run] [--FIELD VALUE ...]\n"
            f"       raekit train --resume RUN [--FIELD VALUE ...]\n\n{console.about(train)}\n",
        )
        console.out.print("recipes: " + ", ".join(names()))
        if arguments not in (["--help"], ["-h"]):
            sys.exit(2)
    else:
        if Path(first, "config.json").is_file() and first not in names():
            raise UserError(f"{first}: a run, not a recipe; to resume it, use raekit train --resume {first}")
        recipe = find(first)
        facts = "\n\n".join(recipe.about.split("\n\n")[:2])
        about = f"{facts}\n\nMore about this recipe: raekit recipes {first}"
        _train([first], recipe.name, about, recipe.config, Path("runs") / recipe.name, rest)


def report(run: Positional[Path], out: Path | None = None) -> None:
    """Write a page about a run: curves, pictures, scores, speed, events and settings.

    Example: raekit report runs/denoiser

    The command works for every stage, during a training and after it. The page is one HTML file that needs no other
    file. Run the command again to update the page.

    Args:
        run: Folder of the run.
        out: HTML file. Default: RUN/report.html.
    """
    from raekit.stages.report import write_report

    if out:
        check_file(out, ".html")
    console.out.print(f"report: {write_report(run, out)}")


class _Options(NamedTuple):
    run: Path
    change: bool
    epochs: float | None
    dry_run: bool
    device: Device | None
    gpus: int | None
    processes: int | None
    config: Any


def _train(what: list[str], name: str, about: str, default: Any, run: Path, arguments: list[str]) -> None:
    """Train the config `default`, changed by the arguments that follow `raekit train WHAT` on the command line."""
    from raekit.stages.inspection import describe_config
    from raekit.stages.run import train as fit
    from raekit.stages.scaling import for_steps, steps_of

    def parse(default: Any) -> _Options:
        return _parse(name, about, default, run, arguments, resume=what[0] == "--resume")

    given = parse(default)
    if given.gpus is not None and given.processes is not None:
        raise UserError("--gpus, --processes: each sets the number of processes; leave out one of the two")
    count = given.processes if given.gpus is None else given.gpus
    if count is not None:
        rest = without(arguments, "--gpus", "--processes")
        launch(count, ["train", *what, *rest, *([] if given.gpus is None else ["--device", "cuda"])])
        return
    if given.epochs is not None:
        if given.config.train.steps != default.train.steps:
            raise UserError("--epochs: sets train.steps; leave out --train.steps")
        # Options of the command line hold as they are, so the default is scaled, and the options are applied again.
        given = parse(for_steps(default, steps_of(given.config, given.epochs)))
    config = given.config
    with processes(given.device) as here:
        if given.dry_run:
            console.out.print(describe_config(config, given.run, here, given.change))
            return
        total = config.train.steps
        with Display(console.err, quiet=not here.is_main) as progress:

            def report(step: int, values: dict[str, float]) -> None:
                # unit=0: the text has the speed of the steps
                progress(given.run.name, step, total, _headline(values), unit=0)

            fit(config, given.run, here, report, progress, given.change)
        if here.is_main:
            console.out.print(f"artifact: {given.run / 'artifact'}")


def _parse(name: str, about: str, default: Any, run: Path, arguments: list[str], resume: bool) -> _Options:
    """Return the options of a training; the fields of the config `default` are options too."""
    # --samples=None is --samples None
    split = ([each.removesuffix("=None"), "None"] if each.endswith("=None") else [each] for each in arguments)
    config, rest = _with_parts(default, [part for parts in split for part in parts])
    _join_help(type(config))
    console.check_lists(_lists(type(config)), rest)

    def command(
        run: Annotated[Path, tyro.conf.arg(help=_RUN)] = run,
        change: Annotated[bool, tyro.conf.arg(help=_CHANGE)] = False,
        epochs: Annotated[float | None, tyro.conf.arg(help=_EPOCHS)] = None,
        dry_run: Annotated[bool, tyro.conf.arg(help=_DRY_RUN)] = False,
        device: Annotated[Device | None, tyro.conf.arg(help=_DEVICE)] = None,
        gpus: Annotated[int | None, tyro.conf.arg(help=_GPUS)] = None,
        processes: Annotated[int | None, tyro.conf.arg(help=_PROCESSES)] = None,
        config: Any = config,
    ) -> _Options:
        return _Options(run, change, epochs, dry_run, device, gpus, processes, config)

    # tyro derives the options and their defaults from the type and the values of the config.
    command.__annotations__["config"] = Annotated[type(config), tyro.conf.arg(name="")]
    if resume:
        command.__annotations__["run"] = tyro.conf.Fixed[Path]
    # Without AvoidSubcommands, tyro turns an optional part into subcommands instead of options for its fields.
    return tyro.cli(
        command,
        prog=f"raekit train {f'--resume {run}' if resume else name}",
        description=indent(about, " "),  # tyro joins lines that are not indented
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _join_help(kind: Any) -> None:
    """Make the help of each field of a config, and of its parts, one line, which tyro wraps."""
    for each in (part for part in kind.__mro__ if is_dataclass(part)):
        each.__doc__ = console.joined(each.__doc__ or "")
    for field in get_type_hints(kind).values():
        for part in (field, *get_args(field)):
            if is_dataclass(part):
                _join_help(part)


def _lists(kind: Any, prefix: str = "--") -> Iterator[str]:
    """Yield the options of a config and of its parts that take a list of values."""
    for name, field in get_type_hints(kind).items():
        option = f"{prefix}{name.replace('_', '-')}"
        for part in (field, *get_args(field)):
            if is_dataclass(part):
                yield from _lists(part, f"{option}.")
            elif get_origin(part) is tuple and Ellipsis in get_args(part):
                yield option


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
    """Return the values of a log record that matter most, as text."""
    losses = [f"{name} {value:.4f}" for name, value in values.items() if name.endswith("/loss")]
    share = f"{values['mfu']:.0%} MFU" if "mfu" in values else f"{values['matmul_share']:.0%} of matmul"
    facts = [
        f"{values['images_per_second']:.1f} images/s",
        f"data {values['data_wait']:.0%}",
        f"{values['tflops']:.3g} TFLOP/s ({share})",
        f"{values['peak_memory_gib']:.2g} GiB",
    ]
    return "  ".join([*losses, ", ".join(facts)])
