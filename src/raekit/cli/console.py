"""What all commands print with, and how they end."""

import sys
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

from rich.console import Console
from rich.text import Text

from raekit.errors import UserError

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
if not out.is_terminal:
    out.width = 240  # in a file or a pipe no table is cut

Device = Literal["cpu", "cuda"]


def about(command: Callable[..., None]) -> str:
    """The docstring of a command, its lines without indentation."""
    return "\n".join(line.strip() for line in (command.__doc__ or "").strip().splitlines())


def fail(message: str) -> NoReturn:
    """Print `message` and exit with 1."""
    err.print(Text(f"error: {message}"))
    sys.exit(1)


def stopped() -> NoReturn:
    """End a command that was interrupted and can go on."""
    err.print("stopped; the same command goes on from here")
    sys.exit(130)


def fail_for(unreadable: Sequence[str], done: int) -> None:
    """End with an error that names the images that could not be read, if there are any."""
    if unreadable:
        lines = [f"{len(unreadable)} of {len(unreadable) + done} images could not be read:", *unreadable[:20]]
        more = [f"and {len(unreadable) - 20} more"] if len(unreadable) > 20 else []
        raise UserError("\n  ".join(lines + more))
