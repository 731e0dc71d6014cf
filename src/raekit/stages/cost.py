"""What a training step costs: parameters, FLOPs and memory, and what to do when the memory does not suffice."""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raekit.distributed import World
from raekit.distributed.sharding import local
from raekit.stages.stage import Stage
from raekit.training.memory import capacity, divisors
from raekit.training.objective import Objective
from raekit.training.optim import count_moments
from raekit.training.precision import autocast
from raekit.training.recompute import checkpoint_blocks
from raekit.training.throughput import flop_counter
from raekit.training.trainer import TrainConfig


@dataclass(frozen=True)
class Cost:
    """The cost of one objective on one process.

    Attributes:
        parameters: Number of trained parameters.
        flops: FLOPs of the loss of one image, including frozen parts. The backward pass costs about twice as many.
        state: Bytes of weights, gradients, moments of the optimizer and the averages, all in float32.
        fixed: Bytes of what else does not grow with the batch: the weights of frozen networks, such as the encoder,
            LPIPS and the discriminator's backbone, and autocast's copies of weights.
        image: Bytes of the activations of one image.
    """

    parameters: int
    flops: float
    state: int
    fixed: int
    image: float


def cost_of(objective: Objective, batch: Any, config: TrainConfig, world: World) -> Cost:
    """Measure the cost of an objective in a forward and a backward pass on `batch`, as in the last training step.

    A second pass on half of the batch says how much of the memory grows with the number of images.

    Args:
        objective: The objective.
        batch: At least two images.
        config: The settings of the training.
        world: The processes and their device.
    """
    module, step = objective.module.to(world.device), max(config.steps - 1, objective.start)
    gradients = [parameter.grad for parameter in module.parameters()]
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        if gradient is None:  # part of the state
            parameter.grad = torch.zeros_like(parameter)

    def measured(part: Any) -> tuple[int, float]:
        with torch.compiler.set_stance("force_eager"), _Memory(module) as memory:
            with flop_counter() as counter, autocast(config.precision, world.device):
                loss, _ = objective.loss(part, step)
            loss.backward()
        return memory.peak, counter.get_total_flops()

    module.eval()  # no power iterations of a discriminator
    half = len(batch) // 2
    (all_bytes, flops), (half_bytes, _) = measured(batch), measured(batch.split(half)[0])
    module.train()
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient
    parameters = sum(parameter.numel() for parameter in module.parameters())
    moments = count_moments(objective.optim, module, objective.convolutions)
    image = (all_bytes - half_bytes) / (len(batch) - half)
    return Cost(
        parameters=parameters,
        flops=flops / len(batch),
        state=4 * (parameters * (2 + len(objective.ema)) + moments) // config.shard,
        fixed=max(round(all_bytes - image * len(batch)), 0),
        image=image,
    )


class _Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations read and write, except trained parameters and their gradients.

    Attributes:
        peak: The largest number of bytes at one time so far.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = {_storage(p.grad)._cdata: 0 for p in module.parameters() if p.grad is not None}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._count(tensor)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            self._count(tensor)
        return made

    def _count(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        if tensor.is_mkldnn:  # a packed weight has no storage (`raekit.models.linear`)
            owner, key, size = tensor, id(tensor), tensor.numel() * tensor.itemsize
        else:
            owner = _storage(tensor)
            key, size = owner._cdata, owner.nbytes()
        if key in self.held:
            return
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:  # perhaps of another objective
            size = 0
        self.held[key] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(owner, self._free, key)

    def _free(self, key: int) -> None:
        self.bytes -= self.held.pop(key)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return local(tensor).untyped_storage()


def memory_advice(stage: Stage, config: TrainConfig, size: int, world: World) -> str:
    """Return an error message for a step that ran out of memory with micro-batches of `size` images.

    It has the estimated memory of the present setting and of settings that fit. One of several processes measures
    nothing: a pass needs the other processes, which may have memory left and be anywhere in the step.
    """
    message = f"out of memory on {world.device} with train.micro_batch {size}"
    if world.size > 1:
        return (
            f"{message}; set train.checkpointing or a smaller train.micro_batch, or use more processes or a smaller "
            "model. --dry-run estimates the memory"
        )
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
        f"{message}: it needs about {_gib(state)} of state and frozen networks, and {_gib(image)} for each image, "
        f"{_gib(state + size * image)} in all, and {_gib(room)} can be used; {remedy}"
    )


def _total(stage: Stage, batch: Any, config: TrainConfig, world: World) -> tuple[int, float]:
    """Return the bytes that do not grow with the batch, and the bytes of an image in the objective that needs most."""
    costs = [cost_of(objective, batch, config, world) for objective in stage.objectives]
    fixed = max(cost.fixed for cost in costs)  # objectives share frozen networks
    return sum(cost.state for cost in costs) + fixed, max(cost.image for cost in costs)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
