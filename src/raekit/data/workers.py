"""Read ahead in several processes, with one clear error for everything that can happen to them."""

import os
import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess as Process
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raekit.distributed import World
from raekit.errors import UserError

_T = TypeVar("_T")
MAX_WORKERS = 512
"""The largest number of worker processes. Each of them takes memory and time to start and to end."""
_NO_HANDOVER = 98
"""Exit status of a worker that could not send a batch."""
_REMEDY = (
    "enlarge /dev/shm (docker: --shm-size), raise the limit of open files (`ulimit -n`), or lower data.workers or the "
    "batch size"
)


def load_parts(reader: Dataset[_T], parts: Iterable[Sequence[int]], workers: int, world: World) -> Iterator[_T]:
    """Yield `reader[part]` for each of `parts`. `workers` processes read ahead; with 0, this process reads.

    Raises:
        UserError: A worker was killed, or ran out of shared memory or files. What `reader` raises is the same for any
            number of workers.
    """
    loaded = DataLoader(
        _Worker(reader) if workers else reader,
        batch_size=None,  # each part is a complete batch
        sampler=parts,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_start,
        generator=torch.Generator(),  # without it, the loader draws from the global generator
    )
    if not workers:
        yield from loaded
        return
    batches, others = None, {*active_children()}
    try:
        batches = _started(loaded)
        # Python ends its child processes with SIGTERM, which the workers ignore, and waits for them.
        Finalize(batches, _ended, (batches._workers,), exitpriority=10)
        while (read := _next(batches)) is not None:
            if isinstance(read, _Failure):
                raise read.error
            yield read
    except OSError as error:
        if batches is not None:
            raise
        raise _explained(error, []) from None
    finally:
        # The loader would wait for one after another, and after a stop during the start it is not known.
        _kill({*active_children()} - others if batches is None else batches._workers)
        del batches  # ends the workers now, also if somebody keeps the error


def _started(loaded: DataLoader) -> Any:
    """Start the workers, without torch's handler of dead workers.

    The handler raises an error anywhere in the main process, for example in the middle of a training step. Without it,
    the next request for a batch finds the dead worker within five seconds.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loaded)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def _next(batches: Any) -> Any:
    try:
        return next(batches, None)
    except Exception as error:
        raise _explained(error, _ended(batches._workers)) from None


@dataclass(frozen=True)
class _Failure:
    error: UserError | OSError


class _Worker(Dataset[Any]):
    """Reads in a worker. An expected error travels as a value: raised, it would become text with a traceback."""

    def __init__(self, reader: Dataset[Any]) -> None:
        self.reader = reader

    def __getitem__(self, part: Sequence[int]) -> Any:
        try:
            read = self.reader[part]
        except (UserError, OSError) as error:
            return _Failure(error)
        try:
            # Otherwise a thread of the worker does the same, and when it fails, nobody learns of it.
            for value in read:
                if isinstance(value, Tensor):
                    value.share_memory_()
        except (RuntimeError, OSError) as error:
            return _Failure(UserError(f"data.workers: a batch does not fit ({_first_line(error)}); {_REMEDY}"))
        return read


def _start(_: int) -> None:
    """Prepare a worker.

    It ignores the signals that stop a training: the main process ends its workers, and may need another batch first.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # By default, a batch that cannot be sent is lost, and the main process waits for it forever.
    Queue._on_queue_feeder_error = staticmethod(_leave)  # type: ignore[method-assign]


def _leave(error: Exception, batch: object) -> NoReturn:
    os._exit(_NO_HANDOVER)


def _ended(workers: list[Process]) -> list[int | None]:
    """End all workers, and return the exit statuses of those that had already ended."""
    exits = [worker.exitcode for worker in workers]
    if not any(exits):  # one may be just ending
        wait([worker.sentinel for worker in workers], timeout=1)
        exits = [worker.exitcode for worker in workers]
    _kill(workers)
    return exits


def _kill(workers: Collection[Process]) -> None:
    for worker in workers:
        worker.kill()  # it may wait for a lock of a dead worker, and ignores SIGTERM


def _explained(error: Exception, exits: list[int | None]) -> Exception:
    """Return the error of a main process whose workers ended with the statuses `exits`."""
    if (
        isinstance(error, OSError)
        or "ancdata" in str(error)
        or "open files" in str(error)
        or {_NO_HANDOVER, -signal.SIGBUS} & {*exits}
    ):
        return UserError(f"data.workers: a batch could not be passed on ({_first_line(error)}); {_REMEDY}")
    if killed := [-status for status in exits if status and status < 0]:
        return UserError(
            f"data.workers: a worker process was killed by {signal.Signals(killed[0]).name}, perhaps because the "
            "memory is full; lower data.workers, and run the same command again"
        )
    if "Pin memory thread" in str(error):  # on CUDA a thread receives the batches, and prints its own error
        return UserError(f"data.workers: a batch could not be received; {_REMEDY}")
    return error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
