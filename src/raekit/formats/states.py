"""What all published state dicts have in common: wrappers, prefixes, fixed tables."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raekit.errors import UserError

State = Mapping[str, Tensor]

# Tables are computed in float32 by some versions and may have passed through bfloat16; another grid, base
# of the frequencies or order of the axes is off by about one.
TABLE_TOLERANCE = 5e-3


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint: `ema` if there is one, else `model`, else the checkpoint itself.

    Prefixes that wrappers leave behind (`module.`, `_orig_mod.`) are removed. UserError if it is none.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        state = next((checkpoint[key] for key in ("ema", "model") if isinstance(checkpoint.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not state:
        raise UserError("checkpoint: holds no state dict, neither bare nor under `ema` or `model`")
    if foreign := sorted(str(key) for key, value in state.items() if not isinstance(value, Tensor)):
        raise UserError(f"checkpoint: no state dict, as these are no tensors: {', '.join(foreign[:8])}")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def without_tables(state: State, tables: State) -> dict[str, Tensor]:
    """`state` without the fixed tables, which have to be equal to `tables` where they are given (on meta: as large)."""
    for key in tables.keys() & state.keys():
        given, table = state[key].float(), tables[key]
        if given.shape != table.shape:
            raise UserError(f"{key}: is {tuple(given.shape)}, expected {tuple(table.shape)} for the configured grid")
        if not given.is_meta and not torch.allclose(given, table, rtol=0, atol=TABLE_TOLERANCE):
            raise UserError(f"{key}: not the fixed sine-cosine table of spec 2.3; learned positions are not supported")
    return {key: value for key, value in state.items() if key not in tables}


def rename(key: str, names: Mapping[str, str]) -> str:
    """`key` with the beginning that `names` lists replaced; another key stays as it is."""
    for theirs, ours in names.items():
        if key == theirs or key.startswith(theirs + "."):
            return ours + key.removeprefix(theirs)
    return key
