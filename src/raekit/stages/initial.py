"""Fine-tuning: the weights that a training starts from, where they are not random."""

from dataclasses import replace
from typing import Any

from raekit.config import differences, to_dict
from raekit.errors import UserError
from raekit.models.autoencoder import Autoencoder, load_autoencoder
from raekit.models.decoder import Decoder
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig


def initialise_decoder(decoder: Decoder, source: str) -> None:
    """Give `decoder` the weights of that of `source`; UserError, listing the fields, if it is another."""
    begun = load_autoencoder(source)
    if not isinstance(begun, Autoencoder):
        raise UserError(f"init_from: {source} has no decoder to train")
    _check_same(source, begun.decoder.config, decoder.config)
    decoder.load_state_dict(begun.decoder.state_dict())


def initialise_denoiser(denoiser: Denoiser, source: str) -> None:
    """Give `denoiser` the weights of `source`; UserError, listing the fields, if it is another.

    The classes may be others: then their embeddings start anew.
    """
    begun = Denoiser.load(source)
    _check_same(source, _built(begun.config), _built(denoiser.config))
    state = begun.state_dict()
    if not _same_classes(begun.config, denoiser.config):
        fresh = {key: value for key, value in denoiser.state_dict().items() if key.startswith("label.")}
        state = {key: value for key, value in state.items() if not key.startswith("label.")} | fresh
    denoiser.load_state_dict(state)


def _check_same(source: str, theirs: Any, ours: Any) -> None:
    if changed := list(differences(to_dict(theirs), to_dict(ours))):
        raise UserError(f"init_from: {source} is built otherwise than this recipe's:\n  " + "\n  ".join(changed))


def _built(config: DenoiserConfig) -> DenoiserConfig:
    """Without its classes, and what matters only to random weights."""
    return replace(config, num_classes=0, class_names=(), label_std=0.0, allow_narrow=True)


def _same_classes(one: DenoiserConfig, other: DenoiserConfig) -> bool:
    """Whether they are, as far as their names are known."""
    named = one.class_names and other.class_names
    return one.num_classes == other.num_classes and (not named or one.class_names == other.class_names)
