"""Find models and files by name: built in, in a local folder, published, or on the Hub."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from raekit.errors import UserError, did_you_mean

# huggingface_hub is imported where it is used: `import raekit` imports this module and has to be fast.

ASSETS = Path(__file__).parent / "assets"


class Published(Protocol):
    """Models that have a short name, such as `rae-dinov2-b`."""

    @property
    def NAMES(self) -> Collection[str]: ...
    def cached(self, name: str, kind: str | None = None) -> Path:
        """Return the folder of the model `name`, made now if it is not in the cache."""
        ...


published: Callable[[], Published] | None = None
"""Return the published models. `import raekit` sets it, because they are defined in a higher layer."""


def find_folder(name: str, kind: str | None = None) -> Path:
    """Return the folder of a model.

    Args:
        name: `builtin:NAME`, a published name, a local folder, or OWNER/NAME on the Hub. OWNER/NAME@REVISION is a
            branch, tag or commit.
        kind: the artifact that is wanted. A published model may keep its artifacts in several folders.

    Raises:
        UserError: there is no such model, or the Hub did not deliver it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.startswith("builtin:"):
        folder = ASSETS / name.removeprefix("builtin:")
        if not folder.is_dir():
            raise UserError(f"{name}: no such built-in model; choose one of {', '.join(builtin_names())}")
        return folder
    models = published() if published else None
    if models and name in models.NAMES:
        return models.cached(name, kind)
    if (path := Path(name)).is_dir():
        return path
    repository, _, revision = name.partition("@")
    if not is_repository(repository):
        if hint := did_you_mean(name, models.NAMES if models else ()):
            raise UserError(f"{name}: no such folder or model; {hint}")
        known = "".join(f", {known}" for known in models.NAMES) if models else ""
        raise UserError(
            f"{name}: no such folder (a model is a local folder, builtin:NAME, OWNER/NAME on the Hub{known})"
        )
    try:
        return Path(snapshot_download(repository, revision=revision or None))
    except HFValidationError as error:
        raise UserError(f"{name}: neither a local folder nor a repository name ({error})") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: no such local folder, and the Hub did not deliver it ({type(error).__name__}); "
            f"run `hf download {repository}{revision and ' --revision ' + revision}` where there is a network"
        ) from None


def builtin_names() -> list[str]:
    """Return the names of the built-in models."""
    return [f"builtin:{path.name}" for path in sorted(ASSETS.iterdir()) if any(path.glob("*/config.json"))]


def is_repository(name: str) -> bool:
    """Return whether `name` has the form OWNER/NAME of a repository on the Hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def how_to_fetch(where: str, what: str) -> str:
    """Return advice for a user whose files of `what` at `where` are incomplete.

    Args:
        where: a local folder, or OWNER/NAME on the Hub.
        what: the name of the model, for the error message.

    Raises:
        UserError: `where` is neither a folder nor OWNER/NAME.
    """
    if where and Path(where).is_dir():
        return f"download it again: `hf download ID --local-dir {where}`, where ID is its repository on the Hub"
    if is_repository(where):
        return f"run `hf download {where}` where there is a network"
    raise UserError(f"{what}: {where!r} is neither a folder nor OWNER/NAME on the Hub")


def find_file(repository: str, name: str) -> Path:
    """Return the path of a file on the Hub. Download the file if it is not in the cache.

    Args:
        repository: OWNER/NAME on the Hub.
        name: the path of the file in the repository.

    Raises:
        UserError: the file is not in the cache, and the Hub did not deliver it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{repository}: the Hub did not deliver {name} ({type(error).__name__}); "
            f"run `hf download {repository} {name}` where there is a network"
        ) from None
