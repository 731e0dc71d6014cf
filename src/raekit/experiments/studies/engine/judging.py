"""Judge the small emoji of `training` by networks that took part in no training of a study."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.evaluation.features import Images, ReferenceNetwork, load_networks
from raekit.evaluation.metrics import Accumulator, FrechetDistance
from raekit.evaluation.pairs import METRICS, PairMean
from raekit.evaluation.references import measure_reference, read_reference
from raekit.evaluation.streaming import score_stream
from raekit.evaluation.streams import Reconstructions
from raekit.experiments.studies.engine.training import SIDE
from raekit.models.latent_space import LatentSpace
from raekit.progress import Progress

CLASSIFIER = "classifier:builtin:emoji"
"""The judge that decides."""
JUDGE = "emoji_classifier"
"""The name of its features in a report."""


def reference(folder: Path) -> Path:
    """Return the file with the statistics of the real images of a study in `folder`."""
    return folder / "reference.safetensors"


def measure_real(folder: Path, judges: Sequence[str], quick: bool, progress: Progress) -> None:
    """Measure all emoji (in a quick study the held-out emoji) in the judges' features. A finished file is kept."""
    if not reference(folder).is_file():
        data = DataConfig(source="emoji", split="heldout" if quick else "all", image_size=SIDE)
        networks = {network.name: network for network in map(_load, judges)}
        measure_reference(data, networks, World(), progress=progress).write(reference(folder))


def distances(
    images: Iterable[Images], judges: Sequence[str], folder: Path, others: Sequence[Accumulator] = ()
) -> dict[str, float]:
    """Return the Frechet distance of images to the real images by judge, and the values of other metrics.

    Args:
        images: Batches of images.
        judges: Names of the networks, which `measure_real` has got too.
        folder: Folder of the study.
        others: Further metrics.
    """
    real = read_reference(reference(folder))
    networks = {judge: _load(judge) for judge in judges}
    to_real = [FrechetDistance(network, real.gaussian(network), judge) for judge, network in networks.items()]
    return score_stream(images, [*to_real, *others], World())


def reconstruction(autoencoder: LatentSpace, count: int, judges: Sequence[str], folder: Path) -> dict[str, float]:
    """Return the distances of reconstructed held-out images by judge, and their PSNR as `psnr`."""
    stream = Reconstructions(autoencoder, "emoji", "heldout", {"psnr": METRICS["psnr"]})
    numbers = range(min(count, stream.count))
    return distances(
        stream.batches([numbers], World()), judges, folder, [PairMean(score) for score in stream.scores.values()]
    )


def _load(judge: str) -> ReferenceNetwork:
    (network,) = load_networks(judge, torch.device("cpu")).values()
    return network
