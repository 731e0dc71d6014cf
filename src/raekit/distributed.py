"""Work in one or many processes. One process is a world of size 1, so the same code serves both."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from raekit.errors import UserError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes of this job, from the view of one process.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        device: the device of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all processes, on the device of `tensor`. The argument does not change."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, value: object) -> list:
        """Return the `value` of every process, by rank. Values must be small and picklable."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Return on every process whether `flag` is true on at least one process."""
        return bool(self.sum(torch.tensor(float(flag))).item())

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 first and then on the other ranks, for example to fill a cache once."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        """Wait until every process calls this method."""
        if self.size > 1:
            dist.barrier()

    def shard(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        """Distribute `module` in place with FSDP2. A world of size 1 does nothing.

        Every process holds all weights in float32, and gradients are averaged over the processes.

        Args:
            module: the module to distribute.
            blocks: parts of `module` that are wrapped separately, so that communication overlaps with computation.
        """
        if self.size == 1:
            return
        # FSDP2 warns at every restart against changing outputs in place. The library changes no output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.size, 1), mesh_dim_names=("replicate", "shard"))
        for block in [*blocks, module]:
            # By default the root keeps its gathered weights after a forward pass without a backward pass. After an
            # evaluation, updates of an EMA copy would then go to these temporary weights.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the full weights and buffers of a module, distributed or not. Every process must call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))  # type: ignore[return-value]


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Set whether backward passes average gradients over processes. Only the last micro-batch of a step needs it."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)


def prepare_device(device: str | None = None, local_rank: int = 0) -> torch.device:
    """Return the device of a process and set up torch for it.

    Args:
        device: "cpu" or "cuda". None selects CUDA if it is available.
        local_rank: the number of the process on this machine.

    Raises:
        UserError: there is no CUDA device, or none for this process.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise UserError(f"torchrun: more processes than CUDA devices ({count}); start at most {count}")
    this = torch.device(kind, local_rank)
    torch.cuda.set_device(this)
    # From 2.11 on, torch prefers cuDNN attention on Hopper. Its bf16 gradients are NaN for some shapes and logits, at
    # least up to the cuDNN version of torch 2.13 (pytorch issue 196678). Flash attention is about as fast.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return this


def _number(name: str, default: int) -> int:
    """Return the whole number in an environment variable that torchrun sets."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise UserError(f"{name}: the environment sets {value!r}, which is no number; unset it, or start with torchrun")
    return int(value)


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join the processes that `torchrun` started. Without `torchrun`, yield a world of size 1.

    Args:
        device: "cpu" or "cuda". None selects CUDA if it is available.
    """
    size, local_rank = _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE: the environment sets {size} processes, but not {', '.join(missing)}; start the processes "
            "with torchrun, or unset WORLD_SIZE for a single process"
        )
    this = prepare_device(device, local_rank)
    if size == 1:
        yield World(device=this)
        return
    cuda = this.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30), device_id=this if cuda else None)
    try:
        yield World(rank=dist.get_rank(), size=size, device=this)
    finally:
        dist.destroy_process_group()
