"""Compare raekit's metrics with pytorch-fid, torch-fidelity and clean-fid, on the same features and the same network.

    pip install torchvision pytorch-fid torch-fidelity clean-fid
    python -m tools.compare_evaluators [--images 32] [--samples 2000] [--dim 256]

The network has the weights of the reference cases, which are a function of their names. The script prints a Markdown
table, and exits with 1 if a relative difference exceeds its bound.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from cleanfid.fid import frechet_distance as clean_fid_frechet
from cleanfid.resize import build_resizer
from pytorch_fid.fid_score import calculate_frechet_distance as pytorch_fid_frechet
from tests.reference import Given, given_batch, inception_weights
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.evaluation.frechet import frechet_distance
from raekit.evaluation.manifold import KernelDistance, Manifold, PrecisionRecall
from raekit.evaluation.metrics import Accumulator, InceptionScore
from raekit.models.inception import LOGITS, POOL, SPATIAL, Inception, load_inception
from raekit.moments import Moments

CLEAN = build_resizer("clean")
Rows = Iterator[tuple[str, str, str, str, float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=256)
    arguments = parser.parse_args()
    rows = [*networks(arguments.images), *formulas(arguments.samples, arguments.dim)]
    print("| what | peer | raekit | peer's value | relative difference |\n|---|---|---|---|---|")
    for what, peer, ours, theirs, difference, _ in rows:
        print(f"| {what} | {peer} | {ours} | {theirs} | {difference:.1e} |")
    sys.exit(any(difference > bound for *_, difference, bound in rows))


def networks(count: int) -> Rows:
    """Compare features of the same images, computed with the same weights."""
    batch = next(Loader(DataConfig(source="emoji", image_size=64), seed=0).once(count, World()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save(inception_weights(), path)
        ours = load_inception(str(path))(batch.pixels()).split([POOL, LOGITS, SPATIAL], 1)
        names = ["2048", "logits_unbiased"]
        peer = FeatureExtractorInceptionV3("peer", names, feature_extractor_weights_path=str(path))
    for name, a, b in zip(names, ours, peer(batch.images), strict=False):
        yield f"Inception, {name}", "torch-fidelity", f"{a.norm():.4f}", f"{b.norm():.4f}", error(a, b), 1e-5
    theirs = torch.stack([torch.from_numpy(CLEAN(image.permute(1, 2, 0).numpy())) for image in batch.images])
    resized = Inception("clean").resized(batch.images.float())
    a, b = resized, theirs.permute(0, 3, 1, 2)
    yield "clean resize, 64 to 299", "clean-fid", f"{a.norm():.4f}", f"{b.norm():.4f}", error(a, b), 1e-5


def formulas(count: int, dim: int) -> Rows:
    """Compare metrics of the same features."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(dim) + torch.randn(dim, dim, generator=generator) / dim**0.5
    real = torch.randn(count, dim, generator=generator) @ mixing
    fake = 0.95 * torch.randn(count, dim, generator=generator) @ mixing + 0.05
    moments = [Moments(dim), Moments(dim)]
    for each, features in zip(moments, (fake, real), strict=True):
        each.update(features)
    statistics = [fid_features_to_statistics(features.double()) for features in (fake, real)]
    flat = [values for one in statistics for values in one.values()]
    distances = {
        "pytorch-fid (scipy sqrtm)": pytorch_fid_frechet(*flat),
        "clean-fid (scipy sqrtm)": clean_fid_frechet(*flat),
        "torch-fidelity (eigvals)": fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
    }
    for peer, theirs in distances.items():
        yield row("Frechet distance", peer, frechet_distance(*moments), float(theirs), 1e-9)

    network, logits = Given(dim), Given(dim, "inception_logits")
    score = InceptionScore(logits, count, split_size=count // 10)
    ours = {
        **value(PrecisionRecall(network, Manifold(real)), fake),
        **value(KernelDistance(network, real, subsets=1, size=count), fake),
        **value(score, fake),
    }
    theirs = {
        **prc_features_to_metric(fake, real, verbose=False),
        **kid_features_to_metric(fake.double(), real.double(), kid_subsets=1, kid_subset_size=count, verbose=False),
        **isc_features_to_metric(fake[score.order.argsort()], shuffle=False),  # in the splits of `score`
    }
    for name in "precision", "recall":
        yield row(name, "torch-fidelity", ours[name], theirs[name], 1e-6)  # torch-fidelity returns float32
    yield row("KID of all images", "torch-fidelity", ours["kid"], theirs["kernel_inception_distance_mean"], 1e-9)
    yield row("Inception Score", "torch-fidelity", ours["inception_score"], theirs["inception_score_mean"], 1e-9)


def value(metric: Accumulator, features: Tensor) -> dict[str, float]:
    metric.update(given_batch(features, metric.network))  # type: ignore[attr-defined]
    metric.reduce(World())
    return metric.result()


def row(what: str, peer: str, ours: float, theirs: float, bound: float) -> tuple[str, str, str, str, float, float]:
    return what, peer, f"{ours:.9g}", f"{theirs:.9g}", abs(ours - theirs) / abs(theirs), bound


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


if __name__ == "__main__":
    main()
