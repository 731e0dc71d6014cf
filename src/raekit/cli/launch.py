"""Start a command in several processes of this machine, with torch's elastic launcher."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from raekit.errors import Stopped, UserError
from raekit.training.signals import SIGNALS

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
    if count < 1:
        raise UserError(f"--gpus, --processes: {count} must be at least 1")
    if "WORLD_SIZE" in os.environ:
        raise UserError("--gpus, --processes: torchrun has started this process already; leave out one of the two")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process prints its own errors
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="raekit",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=",".join([number.name for number in SIGNALS]),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "raekit", *arguments)
    except SignalException:
        raise Stopped from None
    except ChildFailedError as error:
        if {failure.exitcode for failure in error.failures.values()} == {Stopped.STATUS}:
            raise Stopped from None
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:  # a killed process could not print anything
                why = ", perhaps because memory ran out" if -failure.exitcode == signal.SIGKILL else ""
                raise UserError(
                    f"process {rank} was killed by signal {-failure.exitcode} ({failure.signal_name()}){why}; run the "
                    "same command again to resume"
                ) from None
        sys.exit(1)


def without(arguments: Sequence[str], *options: str) -> Iterator[str]:
    """Yield `arguments` without `options`, each with its value."""
    given = iter(arguments)
    for argument in given:
        if argument in options:
            next(given, None)
        elif argument.partition("=")[0] not in options:
            yield argument
