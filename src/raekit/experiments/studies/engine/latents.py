"""Latents of images, and latents that a denoiser generates."""

import torch
from torch import Tensor

from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.evaluation.streaming import BATCH
from raekit.flow.sampling import Sampling, sample_latents
from raekit.models.denoiser import Denoiser
from raekit.models.latent_space import LatentSpace
from raekit.progress import Progress, silent


def encode(autoencoder: LatentSpace, images: DataConfig) -> tuple[Tensor, Tensor]:
    """Return the whitened latents (N, C, h, w) and the classes (N,) of all images."""
    batches = list(Loader(images, seed=0).once(BATCH, World()))
    latents = [autoencoder.encode(batch.pixels()) for batch in batches]
    return torch.cat(latents), torch.cat([batch.labels for batch in batches])


def generate(denoiser: Denoiser, count: int, seed: int, sampling: Sampling, progress: Progress = silent) -> Tensor:
    """Return whitened latents (count, C, h, w), of each class in turn."""
    parts = []
    for indices in torch.arange(count).split(BATCH):
        labels = indices % denoiser.config.num_classes
        parts.append(sample_latents(denoiser, labels, indices, seed, sampling, "cpu"))
        progress("generated latents", int(indices[-1]) + 1, count)
    return torch.cat(parts)
