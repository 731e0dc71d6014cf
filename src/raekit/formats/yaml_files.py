"""Read a published YAML and the model files that it names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from raekit.errors import UserError
from raekit.flow.sampling import Sampling
from raekit.formats.decoder_files import read_decoder
from raekit.formats.denoiser_files import read_denoiser
from raekit.formats.parts import DenoiserParts, Parts, about
from raekit.formats.yaml_model import check_sections, published_autoencoder, published_denoiser
from raekit.formats.yaml_sampling import published_sampling
from raekit.models.denoiser_config import DenoiserConfig


def read_yaml(path: Path, denoiser: bool = True) -> Parts:
    """Read the autoencoder of a published YAML, and the denoiser if the YAML names its file.

    Args:
        path: the YAML file.
        denoiser: if False, read only the autoencoder.

    Raises:
        UserError: the YAML is not a published YAML, or a file that it names is missing or does not fit.
    """
    values = check_sections(_load(path), path)
    config, decoder = published_autoencoder(values, path)
    with about(path):
        fields = config.fields()
    autoencoder = read_decoder(
        fields,
        _find(path, decoder),
        _find(path, config.normalization_stat_path) if config.normalization_stat_path else None,
        config=_find(path, config.decoder_config_path),
        patch_size=config.decoder_patch_size,
        eps=config.eps,
    )
    described = published_denoiser(values, path) if denoiser else None
    if not described or not described[1]:
        return Parts(autoencoder)
    with about(path):
        return Parts(autoencoder, _read_denoiser(path, described[0], described[1]))


def read_denoiser_config(path: Path) -> DenoiserConfig:
    """Read the configuration of the denoiser in a published YAML, without opening the files that the YAML names."""
    if not (described := published_denoiser(check_sections(_load(path), path), path)):
        raise UserError(f"{path}: has no section stage_2, so it describes no denoiser")
    return described[0]


def read_published(path: Path) -> tuple[Parts, Sampling]:
    """Read a published sampling YAML.

    Returns:
        The autoencoder and denoiser, and the sampling settings. For autoguidance, these contain the weaker model.

    Raises:
        UserError: as for `read_yaml`, or the YAML lacks the denoiser's file or the sampling settings.
    """
    values = check_sections(_load(path), path)
    described = published_denoiser(values, path)
    if not described or not described[1]:
        raise UserError(f"{path}: names no denoiser; stage_2.ckpt is missing")
    sampling, weaker = published_sampling(values, path)
    weak = _read_denoiser(path, *weaker).build() if weaker else None
    return read_yaml(path), replace(sampling, weak=weak)


def _read_denoiser(path: Path, config: DenoiserConfig, file: str) -> DenoiserParts:
    return read_denoiser(_find(path, file), config)


def _find(path: Path, name: str) -> Path:
    # Published paths are relative to the repository's root. The YAML lies in a folder somewhere below the root.
    for folder in (*path.resolve().parents, Path()):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{path}: {name} is neither in the working folder nor in any folder above this file")


def _load(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
