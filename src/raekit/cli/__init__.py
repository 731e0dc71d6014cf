"""The command line. Only this package parses arguments, prints and exits."""

import sys
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from typing import Annotated, Any, get_args, get_origin

import tyro
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.app import app
from raekit.cli.autoencoding import encode, reconstruct
from raekit.cli.completion import completion
from raekit.cli.data import data, data_pack
from raekit.cli.evaluation import compare, evaluate, probe, reference
from raekit.cli.formats import convert, info, models, push
from raekit.cli.generation import generate, interpolate, trajectory
from raekit.cli.latents import latents_cache, latents_generate, latents_measure
from raekit.cli.training import demo, recipes, report, study, train
from raekit.errors import Stopped, UserError, did_you_mean
from raekit.extensions import run_extensions
from raekit.training.signals import keyboard_interrupts, stop_signals

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "start here": {"demo": demo, "models": models, "recipes": recipes},
    "use a model": {
        "generate": generate,
        "interpolate": interpolate,
        "trajectory": trajectory,
        "reconstruct": reconstruct,
        "encode": encode,
        "app": app,
    },
    "train": {
        "train": train,
        "report": report,
        "data": data,
        "data pack": data_pack,
        "latents measure": latents_measure,
        "latents cache": latents_cache,
        "latents generate": latents_generate,
    },
    "evaluate": {"evaluate": evaluate, "compare": compare, "reference": reference, "probe": probe, "study": study},
    "share": {"info": info, "convert": convert, "push": push},
    "this program": {"completion": completion},
}
POSITIONAL = Positional[Any].__metadata__
COMMANDS: dict[str, Callable[..., None]] = {name: each for group in GROUPS.values() for name, each in group.items()}


def main() -> None:
    """Run the command in sys.argv.

    The exit status is 0 after success, 2 for a wrong command line, 75 for work that a signal stopped and that the same
    command resumes, 130 after Ctrl-C in another command, and 1 for any other error.
    """
    console.prepare()
    try:
        with keyboard_interrupts():
            _run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        console.out.on_broken_pipe()
    except UserError as error:
        console.fail(str(error))
    except OSError as error:
        console.fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except Stopped:
        console.stopped()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # of numpy and of torch
            reason = str(error).splitlines()[:1]
            console.fail(f"memory: there is not enough ({', '.join(reason)}); ask for fewer or smaller images at once")
        compiler = sys.modules.get("torch._dynamo.exc")  # imported only if something was compiled
        if not compiler or not isinstance(error, compiler.BackendCompilerFailed):
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        reason = str(error).splitlines()[0]
        console.fail(
            f"torch.compile: {reason}. If an earlier compilation was killed, remove {cache_dir()}; if not, leave "
            "out the option that compiles"
        )


def _run(arguments: list[str]) -> None:
    if arguments in (["--version"], ["-V"]):
        from raekit import __version__

        console.out.print(f"raekit {__version__}")
        return
    # `data pack` before `data`
    name = max((n for n in COMMANDS if arguments[: len(n.split())] == n.split()), key=len, default=None)
    if name is None:
        _usage(arguments)
        return
    rest, command = arguments[len(name.split()) :], COMMANDS[name]
    console.check_filled(rest)
    if command is train:
        with stop_signals():  # also while torch is imported
            run_extensions()
            train(rest)
    else:
        run_extensions()
        command.__doc__ = console.joined(command.__doc__ or "")
        console.check_lists(_lists(command), rest)
        _name_positionals(command)
        tyro.cli(command, prog=f"raekit {name}", args=rest)


def _lists(command: Callable[..., None]) -> Iterator[str]:
    """Yield the options of a command that take a list of values."""
    for name, parameter in signature(command).parameters.items():
        kind, marks = parameter.annotation, getattr(parameter.annotation, "__metadata__", ())
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        if get_origin(kind) is tuple and Ellipsis in get_args(kind) and marks != POSITIONAL:
            given = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
            yield f"--{given.replace('_', '-')}"


def _name_positionals(command: Callable[..., None]) -> None:
    """Let the help of a command show positional arguments by their names instead of their types."""
    for name, parameter in signature(command).parameters.items():
        if getattr(parameter.annotation, "__metadata__", ()) == POSITIONAL:
            shown = name.upper() if parameter.default is Parameter.empty else f"[{name.upper()}]"
            command.__annotations__[name] = Annotated[parameter.annotation, tyro.conf.arg(metavar=shown)]


def _usage(given: list[str]) -> None:
    """Print all commands, or only the commands of a family such as `latents`.

    A wrong command is named in an error message, and the exit status is 2.
    """
    families = {name.split()[0] for name in COMMANDS if " " in name}
    *family, last = given or ["--help"]
    wrong = last not in ("--help", "-h") or len(family) > 1 or not families.issuperset(family)
    to = console.err if wrong else console.out
    if wrong:
        asked = " ".join(given[:2] if given[0] in families else given[:1])
        hint = did_you_mean(asked, COMMANDS)
        to.print(f"error: {asked!r} is not a command{hint and '; ' + hint}")
    prefix = f"{given[0]} " if given and given[0] in families else ""
    version = "" if prefix else "; version: raekit --version"
    to.print(f"usage: raekit {prefix}COMMAND ...   (help: raekit {prefix}COMMAND --help{version})")
    width = max(map(len, COMMANDS))
    for title, group in GROUPS.items():
        shown = {name: command for name, command in group.items() if name.startswith(prefix)}
        if shown:
            to.print(f"\n{title}")
        for name, command in shown.items():
            to.print(f"  {name:{width}}  {console.about(command).splitlines()[0]}")
    if wrong:
        sys.exit(2)
