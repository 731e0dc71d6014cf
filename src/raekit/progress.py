"""Show the progress of long work: live bars on a terminal, elsewhere a line at most every ten seconds."""

import math
import time
from collections.abc import Callable
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column


class Progress(Protocol):
    """A callback that receives the progress of long work."""

    def __call__(self, what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        """Report progress.

        Args:
            what: the name of the work.
            done: the number of finished units.
            total: the number of units.
            text: a remark, such as the loss.
            unit: the number of images in one unit. The rate counts images; with 0 there is no rate.
        """
        ...


def silent(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
    """A `Progress` that shows nothing."""


def duration(seconds: float) -> str:
    """Return a duration such as "30 s", "4 min" or "1 h 05 min", rounded up."""
    if (whole := math.ceil(seconds)) < 60:
        return f"{whole} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def counted(progress: Progress, what: str, total: int, processes: int) -> Callable[[int], None]:
    """Return a callback for the number of images that this process has done, out of `total` over all `processes`.

    It assumes that the other processes are equally fast.
    """
    return lambda done: progress(what, min(done * processes, total), total)


class SamplingProgress:
    """The progress of sampling in batches, with the denoiser's evaluations within a batch, which can take minutes.

    Args:
        progress: receives the progress.
        what: the name of the work.
        done: the number of images that are finished already.
        total: the number of images.
    """

    def __init__(self, progress: Progress, what: str, done: int, total: int) -> None:
        self.progress, self.what, self.done, self.total = progress, what, done, total
        self.evaluations = 0

    def watch(self, *state: object) -> None:
        """Report an evaluation of the denoiser: the `watch` of sampling."""
        self.evaluations += 1
        self.progress(self.what, self.done, self.total, f"evaluation {self.evaluations}")

    def finish(self, images: int) -> None:
        """Report that a batch is finished."""
        self.evaluations, self.done = 0, min(self.done + images, self.total)
        self.progress(self.what, self.done, self.total)


class Display:
    """A `Progress` that shows bars with the rate and the remaining time. It is a context manager.

    Args:
        console: where the bars appear.
        quiet: whether to show nothing.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.live = not quiet and console.is_terminal
        self.quiet = quiet
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.last: dict[str, int] = {}
        self.advanced: dict[str, float] = {}  # when `done` last changed
        self.printed = 0.0
        self.bars = Bars(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            # The text gets what is left of the line, and its end is cut.
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=console,
            expand=True,
        )

    def __enter__(self) -> Self:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.bars.stop()

    def __call__(self, what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        """Show that `done` of `total` units of `what` are finished, see `Progress`."""
        if self.quiet:
            return
        now = time.monotonic()
        last = self.last.get(what, -1)
        again = done < last or done == last == total  # other work of the same name
        self.last[what] = done
        if again or what not in self.began:
            self.began[what] = now, done
        if done != last:
            self.advanced[what] = now
        (first, start), advanced = self.began[what], self.advanced[what]
        speed = (done - start) / (advanced - first) if advanced > first else 0.0
        rate = f"{speed * unit:{'.1f' if speed * unit > 1 else '.2g'}} images/s" if speed and unit else ""
        left = ""
        if speed and done < total:
            left = f"{duration(max((total - done) / speed - (now - advanced), 0))} left"
        if self.live:
            if what not in self.tasks:
                self.tasks[what] = self.bars.add_task(what, total=total, rate="", left="", text="")
            elif again:
                self.bars.reset(self.tasks[what])
            self.bars.update(self.tasks[what], completed=done, total=total, rate=rate, left=left, text=text)
        elif now - self.printed > 10 or done == total:
            self.printed = now
            parts = (f"{what}: {done}/{total}", ", ".join(filter(None, (rate, left))), text)
            self.console.print("  ".join(filter(None, parts)), markup=False)
