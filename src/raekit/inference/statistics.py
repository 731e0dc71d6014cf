"""Measuring the mean and variance of an encoder's latents."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from raekit.data.loader import Batch
from raekit.distributed import World
from raekit.moments import Moments


@torch.no_grad()
def measure_latents(
    tokens: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    latent_shape: tuple[int, int, int],
    world: World,
    mirror: bool = False,
    shown: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """Measure the mean and the variance of the latents over the batches of all processes.

    One pass accumulates exact moments in float64, so the result does not depend on the batch size, the order of the
    images or the number of processes.

    Args:
        tokens: returns the latents (B, C, H, W) of a batch of images, before whitening.
        batches: the batches of this process.
        latent_shape: the shape (C, H, W) of the latents of one image.
        world: this process and its device.
        mirror: whether to count each image a second time, flipped left to right.
        shown: receives the number of images that this process has finished.

    Returns:
        The mean and the population variance, each (C, H, W), float32.
    """
    moments = Moments(torch.Size(latent_shape).numel(), diagonal=True)
    done = 0
    for batch in batches:
        images = batch.to(world.device).pixels()
        for view in (images, images.flip(-1)) if mirror else (images,):
            moments.update(tokens(view).float())
        done += len(batch)
        shown(done)
    moments.reduce(world)
    mean, variance = moments.mean.view(latent_shape), moments.variance.view(latent_shape)
    return mean.float().to(world.device), variance.float().to(world.device)
