"""The command line. Only this package parses arguments, prints and exits."""

import logging
import sys
from collections.abc import Callable

import tyro

from raekit.cli import console
from raekit.cli.autoencoding import encode, reconstruct
from raekit.cli.evaluation import compare, evaluate, probe, reference
from raekit.cli.formats import convert, info
from raekit.cli.generation import generate, interpolate, trajectory
from raekit.cli.latents import latents_cache, latents_generate, latents_measure
from raekit.cli.training import demo, recipes, train
from raekit.errors import Stopped, UserError
from raekit.train.signals import stop_signals

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "generate": generate,
    "interpolate": interpolate,
    "trajectory": trajectory,
    "reconstruct": reconstruct,
    "encode": encode,
    "probe": probe,
    "recipes": recipes,
    "train": train,
    "latents measure": latents_measure,
    "latents cache": latents_cache,
    "latents generate": latents_generate,
    "evaluate": evaluate,
    "compare": compare,
    "reference": reference,
    "convert": convert,
    "info": info,
}


def main() -> None:
    """Run the command in sys.argv.

    The exit status is 0 after success, 2 for a wrong command line, 75 for a training that a signal stopped and that the
    same command resumes, 130 after Ctrl-C in another command, and 1 for any other error.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns at every retry
    try:
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
        compiler = sys.modules.get("torch._dynamo.exc")  # imported only if something was compiled
        if not compiler or not isinstance(error, compiler.BackendCompilerFailed):
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        reason = str(error).splitlines()[0]
        console.fail(
            f"torch.compile: {reason}. If an earlier compilation was killed, remove {cache_dir()}; if not, leave out "
            "--train.compile"
        )


def _run(arguments: list[str]) -> None:
    if arguments in (["--version"], ["-V"]):
        from raekit import __version__

        console.out.print(f"raekit {__version__}")
        return
    name = next((n for n in COMMANDS if arguments[: len(n.split())] == n.split()), None)
    if name is None:
        words = [word for word in arguments if word not in ("--help", "-h")]
        group = {n: command for n, command in COMMANDS.items() if n.split()[: len(words)] == words}
        _usage(group or COMMANDS, wrong=bool(arguments) and (not group or words == arguments), given=arguments)
        return
    rest, command = arguments[len(name.split()) :], COMMANDS[name]
    if command is train:
        with stop_signals():  # also while torch is imported
            train(rest)
    else:
        command.__doc__ = console.joined(command.__doc__ or "")
        tyro.cli(command, prog=f"raekit {name}", args=rest)


def _usage(commands: dict[str, Callable[..., None]], wrong: bool, given: list[str]) -> None:
    """Print `commands`; after a wrong command, name it and exit with 2."""
    to = console.err if wrong else console.out
    if wrong:
        to.print(f"error: {' '.join(given[:2])!r} is not a command", markup=False)
    to.print("usage: raekit COMMAND ...   (help: raekit COMMAND --help; version: raekit --version)\n", markup=False)
    width = max(map(len, commands))
    for name, command in commands.items():
        to.print(f"  {name:{width}}  {console.about(command).splitlines()[0]}", markup=False)
    if wrong:
        sys.exit(2)
