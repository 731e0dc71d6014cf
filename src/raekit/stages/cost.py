"""What a training step costs: parameters, FLOPs and memory, and what to do when the memory does not suffice."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from raekit.distributed import World
from raekit.stages.stage import Stage
from raekit.train.memory import capacity, divisors
from raekit.train.objective import Objective
from raekit.train.precision import autocast
from raekit.train.recompute import checkpoint_blocks
from raekit.train.throughput import flop_counter
from raekit.train.trainer import TrainConfig


@dataclass(frozen=True)
class Cost:
    """The cost of one objective on one process.

    Attributes:
        parameters: Number of trained parameters.
        flops: FLOPs of the loss of one image, including frozen parts. The backward pass costs about twice as many.
        state: Bytes of weights, gradients, two moments of AdamW and the averages, all in float32.
        image: Bytes of the activations of one image.
    """

    parameters: int
    flops: float
    state: int
    image: float


def cost_of(objective: Objective, batch: Any, config: TrainConfig, world: World) -> Cost:
    """Measure the cost of an objective in one forward pass on `batch`, as in the last training step.

    The activations are those that the backward pass needs. Tensors that do not grow with the batch, such as weights in
    bfloat16, are left out by the comparison with half of the batch, if there are two images.
    """
    module, step = objective.module.to(world.device), max(config.steps - 1, objective.start)

    def saved(part: Any) -> tuple[int, float]:
        kept = _Kept(module)
        with (
            torch.compiler.set_stance("force_eager"),
            flop_counter() as counter,
            saved_tensors_hooks(kept.pack, lambda held: held.tensor),
            autocast(config.precision, world.device),
        ):
            objective.loss(part, step)
        return kept.peak, counter.get_total_flops()

    module.eval()  # no power iterations of a discriminator
    half = len(batch) // 2
    (all_bytes, flops), (half_bytes, _) = saved(batch), saved(batch.split(half)[0]) if half else (0, 0)
    module.train()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(
        parameters=parameters,
        flops=flops / len(batch),
        state=4 * parameters * (4 + len(objective.ema)),
        image=(all_bytes - half_bytes) / (len(batch) - half),
    )


class _Kept:
    """Counts the bytes that autograd keeps for backward passes, without the parameters of `module`.

    Attributes:
        peak: The largest number of bytes so far. A loss may run a backward pass itself, which frees tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self.holders: Counter[int] = Counter(_storage(p)._cdata for p in module.parameters())
        self.bytes = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> "_Held":
        storage = _storage(tensor)
        self.change(storage, 1)
        self.peak = max(self.peak, self.bytes)
        return _Held(self, tensor)

    def change(self, storage: torch.UntypedStorage, by: int) -> None:
        """Note that one holder of a storage has come (1) or gone (-1)."""
        before = self.holders[storage._cdata]
        self.holders[storage._cdata] += by
        if not before or before + by == 0:
            self.bytes += by * storage.nbytes()


class _Held:
    """A tensor that autograd keeps."""

    def __init__(self, kept: _Kept, tensor: torch.Tensor) -> None:
        self.kept, self.tensor = kept, tensor

    def __del__(self) -> None:
        self.kept.change(_storage(self.tensor), -1)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def memory_advice(stage: Stage, config: TrainConfig, size: int, world: World) -> str:
    """Return an error message for a step that ran out of memory with micro-batches of `size` images.

    It has the estimated memory of the present setting and of settings that fit.
    """
    message = f"out of memory on {world.device} with train.micro_batch {size}"
    try:
        batch = next(stage.batches(0)).split(2)[0].to(world.device)
        present = _total(stage, batch, config, world)
        proposals = {} if config.checkpointing else {"": present}
        for objective in stage.objectives:
            checkpoint_blocks(objective.blocks)
        recomputed = _total(stage, batch, replace(config, checkpointing=True), world)
    except torch.OutOfMemoryError:
        return f"{message}; not even two images fit. Set train.checkpointing, use a larger GPU or a smaller model"
    proposals["train.checkpointing and "] = recomputed
    state, image = present
    room, share = capacity(world.device), config.batch_size // world.size
    lines = []
    for setting, (base, each) in proposals.items():
        smaller = size // 2 if (base, each) == present else size
        if fits := [d for d in divisors(share) if d <= smaller and base + d * each <= room]:
            lines.append(f"set {setting}train.micro_batch {fits[-1]} (about {_gib(base + fits[-1] * each)})")
    remedy = ", or ".join(lines) or "use a larger GPU, more processes or a smaller model"
    return (
        f"{message}: it needs about {_gib(state)} of state and {_gib(image)} for each image, "
        f"{_gib(state + size * image)} in all, and {_gib(room)} can be used; {remedy}"
    )


def _total(stage: Stage, batch: Any, config: TrainConfig, world: World) -> tuple[int, float]:
    """Return the bytes of the state of all objectives, and the bytes of an image of the largest."""
    costs = [cost_of(objective, batch, config, world) for objective in stage.objectives]
    return sum(cost.state for cost in costs), max(cost.image for cost in costs)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
