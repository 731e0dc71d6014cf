"""A thread in every process that learns from the other processes who wants to stop, who failed, and who died.

Collectives cannot tell: a process that waits in one for a dead process waits until a timeout of many minutes.
"""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raekit.errors import Stopped

if TYPE_CHECKING:
    from torch.distributed import Store

PULSE = 0.5
"""Seconds between two looks at the other processes."""
DEAD = 60.0
"""Seconds without a sign of life after which a process counts as dead."""
GRACE = 20.0
"""Seconds that a process has to end by itself after another process stopped or failed."""

_worlds = itertools.count()
"""The number of the next world of this process. All of its processes count the same."""


@dataclass(eq=False)
class _Work:
    """A piece of work of all processes, as one of them sees it. A request to stop belongs to one piece.

    Attributes:
        key: What all processes call a request to stop it.
        interrupt: Interrupts it.
        may_end: Whether the process may end in the middle of it.
        wanted: Whether this process wants all to stop.
        stopping: The time of the first interrupt.
        ended: Whether it has ended.
    """

    key: str
    interrupt: Callable[[], None]
    may_end: Callable[[], bool]
    wanted: bool = False
    stopping: float | None = None
    ended: bool = False


class Watch:
    """Watches the other processes of a world through their common store.

    Each process counts a pulse. The first process watches the pulses of all, and the others watch the first. When a
    process fails or dies, the others end too, with the exit status 1, at the latest after `GRACE` seconds. A process
    that has done its work waits for the others.

    Args:
        store: The store of the world. The watch uses a connection of its own.
        rank: The number of this process.
        size: The number of processes.
    """

    def __init__(self, store: "Store", rank: int, size: int) -> None:
        from torch.distributed import PrefixStore

        connection = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._store, self._rank, self._size = PrefixStore(f"watch/{next(_worlds)}", connection), rank, size
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._given: dict[str, set[str]] = {}  # the names that this process has counted
        self._works = 0  # pieces of work so far
        self._work = _Work("stop/0", lambda: None, lambda: True, ended=True)  # the newest
        self._interrupting = threading.Lock()
        self._failed = False  # another process failed, as far as this one has noticed
        self._leaving, self._left = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Ask all processes to stop. A signal handler may call this method: it takes no lock and does not wait."""
        self._work.wanted = True

    def stop_requested(self) -> bool:
        """Return whether a process asked all to stop."""
        return self._has(self._work.key)

    def failed(self) -> bool:
        """Return whether another process failed or died."""
        return self._failed or self._has("failed")

    def is_first(self, what: str) -> bool:
        """Return whether no other process has called this method with `what`."""
        try:
            return self._store.compare_set(f"first/{what}", "", str(self._rank)).decode() == str(self._rank)
        except RuntimeError:  # the process that holds the store has ended
            return True

    def count_distinct(self, what: str, names: Collection[str]) -> int:
        """Return how many different names all processes have given for `what` so far."""
        given = self._given.setdefault(what, set())
        try:
            for name in {*names} - given:
                given.add(name)
                if self._store.add(f"distinct/{what}/{name}", 1) == 1:  # no other process has given it
                    self._store.add(f"distinct/{what}", 1)
            return self._store.add(f"distinct/{what}", 0)
        except RuntimeError:  # the process that holds the store has ended
            return len(names)

    def _tell(self, key: str, value: str = "") -> None:
        with suppress(RuntimeError):  # the process that holds the store has ended
            self._store.set(key, value)

    def _has(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except RuntimeError:  # the process that holds the store has ended
            return False

    @contextmanager
    def on_stop(self, interrupt: Callable[[], None], may_end: Callable[[], bool]) -> Iterator[None]:
        """Inside this block, a piece of work of all processes, call `interrupt` when a process asks to stop.

        If this process is still running `GRACE` seconds later, for example because it waits for one that has stopped,
        and `may_end()` is true, it ends with the exit status of a stop.
        """
        self._works += 1
        work = self._work = _Work(f"stop/{self._works}", interrupt, may_end)
        try:
            yield
        finally:
            work.ended = True
            with self._interrupting:  # the next piece of work would receive an interrupt that has begun
                pass
            if work.wanted:
                self._tell(work.key)

    def leave(self, failed: bool) -> None:
        """Tell the others that this process ends, and stop watching.

        A process that did not fail waits until all have left, or one has failed. The store may end with the first
        process. So after a failure, the first process waits until the others have noticed, but no longer: they may wait
        for it themselves, and when they give up, a launcher ends this process before it has said why it failed.
        """
        self._leaving.set()
        if failed:
            self._left.set()
            self._thread.join()
            self._tell("failed", str(self._rank))
        with suppress(RuntimeError):  # the store has ended: nobody is left to tell
            self._store.add("left", 1)
            while self._thread.is_alive() and not self._all_have_left():
                time.sleep(0.01)
            deadline = time.monotonic() + 4 * PULSE
            while self._rank == 0 and not self._all_have_left() and time.monotonic() < deadline:
                time.sleep(0.01)
        self._left.set()
        self._thread.join()

    def _all_have_left(self) -> bool:
        return self._store.add("left", 0) >= self._size

    def _run(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        watched = range(1, self._size) if self._rank == 0 else (0,)
        while not self._left.wait(PULSE):
            now, work = time.monotonic(), self._work
            try:
                self._store.add(f"pulse/{self._rank}", 1)
                if self._launcher not in (None, os.getppid()):  # nobody would restart or stop this process any more
                    work.wanted = True
                if work.wanted:
                    self._store.set(work.key, "")
                stop, failed = self._store.check([work.key]), self._store.check(["failed"])
                pulses = {rank: self._store.add(f"pulse/{rank}", 0) for rank in watched}
            except RuntimeError:  # the process that holds the store has ended
                self._end("the first process, or the launcher, ended", 1, work)
                return
            if failed:
                self._failed = True
                self._end(f"process {self._store.get('failed').decode()} failed; its own message says why", 1, work)
                return
            for rank, pulse in pulses.items():
                if seen.get(rank, (-1, 0.0))[0] != pulse:
                    seen[rank] = pulse, now
                elif now - seen[rank][1] > DEAD:
                    self._store.set("failed", str(rank))
                    self._end(f"process {rank} gave no sign of life for {DEAD:.0f} seconds", 1, work)
                    return
            if stop:
                with self._interrupting:
                    if work.ended:
                        continue
                    work.stopping = work.stopping or now
                    work.interrupt()
                if now - work.stopping > GRACE and work.may_end():
                    self._end("", Stopped.STATUS, work)
                    return

    def _end(self, why: str, status: int, work: _Work) -> None:
        """End this process, unless it leaves by itself within `GRACE` seconds."""
        if self._leaving.wait(GRACE if why else 0):
            return
        if work.stopping and (work.ended or work.may_end()):
            status = Stopped.STATUS
        elif why:
            sys.stderr.write(f"error: {why}; run the same command again to resume\n")
        with suppress(RuntimeError):  # the store has ended
            self._store.add("left", 1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
