"""Configurations: frozen, keyword-only dataclasses with strict conversion to and from JSON."""

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError

from raekit.errors import UserError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configclass(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass of finite numbers that rejects unknown fields in JSON."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=False)  # type: ignore[attr-defined]
    check = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field.name}: {value} must be a finite number")
        if check:
            check(self)
        elif parent := getattr(super(cls, self), "__post_init__", None):
            parent()

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


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
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or cls.__name__}: {e['msg']}" for e in error.errors())
        raise UserError(f"{source}: {faults}") from None
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


def to_json(values: Any) -> str:
    """Return indented JSON text that ends in a newline."""
    return json.dumps(values, indent=2) + "\n"


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield a line `field: old -> new` for every field in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {json.dumps(old)} -> {json.dumps(new)}"
