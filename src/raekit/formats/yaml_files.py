"""A published YAML: the files that it names, and how it samples."""

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
    """The autoencoder of a YAML, and its denoiser if the YAML names its file; `denoiser` False leaves that out."""
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
    """The denoiser that a YAML describes, whatever files it names."""
    if not (described := published_denoiser(check_sections(_load(path), path), path)):
        raise UserError(f"{path}: describes no denoiser, as it has no section stage_2")
    return described[0]


def read_published(path: Path) -> tuple[Parts, Sampling]:
    """The whole model of a YAML of sampling, and how it samples, with the weaker model of its guidance."""
    values = check_sections(_load(path), path)
    described = published_denoiser(values, path)
    if not described or not described[1]:
        raise UserError(f"{path}: names no denoiser; stage_2.ckpt is missing")
    sampling = published_sampling(values, path)
    weak = _read_denoiser(path, *sampling.weak).build() if sampling.weak else None
    return read_yaml(path), Sampling(
        steps=sampling.steps,
        solver=sampling.solver,
        grid=sampling.grid,
        guidance=sampling.guidance,
        weak=weak,
        atol=sampling.atol,
        rtol=sampling.rtol,
    )


def _read_denoiser(path: Path, config: DenoiserConfig, file: str) -> DenoiserParts:
    return read_denoiser(_find(path, file), config)


def _find(path: Path, name: str) -> Path:
    # Published files give paths from the root of their repository, in some folder of which they stand.
    for folder in (*path.resolve().parents, Path()):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{path}: {name} is neither in the working folder nor in one above this file")


def _load(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
