"""Fine-tuning: start a training from the weights of an existing model."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from raekit.config import differences, to_dict
from raekit.errors import UserError
from raekit.models.autoencoder import Autoencoder, load_autoencoder
from raekit.models.conditioning import same_classes
from raekit.models.decoder import Decoder
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig


def initialise_decoder(decoder: Decoder, source: str) -> None:
    """Load the weights of the decoder of `source` into `decoder`.

    Args:
        decoder: The decoder to initialise.
        source: Name of an autoencoder (`load_autoencoder`).

    Raises:
        UserError: If the two decoders have different configs. The message lists the fields.
    """
    pretrained = load_autoencoder(source)
    if not isinstance(pretrained, Autoencoder):
        raise UserError(f"init_from: {source} has no decoder to train; name an autoencoder with a decoder")
    config, state = _with_positions(pretrained.decoder, decoder.config.positions)
    _check_same(source, config, decoder.config)
    decoder.load_state_dict(state)


def initialise_denoiser(denoiser: Denoiser, source: str) -> None:
    """Load the weights of the denoiser `source` into `denoiser`.

    If the classes differ, the class embeddings keep their new random weights. `denoiser` may have a base output that
    `source` lacks, which then starts from random weights, and may lack a base output that `source` has.

    Args:
        denoiser: The denoiser to initialise.
        source: Name of a denoiser (`Denoiser.load`).

    Raises:
        UserError: If the two denoisers have different configs. The message lists the fields.
    """
    pretrained = Denoiser.load(source)
    config, state = _with_positions(pretrained, denoiser.config.positions)
    own: tuple[str, ...] = ()
    if bool(config.base_depth) != bool(denoiser.config.base_depth):
        config = replace(config, base_depth=denoiser.config.base_depth)
        own += ("base_final.",)
    _check_same(source, _architecture(config), _architecture(denoiser.config))
    theirs, ours = pretrained.config, denoiser.config
    if theirs.num_classes != ours.num_classes or not same_classes(theirs.class_names, ours.class_names):
        own += ("label.",)
    if bool(pretrained.config.num_classes) != bool(denoiser.config.num_classes):
        own += ("label_tokens",)
    kept = {key: value for key, value in denoiser.state_dict().items() if key.startswith(own)}
    denoiser.load_state_dict({key: value for key, value in state.items() if not key.startswith(own)} | kept)


def _with_positions(pretrained: Any, wanted: str) -> tuple[Any, dict[str, Tensor]]:
    """Return the config and the weights of a network. Learned positions, if wanted, start from a fixed table."""
    config, state = pretrained.config, pretrained.state_dict()
    if (wanted, config.positions) == ("learned", "sincos"):
        return replace(config, positions="learned"), state | {"positions": pretrained.positions}
    return config, state


def _check_same(source: str, pretrained: Any, wanted: Any) -> None:
    if changed := list(differences(to_dict(pretrained), to_dict(wanted))):
        raise UserError(
            f"init_from: the architecture of {source} differs from this config's:\n  "
            + "\n  ".join(changed)
            + "\nName another model, or change these fields of the config"
        )


def _architecture(config: DenoiserConfig) -> DenoiserConfig:
    """Return `config` without its classes and without the fields that only affect random weights."""
    return replace(config, num_classes=0, class_names=(), label_std=0.0, allow_narrow=True)
