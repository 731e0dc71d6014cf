"""Configurations: frozen, keyword-only dataclasses, read from and written to JSON strictly."""

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError

from raekit.errors import UserError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configclass(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose JSON form refuses unknown fields."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=False)  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the plain JSON values of `config` (tuples become lists)."""
    return _adapter(type(config)).dump_python(config, mode="json")


def from_dict(cls: type[T], values: Any, source: str | Path) -> T:
    """Build a `cls` from JSON values, refusing unknown fields and wrong types.

    Raises UserError with one line a fault, each naming its field; `source` names the file in it.
    """
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or cls.__name__}: {e['msg']}" for e in error.errors())
        raise UserError(f"{source}: {faults}") from None
    except UserError as error:  # of an invariant
        raise UserError(f"{source}: {error}") from None


def check_sizes(part: str, limit: int = 65_536, **sizes: int) -> None:
    """Refuse numbers of an architecture, the fields of `part`, that are below 1 or beyond all sense.

    A configuration may come from anywhere, and its sizes are what memory is taken for.
    """
    for name, value in sizes.items():
        if not 1 <= value <= limit:
            raise UserError(f"{part}.{name}: {value} must be from 1 to {limit:,}")


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`; UserError if it is missing, unreadable or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def to_json(values: Any) -> str:
    """Return indented JSON text with a closing newline."""
    return json.dumps(values, indent=2) + "\n"


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield a line `field: old -> new` for every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {json.dumps(old)} -> {json.dumps(new)}"
