"""The exceptions that end a command: an error that the user can fix, and a stop that can be resumed."""

import operator
from collections.abc import Collection, Hashable, Iterable, Sequence
from numbers import Real
from typing import Any


class UserError(Exception):
    """Bad input or a failing environment.

    The message says what is wrong, where, and what to do. The command line prints the message without a traceback and
    exits with 1.
    """


class Stopped(BaseException):
    """A signal ended the work. The same command resumes it.

    Like KeyboardInterrupt, this is no `Exception`, so that no handler of errors swallows it. The command line exits
    with `STATUS`.
    """

    STATUS = 75
    """The exit status EX_TEMPFAIL of sysexits.h: try again later."""


MAX_COUNT = 10**8
"""The largest number of samples, or images of a strip, that are asked for at once."""


def whole_number(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """Return a setting as an int. Integers of numpy and torch are whole numbers, too; booleans are not.

    Args:
        name: the name of the setting, for the error message.
        value: the value that a caller gives.
        least: the smallest valid value. None: any.
        most: the largest valid value. None: any.

    Raises:
        UserError: `value` is not a whole number, or is out of range.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"{name}: {value!r} must be a whole number") from None
    if least is not None and number < least:
        raise UserError(f"{name}: {number} must be at least {least}")
    if most is not None and number > most:
        raise UserError(f"{name}: {number} must be at most {most}")
    return number


def real_number(name: str, value: Any) -> float:
    """Return a setting as an int or a float. Numbers of numpy and torch are numbers, too; booleans are not.

    Args:
        name: the name of the setting, for the error message.
        value: the value that a caller gives.

    Raises:
        UserError: `value` is not a number, or is larger than any float.
    """
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # of numpy or torch
    if isinstance(number, bool) or not isinstance(number, Real):
        raise UserError(f"{name}: {value!r} must be a number")
    try:
        rounded = float(number)
    except OverflowError:
        raise UserError(f"{name}: the number is too large; give one below 1.8e308") from None
    return number if isinstance(number, int) else rounded


def check_text(name: str, value: object) -> None:
    """Raise UserError if `value` is not a text, for the setting `name`."""
    if not isinstance(value, str):
        raise UserError(f"{name}: {value!r} must be a text")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise UserError if `value` is not one of the `choices` for the setting `name`."""
    if not isinstance(value, Hashable) or value not in choices:  # an array has no truth value to compare by
        raise UserError(f"{name}: {value!r} is none of {', '.join(map(str, choices))}")


def some(names: Sequence[str], most: int = 8) -> str:
    """Return at most `most` of the names as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean A or B?" for the known names that resemble `name`; "" if none does."""
    from difflib import get_close_matches  # only after a mistake

    folded = {each.casefold(): each for each in known}
    close = get_close_matches(name.casefold(), folded, n=3)
    return f"did you mean {' or '.join(folded[each] for each in close)}?" if close else ""
