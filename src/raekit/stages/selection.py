"""Which decoder to keep: the best one for generation, which is not always the last one or the best one by rFID."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from raekit.config import Defines, Interval, Place, configclass, read_json, to_json
from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import UserError, whole_number
from raekit.evaluation.features import Images, PairScore, default_features, load_networks
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.pairs import PairMean, psnr, ssim
from raekit.evaluation.references import reference_loader
from raekit.evaluation.streaming import BATCH, images_of, reference_moments, score_stream
from raekit.files import whole
from raekit.inference.model import reconstruct
from raekit.models.latent_space import LatentSpace
from raekit.moments import Moments
from raekit.weights import is_real, read_weights


@configclass
class SelectionConfig:
    """Keep the best averaged decoder in RUN/artifact: the one with the smallest Frechet distance to held-out images.

    Attributes:
        every: Steps between scores.
        latents: A file that `raekit latents generate` wrote. The score is the distance between these latents,
            decoded, and the held-out images. Default: the score is the distance of
            reconstructions.
        features: The network whose features are compared, as in `raekit evaluate`. Only the built-in images have a
            default.
    """

    every: Interval
    latents: Defines[Place | None] = None
    features: Defines[Place | None] = None

    def __post_init__(self) -> None:
        whole_number("selection.every", self.every, 1)


def read_generated(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read generated latents (N, C, h, w), not whitened; UserError if the file holds none of this shape."""
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
    """Return a function that scores autoencoders on the held-out images of `data`, and on the latents of `config`.

    The scores are `reconstruction_fd`, `psnr`, `ssim`, the scores in `more`, and `generation_fd` if there are latents.

    Args:
        config: what to score.
        data: the training data.
        latent_shape: shape (C, h, w) of the latents.
        world: the processes.
        more: further scores of reconstructions, {name: (images, originals) -> (B,)}.

    Raises:
        UserError: there are fewer than two held-out images, or no default network for them.
    """
    features = config.features or default_features(data.address)[0]
    network = next(iter(load_networks(features, world.device).values()))
    heldout = reference_loader(replace(data, split="heldout", flip=False, crop="center"))
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
        values = score_stream(reconstructed(model), [*metrics, *scores], world)
        if latents is not None:
            metrics = [FrechetDistance(network, reference[0], "generation_fd")]
            values |= score_stream(decoded(model, latents), metrics, world)
        return values

    return score


def _is_better(score: float, path: Path) -> bool:
    """Return whether `score` is below the score in the file `path`, or that file has no finite score."""
    return not path.is_file() or score < read_json(path)["score"] or not math.isfinite(read_json(path)["score"])


def selector(
    config: SelectionConfig,
    data: DataConfig,
    latent_shape: tuple[int, int, int],
    run: Path,
    current: Callable[[], LatentSpace],
    world: World,
) -> Callable[[int], dict[str, float]]:
    """Return a function for `Periodic` that scores the autoencoder of `current()` and exports the best one so far.

    RUN/selected.json has the step and the score of the best one.
    """
    score = scorer(config, data, latent_shape, world)

    def call(step: int) -> dict[str, float]:
        model = current()
        values = score(model)
        chosen = values["generation_fd" if config.latents else "reconstruction_fd"]
        path = run / "selected.json"
        # One process decides: another process may see the file that this one writes, or a score with other last bits.
        if world.any(world.is_main and _is_better(chosen, path)):
            model.save(run / "artifact", world)
            if world.is_main:
                with whole(path) as partial:
                    partial.write_text(to_json({"step": step, "score": chosen}), "utf-8")
            world.barrier()  # the next reader of RUN/artifact finds all of it
        return values

    return call
