"""Find models and files by name: built in, in a local folder, published, or on the Hub."""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

from raekit.errors import UserError, did_you_mean

# huggingface_hub, socket and urllib are imported where they are used: `import raekit` imports this module and has to be
# fast.

ASSETS = Path(__file__).parent / "assets"


class Published(Protocol):
    """Models that have a short name, such as `rae-dinov2-b`."""

    @property
    def NAMES(self) -> Collection[str]: ...
    @property
    def REPLACED(self) -> Mapping[str, str]: ...
    def cached(self, name: str, kind: str | None = None) -> Path:
        """Return the folder of the model `name`, made now if it is not in the cache."""
        ...

    def converted(self, folder: Path) -> Path | None:
        """Return the raekit model that is made of a folder of diffusers; None if it is not such a folder."""
        ...


published: Callable[[], Published] = cast(Any, None)
"""Return the published models. `import raekit` sets it, because they are defined in a higher layer."""


def find_folder(name: str | Path, kind: str | None = None, encoders: Iterable[str] = ()) -> Path:
    """Return the folder of a model. From the Hub, only the files that raekit reads are downloaded.

    Args:
        name: `builtin:NAME`, a published name, a local folder, RUN@STEP for a milestone of a training, or OWNER/NAME or
            OWNER/NAME@REVISION on the Hub.
        kind: the artifact that is wanted, by default all. A published model may keep its artifacts in several folders.
        encoders: the names of encoders to suggest for an unknown name. Default: published models are suggested.

    Raises:
        UserError: there is no such model, or the Hub did not deliver it.
    """
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise UserError(f"model: {name!r} is no name; give builtin:emoji, a folder or OWNER/NAME, for example")
    name = str(name)
    if name.startswith("builtin:"):
        folder = ASSETS / name.removeprefix("builtin:")
        if not os.path.isdir(folder):
            raise UserError(f"{name}: no such built-in model; choose one of {', '.join(builtin_names())}")
        return folder
    models = published()
    if name in models.NAMES:
        return models.cached(name, kind)
    if os.path.isdir(path := Path(name)):  # `Path.is_dir` raises an error for too long a name
        return path
    if os.path.isfile(path):
        raise UserError(f"{name}: is a file, and a model is a folder; `raekit convert` reads files of other projects")
    if milestone := _milestone(name):
        return milestone
    if not is_repository(name):
        known = [*builtin_names(), *(encoders or models.NAMES)]
        lists = "raekit models --encoders" if encoders else "raekit models"
        hint = did_you_mean(name, known) or f"give a folder, OWNER/NAME on the Hub, or a name that `{lists}` lists"
        raise UserError(f"{name}: no such folder or model; {hint}")
    if same := models.REPLACED.get(name.partition("@")[0]):
        raise UserError(
            f"{name}: needs code of its repository, and raekit runs no such code; use {same}, which is the same model"
        )
    places = _places(kind)
    averages = [f"{place[:-1]}-ema-*/" for place in places if place]
    configs = [f"{place}config.{form}" for place in (*places, *averages) for form in ("json", "yaml")]
    folder = download(name, [*configs, "model_index.json", "scheduler/scheduler_config.json"])
    # The configs say which weights are needed: a repository may hold large files of other models.
    wanted = [place for place in places if _is_model(folder / place)]
    return download(name, [f"{place}{file}" for place in wanted for file in _MODEL_FILES]) if wanted else folder


_MODEL_FILES = (
    "config.*",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "statistics.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.pt",
    "stat.pt",
)
"""Names of the files that raekit reads in a model's folders: those of raekit, diffusers and RAE v1."""


def _places(kind: str | None) -> list[str]:
    """Return the folders of a repository that may hold the artifact `kind`, and for an autoencoder its encoder.

    The folders of a pipeline of diffusers are always among them, because a pipeline is converted as a whole.
    """
    kinds = {"autoencoder": ["autoencoder", "encoder"], None: ["autoencoder", "encoder", "denoiser"]}.get(kind, [kind])
    return ["", *(f"{base}{each}/" for base in ("", "artifact/") for each in kinds), "vae/", "transformer/"]


def _is_model(folder: Path) -> bool:
    """Return whether a folder holds the config of a model that raekit reads, perhaps as a part of a pipeline."""
    try:
        values = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        values = None
    known = isinstance(values, dict) and values.get("_class_name") in ("AutoencoderRAE", "RAEDiT2DModel")
    named = isinstance(values, dict) and (known or bool(values.keys() & {"kind", "decoder_hidden_size"}))
    return named or (folder / "config.yaml").is_file()


