"""Which decoder to keep: the one that is best for generation, which is not always the last, nor the best by rFID."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from raekit.config import configclass, read_json, to_json
from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.evaluate import BATCH, evaluate, images_of, reference_moments
from raekit.evaluation.features import EncoderFeatures, Images, PairScore
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.pairs import PairMean, psnr, ssim
from raekit.files import whole
from raekit.inference.model import reconstruct
from raekit.models.encoders import load_encoder
from raekit.models.latent_space import LatentSpace
from raekit.moments import Moments
from raekit.weights import is_real, read_weights


@configclass
class SelectionConfig:
    """Score the averaged decoder every `every` steps, and keep the best so far in RUN/artifact.

    Best is the smallest Frechet distance to the held-out images, in the features of the encoder `features`: of the
    decoded `latents`, a file that `raekit latents generate` made, or without one of reconstructions.
    """

    every: int
    latents: str | None = None
    features: str = "builtin:vit-tiny"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"selection.every: {self.every} must be at least 1")


def read_generated(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Generated latents (N, C, h, w), not whitened; UserError if the file holds none of this shape."""
    latents = read_weights(path).get("unwhitened")
    if not is_real(latents) or latents.shape[1:] != shape or len(latents) < 2 or not latents.isfinite().all():
        found = tuple(latents.shape) if is_real(latents) else "none"
        raise UserError(
            f"{path}: needs two generated latents or more of shape {shape}, all finite, has {found}; make them with "
            "`raekit latents generate`"
        )
    return latents.float()


def scorer(
    config: SelectionConfig,
    data: DataConfig,
    latent_shape: tuple[int, int, int],
    world: World,
    more: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> Callable[[LatentSpace], dict[str, float]]:
    """A function that scores autoencoders on the held-out images of `data`, and on the latents of `config`.

    Gives `reconstruction_fd`, psnr and ssim, and `generation_fd` if there are latents. `more` are further
    {name: (images, originals) -> (B,)} of reconstructions.
    """
    network = EncoderFeatures(load_encoder(config.features).to(world.device))
    heldout = Loader(replace(data, split="heldout", flip=False, crop="center"), seed=0)
    latents = read_generated(Path(config.latents), latent_shape) if config.latents else None
    pairs = {"psnr": psnr, "ssim": ssim, **(more or {})}
    reference: list[Moments] = []

    def reconstructed(model: LatentSpace) -> Iterator[Images]:
        for batch in heldout.once(BATCH, world):
            images = batch.to(world.device).pixels()
            yield Images(reconstruct(model, images), batch.labels, images)

    def decoded(model: LatentSpace, latents: Tensor) -> Iterator[Images]:
        for part in latents.split(BATCH)[world.rank :: world.size]:
            with torch.no_grad():
                yield Images(model.decode(model.whiten(part.to(world.device))), torch.full((len(part),), -1))

    def score(model: LatentSpace) -> dict[str, float]:
        if not reference:
            stream = images_of(heldout.once(BATCH, world), world)
            reference.append(reference_moments(stream, network, world))
        metrics = [FrechetDistance(network, reference[0], "reconstruction_fd")]
        scores = [PairMean(PairScore(*pair)) for pair in pairs.items()]
        values = evaluate(reconstructed(model), [*metrics, *scores], world)
        if latents is not None:
            metrics = [FrechetDistance(network, reference[0], "generation_fd")]
            values |= evaluate(decoded(model, latents), metrics, world)
        return values

    return score


def _is_better(score: float, path: Path) -> bool:
    """Than that in the file `path`, if there is one; one that is not a number is no score."""
    return not path.is_file() or score < read_json(path)["score"] or not math.isfinite(read_json(path)["score"])


def selector(
    config: SelectionConfig,
    data: DataConfig,
    latent_shape: tuple[int, int, int],
    run: Path,
    current: Callable[[], LatentSpace],
    world: World,
) -> Callable[[int], dict[str, float]]:
    """A function for `Periodic` that scores the autoencoder of `current()` and exports it if it is the best so far.

    RUN/selected.json has the step and the score of the best.
    """
    score = scorer(config, data, latent_shape, world)

    def call(step: int) -> dict[str, float]:
        model = current()
        values = score(model)
        chosen = values["generation_fd" if config.latents else "reconstruction_fd"]
        path = run / "selected.json"
        # Said by one process: another may see the file that this one writes, or a score of other last bits.
        if world.any(world.is_main and _is_better(chosen, path)):
            model.save(run / "artifact", world)
            if world.is_main:
                with whole(path) as partial:
                    partial.write_text(to_json({"step": step, "score": chosen}))
            world.barrier()  # whoever reads RUN/artifact next finds the whole of it
        return values

    return call
