"""Handle what all published state dicts share: checkpoint wrappers, name prefixes and fixed tables."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raekit.errors import UserError

State = Mapping[str, Tensor]

# Correct tables differ by rounding: some versions compute them in float32, and some store them in bfloat16. A table
# for another grid, frequency base or order of axes differs by about 1.
TABLE_TOLERANCE = 5e-3


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint: `ema` if present, else `model`, else the checkpoint itself.

    The name prefixes that DDP and torch.compile add (`module.`, `_orig_mod.`) are removed.

    Raises:
        UserError: there is no state dict.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        state = next((checkpoint[key] for key in ("ema", "model") if isinstance(checkpoint.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not state:
        raise UserError("checkpoint: holds no state dict, neither at the top level nor under `ema` or `model`")
    if foreign := sorted(str(key) for key, value in state.items() if not isinstance(value, Tensor)):
        raise UserError(f"checkpoint: not a state dict, because these are not tensors: {', '.join(foreign[:8])}")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def without_tables(state: State, tables: State) -> dict[str, Tensor]:
    """Return the state dict without the fixed tables, after comparing them with the expected values.

    Args:
        state: a published state dict. Any table may be absent. Of a table on the meta device, only the shape is
            compared.
        tables: the expected values by published name.

    Raises:
        UserError: a table has another shape or other values.
    """
    for key in tables.keys() & state.keys():
        given, table = state[key].float(), tables[key]
        if given.shape != table.shape:
            raise UserError(f"{key}: is {tuple(given.shape)}, expected {tuple(table.shape)} for the configured grid")
        if not given.is_meta and not torch.allclose(given, table, rtol=0, atol=TABLE_TOLERANCE):
            raise UserError(f"{key}: not the fixed sine-cosine table of RAE v1; learned positions are not supported")
    return {key: value for key, value in state.items() if key not in tables}


def rename(key: str, names: Mapping[str, str]) -> str:
    """Replace the beginning of a dotted name by the first match in `names`. Other names stay unchanged."""
    for theirs, ours in names.items():
        if key == theirs or key.startswith(theirs + "."):
            return ours + key.removeprefix(theirs)
    return key
