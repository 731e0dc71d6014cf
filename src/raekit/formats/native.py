"""Read and write raekit's own model folders."""

import dataclasses
from pathlib import Path

import torch

from raekit import artifacts
from raekit.config import from_dict
from raekit.distributed import World
from raekit.errors import UserError
from raekit.formats.parts import AutoencoderParts, DenoiserParts, Parts, geometry
from raekit.models.autoencoder import AutoencoderConfig
from raekit.models.decoder import Decoder
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig
from raekit.models.encoders import load_encoder
from raekit.weights import check_fit, load_strict


def read_model(name: str, denoiser: bool = True) -> Parts:
    """Read the autoencoder and the denoiser of a raekit model, run or Hub repository, as far as it contains them.

    Args:
        name: the model, as for `find_folder`.
        denoiser: if False, read only the autoencoder.

    Raises:
        UserError: there is no such model, or it contains neither.
    """
    found: list[artifacts.MissingArtifact] = []
    places = {}
    for kind in ("autoencoder", "denoiser") if denoiser else ("autoencoder",):
        try:
            places[kind] = artifacts.find(name, kind)
        except artifacts.MissingArtifact as error:
            found.append(error)
    if not places:
        raise found[0]
    return Parts(
        _read_autoencoder(places["autoencoder"]) if "autoencoder" in places else None,
        _read_denoiser(places["denoiser"]) if "denoiser" in places else None,
    )


def _read_autoencoder(found: artifacts.Artifact) -> AutoencoderParts:
    path, values = found.path, found.config
    if "baseline" in values:
        raise UserError(f"{path}: names the baseline {values['baseline']}; baselines cannot be converted")
    config = from_dict(AutoencoderConfig, values, path / "config.json")
    if (own := path.parent / "encoder").is_dir():
        config = dataclasses.replace(config, encoder=str(own))
    spec, grid = geometry(config.encoder, config.encoder_size)
    state = artifacts.read(path)
    check_fit(lambda: Decoder(config.decoder), state, path)
    mean, var = artifacts.read_statistics(path / artifacts.STATISTICS, (spec.width, *grid))
    return AutoencoderParts(config, state, mean, var, found.trained_on)


def _read_denoiser(found: artifacts.Artifact) -> DenoiserParts:
    path = found.path
    config, state = from_dict(DenoiserConfig, found.config, path / "config.json"), artifacts.read(path)
    check_fit(lambda: Denoiser(config), state, path)
    return DenoiserParts(config, state, found.trained_on, found.ema)


def write_model(parts: Parts, folder: Path) -> None:
    """Write the parts that are present to the subfolders `autoencoder/` and `denoiser/`.

    An encoder that raekit pretrained is copied to `encoder/`, so that the folder is complete.
    """
    if parts.autoencoder:
        own = parts.autoencoder
        with torch.device("meta"):
            decoder = Decoder(own.config.decoder)
        load_strict(decoder, own.decoder, folder)
        statistics = {"var": own.var} | ({} if own.mean is None else {"mean": own.mean})
        artifacts.write(
            folder / "autoencoder",
            "autoencoder",
            own.config,
            decoder,
            World(),
            trained_on=own.trained_on,
            statistics=statistics,
        )
        if Path(own.config.encoder).is_dir():
            load_encoder(own.config.encoder).save(folder)
    if parts.denoiser:
        made = parts.denoiser
        with torch.device("meta"):
            denoiser = Denoiser(made.config)
        load_strict(denoiser, made.state, folder)
        artifacts.write(
            folder / "denoiser",
            "denoiser",
            made.config,
            denoiser,
            World(),
            ema=made.ema,
            trained_on=made.trained_on,
        )
