"""How far long work has come: live bars on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Report(Protocol):
    """Called with what is being done, how much of how much, a remark, and the images in one unit of it."""

    def __call__(self, what: str, done: int, total: int, text: str = "", unit: int = 1) -> None: ...


def silent(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
    """A `Report` that shows nothing."""


def counted(report: Report, what: str, total: int, processes: int) -> Callable[[int], None]:
    """Called with the images that this process has done, tell `report` of all, where `processes` share them evenly."""
    return lambda done: report(what, min(done * processes, total), total)


class Display:
    """A `Report` that shows bars with rate and time left on `console`, between `with` and its end."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.live = not quiet and console.is_terminal
        self.quiet = quiet
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.printed = 0.0
        self.bars = Progress(
            TextColumn("{task.description:22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
        )

    def __enter__(self) -> Self:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.bars.stop()

    def __call__(self, what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        """`done` of `total` of the work `what`; the rate is given in `unit`s, images for one step."""
        if self.quiet:
            return
        now = time.monotonic()
        first, start = self.began.setdefault(what, (now, done))
        speed = (done - start) / (now - first) if now > first else 0.0
        rate = f"{speed * unit:.1f} images/s" if speed else ""
        if self.live:
            if what not in self.tasks:
                self.tasks[what] = self.bars.add_task(what, total=total, completed=done, rate="", text="")
            self.bars.update(self.tasks[what], completed=done, total=total, rate=rate, text=text)
        elif now - self.printed > 10 or done == total:
            self.printed = now
            left = f", {(total - done) / speed:.0f} s left" if speed and done < total else ""
            self.console.print(Text(f"{what}: {done}/{total}  {rate}{left}  {text}".rstrip()))
