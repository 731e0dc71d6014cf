"""The largest micro-batch that fits into the memory of a GPU, found by a trial."""

from collections.abc import Callable

import torch

from raekit.distributed import World

FILLED = 0.9  # of the memory; the rest is for fragmentation and for work between the steps


def divisors(number: int) -> list[int]:
    """Return the divisors of `number` in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def capacity(device: torch.device) -> float:
    """Return the number of bytes that a training may take on `device`, with what this process holds already."""
    free, _ = torch.cuda.mem_get_info(device)
    return FILLED * (free + torch.cuda.memory_reserved(device))


def peak(trial: Callable[[], None], device: torch.device) -> float:
    """Return the largest number of bytes that this process holds on `device` during `trial()`."""
    torch.cuda.reset_peak_memory_stats(device)
    trial()
    return torch.cuda.max_memory_allocated(device)


def fitting(share: int, trial: Callable[[int], None], world: World) -> int:
    """Return the largest micro-batch that fits into the memory of every process, a divisor of `share`.

    The memory grows in proportion to the number of images. So a trial with one image and one with a few say how many
    fit, and no trial runs out of memory while another process waits for this one. On a CPU everything fits.

    In a trial, gradients must be there before the last forward pass, as in a step of several micro-batches. Without
    them, a step on few images takes the most memory at its end, for the gradients and not for the images.

    Args:
        share: The number of images of a step on one process.
        trial: `trial(size)` does the work of a step on two micro-batches of `size` images, and changes nothing.
        world: The processes, which must all call this function.
    """
    if world.device.type == "cpu" or share == 1:
        return share
    few = min(share, 4)
    one, several = (peak(lambda size=size: trial(size), world.device) for size in (1, few))
    each = max((several - one) / (few - 1), 1)
    most = min(world.gather(int((capacity(world.device) - one) / each) + 1))
    return max(size for size in divisors(share) if size <= max(most, 1))
