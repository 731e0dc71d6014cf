"""Ranks: one process is a world of one, so nothing else has a second version for many."""

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
    """The processes of this job, as seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, on its own device; the argument is left alone."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, value: object) -> list:
        """Every process's (picklable, small) `value`, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """True on all processes if it is on one."""
        return bool(self.sum(torch.tensor(float(flag))).item())

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank zero first, then on the others: for downloads and caches."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def shard(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        """Distribute `module` in place with FSDP2: replicated in float32, gradients averaged over processes.

        `blocks` are sharded as units of their own, so that communication overlaps computation. A world of
        one needs nothing of it and leaves the module alone.
        """
        if self.size == 1:
            return
        # Nothing changes a module's output in place, which is what this would warn of at every restart.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.size, 1), mesh_dim_names=("replicate", "shard"))
        for block in [*blocks, module]:
            # By default the root stays gathered after a forward pass without a backward pass, and an average
            # that was evaluated would from then on be updated in a temporary copy.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole weights and buffers of a module that may be distributed; all processes call it and get them."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))  # type: ignore[return-value]


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass averages gradients over processes (off for all micro-batches but the last)."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)


def prepare_device(device: str | None = None, local_rank: int = 0) -> torch.device:
    """ "cpu", "cuda" or, for None, the best there is, for the process `local_rank` of this machine; UserError if it
    is not there. Sets up torch for it.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device that torch can use")
    if local_rank >= (count := torch.cuda.device_count()):
        raise UserError(f"torchrun: {local_rank + 1} or more processes for {count} CUDA devices; start {count} at most")
    this = torch.device(kind, local_rank)
    torch.cuda.set_device(this)
    # On Hopper torch prefers cuDNN's attention from 2.11 on. Its bf16 gradients are NaN for some shapes and logits
    # up to the cuDNN of torch 2.13 at least (pytorch issue 196678); flash attention is about as fast.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return this


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Enter the world that `torchrun` describes in the environment; without it, a world of one.

    `device` is "cpu", "cuda" or None for the best there is.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    this = prepare_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1:
        yield World(device=this)
        return
    cuda = this.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30), device_id=this if cuda else None)
    try:
        yield World(rank=dist.get_rank(), size=size, device=this)
    finally:
        dist.destroy_process_group()
