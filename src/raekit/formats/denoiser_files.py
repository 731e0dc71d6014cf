"""Read denoisers from the files of RAE v1 and v2."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raekit.errors import UserError
from raekit.flow.path import Prediction
from raekit.formats.denoiser_keys import denoiser_config, denoiser_state, denoiser_v2_config, with_its_positions
from raekit.formats.denoiser_shapes import denoiser_arguments
from raekit.formats.parts import DenoiserParts, about, guessed
from raekit.formats.states import State, unwrap
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig
from raekit.weights import mismatches, read_weights


def read_denoiser(
    path: Path,
    config: DenoiserConfig | None = None,
    *,
    weights: Mapping[str, Any] | None = None,
    prediction: Prediction | None = None,
) -> DenoiserParts:
    """Read a published denoiser.

    Args:
        path: the file: a bare state dict, or a checkpoint with `ema` or `model`.
        config: the denoiser's configuration. Default: derived from the names and shapes in the file. Its positions
            become "learned" if the file holds others than the fixed table.
        weights: the contents of the file, if the caller has read it already.
        prediction: overrides `prediction` in the configuration.

    Raises:
        UserError: the file holds no denoiser, or does not fit the configuration.
    """
    with about(path):
        state = unwrap(read_weights(path) if weights is None else weights)
        whose = "its configuration"
        if config is None:
            config, whose = _config_from_shapes(state), "the denoiser that its shapes describe"
        if prediction:
            config = replace(config, prediction=prediction)
        try:
            config = with_its_positions(config, state)
            ours = denoiser_state(state, config)
        except UserError as error:
            raise UserError(f"{error}{guessed(state)}") from None
        with torch.device("meta"):
            wanted = Denoiser(config).state_dict()
        if faults := mismatches(ours, wanted):
            raise UserError(f"does not fit {whose}: {faults}{guessed(state)}")
    return DenoiserParts(config, ours)


def _config_from_shapes(state: State) -> DenoiserConfig:
    try:
        values = denoiser_arguments(state)
        config = (denoiser_v2_config if "num_t_tokens" in values else denoiser_config)(values) if values else None
    except UserError as error:
        raise UserError(f"{error}; give its YAML with --denoiser-config FILE.yaml") from None
    if config is None:
        raise UserError(f"holds no published denoiser{guessed(state)}")
    return config
