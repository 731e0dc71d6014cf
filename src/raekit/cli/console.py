"""Printing and exiting, shared by all commands."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

from rich.console import Console
from rich.text import Text

from raekit.errors import Stopped, UserError


class _Console(Console):
    """A console that ends the program silently when the reader of its output, such as `head`, has ended."""

    def on_broken_pipe(self) -> NoReturn:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        sys.exit(0)


out = _Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
if not out.is_terminal:
    out.width = 240  # tables are not cut in a file or a pipe

Device = Literal["cpu", "cuda"]


def about(command: Callable[..., None]) -> str:
    """Return the docstring of a command without indentation."""
    return "\n".join(line.strip() for line in (command.__doc__ or "").strip().splitlines())


def joined(doc: str) -> str:
    """Return a docstring in which the help of each argument is one line. tyro would keep the line breaks."""
    return re.sub(r"\n {12,}(?=\S)", " ", doc)


def fail(message: str) -> NoReturn:
    """Print an error message and exit with 1."""
    err.print(Text(f"error: {message}"))
    sys.exit(1)


def stopped() -> NoReturn:
    """Exit with the status of work that a signal ended and that can be resumed."""
    err.print("stopped; run the same command again to resume")
    sys.exit(Stopped.STATUS)


def fail_for(unreadable: Sequence[str], done: int) -> None:
    """Raise a UserError that names the unreadable images, if there are any."""
    if unreadable:
        lines = [f"{len(unreadable)} of {len(unreadable) + done} images could not be read:", *unreadable[:20]]
        more = [f"and {len(unreadable) - 20} more"] if len(unreadable) > 20 else []
        raise UserError("\n  ".join(lines + more))
