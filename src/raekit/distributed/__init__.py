"""Work in one or many processes. One process is a world of size 1, so the same code serves both."""

import os
import socket
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from raekit.distributed import slurm
from raekit.distributed.liveness import Watch
from raekit.distributed.memory import keep_freed_memory
from raekit.errors import Stopped, UserError

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=30)
"""How long a process may be ahead of another. A process that died is noticed earlier, see `liveness`."""
SHARING = 10.0
"""Seconds until a file of one machine must be visible on the others, and its name known to them."""


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Create tensors as float32 on the CPU if neither type nor device is given, whatever defaults the caller has set.

    Also a decorator. The defaults of `torch.set_default_device` and `torch.set_default_dtype` would change networks
    while they are built: buffers would be on another device, and weights would be rounded.
    """
    before = torch.get_default_dtype()
    if before == torch.float32 and torch.get_default_device().type == "cpu":
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with CPU:
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class World:
    """The processes of this job, from the view of one process.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        device: the device of this process.
        watch: what the other processes do outside of collectives. None in a world of size 1.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    watch: Watch | None = None

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
        """Return on every process whether `flag` is true on at least one process. The device does not wait."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))  # on the CPU, where gloo sums it
        dist.all_reduce(flags)
        return bool(flags)

    def is_first(self, what: str) -> bool:
        """Return whether no other process has called this method with `what`. Processes may call it at any time."""
        return self.watch is None or self.watch.is_first(what)

    def count_distinct(self, what: str, names: Collection[str]) -> int:
        """Return how many different names all processes have given for `what` so far.

        Processes may call this method at any time.

        Args:
            what: what is counted.
            names: all names that this process has found so far.
        """
        return len(names) if self.watch is None else self.watch.count_distinct(what, names)

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
        self.any(False)  # unlike a barrier of NCCL, gloo notices at once that a process has ended


def check_shared(folder: Path, world: World) -> None:
    """Check that all processes see the same `folder`: the first writes a token that all must read.

    Raises:
        UserError: `folder` is on a disk of one machine.
    """
    if world.size == 1:
        return
    name = world.gather(f".token-{uuid.uuid4().hex}")[0]
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, "utf-8")
    world.barrier()
    deadline = time.monotonic() + SHARING
    while not (seen := (folder / name).is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    everywhere = not world.any(not seen)
    if world.is_main:
        (folder / name).unlink()
    if not everywhere:
        raise UserError(f"{folder}: must be on a file system that all machines share; choose another --run")


def prepare_device(device: str | None = None, local_rank: int = 0) -> torch.device:
    """Return the device of a process and set up torch for it.

    Args:
        device: "cpu" or "cuda". None selects CUDA if it is available.
        local_rank: the number of the process on this machine.

    Raises:
        UserError: `device` is another device, or there is no CUDA device, or none for this process.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device: {kind!r} is neither 'cpu' nor 'cuda'")
    if kind == "cpu":
        keep_freed_memory()
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
    # By default, torch computes convolutions of float32 in TF32. Trainings with precision tf32 turn it on again.
    torch.backends.cudnn.allow_tf32 = False
    return this


def _meet(rank: int, size: int) -> dist.Store:
    """Return the store of a world, which its first process opens at MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: the host is unknown, its port is in use, or the other processes have not come within `TIMEOUT`.
    """
    host, port = os.environ["MASTER_ADDR"], slurm.number(os.environ, "MASTER_PORT", 0, 1, 65_535)
    deadline = time.monotonic() + SHARING
    while True:  # torch would try for the whole `TIMEOUT`
        try:
            socket.getaddrinfo(host, port)
            break
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR: the host {host!r} is not known ({error}); give the host of the first process"
                ) from None
            time.sleep(0.1)
    try:
        return next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))[0]
    except dist.DistError as error:
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: the {size} processes could not meet at port {port} of {host} "
            f"({str(error).splitlines()[0]}); start all of them, with a port that is free"
        ) from None


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join the processes that `torchrun` or `srun` started. Without these, yield a world of size 1.

    Args:
        device: "cpu" or "cuda". None selects CUDA if it is available.
    """
    if "WORLD_SIZE" not in os.environ:
        os.environ |= slurm.environment(os.environ)
    size, local_rank = slurm.number(os.environ, "WORLD_SIZE", 1, 1), slurm.number(os.environ, "LOCAL_RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE: the environment sets {size} processes, but not {', '.join(missing)}; start the processes "
            "with torchrun, or unset WORLD_SIZE for a single process"
        )
    this = prepare_device(device, local_rank)
    if size == 1:
        yield World(device=this)
        return
    rank = slurm.number(os.environ, "RANK", 0)
    if rank >= size:
        raise UserError(f"RANK: the environment sets {rank}, which is not below WORLD_SIZE {size}; number them from 0")
    store = _meet(rank, size)
    # One communicator for device tensors, and one for small messages between hosts.
    backend = "cpu:gloo,cuda:nccl" if this.type == "cuda" else "gloo"
    device_id = this if this.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id)
    watch, failed, complete = Watch(store, rank, size), True, False
    try:
        yield World(rank=rank, size=size, device=this, watch=watch)
        failed, complete = False, True
    except Stopped:
        failed = False
        raise
    except UserError:
        raise
    except Exception as error:
        if watch.failed():  # the failure broke the connection to this process
            raise UserError("another process failed; its own message says why") from None
        if isinstance(error, dist.DistBackendError) or "gloo" in str(error):
            raise UserError(
                f"the connection to another process broke ({str(error).splitlines()[0]}), perhaps because the process "
                "was killed; run the same command again to resume"
            ) from None
        raise
    finally:
        watch.leave(failed)
        if complete or this.type == "cpu":  # NCCL waits for all processes, and some may have ended
            dist.destroy_process_group()
