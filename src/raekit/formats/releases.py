"""The names of published models. A model is downloaded and converted at its first use, and then cached."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from raekit.config import read_json, to_dict
from raekit.errors import UserError
from raekit.formats.decoder_files import read_decoder
from raekit.formats.denoiser_files import read_denoiser
from raekit.formats.denoiser_keys import denoiser_config, denoiser_v2_config
from raekit.formats.diffusers_files import read_diffusers
from raekit.formats.diffusers_pipeline import INDEX, read_pipeline
from raekit.formats.native import write_model
from raekit.formats.parts import Parts, reject_code
from raekit.hub import ASSETS, cache_folder, cache_lock, command, find_file
from raekit.models.denoiser_config import SIZES, DenoiserConfig, wide_head
from raekit.models.registry import LAYERS, REGISTRY

_IMAGENET = tuple((ASSETS / "imagenet-classes.txt").read_text("utf-8").splitlines())
"""The names of ImageNet's 1,000 classes in the order of their ids. The published files contain no names."""
V1, V2 = "nyu-visionx/RAE-collections", "nyu-visionx/RAEv2-models"


@dataclass(frozen=True, kw_only=True)
class Release:
    """A published autoencoder.

    Attributes:
        repository: the repository on the Hub.
        decoder: the path of the decoder's file in the repository.
        statistics: the path of the statistics file. None if there is none: latents are then not whitened.
        fields: the AutoencoderConfig fields, except `decoder`.
        config: the path of the decoder's `config.json`. None: the published decoder of this width.
    """

    repository: str
    decoder: str
    statistics: str | None
    fields: dict[str, Any]
    config: str | None = None

    @property
    def files(self) -> list[str]:
        return [file for file in (self.decoder, self.statistics, self.config) if file]


def _v1(decoder: str, statistics: str | None, **fields: Any) -> Release:
    return Release(
        repository=V1,
        decoder=f"decoders/{decoder}/model.pt",
        statistics=statistics and f"stats/{statistics}/stat.pt",
        fields=fields,
    )


def _v2(domain: str, layers: str) -> Release:
    folder = f"stage1/{domain}/dinov3l-{layers}"
    return Release(
        repository=V2,
        decoder=f"{folder}/decoder.pt",
        statistics=f"{folder}/stats.pt",
        fields={"encoder": "dinov3-l", "layers": to_dict(LAYERS[layers]), "output": "pixels"},
    )


def _fusereg(percent: int) -> Release:
    return Release(
        repository="Hongyang-Du/FuseReg",
        decoder=f"dinov3-vitl/decoder_k23/p{percent / 100:.2f}.safetensors",
        statistics=None,
        fields={"encoder": "dinov3-l", "layers": to_dict(LAYERS["k23"])},
    )


def _scale_rae(repository: str, encoder: str) -> Release:
    return Release(
        repository=f"nyu-visionx/{repository}",
        decoder="model.pt",
        statistics=None,
        fields={"encoder": encoder},
        config="config.json",
    )


RELEASES = {
    "rae-dinov2-s": _v1("dinov2/wReg_small/ViTXL_n08", None, encoder="dinov2-s"),
    "rae-dinov2-b": _v1("dinov2/wReg_base/ViTXL_n08", "dinov2/wReg_base/imagenet1k", encoder="dinov2-b"),
    "rae-dinov2-b-512": _v1(
        "dinov2/wReg_base/ViTXL_n08_i512", "dinov2/wReg_base/imagenet1k_512", encoder="dinov2-b", encoder_size=448
    ),
    "rae-siglip2-b": _v1("siglip2/base_p16_i256/ViTXL_n08", "siglip2/base_p16_i256/ImageNet1k", encoder="siglip2-b"),
    "rae-mae-b": _v1("mae/base_p16/ViTXL_n08", "mae/base_p16/ImageNet1k", encoder="mae-b"),
    **{f"raev2-dinov3-l-{k}": _v2("imagenet", k) for k in ("k1", "k7", "k23")},
    **{f"raev2-dinov3-l-{k}-general": _v2("general", k) for k in ("k1", "k7", "k23")},
    **{f"fusereg-dinov3-l-k23-p{p}": _fusereg(p) for p in (5, 10, 30, 50, 70, 90, 95)},
    "scale-rae-siglip2-so400m": _scale_rae("siglip2_decoder", "siglip2-so400m-p14"),
    "scale-rae-webssl-300m": _scale_rae("webssl300m_decoder", "webssl-300m"),
}
"""The published autoencoders by name (RAE v1 and v2, FuseReg, Scale-RAE).

A decoder of FuseReg (arXiv 2609.31620) was trained on the mean of a random subset of the blocks: p is the percentage
of blocks that were left out. Like v1's decoders it predicts normalised pixels. No statistics are published for
DINOv2-S, for FuseReg and for Scale-RAE's decoders of general images.
"""


@dataclass(frozen=True, kw_only=True)
class DenoiserRelease:
    """A published denoiser.

    Attributes:
        repository: the repository on the Hub.
        denoiser: the path of the denoiser's file in the repository.
        config: the denoiser's configuration.
        autoencoder: the name of the published autoencoder that produces its latents.
    """

    repository: str
    denoiser: str
    config: DenoiserConfig
    autoencoder: str

    @property
    def files(self) -> list[str]:
        return [self.denoiser]


def _dit_dh(folder: str, size: str, side: int, autoencoder: str) -> DenoiserRelease:
    backbone, head = SIZES[size], wide_head()
    arguments = {"hidden_size": (backbone.width, head.width), "depth": (backbone.depth, head.depth)}
    arguments |= {"num_heads": (backbone.heads, head.heads)}
    config = denoiser_config({"input_size": side, "in_channels": 768, **arguments})
    return DenoiserRelease(
        repository=V1,
        denoiser=f"DiTs/Dinov2/wReg_base/{folder}/stage2_model.pt",
        config=replace(config, class_names=_IMAGENET),
        autoencoder=autoencoder,
    )


