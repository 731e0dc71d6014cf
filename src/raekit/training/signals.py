"""Stop work in an orderly way when a signal arrives."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING

from raekit.errors import Stopped

if TYPE_CHECKING:  # this module does not wait for torch
    from raekit.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that stop work. Schedulers send SIGTERM, or SIGUSR1 or SIGUSR2 as an early warning."""


def _postponed(number: int, frame: FrameType | None, later: ExitStack) -> bool:
    """Return whether `frame` is part of an import. The signal `number` then arrives again in a moment, within `later`.

    A signal handler must not raise an exception in an import: C++ code that imports, as in torch, loses the exception
    or aborts the process.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            again = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), number))
            again.daemon = True
            again.start()
            later.callback(again.cancel)
            return True
        frame = frame.f_back
    return False


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGINT, as Python does, but after an import that the signal interrupts."""
    later = ExitStack()

    def handle(number: int, frame: FrameType | None) -> None:
        if not _postponed(number, frame, later):
            raise KeyboardInterrupt

    # A background job of a shell ignores SIGINT.
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread()
    if own:
        signal.signal(signal.SIGINT, handle)
    try:
        with later:
            yield
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Stop:
    """A request to stop. It raises `Stopped` at once, except inside `deferred`.

    Attributes:
        requested: Whether a signal arrived, or another process was asked to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self.immediate = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a request inside this block, for example while weights change or a checkpoint is written."""
        yield from self._set(immediate=False)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Raise `Stopped` for a request inside this block, or noted before it, although `deferred` surrounds it."""
        yield from self._set(immediate=True)

    def _set(self, immediate: bool) -> Iterator[None]:
        before, self.immediate = self.immediate, immediate
        try:
            if immediate:
                self.check()
            yield
        finally:
            self.immediate = before

    def check(self) -> None:
        """Raise `Stopped` if a stop was requested and is not deferred."""
        if self.requested and self.immediate:
            raise Stopped


@contextmanager
def stop_signals(world: "World | None" = None) -> Iterator[Stop]:
    """Turn the signals `SIGNALS` into a request to stop.

    A signal to one process of `world` stops all processes. A second SIGINT raises KeyboardInterrupt at once. The
    previous handlers return when the context ends. Outside the main thread, Python does not allow signal handlers, and
    nothing requests a stop.
    """
    stop = Stop()
    if not _in_main_thread():
        yield stop
        return
    watch, later = world.watch if world else None, ExitStack()
    main = threading.get_ident()

    def handle(number: int, frame: FrameType | None) -> None:
        again, stop.requested = stop.requested, True
        if watch:
            watch.request_stop()
        if _postponed(signal.SIGTERM, frame, later):
            return
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.check()

    def interrupt() -> None:
        """Wake the main thread, because another process wants to stop."""
        if not stop.requested:
            # To the process, the signal could reach a thread that does not wait for anything.
            signal.pthread_kill(main, signal.SIGTERM)

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        with later, watch.on_stop(interrupt, lambda: stop.immediate) if watch else nullcontext():
            yield stop
    except RuntimeError:
        # A process that stops breaks the connection of the others, and torch raises RuntimeError. Other errors, such as
        # a full disk, must not look like a stop after which the state is saved.
        if watch and (stop.requested or watch.stop_requested()):
            raise Stopped from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
