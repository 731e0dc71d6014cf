"""Configurations: frozen, keyword-only dataclasses with strict conversion to and from JSON."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache, wraps
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from raekit.errors import UserError

T = TypeVar("T")


class Mark(Enum):
    """What a field of a config means for a run. A field carries its marks in its type, as in `Operation[int]`.

    The first three say what the field is part of. A field without one of them inherits the part of the field that
    holds its config. At the top that is DEFINES, so a new field must agree until someone decides otherwise.
    """

    DEFINES = "defines the training: must agree between the starts of a run"
    OPERATION = "operation: may differ between the starts of a run"
    ON_PURPOSE = "changed on purpose: may differ between the starts of a run, with --change"
    PLACE = "names a file or folder, or a model or dataset that may be one"
    STEPS = "number of training steps, which scales with the length of the training"
    INTERVAL = "number of steps from one event to the next, which scales with the length of the training"


Defines = Annotated[T, Mark.DEFINES]
Operation = Annotated[T, Mark.OPERATION]
OnPurpose = Annotated[T, Mark.ON_PURPOSE]
Place = Annotated[str, Mark.PLACE]
Steps = Annotated[int, Mark.STEPS]
Interval = Annotated[int, Mark.INTERVAL]

_PARTS = {Mark.DEFINES, Mark.OPERATION, Mark.ON_PURPOSE}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configclass(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that checks the types of its fields and rejects unknown fields.

    The type of a field says whether the field may change between the starts of a run, see `Mark`.
    """
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    made: Any = dataclass(frozen=True, kw_only=True, config=config)(cls)
    construct = made.__init__

    @wraps(construct)
    def __init__(self: Any, **fields: Any) -> None:
        try:
            construct(self, **fields)
        except ValidationError as error:
            raise UserError(_faults(error, f"{made.__name__}.")) from None

    made.__init__ = __init__
    return made


def _faults(error: ValidationError, prefix: str = "") -> str:
    """Return the fields that `error` is about, each with what is wrong and the value if it is a single one."""
    faults = []
    for fault in error.errors():
        value = fault["input"]
        given = f" (given: {value!r:.80})" if isinstance(value, bool | int | float | str) else ""
        faults.append(f"{prefix}{'.'.join(map(str, fault['loc'])) or error.title}: {fault['msg']}{given}")
    return "; ".join(faults)


@cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as JSON values (tuples become lists)."""
    return _adapter(type(config)).dump_python(config, mode="json")


def from_dict(cls: type[T], values: Any, source: str | Path) -> T:
    """Build a `cls` from JSON values.

    Args:
        cls: a dataclass made by `configclass`.
        values: the JSON values of its fields.
        source: the file of the values, for the error message.

    Raises:
        UserError: a field is unknown, missing or invalid. The message lists every such field.
    """
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_faults(error)}") from None
    except UserError as error:  # raised by __post_init__
        raise UserError(f"{source}: {error}") from None


def check_sizes(part: str, limit: int = 65_536, **sizes: int) -> None:
    """Check that each size of an architecture is between 1 and `limit`.

    A configuration may come from an unknown source, and its sizes determine how much memory is allocated.

    Args:
        part: the name of the configuration, for the error message.
        limit: the largest valid size.
        sizes: the sizes by the names of their fields.

    Raises:
        UserError: a size is out of range.
    """
    for name, value in sizes.items():
        if not 1 <= value <= limit:
            raise UserError(f"{part}.{name}: {value} must be from 1 to {limit:,}")


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`.

    Raises:
        UserError: the file is missing, unreadable or not valid JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_lines(path: Path, is_record: Callable[[dict[str, Any]], bool], torn: bool = False) -> list[dict[str, Any]]:
    """Return the records in a file with a JSON object on each line; [] if there is no such file.

    Args:
        path: the file.
        is_record: says whether an object has the fields of a record.
        torn: leave out a last line that is incomplete, because a process was killed while it wrote this line.

    Raises:
        UserError: the file cannot be read, or a line holds no record.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if torn and number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or not is_record(record):
            raise UserError(f"{path}: line {number} is damaged; remove this line, and run the same command again")
        records.append(record)
    return records


def to_json(values: Any) -> str:
    """Return indented JSON text that ends in a newline."""
    return json.dumps(values, indent=2) + "\n"


class Change(NamedTuple):
    """A field in which two configs differ.

    Attributes:
        part: DEFINES, OPERATION or ON_PURPOSE.
        field: the dotted name of the field.
        old: its JSON value in the first config.
        new: its JSON value in the second config.
    """

    part: Mark
    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


def changes(old: Any, new: Any, part: Mark = Mark.DEFINES, path: str = "") -> Iterator[Change]:
    """Yield the fields in which two configs of the same class differ, each with the part that it declares."""
    before, after = to_dict(old), to_dict(new)
    for name, marks in _marks(type(old)).items():
        one, other = getattr(old, name), getattr(new, name)
        own = next((mark for mark in marks if mark in _PARTS), part)
        field = f"{path}.{name}" if path else name
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            yield from changes(one, other, own, field)
        elif one != other:
            yield from (Change(own, *each) for each in _leaves(before[name], after[name], field))


def replaced(config: T, mark: Mark, change: Callable[[Any], Any]) -> T:
    """Return `config` with `change(value)` in every field with `mark`, at any depth. A value of None stays.

    In a tuple each value changes.
    """
    values = {}
    for name, marks in _marks(type(config)).items():
        value = getattr(config, name)
        if mark in marks and value is not None:
            values[name] = tuple(map(change, value)) if isinstance(value, tuple) else change(value)
        elif dataclasses.is_dataclass(value):
            values[name] = replaced(value, mark, change)
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


@cache
def _marks(cls: type) -> dict[str, set[Mark]]:
    """Return the marks of each field of a config class."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: _marks_of(hints[field.name]) for field in dataclasses.fields(cls)}


def _marks_of(hint: Any) -> set[Mark]:
    """Return the marks in a type, also inside of Annotated, of a union and of a tuple."""
    if isinstance(hint, Mark):
        return {hint}
    inner = get_args(hint) if get_origin(hint) in (Annotated, Union, UnionType, tuple) else ()
    return set[Mark]().union(*map(_marks_of, inner))


def differences(old: Any, new: Any) -> Iterator[str]:
    """Yield a line `field: old -> new` for every field in which two JSON values differ."""
    for field, one, other in _leaves(old, new, ""):
        yield f"{field}: {json.dumps(one)} -> {json.dumps(other)}"


def _leaves(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from _leaves(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new
