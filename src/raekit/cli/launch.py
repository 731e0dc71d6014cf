"""Commands in several processes: start them with torch's elastic launcher, and join those that are started."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from raekit.cli import console
from raekit.errors import Stopped, UserError, whole_number
from raekit.training.signals import SIGNALS, stop_signals

if TYPE_CHECKING:
    from raekit.distributed import World

RUN_ID = "raekit"
"""How the processes know that `launch` started them."""
SAVING = 600
"""Seconds that the processes have to save their state after a signal to the launcher."""


def launch(count: int, arguments: Sequence[str]) -> None:
    """Run `raekit ARGUMENTS` in `count` processes that form a world, and wait for them.

    A signal to this process goes to all of them. One that fails ends the others.

    Raises:
        UserError: If `count` is not positive, another launcher has started this process, or a signal killed a process.
        Stopped: If a signal stopped the command.
        SystemExit: With status 1, if a process failed. The process has printed its error.
    """
    whole_number("--gpus, --processes", count, 1)
    if "WORLD_SIZE" in os.environ:
        raise UserError("--gpus, --processes: torchrun has started this process already; leave out one of the two")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for part in ("", ".agent.server.api"):  # the processes print their own errors
        logging.getLogger(f"torch.distributed.elastic{part}").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # the name of the machine may have no address, as in a container
        max_restarts=0,
        signals_to_handle=",".join([number.name for number in SIGNALS]),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "raekit", *arguments)
    except SignalException:
        raise Stopped from None
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        if statuses == {Stopped.STATUS}:
            raise Stopped from None
        ended = {-signal.SIGTERM} if 1 in statuses else set()  # by the launcher, after a process that failed
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and failure.exitcode not in ended:  # a killed process could not print anything
                why = ", perhaps because memory ran out" if -failure.exitcode == signal.SIGKILL else ""
                raise UserError(
                    f"process {rank} was killed by signal {-failure.exitcode} ({failure.signal_name()}){why}; run the "
                    "same command again to resume"
                ) from None
        sys.exit(1)


@contextmanager
def processes(device: str | None, alone: str = "", resumable: bool = False) -> "Iterator[World]":
    """Join the processes of this command. Of an error, or a stop, that several of them have, one prints the message.

    Args:
        device: "cpu" or "cuda". None selects CUDA if it is available.
        alone: the name of a command that runs in a single process, for the error message.
        resumable: whether the same command resumes the work, so that a signal ends it with the status for that.
    """
    from raekit.distributed import world

    with world(device) as here:
        try:
            if alone and here.size > 1:
                raise UserError(f"{alone}: runs in a single process; start it without torchrun")
            with stop_signals(here) if resumable else nullcontext():
                yield here
        except UserError as error:  # printed before this process leaves: the launcher may end it then
            if here.is_first(f"error {str(error)!a}"):
                console.fail(str(error))
            sys.exit(1)
        except Stopped:
            if os.environ.get("TORCHELASTIC_RUN_ID") != RUN_ID and here.is_first("stopped"):
                raise
            sys.exit(Stopped.STATUS)  # `launch` says it for all


def without(arguments: Sequence[str], *options: str) -> Iterator[str]:
    """Yield `arguments` without `options`, each with its value."""
    given = iter(arguments)
    for argument in given:
        if argument in options:
            next(given, None)
        elif argument.partition("=")[0] not in options:
            yield argument
