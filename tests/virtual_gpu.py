"""A virtual GPU for tests on machines without a GPU. It finds device errors and waits of the host.

The tensors of the virtual GPU report the device "meta", but they keep their numbers on the CPU and compute there. An
operation on tensors of both devices is an error, as on a real GPU. Operations that would make the host wait for the GPU
are counted. The virtual GPU says nothing about the kernels, memory and speed of a real GPU.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
_BETWEEN = (_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default)
"""The operations that accept tensors of both devices."""


class _Remote(Tensor):
    """A tensor on the virtual GPU. `numbers` is the CPU tensor with its values."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "_Remote":
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        remote = Tensor._make_wrapper_subclass(cls, numbers.shape, device=GPU, **layout)  # type: ignore[attr-defined]
        remote.numbers = numbers
        return remote

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operation}: used outside virtual_gpu()")


class _Machine(TorchDispatchMode):
    """Intercepts every operation, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        remote = [isinstance(x, _Remote) for x in given]
        here = [x for x in given if not isinstance(x, _Remote) and x.ndim]  # a scalar tensor may be on any device
        if any(remote) and here and operation not in _BETWEEN:
            places = ", ".join(f"{'GPU' if r else 'CPU'} {tuple(x.shape)}" for x, r in zip(given, remote, strict=True))
            raise RuntimeError(f"{operation}: tensors on two devices: {places}")
        self.waits += any(remote) and _waits_for(operation, given)
        if operation is _aten.copy_.default:
            self.waits += remote[0] != remote[1] and not (kwargs.get("non_blocking") or args[2:] == (True,))
            _numbers(args[0]).copy_(_numbers(args[1]))
            return args[0]
        goes = remote[0] if remote else False
        if (device := kwargs.get("device")) is not None:
            goes, kwargs["device"] = torch.device(device) == GPU, _CPU
            if any(remote) != goes and operation is _aten._to_copy.default:
                self.waits += not (goes and kwargs.get("non_blocking"))
                args = (args[0].numbers if any(remote) else args[0]).clone(), *args[1:]
        plain = tree_map(_numbers, (args, kwargs))
        of = {id(_numbers(x)): x for x in given}  # an in-place operation returns its argument

        def placed(x: Any) -> Any:
            return of.get(id(x), _Remote(x) if goes else x) if isinstance(x, Tensor) else x

        drawn = goes and torch.Tag.nondeterministic_seeded in operation.tags
        with torch.random.fork_rng(devices=[]) if drawn else nullcontext():  # a GPU has its own generator
            return tree_map(placed, operation(*plain[0], **plain[1]))


def _waits_for(operation: Any, given: list[Tensor]) -> bool:
    """Return whether the host needs values from the device, such as a number or the size of a mask selection."""
    if operation in (_aten.index.Tensor, _aten.index_put_.default):
        return any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*operation.tags})


def _numbers(x: Any) -> Any:
    return x.numbers if isinstance(x, _Remote) else x


@contextmanager
def virtual_gpu() -> Iterator[Callable[[], int]]:
    """Enable the device `GPU`. Yield a function that returns how often the host has waited for the device so far."""
    machine = _Machine()
    tolist, autocast, generator = Tensor.tolist, torch.autocast, torch.Generator
    autocast_enabled = torch.is_autocast_enabled
    fused = _foreach_utils._get_fused_kernels_supported_devices

    def made_here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Make the tensor on the CPU and move it, because `torch.tensor` makes a meta tensor without numbers."""
        return lambda data, *, device=None, **options: make(data, **options).to(device or _CPU)

    def to_list(self: Tensor) -> Any:
        machine.waits += isinstance(self, _Remote)
        return tolist(_numbers(self))

    def place(device: torch.device | str) -> str:
        return "cpu" if torch.device(device) == GPU else torch.device(device).type

    replaced = {
        "torch.tensor": made_here(torch.tensor),
        "torch.as_tensor": made_here(torch.as_tensor),
        "torch.Tensor.tolist": to_list,
        "torch.Generator": lambda device="cpu": generator(place(device)),
        "torch.autocast": lambda device_type, *args, **options: autocast(place(device_type), *args, **options),
        # Autocast does not cast tensors of the virtual GPU, which compute in their own type.
        "torch.is_autocast_enabled": lambda *device: GPU.type not in device and autocast_enabled(*device),
        "torch.optim.optimizer._get_fused_kernels_supported_devices": lambda: [*fused(), GPU.type],
    }
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        # Keep the parameter objects of a module when it moves to the device, as on a real GPU.
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(warnings.catch_warnings())
        # Torch assumes that a parameter on "meta" has no numbers.
        warnings.filterwarnings("ignore", message=".* in the checkpoint to a meta parameter")
        stack.enter_context(machine)
        yield lambda: machine.waits
