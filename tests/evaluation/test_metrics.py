import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation import metrics
from raekit.evaluation.features import Images
from raekit.evaluation.metrics import (
    FrechetDistance,
    NearestNeighbours,
    PairMean,
    frechet_distance,
    psnr,
    ssim,
)
from raekit.moments import Moments


def moments(rows: Tensor) -> Moments:
    result = Moments(rows.shape[1])
    result.update(rows)
    return result


def gaussian(mean: Tensor, covariance: Tensor, count: int = 10_000) -> Moments:
    result = Moments(len(mean))
    result.count, result.mean, result.scatter = count, mean.double(), covariance.double() * (count - 1)
    return result


def rows(count: int, dim: int, seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(count, rank or dim, generator=generator, dtype=torch.float64) @ mixing + seed


# Frechet distance


@pytest.mark.parametrize("dim", [3, 64])
def test_frechet_distance_agrees_with_sqrtm(dim):
    a, b = moments(rows(400, dim, 1)), moments(rows(500, dim, 2))
    root = np.trace(scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_of_diagonal_gaussians():
    deviations = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    a, b = (gaussian(m, s.square().diag()) for m, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("rank", [None, 5])
def test_frechet_distance_is_zero_on_itself(rank, scale):
    a = moments(scale * rows(300, 40, 1, rank))
    assert 0 <= frechet_distance(a, a) < 1e-11 * a.covariance.trace()


def test_frechet_distance_without_full_rank():
    """In the plane that both distributions live in, all is of full rank: an isometry changes no distance."""
    flat_a, flat_b = rows(300, 8, 1), rows(300, 8, 2)
    plane = torch.linalg.qr(rows(100, 8, 3))[0].T
    expected = frechet_distance(moments(flat_a), moments(flat_b))
    assert frechet_distance(moments(flat_a @ plane), moments(flat_b @ plane)) == pytest.approx(expected, rel=1e-10)
    # Orthogonal subspaces share nothing: the traces alone remain.
    a, b = (gaussian(torch.zeros(4), torch.tensor(d).diag()) for d in ([1.0, 2, 0, 0], [0.0, 0, 3, 4]))
    assert frechet_distance(a, b) == pytest.approx(10, rel=1e-12)


def test_few_samples_bring_a_warning(caplog):
    a, b = moments(rows(41, 40, 1)), moments(rows(40, 40, 2))
    assert frechet_distance(a, a) >= 0
    assert not caplog.records
    assert math.isfinite(frechet_distance(a, b))
    assert "40 samples in 40 dimensions" in caplog.text


def test_features_that_are_not_finite_give_nan_and_a_warning(caplog):
    bad = rows(100, 4, 1)
    bad[3, 2] = math.nan
    assert math.isnan(frechet_distance(moments(bad), moments(rows(100, 4, 2))))
    assert "not finite" in caplog.text


def test_frechet_distance_of_the_reference_case(golden):
    case = np.load(golden("metrics_on_features.npz"))
    a, b = (moments(torch.from_numpy(case[key])) for key in "AB")
    assert frechet_distance(a, b) == pytest.approx(float(case["fid_A_B"]), rel=1e-6)


# Metrics of batches


@dataclass(frozen=True)
class Corner:
    """Features of an image: its first `width` numbers."""

    width: int = 4
    name: str = "corner"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.width]


def batch(images: Tensor, labels: list[int] | None = None, originals: Tensor | None = None) -> Images:
    return Images(images, torch.tensor(labels or [-1] * len(images)), originals)


def levels(*vectors: list[int]) -> Tensor:
    """Images whose `Corner` features are these 8-bit numbers over 255."""
    images = torch.zeros(len(vectors), 3, 4, 4)
    images.view(len(vectors), -1)[:, : len(vectors[0])] = torch.tensor(vectors) / 255
    return images


def test_frechet_distance_of_images():
    images = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reference = moments(rows(50, 4, 1))
    metric = FrechetDistance(Corner(), reference)
    for part in images.split(13):
        metric.update(batch(part))
    metric.reduce(World())
    expected = frechet_distance(moments(Corner()(batch(images).images)), reference)
    assert metric.result() == {"fd_corner": pytest.approx(expected, rel=1e-11)}
    assert FrechetDistance(Corner(), reference, "train").name == "train"
    with pytest.raises(UserError, match="4 dimensions, the features of corner have 5"):
        FrechetDistance(Corner(width=5), reference)


def test_psnr_of_known_errors():
    originals = torch.full((4, 3, 8, 8), 0.5)
    images = originals + torch.tensor([0.1, 0.01, 1e-6, 0.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(psnr(images, originals), torch.tensor([20.0, 40, 100, 100]).double(), rtol=1e-5, atol=0)


def test_psnr_is_averaged_over_images_not_over_errors():
    originals = levels([100, 0, 0, 0], [100, 0, 0, 0])
    images = levels([151, 0, 0, 0], [100, 0, 0, 0])  # one error of 0.2 among 48 numbers, and a perfect image
    metric = PairMean("psnr", psnr)
    metric.update(batch(images[:1], originals=originals[:1]))
    metric.update(batch(images[1:], originals=originals[1:]))
    assert metric.result() == {"psnr": pytest.approx((10 * math.log10(48 / 0.04) + 100) / 2, rel=1e-6)}
    with pytest.raises(ValueError, match="psnr compares with originals"):
        metric.update(batch(images))


def test_ssim_of_known_images():
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(3, 3, 32, 32, generator=generator)
    flat = torch.full((1, 3, 32, 32), 0.2)
    # For two constant images only the comparison of their means remains.
    a, b, c = 0.2, 0.6, 0.01**2
    assert ssim(flat, flat * 3).tolist() == pytest.approx([(2 * a * b + c) / (a * a + b * b + c)], abs=2e-4)
    torch.testing.assert_close(ssim(originals, originals), torch.ones(3))
    noisy = (originals + 0.2 * torch.randn(originals.shape, generator=generator)).clamp(0, 1)
    assert (ssim(noisy, originals) < 0.9).all()
    assert torch.equal(ssim(noisy[:1], originals[:1]), ssim(noisy, originals)[:1])


def test_nearest_neighbours_vote_and_distance():
    # Unit vectors along the axes, and one between the first two.
    bank = torch.tensor([[2.0, 0, 0, 0], [3, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 5, 0], [0, 0, 4, 0.4]])
    labels = torch.tensor([0, 0, 1, 2, 2])
    images = levels([200, 0, 0, 0], [0, 100, 0, 0], [0, 0, 0, 50], [0, 0, 90, 0])
    metric = NearestNeighbours(Corner(), bank, labels, k=3)
    metric.update(batch(images, [0, 1, 2, -1]))
    metric.reduce(World())
    # The second image's neighbours are 1, 0, 0: two votes against its own class. The fourth has no label.
    # Distances: 0, 0, from the last axis to (0, 0, 4, 0.4) scaled, 0.
    assert metric.result() == {
        "knn_accuracy_corner": pytest.approx(2 / 3),
        "nearest_distance_corner": 0.0,
    }
    far = math.sqrt(2 - 2 * 0.4 / math.hypot(4, 0.4))
    assert metric.distances[0].tolist() == pytest.approx([0, 0, far, 0], abs=1e-7)


def test_a_drawn_vote_goes_to_the_nearest():
    bank = torch.tensor([[1.0, 0, 0, 0], [1, 0.2, 0, 0], [1, 0.4, 0, 0], [1, 0.6, 0, 0]])
    images = levels([200, 0, 0, 0])
    for labels, expected in ([1, 0, 0, 1], 1), ([0, 1, 1, 0], 0), ([1, 1, 0, 0], 1):
        metric = NearestNeighbours(Corner(), bank, torch.tensor(labels), k=4)
        metric.update(batch(images, [1]))
        assert metric.result()["knn_accuracy_corner"] == expected


def test_unlabelled_images_or_banks_have_no_accuracy():
    bank, images = torch.rand(5, 4) + 0.1, torch.rand(3, 3, 4, 4)
    for bank_label, label in product([-1, 0], [-1, 0]):
        metric = NearestNeighbours(Corner(), bank, torch.full((5,), bank_label), k=1)
        metric.update(batch(images, [label] * 3))
        assert ("knn_accuracy_corner" in metric.result()) == (bank_label == label == 0)


def test_banks_that_cannot_be_searched_are_refused():
    with pytest.raises(UserError, match="k = 6 neighbours in a bank of 5"):
        NearestNeighbours(Corner(), torch.rand(5, 4), torch.zeros(5), k=6)
    with pytest.raises(UserError, match="the bank has 3 dimensions"):
        NearestNeighbours(Corner(), torch.rand(50, 3), torch.zeros(50))


def test_a_search_in_blocks_finds_what_a_full_search_finds(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(100, 6, generator=generator))
    queries = torch.cat([bank[40:42], torch.nn.functional.normalize(torch.randn(9, 6, generator=generator))])
    expected, rows = torch.cdist(queries.double(), bank.double()).topk(7, largest=False)
    monkeypatch.setattr(metrics, "_BLOCK", 8)
    distances, index = metrics.nearest(queries, bank, 7)
    assert torch.equal(index, rows)
    torch.testing.assert_close(distances, expected, rtol=1e-6, atol=1e-6)
    assert distances[:2, 0].tolist() == [0, 0]
