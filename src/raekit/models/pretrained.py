"""Strict reading of published checkpoints into the classes of `transformers`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from raekit.errors import UserError
from raekit.hub import download, how_to_fetch
from raekit.models.linear import widen_linear
from raekit.models.registry import MAX_DEPTH


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and the loading bar of `transformers`. Downloads still show their progress."""
    from transformers import logging

    verbosity, bar, silent = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()  # also switches off the bars of downloads
    if not silent:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@_quiet()  # the faults that it would print are checked below
def read_pretrained(
    what: str,
    where: str,
    model_class: str,
    model_types: Sequence[str],
    *,
    config: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Path]:
    """Return the `transformers` model in a folder or Hub repository, and its local folder. No code of it is run.

    Args:
        what: the name of the model in error messages.
        where: a folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hub.
        model_class: name of the class in `transformers`.
        model_types: the model types that the checkpoint's config.json may name.
        config: overrides for fields of the checkpoint's config.
        arguments: extra arguments of the class.
        dtype: type that the weights are held in.

    Raises:
        UserError: the model is missing, incomplete or of another type.
    """
    import transformers  # slow to import

    kind, arguments = getattr(transformers, model_class), arguments or {}
    advice = how_to_fetch(where, what)
    folder = Path(where) if Path(where).is_dir() else _download(what, where)
    try:
        path = folder / "config.json"
        values = json.loads(path.read_text("utf-8")) if path.is_file() else None
        if not isinstance(values, dict) or not values:
            raise OSError("no config.json, or an empty one")
        if (found := values.get("model_type")) not in model_types:
            raise UserError(f"{what}: {where} holds a model of type {found!r}, not {model_types[0]!r}")
        values = values.get("vision_config", values) | (config or {})
        if not 0 < values.get("num_hidden_layers", 1) <= MAX_DEPTH:
            raise ValueError(f"num_hidden_layers: {values['num_hidden_layers']} in config.json")
        if sum(values.get("depths", [])) > MAX_DEPTH:
            raise ValueError(f"depths: {values['depths']} in config.json")
        # Only the fields that describe the architecture: others name code, kernels or a quantization to load.
        own = {field.name for field in fields(kind.config_class)} - {
            field.name for field in fields(transformers.PretrainedConfig)
        }
        parsed = kind.config_class.from_dict({key: value for key, value in values.items() if key in own})
        _check_size(kind, parsed, arguments, folder)
        model, loading = kind.from_pretrained(
            folder,
            config=parsed,
            dtype=dtype,
            attn_implementation="sdpa" if kind._supports_sdpa else "eager",
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    except UserError:
        raise
    except Exception as error:  # damaged or missing files raise many types
        raise UserError(f"{what}: {where} could not be loaded ({_reason(error)}); {advice}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers fills missing weights with random numbers
        raise UserError(f"{what}: {where} lacks {', '.join(missing[:8])}; {advice}")
    widen_linear(model)
    return model, folder


def _download(what: str, where: str) -> Path:
    """Download what `transformers` reads of the repository `where`, and return the local folder."""
    try:
        folder = download(where, ["config.json", "preprocessor_config.json", "model*.safetensors*"])
        if not any(folder.glob("model*.safetensors")):
            folder = download(where, ["pytorch_model*.bin*"])
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    return folder


def _check_size(kind: Any, config: Any, arguments: Mapping[str, Any], folder: Path) -> None:
    """Check that the weights files are large enough for the model of `config`.

    `transformers` allocates a model of any size, and fills the weights that the files lack with random numbers.

    Raises:
        ValueError: the files are too small.
    """
    from transformers.initialization import no_init_weights

    files = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    with torch.device("meta"), no_init_weights():
        parameters = sum(p.numel() for p in kind(config, **arguments).parameters())
    held = sum(file.stat().st_size for file in files)
    if parameters > held + 2**24:  # a parameter takes at least one byte; small models get the names of what they lack
        raise ValueError(f"config.json describes {parameters:,} parameters, but the weights files have {held:,} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):
        return "its weights file is damaged or holds more than tensors"
    if "ignore_mismatched_sizes" in str(error):
        return "its tensors do not have the shapes of its config.json"
    return f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0][:200]}"
