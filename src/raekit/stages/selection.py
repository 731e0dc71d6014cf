"""Which decoder to keep: the best one for generation, which is not always the last one or the best one by rFID."""

import math
from collections.abc import Callable, Iterator
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
from raekit.evaluation.pairs import METRICS, PairMean
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
            decoded, and the held-out images. Default: the score is the distance of reconstructions.
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


def _is_better(score: float, path: Path) -> bool:
    """Return whether `score` is below the score in the file `path`, or that file has no finite score."""
    best = read_json(path)["score"] if path.is_file() else math.nan
    return not math.isfinite(best) or score < best


def selector(
    config: SelectionConfig,
    data: DataConfig,
    latent_shape: tuple[int, int, int],
    run: Path,
    current: Callable[[], LatentSpace],
    world: World,
) -> Callable[[int], dict[str, float]]:
    """Return a function for `Periodic` that scores the autoencoder of `current()` and exports the best one so far.

    The scores are `reconstruction_fd`, `psnr` and `ssim` of the held-out images of `data`, and `generation_fd` if
    `config` names latents. RUN/selected.json has the step and the score of the best autoencoder.

    Raises:
        UserError: there are fewer than two held-out images, or no default network for them.
    """
    features = config.features or default_features(data.address)[0]
    network = next(iter(load_networks(features, world.device).values()))
    heldout = reference_loader(replace(data, split="heldout"))
    latents = read_generated(Path(config.latents), latent_shape) if config.latents else None
    reference: list[Moments] = []

    def reconstructed(model: LatentSpace) -> Iterator[Images]:
        for batch in images_of(heldout.once(BATCH, world), world):
            yield Images(reconstruct(model, batch.images), batch.labels, batch.indices, batch.images)

    def decoded(model: LatentSpace, latents: Tensor) -> Iterator[Images]:
        for part in torch.arange(len(latents)).split(BATCH)[world.rank :: world.size]:
            with torch.no_grad():
                images = model.decode(model.whiten(latents[part].to(world.device)))
            yield Images(images, torch.full_like(part, -1), part)

    def call(step: int) -> dict[str, float]:
        if not reference:
            stream = images_of(heldout.once(BATCH, world), world)
            reference.append(reference_moments(stream, network, world))
        model = current()
        distance = FrechetDistance(network, reference[0], "reconstruction_fd")
        pairs = [PairMean(PairScore(*pair)) for pair in METRICS.items()]
        values = score_stream(reconstructed(model), [distance, *pairs], world)
        if latents is not None:
            distance = FrechetDistance(network, reference[0], "generation_fd")
            values |= score_stream(decoded(model, latents), [distance], world)
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
