"""Modules that are distributed over processes with FSDP2.

torch imports this code slowly, so modules that a command imports at its start import this one where they need it.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from raekit.distributed import World


def shard(module: nn.Module, blocks: list[nn.Module], world: World, ways: int = 1) -> None:
    """Distribute `module` in place with FSDP2. A world of size 1 does nothing.

    Weights are float32, and gradients are averaged over the processes.

    Args:
        module: the module to distribute.
        blocks: parts of `module` that are wrapped separately, so that communication overlaps with computation.
        world: the processes.
        ways: the number of processes that share one copy of the weights, a divisor of `world.size`. With 1, every
            process holds all weights.
    """
    if world.size == 1:
        return
    # FSDP2 warns at every restart against changing outputs in place. The library changes no output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = _mesh(world, ways)
    for block in [*blocks, module]:
        # By default the root keeps its gathered weights after a forward pass without a backward pass. After an
        # evaluation, updates of an EMA copy would then go to these temporary weights.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


@cache
def _mesh(world: World, ways: int) -> DeviceMesh:
    """Return the mesh for `fully_shard`. All modules share one, and with it one communicator for each dimension."""
    return init_device_mesh(world.device.type, (world.size // ways, ways), mesh_dim_names=("replicate", "shard"))


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the full weights of distributed modules in every process inside this block.

    A forward pass then needs no other process, so that processes may make different numbers of passes.
    """
    modules = list(modules)
    for module in modules:
        if isinstance(module, FSDPModule):
            # The first forward pass decides what FSDP takes for the root. It may be a pass of a part alone, as in a run
            # that resumes into an evaluation of a denoiser with an alignment.
            module._get_fsdp_state()._lazy_init()
    parts = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a distributed tensor, and any other tensor itself, without its gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full_state(module: nn.Module, cpu: bool = False) -> dict[str, Tensor]:
    """Return the full weights and buffers of a module, distributed or not. Every process must call it.

    With `cpu` they are on the CPU, and only the first process has them.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=cpu)
    return get_model_state_dict(module, options=options)  # type: ignore[return-value]


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Set whether backward passes average gradients over processes. Only the last micro-batch of a step needs it."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
