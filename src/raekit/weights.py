"""Finding and reading weights, without executing code, and loading them strictly."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raekit.errors import UserError

ASSETS = Path(__file__).parent / "assets"


def find_folder(name: str) -> Path:
    """Return the folder that `name` means: `builtin:NAME`, a local folder, or a repository `OWNER/NAME` of the Hub.

    Raises UserError, naming what was looked for, if there is none.
    """
    if name.startswith("builtin:"):
        folder = ASSETS / name.removeprefix("builtin:")
        if not folder.is_dir():
            known = ", ".join(f"builtin:{p.name}" for p in sorted(ASSETS.iterdir()) if p.is_dir())
            raise UserError(f"{name}: no such built-in; there are {known}")
        return folder
    if (path := Path(name)).is_dir():
        return path
    if not is_repository(name):
        raise UserError(f"{name}: no such folder (a model is a local folder, builtin:NAME, or OWNER/NAME on the Hub)")
    try:
        return Path(snapshot_download(name))
    except HFValidationError as error:
        raise UserError(f"{name}: neither a local folder nor a repository name ({error})") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: no such local folder, and the Hub did not deliver it ({type(error).__name__}); "
            f"run `hf download {name}` where there is a network"
        ) from None


def is_repository(name: str) -> bool:
    """Whether `name` has the form OWNER/NAME of a repository on the Hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file, or a torch file with `weights_only=True`; UserError if it is absent or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged or no weights file ({_first_line(error)}); fetch or export it again"
        ) from None
    except Exception as error:  # torch raises pickle.UnpicklingError for a file that asks to run code
        raise UserError(f"{path}: refused, it holds more than tensors ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load `state` into `module`; UserError that lists what is missing, unexpected or misshapen."""
    wanted = module.state_dict()
    faults = [f"missing {key}" for key in wanted.keys() - state.keys()]
    faults += [f"unexpected {key}" for key in state.keys() - wanted.keys()]
    faults += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise UserError(f"{source}: the weights do not fit {type(module).__name__}: {shown}")
    module.load_state_dict(dict(state), assign=any(p.is_meta for p in module.parameters()))