def expanded(path: str | Path) -> Path:
    """Return `path` with the home folder in place of ~.

    Raises:
        UserError: the path begins with ~, and no home folder is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: no home folder is known, because HOME is not set and the user has no entry in the system; set "
            "HOME, or HF_HOME for the cache of models, to a folder"
        ) from None


def cache_folder() -> Path:
    """Return the cache of what raekit makes once: `RAEKIT_CACHE`, by default `raekit` in Hugging Face's `HF_HOME`."""
    from huggingface_hub import constants

    return expanded(os.environ.get("RAEKIT_CACHE") or Path(constants.HF_HOME, "raekit"))


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Hold a lock file in the cache, so that only one of several processes makes what the cache lacks."""
    from huggingface_hub.utils import WeakFileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"{path.parent}: {error.strerror}; set RAEKIT_CACHE to a writable folder") from None
    with WeakFileLock(path):
        yield


def _milestone(name: str) -> Path | None:
    """Return the folder of the milestone RUN@STEP; None if `name` has another form.

    Raises:
        UserError: the run has no such milestone.
    """
    run, _, step = name.rpartition("@")
    if not (step.isdigit() and run and os.path.isdir(run)):
        return None
    kept = {
        int(folder.name.removeprefix("step-")): folder for folder in sorted(Path(run).glob("milestones/step-*[0-9]"))
    }
    if int(step) not in kept:
        has = f"has the steps {', '.join(map(str, kept))}" if kept else "has none"
        raise UserError(f"{name}: no such milestone; {run} {has} (train.milestones sets the steps to keep)")
    return kept[int(step)]


def builtin_names() -> list[str]:
    """Return the names of the built-in models."""
    return [f"builtin:{path.name}" for path in sorted(ASSETS.iterdir()) if any(path.glob("*/config.json"))]


def is_repository(name: str) -> bool:
    """Return whether `name` has the form OWNER/NAME or OWNER/NAME@REVISION of a repository on the Hub."""
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def how_to_fetch(where: str, what: str) -> str:
    """Return advice for a user whose files of `what` at `where` are incomplete.

    Args:
        where: a local folder, or OWNER/NAME on the Hub.
        what: the name of the model, for the error message.

    Raises:
        UserError: `where` is neither a folder nor OWNER/NAME.
    """
    if where and os.path.isdir(where):
        return f"download it again: `hf download ID --local-dir {where}`, where ID is its repository on the Hub"
    if is_repository(where):
        return f"run {command(where)} where there is a network"
    raise UserError(f"{what}: {where!r} is neither a folder nor OWNER/NAME on the Hub")


def command(repository: str, *files: str) -> str:
    """Return the command that downloads a repository or some of its files."""
    name, _, revision = repository.partition("@")
    return f"`{' '.join(['hf download', name, *files, *(['--revision', revision] if revision else [])])}`"


def find_file(repository: str, name: str, remedy: str = "") -> Path:
    """Return the path of a file on the Hub. Download the file if it is not in the cache.

    Args:
        repository: OWNER/NAME or OWNER/NAME@REVISION on the Hub.
        name: the path of the file in the repository.
        remedy: the commands that the error message advises to run. Default: the command that downloads the file.

    Raises:
        UserError: the file is not in the cache, and the Hub did not deliver it.
    """
    from huggingface_hub import hf_hub_download

    fault = f"{repository}: the Hub did not deliver {name}"
    return _from_hub(hf_hub_download, repository, fault, remedy or command(repository, name), filename=name)


def download(repository: str, patterns: Sequence[str]) -> Path:
    """Return a local folder with the files of a repository that match `patterns`, from the Hub or its cache.

    Args:
        repository: OWNER/NAME or OWNER/NAME@REVISION on the Hub.
        patterns: paths of files in the repository, with wildcards.

    Raises:
        UserError: the repository is not in the cache, and the Hub did not deliver it.
    """
    from huggingface_hub import snapshot_download

    fault = f"{repository}: no such local folder, and the Hub did not deliver it"
    return _from_hub(snapshot_download, repository, fault, command(repository), allow_patterns=list(patterns))


def _from_hub(get: Callable[..., str], repository: str, fault: str, remedy: str, **options: Any) -> Path:
    """Call a download function. If the Hub cannot be reached, return what the cache holds."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the client warns at every retry
    name, _, revision = repository.partition("@")
    options |= {"revision": revision} if revision else {}
    offline = not _has_network()
    try:
        return Path(get(name, local_files_only=offline, **options))
    except HFValidationError as error:
        raise UserError(f"{repository}: neither a local folder nor a repository name ({error})") from None
    except Exception as error:  # networks, proxies and endpoints fail in many ways
        reason = "no network" if offline else " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        try:
            return Path(get(name, local_files_only=True, **options))
        except Exception:
            raise UserError(f"{fault} ({reason}); run {remedy} where there is a network") from None


@cache
def _has_network() -> bool:
    """Return whether the name of the Hub's host can be resolved. If it cannot, the client retries for half a minute."""
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if urllib.request.getproxies():  # the proxy resolves names
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except (OSError, ValueError):
        return False
    return True
