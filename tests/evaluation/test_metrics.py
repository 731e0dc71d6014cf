import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation import metrics
from raekit.evaluation.features import Images, PairScore
from raekit.evaluation.frechet import Gaussian, frechet_distance
from raekit.evaluation.intervals import wilson_interval
from raekit.evaluation.metrics import FDR6, FrechetDistance, FrechetRatio, InceptionScore, NearestNeighbours
from raekit.evaluation.pairs import PairMean, psnr, ssim
from raekit.moments import Moments
from raekit.pictures import quantize


def moments(rows: Tensor) -> Moments:
    result = Moments(rows.shape[1])
    result.update(rows)
    return result


def rows(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + seed


@dataclass(frozen=True)
class Corner:
    """Features of an image: its first `width` values."""

    width: int = 4
    name: str = "corner"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.width]


def batch(images: Tensor, labels: list[int] | None = None, originals: Tensor | None = None) -> Images:
    return Images(images, torch.tensor(labels or [-1] * len(images)), torch.arange(len(images)), originals)


def levels(*vectors: list[int]) -> Tensor:
    """Return images whose `Corner` features are these 8-bit levels, divided by 255."""
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
    with pytest.raises(UserError, match="4 dimensions, but the features of corner have 5"):
        FrechetDistance(Corner(width=5), reference)


def test_frechet_distances_of_inception_have_their_usual_names():
    names = [
        FrechetDistance(Corner(name=name), moments(rows(50, 4, 1))).name
        for name in ("inception", "inception_spatial", "clean_inception", "clean_inception_spatial")
    ]
    assert names == ["fid", "sfid", "clean_fid", "fd_clean_inception_spatial"]


def test_frechet_ratios_are_to_the_distances_of_other_real_images():
    networks = Corner(name="inception"), Corner(width=6, name="six")
    references = [moments(rows(50, network.width, 1) / 9) for network in networks]
    baselines = [moments(rows(50, network.width, 2) / 9) for network in networks]
    metric = FrechetRatio([FrechetDistance(*pair) for pair in zip(networks, references, strict=True)], baselines)
    images = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    metric.update(batch(images))
    metric.reduce(World())
    result = metric.result()
    ratios = [
        frechet_distance(moments(network(batch(images).images)), reference) / frechet_distance(baseline, reference)
        for network, reference, baseline in zip(networks, references, baselines, strict=True)
    ]
    assert list(result) == ["fid", "fd_six", "fdr_fid", "fdr_six", "fdr_mean"]
    assert [result["fdr_fid"], result["fdr_six"]] == pytest.approx(ratios)
    assert result["fdr_mean"] == pytest.approx(sum(ratios) / 2)
    with pytest.raises(UserError, match="fid: the baseline's distance from the reference is 0"):
        FrechetRatio([FrechetDistance(networks[0], gaussian := Gaussian(torch.zeros(4), torch.eye(4)))], [gaussian])


def test_fdr6_is_the_mean_of_six_ratios_to_published_distances():
    """The formula of the released evaluator: each raw distance over its constant, and the arithmetic mean."""
    networks = [Corner(width=4, name=name) for name in FDR6]
    distances = [FrechetDistance(network, Gaussian(torch.zeros(4), torch.eye(4))) for network in networks]
    metric = FrechetRatio(distances, list(FDR6.values()), "fdr6")
    images = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    metric.update(batch(images))
    metric.reduce(World())
    result = metric.result()
    raw = result["fid"]  # all six networks have the same features here
    assert [result[f"fd_{name}"] for name in list(FDR6)[1:]] == [raw] * 5
    ratios = [raw / value for value in (1.68, 56.87, 14.19, 0.04, 0.60, 5.60)]
    assert [value for name, value in result.items() if name.startswith("fdr_")] == pytest.approx(ratios)
    assert result["fdr6"] == pytest.approx(sum(ratios) / 6)


class Logits:
    """Logits: the first values of an image."""

    width, name = 6, "inception_logits"

    def __call__(self, images: Tensor) -> Tensor:
        return 8 * images.flatten(1)[:, : self.width]


def inception_score(logits: Tensor) -> float:
    """Return the Inception Score of all images, computed by its definition."""
    p = logits.double().softmax(1)
    return float((p * (p / p.mean(0)).log()).sum(1).mean().exp())


def numbered(images: Tensor, indices: Tensor) -> Images:
    return Images(images, torch.full((len(images),), -1), indices)


