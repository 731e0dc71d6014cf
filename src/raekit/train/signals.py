"""Stop a training run in an orderly way on SIGINT and SIGTERM."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of ending the process.

    The caller checks the list and stops when it is no longer empty. A SIGINT that follows another signal raises
    KeyboardInterrupt at once. The previous signal handlers return when the context ends. Outside the main thread,
    Python does not allow signal handlers, and the list stays empty.

    Yields:
        The numbers of the signals received so far.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
