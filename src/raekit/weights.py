"""Read weights without running code, and load them strictly."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raekit.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
VARIANCE_EPS = 1e-5  # added to the variance in whitening (RAE v1)


def read_weights(path: Path) -> dict[str, Any]:
    """Read a `.safetensors` file, or a torch file with `weights_only=True`.

    Returns:
        The values by name. A safetensors file contains only tensors. A torch file may also contain None, numbers and
        nested dictionaries.

    Raises:
        UserError: the file is missing, unreadable or damaged, contains code, or is not a dictionary of names.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_packed(path):
            raise ValueError("a zip file with compressed entries")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the protocol of a pickle that is rejected below
            state = torch.load(path, map_location="cpu", weights_only=True)
        _check_storage(state)
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path}: rejected because it would run {asked[1]}; save a state dict of tensors") from None
        raise UserError(f"{path}: damaged or not a weights file; download or export it again") from None
    except Exception as error:  # a damaged file can raise almost any type of exception in torch
        reason = _first_line(error) or type(error).__name__
        raise UserError(f"{path}: damaged or not a weights file ({reason}); download or export it again") from None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: not a state dict; expected a dictionary of tensors by name")
    return state


def _is_packed(path: Path) -> bool:
    """Return whether a zip file is compressed. Torch writes no such files, and they can unpack to any size."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _check_storage(values: Any) -> None:
    """Check that each tensor in `values` is no larger than its storage: a stride of 0 makes a small file ask for any
    amount of memory when the tensor is copied.

    Raises:
        ValueError: a tensor is larger.
    """
    if isinstance(values, dict):
        for value in values.values():
            _check_storage(value)
        return
    dense = isinstance(values, Tensor) and values.layout == torch.strided
    if dense and values.numel() * values.itemsize > values.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(values.shape)} repeats its values; save it with contiguous()")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


def fingerprint(tensors: Mapping[str, Tensor | None], *values: object) -> str:
    """Return 16 hexadecimal digits that identify the names and content of `tensors` and the `repr` of `values`."""
    digest = blake2b(repr(values).encode(), digest_size=8)
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {None if tensor is None else (tensor.dtype, tuple(tensor.shape))}".encode())
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in bfloat16, so that a network has the same `fingerprint` in float32 and in bfloat16."""
    return {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}


def check_fit(make: Callable[[], nn.Module], state: Mapping[str, Tensor], source: object) -> None:
    """Check that `state` fits the module that `make` returns, without allocating memory for the module.

    Args:
        make: builds the module.
        state: the weights.
        source: the origin of the weights, for the error message.

    Raises:
        UserError: the weights do not fit, see `load_strict`.
    """
    try:
        with torch.device("meta"), NoRandomWeights():
            load_strict(make(), state, source)
    except (RuntimeError, TypeError) as error:  # torch, of sizes that overflow
        raise UserError(f"{source}: config.json has an impossible size ({_first_line(error)})") from None


def load_network(make: Callable[[], Network], state: Mapping[str, Tensor], source: object) -> Network:
    """Return the network that `make` builds, with the weights `state`.

    The weights are checked before memory is allocated, and no random weights are drawn: for DiT^DH-XL that would take
    eight seconds on a CPU.

    Args:
        make: builds the network.
        state: the weights.
        source: the origin of the weights, for the error message.

    Raises:
        UserError: the weights do not fit, see `load_strict`.
    """
    check_fit(make, state, source)
    with NoRandomWeights():
        network = make()
    load_strict(network, state, source)
    return network


class NoRandomWeights(TorchFunctionMode):
    """Inside this context, networks are built without random weights, because others are loaded into them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.randn:
            return torch.empty(*args, **(kwargs or {}))
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        # Filled, because torch's trunc_normal_ draws again until all values are within its bounds.
        if func is Tensor.normal_:
            return args[0].fill_(args[1] if len(args) > 1 else (kwargs or {}).get("mean", 0.0))
        if func is Tensor.uniform_:
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load `state` into `module`.

    Args:
        module: the module. If it is on the meta device, it takes over the tensors of `state`.
        state: the weights.
        source: the origin of the weights, for the error message.

    Raises:
        UserError: a tensor is missing, unexpected or not numeric, or has the wrong shape. The message lists them.
    """
    if faults := mismatches(state, module.state_dict()):
        raise UserError(f"{source}: the weights do not fit {type(module).__name__}: {faults}")
    module.load_state_dict(dict(state), assign=any(p.is_meta for p in module.parameters()))


def _kind(value: object) -> str:
    """Describe a value in a few words, for error messages."""
    return f"{value.layout} of {value.dtype}".replace("torch.", "") if isinstance(value, Tensor) else f"{value!r:.40}"


def is_real(value: object) -> TypeGuard[Tensor]:
    """Return whether the value is a dense tensor of real floating-point numbers."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()


def check_statistics(mean: Tensor | None, var: Tensor) -> None:
    """Check that latents can be whitened with these statistics.

    Raises:
        UserError: a value is not finite, or a variance is negative.
    """
    if not (var.isfinite() & (var + VARIANCE_EPS > 0)).all() or (mean is not None and not mean.isfinite().all()):
        raise UserError("statistics: mean and var must be finite, and var must not be negative")


def mismatches(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Describe how `state` differs from `wanted`: keys, shapes and types. The result is empty if everything fits.

    At most eight differences are listed.
    """
    faults = [f"missing {key}" for key in wanted.keys() - state.keys()]
    faults += [f"unexpected {key}" for key in state.keys() - wanted.keys()]
    faults += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if isinstance(state[key], Tensor) and state[key].shape != wanted[key].shape
    ]
    faults += [
        f"{key} is {_kind(state[key])}, expected floating-point numbers"
        for key in wanted.keys() & state.keys()
        if wanted[key].is_floating_point() and not is_real(state[key])
    ]
    return "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
