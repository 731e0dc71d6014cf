"""Decoded midpoints between images and similar training images in latents, for iFID (arXiv 2603.05630)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raekit import randomness
from raekit.data.loader import DataConfig
from raekit.data.sources import absolute
from raekit.data.sources.base import Split
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import Images
from raekit.evaluation.streaming import BATCH, images_of
from raekit.evaluation.streams import RealImages
from raekit.flow.sampling import slerp
from raekit.models.latent_space import LatentSpace
from raekit.progress import Progress, silent
from raekit.weights import fingerprint

NEAREST = 10
"""The most similar training images, one of which is drawn."""

QUERIES = 4 * 2**30
"""The latents that are held at once while the training images pass by, in bytes."""


class Interpolations:
    """Images halfway between held-out images and similar training images, in the latents of an autoencoder.

    For each image, the training images with the largest cosine similarity of whitened latents are found, and one of
    them is drawn with probability softmax(-mean squared difference). The two latents are interpolated along the great
    circle, each with its own length, and decoded. No denoiser takes part: if the midpoints look real, the latents are
    easy to model.

    Args:
        autoencoder: the autoencoder.
        source: the address of the held-out images.
        split: their split.
        training: the address of the dataset whose training images are searched.
        seed: seed of the draws.
        batch_size: images at once.
        workers: processes that decode images.
        progress: called after each batch of the search.

    Raises:
        UserError: the held-out images are training images, or an image is unreadable, when it is read.
    """

    def __init__(
        self,
        autoencoder: LatentSpace,
        source: str,
        split: Split,
        *,
        training: str,
        seed: int = 0,
        batch_size: int = BATCH,
        workers: int = 0,
        progress: Progress = silent,
    ):
        if absolute(source) == absolute(training) and split != "heldout":
            raise UserError(
                f"interpolate: the reference has the images of {source} ({split}), so each image would be its own "
                "neighbour; give a reference of held-out images (raekit reference --split heldout)"
            )
        size = autoencoder.image_size
        self.autoencoder, self.seed, self.progress = autoencoder, seed, progress
        self.originals = RealImages(source, split, size, batch_size, workers)
        self.training = RealImages(training, "train", size, batch_size, workers, DataConfig.max_unreadable)
        self.count, self.image_size, self.source = self.originals.count, size, source
        self.classes = self.originals.classes
        self.split: Split = split

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        """Yield the midpoints of the images in `chunks`. All processes call this, and share the search."""
        drawn = self._neighbours(world) if world.any(len(chunks) > 0) else []
        return self._decoded(chunks, drawn, world)

    @torch.no_grad()
    def _decoded(self, chunks: Sequence[range], drawn: Sequence[int], world: World) -> Iterator[Images]:
        numbers = (number for chunk in chunks for number in chunk)
        partners = images_of(self.training.loader.read((range(drawn[n], drawn[n] + 1) for n in numbers), world), world)
        half = torch.tensor([0.5], device=world.device)
        for batch in self.originals.batches(chunks, world):
            ours = self.autoencoder.encode(batch.images)
            theirs = self.autoencoder.encode(torch.cat([next(partners).images for _ in range(len(batch))]))
            middle = torch.cat([slerp(a, b, half) for a, b in zip(ours, theirs, strict=True)])
            yield Images(self.autoencoder.decode(middle), batch.labels, batch.indices)

    @torch.no_grad()
    def _neighbours(self, world: World) -> list[int]:
        """Return the number of the training image that is drawn for each image."""
        drawn: list[int] = []
        held = max(QUERIES // (4 * math.prod(self.autoencoder.latent_shape)), 1)
        for first in range(0, self.count, held):
            numbers = range(first, min(first + held, self.count))
            batches = self.originals.batches([numbers], world)
            queries = torch.cat([self.autoencoder.encode(batch.images).flatten(1) for batch in batches])
            _, differences, training = self._nearest(queries, first, world)
            chances = (-differences).softmax(1).cumsum(1)
            uniform = randomness.uniform(self.seed, "interpolation", numbers)[:, None].double()
            place = (chances < uniform * chances[:, -1:]).sum(1, keepdim=True)
            drawn += training.gather(1, place).flatten().tolist()
        return drawn

    def _nearest(self, queries: Tensor, first: int, world: World) -> tuple[Tensor, Tensor, Tensor]:
        """Return cosine, mean squared difference and number of the most similar training images, each (Q, NEAREST)."""
        found = [queries.new_zeros(len(queries), 0).double().cpu() for _ in range(2)]
        best = (found[0], found[1], torch.zeros(len(queries), 0, dtype=torch.int64))
        lengths, done = queries.norm(dim=1, keepdim=True), 0
        for batch in images_of(self.training.loader.once(self.training.batch_size, world), world):
            latents = self.autoencoder.encode(batch.images).flatten(1)
            products, others = queries @ latents.mT, latents.norm(dim=1)
            squares = lengths.square() + others.square() - 2 * products
            new = (products / (lengths * others)).double().cpu(), (squares / queries.shape[1]).double().cpu()
            best = _most_similar([best, (*new, batch.indices.cpu().expand(len(queries), -1))])
            done = min(done + len(batch) * world.size, self.training.count)
            compared = first * self.training.count + done * len(queries)
            self.progress("neighbours", compared, self.count * self.training.count, unit=0)
        return _most_similar(world.gather(best))

    def settings(self) -> dict[str, Any]:
        return {
            "interpolations": {"training": self.training.source, "nearest": NEAREST, "seed": self.seed},
            "weights": {"autoencoder": fingerprint(self.autoencoder.state_dict(), self.autoencoder.config)},
            "batch_size": self.originals.batch_size,
        }


def _most_similar(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Join candidates (cosine, difference, number) and keep the most similar; of equal ones, the smaller number."""
    cosine, difference, number = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    order = number.argsort(1)
    order = order.gather(1, cosine.gather(1, order).sort(dim=1, descending=True, stable=True)[1])[:, :NEAREST]
    return cosine.gather(1, order), difference.gather(1, order), number.gather(1, order)
