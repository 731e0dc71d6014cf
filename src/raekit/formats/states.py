"""Handle what all published state dicts share: checkpoint wrappers, name prefixes and fixed tables."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raekit.errors import UserError

State = Mapping[str, Tensor]

# Fixed tables differ by rounding: some versions compute them in float32, and some store them in half precision.
# Training changes a table by more after a few steps.
TABLE_TOLERANCE = 1e-4
HALF_TOLERANCES = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


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


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """Return {ours: theirs} of {theirs: ours}. Of several published names, the first one counts: the name of v1."""
    return {ours: theirs for theirs, ours in reversed([*names.items()])}


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
        if not is_table(state, key, tables[key]):
            raise UserError(f"{key}: not the fixed table of RAE v1, which the configuration requires")
    return {key: value for key, value in state.items() if key not in tables}


def is_table(state: State, key: str, table: Tensor) -> bool:
    """Return whether the tensor `key` of a published state dict is absent, or equals a fixed table up to rounding.

    Of a tensor on the meta device, only the shape is compared.

    Raises:
        UserError: the tensor has another shape.
    """
    if key not in state:
        return True
    given = state[key].float()
    if given.shape != table.shape:
        raise UserError(f"{key}: is {tuple(given.shape)}, expected {tuple(table.shape)} for the configured grid")
    if given.is_meta:
        return True
    # The values themselves show the precision that the table was stored in, also after a conversion to float32.
    stored = (atol for dtype, atol in HALF_TOLERANCES.items() if torch.equal(given, given.to(dtype).float()))
    return torch.allclose(given, table, rtol=0, atol=next(stored, TABLE_TOLERANCE))


def rename(key: str, names: Mapping[str, str]) -> str:
    """Replace the beginning of a dotted name by the first match in `names`. Other names stay unchanged."""
    for theirs, ours in names.items():
        if key == theirs or key.startswith(theirs + "."):
            return ours + key.removeprefix(theirs)
    return key
