"""Printing and exiting, shared by all commands. Nothing else prints."""

import io
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raekit.errors import Stopped, UserError


class _Console(Console):
    """A console that prints text as it is: names of files and classes may contain markup or control characters.

    It ends the program silently when the reader of its output, such as `head`, has ended.
    """

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(plain(text), **options)

    def on_broken_pipe(self) -> NoReturn:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        sys.exit(0)


out = _Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = _Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
if not out.is_terminal:
    out.width = 240  # tables are not cut in a file or a pipe

Device = Literal["cpu", "cuda"]


def plain(text: str) -> str:
    """Return text for a terminal: control characters, and bytes of file names that are no UTF-8, become escapes."""
    hidden = (c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)
    return "".join(ascii(c)[1:-1] if hide else c for c, hide in zip(text, hidden, strict=True))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(record.getMessage() if record.levelno == logging.INFO else super().format(record))


def prepare() -> None:
    """Set up logging and the standard streams. Characters that a stream cannot encode are printed as escapes.

    A standard output that is closed, as by `>&-` in a shell, takes everything and prints nothing.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("raekit").setLevel(logging.INFO)
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table to the standard output."""
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def about(command: Callable[..., None]) -> str:
    """Return the docstring of a command without indentation."""
    return "\n".join(line.strip() for line in (command.__doc__ or "").strip().splitlines())


def joined(doc: str) -> str:
    """Return a docstring in which the help of each argument is one line. tyro would keep the line breaks."""
    return re.sub(r"\n {12,}(?=\S)", " ", doc)


def check_filled(arguments: Sequence[str]) -> None:
    """Exit with 2 if a value is empty, as a shell variable that is not set: an empty path is the working folder.

    Texts in the settings of a recipe, such as --data.splits, may be empty.
    """
    option = ""
    for argument in arguments:
        name, assigned, value = argument.partition("=") if argument.startswith("--") else (option, "=", argument)
        option = name
        if assigned and not value and "." not in option:
            err.print(f"error: {option or 'an argument'}: the value is empty; give one, or set the shell's variable")
            sys.exit(2)


def check_lists(options: Iterable[str], arguments: Sequence[str]) -> None:
    """Exit with 2 if an option is given twice that takes a list of values. Only the last list would count."""
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for option in options:
        if given.count(option) > 1:
            err.print(f"error: {option}: given {given.count(option)} times; give all values after one {option}")
            sys.exit(2)


def fail(message: str) -> NoReturn:
    """Print an error message and exit with 1."""
    err.print(f"error: {message}")
    sys.exit(1)


def stopped() -> NoReturn:
    """Exit with the status of work that a signal ended and that can be resumed."""
    err.print("stopped; run the same command again to resume")
    sys.exit(Stopped.STATUS)


def fail_for(unreadable: Sequence[str], done: int) -> None:
    """Raise a UserError that names the images that could not be read or written, if there are any."""
    if unreadable:
        lines = [
            f"{len(unreadable)} of {len(unreadable) + done} images could not be read or written:",
            *unreadable[:20],
        ]
        more = [f"and {len(unreadable) - 20} more"] if len(unreadable) > 20 else []
        raise UserError("\n  ".join(lines + more))
