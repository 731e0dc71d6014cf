"""Measuring the latent statistics of an encoder."""

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
    """Mean and population variance, each (C, H, W), of `tokens(images)` over all processes' batches.

    Exact in one pass, in float64: independent of batch size, order and number of processes. `mirror` counts
    each image a second time, flipped left to right. `tokens` gives un-whitened latents (B, C, H, W).
    `shown` is called with the number of images that this process has done.
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