def test_the_inception_score_is_the_mean_over_splits():
    network = Logits()
    images = quantize(torch.rand(23, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    number = InceptionScore(network, 23).order  # number[i] is the place of image i
    parts = [inception_score(network(part)) for part in images[number.argsort()].split(10)]
    for order in torch.arange(23), torch.randperm(23, generator=torch.Generator().manual_seed(1)):
        metric = InceptionScore(network, 23, split_size=10)
        for index in order.split(4):
            metric.update(numbered(images[index], index))
        metric.reduce(World())
        assert metric.result() == {"inception_score": pytest.approx(sum(parts) / 3, rel=1e-12)}
    metric = InceptionScore(network, 23)
    assert metric.split_size == 5000  # ten splits of 50,000 images, as in the literature
    for index in torch.arange(23).split(7):
        given = numbered(images[index], index)
        with torch.device("meta"):  # a default device of the caller changes nothing
            metric.update(given)
    assert metric.result()["inception_score"] == pytest.approx(inception_score(network(images)), rel=1e-12)


def test_the_inception_score_does_not_depend_on_the_order_of_the_classes():
    classes = torch.arange(400) % 4
    scores = []
    for labels in classes, classes.sort().values:
        metric = InceptionScore(Logits(), 400, split_size=100)
        given = numbered(torch.zeros(400, 3, 1, 1), torch.arange(400))
        given._features[metric.network] = 8 * torch.eye(6)[labels]
        metric.update(given)
        scores.append(metric.result()["inception_score"])
    assert scores[1] == pytest.approx(scores[0], rel=0.02)
    assert scores[0] > 3


def test_the_inception_score_of_certain_and_of_equal_predictions():
    certain = torch.eye(6)[torch.arange(12) % 6] * 1000
    for logits, expected in (certain, 6), (torch.zeros(12, 6), 1):
        metric = InceptionScore(Logits(), 12)
        given = batch(torch.zeros(12, 3, 2, 2))
        given._features[metric.network] = logits
        metric.update(given)
        assert metric.result()["inception_score"] == pytest.approx(expected, rel=1e-12)


def test_psnr_of_known_errors():
    originals = torch.full((4, 3, 8, 8), 0.5)
    images = originals + torch.tensor([0.1, 0.01, 1e-6, 0.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(psnr(images, originals), torch.tensor([20.0, 40, 100, 100]).double(), rtol=1e-5, atol=0)


def test_psnr_is_averaged_over_images_not_over_errors():
    originals = levels([100, 0, 0, 0], [100, 0, 0, 0])
    images = levels([151, 0, 0, 0], [100, 0, 0, 0])  # one error of 0.2 among 48 values, and a perfect image
    metric = PairMean(PairScore("psnr", psnr))
    metric.update(batch(images[:1], originals=originals[:1]))
    metric.update(batch(images[1:], originals=originals[1:]))
    assert metric.result() == {"psnr": pytest.approx((10 * math.log10(48 / 0.04) + 100) / 2, rel=1e-6)}
    with pytest.raises(ValueError, match="psnr needs originals"):
        metric.update(batch(images))


def test_ssim_of_known_images():
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(3, 3, 32, 32, generator=generator)
    flat = torch.full((1, 3, 32, 32), 0.2)
    # For two constant images only the comparison of their means remains.
    a, b, c = 0.2, 0.6, 0.01**2
    assert ssim(flat, flat * 3).tolist() == pytest.approx([(2 * a * b + c) / (a * a + b * b + c)], abs=2e-4)
    torch.testing.assert_close(ssim(originals, originals), torch.ones(3, dtype=torch.float64))
    noisy = (originals + 0.2 * torch.randn(originals.shape, generator=generator)).clamp(0, 1)
    assert (ssim(noisy, originals) < 0.9).all()
    torch.testing.assert_close(ssim(noisy[:1], originals[:1]), ssim(noisy, originals)[:1])


def test_ssim_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    images, originals = torch.rand(2, 2, 3, 24, 16, generator=generator, dtype=torch.float64)
    expected = structural_similarity_index_measure(images, originals, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(images, originals), expected)


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


def test_a_tied_vote_goes_to_the_nearest_class():
    bank = torch.tensor([[1.0, 0, 0, 0], [1, 0.2, 0, 0], [1, 0.4, 0, 0], [1, 0.6, 0, 0]])
    images = levels([200, 0, 0, 0])
    for labels, expected in ([1, 0, 0, 1], 1), ([0, 1, 1, 0], 0), ([1, 1, 0, 0], 1):
        metric = NearestNeighbours(Corner(), bank, torch.tensor(labels), k=4)
        metric.update(batch(images, [1]))
        assert metric.result()["knn_accuracy_corner"] == expected


def test_neighbours_closer_than_float32_can_tell_are_in_order():
    near, far = [1.0, 5e-5, 0, 0], [1.0, 1e-4, 0, 0]  # the products of both with the image are 1 in float32
    for bank in (near, far), (far, near):
        metric = NearestNeighbours(Corner(), torch.tensor(bank), torch.tensor([each is near for each in bank]), k=2)
        metric.update(batch(levels([200, 0, 0, 0]), [1]))
        assert metric.result() == {"knn_accuracy_corner": 1.0, "nearest_distance_corner": pytest.approx(5e-5, rel=1e-2)}


def test_the_interval_of_an_accuracy_is_that_of_its_hits():
    # 1 / 49 * 49 is below 1 in float64.
    metric = NearestNeighbours(Corner(), torch.eye(4), torch.tensor([0, 1, 1, 1]), k=1, intervals=True)
    metric.update(batch(levels([200, 0, 0, 0]).expand(49, -1, -1, -1), [0] + [1] * 48))
    result = metric.result()
    assert (result["knn_accuracy_corner_low"], result["knn_accuracy_corner_high"]) == wilson_interval(1, 49)


def test_unlabelled_images_or_banks_have_no_accuracy():
    bank, images = torch.rand(5, 4) + 0.1, torch.rand(3, 3, 4, 4)
    for bank_label, label in product([-1, 0], [-1, 0]):
        metric = NearestNeighbours(Corner(), bank, torch.full((5,), bank_label), k=1)
        metric.update(batch(images, [label] * 3))
        assert ("knn_accuracy_corner" in metric.result()) == (bank_label == label == 0)


def test_banks_that_cannot_be_searched_are_rejected():
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