DENOISERS = {
    "dit-dh-xl-256": _dit_dh("ImageNet256/DiTDH-XL", "XL", 16, "rae-dinov2-b"),
    "dit-dh-xl-256-ep20": _dit_dh("ImageNet256/DiTDH-XL_ep20", "XL", 16, "rae-dinov2-b"),
    "dit-dh-xl-256-ep80": _dit_dh("ImageNet256/DiTDH-XL_ep80", "XL", 16, "rae-dinov2-b"),
    "dit-dh-s-256-ep14": _dit_dh("ImageNet256/DiTDH-S_ep14", "S", 16, "rae-dinov2-b"),
    "dit-dh-xl-512": _dit_dh("ImageNet512/DiTDH-XL_ep400", "XL", 32, "rae-dinov2-b-512"),
    "dit-dh-s-512-ep20": _dit_dh("ImageNet512/DiTDH-S_ep20", "S", 32, "rae-dinov2-b-512"),
    "raev2-k7-256": DenoiserRelease(
        repository=V2,
        denoiser="stage2/imagenet/dinov3l-k7/checkpoint.pt",
        config=replace(
            denoiser_v2_config(
                {
                    "input_size": 16,
                    "in_channels": 1024,
                    "hidden_size": (1440, 2048),
                    "depth": (28, 2),
                    "num_heads": (20, 16),
                }
            ),
            class_names=_IMAGENET,
        ),
        autoencoder="raev2-dinov3-l-k7",
    ),
}
"""The published denoisers by name (RAE v1 and v2)."""


def in_cache(name: str) -> bool:
    """Return whether the files of a published model are in the cache, so that loading it needs no network."""
    release = RELEASES[name] if name in RELEASES else DENOISERS[name]
    if isinstance(release, DenoiserRelease) and not in_cache(release.autoencoder):
        return False
    kind = "denoiser" if isinstance(release, DenoiserRelease) else "autoencoder"
    return (cache_folder() / name / kind).is_dir() or all(
        isinstance(try_to_load_from_cache(release.repository, file), str) for file in release.files
    )


def cached(name: str, kind: str | None = None) -> Path:
    """Return the folder of a published model. Download and convert the model if it is not in the cache.

    Args:
        name: a published name.
        kind: the artifact that is wanted. For a denoiser's name, "autoencoder" returns the folder of the denoiser's
            autoencoder, which several denoisers share.

    Raises:
        UserError: the Hub does not deliver a file (the message contains the command to run), the file is not the
            published model, or the cache is not writable.
    """
    release = RELEASES[name] if name in RELEASES else DENOISERS[name]
    if isinstance(release, DenoiserRelease) and kind == "autoencoder":
        return cached(release.autoencoder)

    def parts() -> Parts:
        paths = {file: _download(name, release, file) for file in release.files}
        if isinstance(release, DenoiserRelease):
            return Parts(denoiser=read_denoiser(paths[release.denoiser], release.config))
        statistics, config = (paths[file] if file else None for file in (release.statistics, release.config))
        return Parts(read_decoder(release.fields, paths[release.decoder], statistics, config=config))

    return _kept(name, "denoiser" if isinstance(release, DenoiserRelease) else "autoencoder", parts)


def converted(folder: Path) -> Path | None:
    """Return a raekit model made of a folder of diffusers: a RAEDiTPipeline or an AutoencoderRAE.

    The result is in the cache, under a name that depends on the path, sizes and times of the files.

    Args:
        folder: any folder.

    Returns:
        The folder of the model; None if `folder` does not have such a layout.

    Raises:
        UserError: the folder cannot be read or needs code of its repository, or the cache is not writable.
    """
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else None
    reject_code(config, values)
    if (folder / INDEX).is_file():
        read, kind = partial(read_pipeline, folder), "denoiser"
    elif isinstance(values, dict) and "_class_name" in values:
        read, kind = (lambda: Parts(read_diffusers(folder))), "autoencoder"
    else:
        return None
    files = sorted(path for place in ("", "vae", "transformer", "scheduler") for path in (folder / place).glob("*.*"))
    states = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _kept(f"diffusers-{blake2b(repr(states).encode(), digest_size=8).hexdigest()}", kind, read)


def _kept(name: str, kind: str, read: Callable[[], Parts]) -> Path:
    """Return the folder of a model in the cache. If it has no artifact `kind` yet, write what `read` returns."""
    folder = cache_folder() / name
    made = folder / kind
    if made.is_dir():  # also in a cache that cannot be written
        return folder
    with cache_lock(folder.with_name(f"{name}.lock")):  # only one of several processes converts
        if not made.is_dir():
            write_model(read(), folder)
    return folder


def _download(name: str, release: Release | DenoiserRelease, file: str) -> Path:
    try:
        return find_file(release.repository, file, ", ".join(_commands(release)))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _commands(release: Release | DenoiserRelease) -> list[str]:
    """Return the commands that download a release with its encoder, and for a denoiser also its autoencoder."""
    own = command(release.repository, *release.files)
    if isinstance(release, DenoiserRelease):
        return [own, *_commands(RELEASES[release.autoencoder])]
    return [own, command(REGISTRY[release.fields["encoder"]].hub_id)]


REPLACED = {"gatilin/raev2_dinov3l_k7_general_codec": "raev2-dinov3-l-k7-general"}
"""Repositories whose models only their own code reads, and the published names of the same models."""

NAMES = (*RELEASES, *DENOISERS)
"""The names of all published models."""
