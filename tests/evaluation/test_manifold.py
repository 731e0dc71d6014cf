"""Metrics that keep all features: precision and recall, KID."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation import manifold
from raekit.evaluation.features import Images
from raekit.evaluation.manifold import KernelDistance, Manifold, PrecisionRecall
from raekit.evaluation.metrics import InceptionScore
from raekit.evaluation.streaming import score_stream

ALONE = World()


class Rows:
    """Features: all values of an image."""

    def __init__(self, width: int = 12, name: str = "inception"):
        self.width, self.name = width, name

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def pictures(count: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 + 0.1 * torch.randn(count, 3, 2, 2, generator=generator)
    return (images + shift).clamp(0, 1).mul(255).round().div(255)


def stream(images: Tensor, size: int, world: World = ALONE):
    """Yield the batches of one process: every `world.size`-th batch, as a generator gives them."""
    for first in range(world.rank * size, len(images), size * world.size):
        part = images[first : first + size]
        numbers = torch.arange(first, first + len(part))
        yield Images(part, torch.full((len(part),), -1), numbers)


def by_definition(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    real, fake = (x.flatten(1).double() for x in (real, fake))
    radii = [torch.cdist(x, x).sort(1).values[:, k] for x in (real, fake)]
    across = torch.cdist(real, fake)
    precision = (across <= radii[0][:, None]).any(0).double().mean()
    return float(precision), float((across <= radii[1]).any(1).double().mean())


def values(real: Tensor, fake: Tensor, k: int = 3, network: Rows | None = None) -> dict[str, float]:
    network = network or Rows()
    return score_stream(stream(fake, 7), [PrecisionRecall(network, Manifold(network(real), k))], ALONE)


@pytest.mark.parametrize("tile", [4096, 16])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_the_definition(k: int, tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifold, "TILE", tile)
    real, fake = pictures(83, 1), pictures(61, 2, shift=0.06)
    precision, recall = by_definition(real, fake, k)
    assert 0.1 < recall < 0.9
    assert 0.1 < precision < 0.9
    assert values(real, fake, k) == {"precision": precision, "recall": recall}


def test_precision_and_recall_of_other_networks_are_named_after_them():
    assert list(values(pictures(9, 1), pictures(9, 2), network=Rows(name="vit"))) == ["precision_vit", "recall_vit"]


def test_equal_images_are_at_no_distance():
    """Four copies of an image have radius zero. The ball contains the other copies, and nothing else."""
    copies = pictures(1, 1).expand(4, -1, -1, -1)
    assert values(copies, torch.cat([copies[:1], pictures(4, 2)]))["precision"] == 0.2
    real = pictures(30, 3)
    assert values(real, real) == {"precision": 1.0, "recall": 1.0}
    for seed in range(20):  # a distance is rounded differently in a small and a large block
        others = 37 * torch.randn(61, 500, generator=torch.Generator().manual_seed(seed))
        points = Manifold(torch.cat([others[:1].expand(4, -1), others[1:]]))
        assert points.covers(others[:1]).all()
        assert not points.covers(others[:1] + 40).any()


def test_small_differences_next_to_a_large_mean_are_seen():
    real, fake = pictures(40, 1).flatten(1), pictures(40, 2).flatten(1)
    far = 1000.0  # in float32 arithmetic the distances would be noise
    metric = PrecisionRecall(Rows(), Manifold(real + far))
    given = Images(torch.zeros(40, 3, 2, 2), torch.zeros(40).long(), torch.arange(40))
    given._features[metric.network] = fake + far
    metric.update(given)
    metric.reduce(ALONE)
    assert metric.values == list(by_definition(real + far, fake + far, 3))


def test_features_that_cannot_be_compared_are_rejected(caplog):
    with pytest.raises(UserError, match="need more than 3 images, and there are 3"):
        Manifold(torch.rand(3, 12))
    with pytest.raises(UserError, match="need more than 3 images, and there are 2"):
        values(pictures(9, 1), pictures(2, 1))
    for metric in (lambda x: PrecisionRecall(Rows(), Manifold(x)), lambda x: KernelDistance(Rows(), x)):
        with pytest.raises(UserError, match="the reference has 5 dimensions, but the features of inception have 12"):
            metric(torch.rand(50, 5))
    metric = PrecisionRecall(Rows(), Manifold(torch.full((9, 12), math.nan)))
    assert all(math.isnan(value) for value in score_stream(stream(pictures(9, 1), 3), [metric], ALONE).values())
    assert "not finite" in caplog.text


def kid_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Return KID, computed by sums over pairs."""

    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (n * (n - 1))
    return within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / n**2


def test_kid_of_all_images_agrees_with_the_definition():
    real, fake = pictures(11, 1), pictures(11, 2, shift=0.05)  # of 12 features
    metric = KernelDistance(Rows(), Rows()(real), subsets=3, size=11)
    result = score_stream(stream(fake, 5), [metric], ALONE)
    expected = kid_by_definition(*(x.flatten(1).double().numpy() for x in (real, fake)))
    assert result == {"kid": pytest.approx(expected, rel=1e-9), "kid_std": pytest.approx(0, abs=1e-12)}


def test_kid_is_unbiased_and_its_deviation_is_over_subsets():
    reference = Rows()(pictures(600, 1))
    same, other = (
        score_stream(stream(pictures(500, 2, shift), 100), [KernelDistance(Rows(), reference, 60, 40)], ALONE)
        for shift in (0.0, 0.1)
    )
    assert abs(same["kid"]) < 3 * same["kid_std"] / 60**0.5 + 1e-4
    assert other["kid"] > 5 * other["kid_std"] > 0
    metric = KernelDistance(Rows(), reference)
    assert metric.subsets == 100
    metric.values = torch.tensor([1.0, 3.0])
    assert metric.result() == {"kid": 2.0, "kid_std": 1.0}
    with pytest.raises(UserError, match="subsets of 1000 images, and there are 500"):
        score_stream(stream(pictures(500, 2), 100), [KernelDistance(Rows(), reference)], ALONE)


def everything(world: World, size: int) -> dict[str, float]:
    network, logits = Rows(), Rows(name="inception_logits")
    reference = network(pictures(80, 1))
    metrics = [
        PrecisionRecall(network, Manifold(reference)),
        KernelDistance(network, reference, subsets=5, size=20),
        InceptionScore(logits, 61, split_size=16),
    ]
    return score_stream(stream(pictures(61, 2, shift=0.06), size, world), metrics, world)


def test_values_depend_neither_on_batch_size_nor_on_processes(run_ranks):
    one = everything(ALONE, 61)
    assert everything(ALONE, 8) == pytest.approx(one, rel=1e-9)
    for found in run_ranks(everything, 2, 8):
        assert found == pytest.approx(one, rel=1e-9)
