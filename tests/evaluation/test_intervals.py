"""Intervals contain the true value as often as they claim."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import Images
from raekit.evaluation.frechet import Gaussian, frechet_distance
from raekit.evaluation.intervals import wilson_interval
from raekit.evaluation.manifold import Manifold, PrecisionRecall
from raekit.evaluation.metrics import FrechetDistance, FrechetRatio, NearestNeighbours
from raekit.evaluation.streaming import score_stream
from raekit.moments import Moments

ALONE = World()
DIM = 4


class Rows:
    name, width = "rows", DIM

    def __call__(self, images: Tensor) -> Tensor:
        raise AssertionError("known")


NETWORK = Rows()
REFERENCE = Gaussian(torch.zeros(DIM), torch.eye(DIM))


def batch(rows: Tensor, first: int = 0) -> Images:
    return Images.gone({NETWORK: rows}, torch.zeros(len(rows)).long(), torch.arange(first, first + len(rows)))


def scored(rows: Tensor, size: int = 1000) -> dict[str, float]:
    parts = [batch(part, first) for first, part in zip(range(0, len(rows), size), rows.split(size), strict=True)]
    return score_stream(parts, [FrechetDistance(NETWORK, REFERENCE, intervals=True)], ALONE)


def test_an_interval_contains_the_expected_distance_and_the_bias_is_the_bias_of_few_images():
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.6, 1.4, DIM)
    exact = frechet_distance(Gaussian(torch.zeros(DIM), scale.diag().square()), REFERENCE)
    found = [scored(torch.randn(400, DIM, generator=generator) * scale) for _ in range(100)]
    mean = sum(values["fd_rows"] for values in found) / len(found)
    inside = sum(values["fd_rows_low"] <= mean <= values["fd_rows_high"] for values in found) / len(found)
    assert 0.86 <= inside <= 0.99
    bias = sum(values["fd_rows_bias"] for values in found) / len(found)
    assert bias == pytest.approx(mean - exact, rel=0.35)
    assert mean > exact


def test_the_interval_agrees_with_the_definition_of_the_jackknife():
    rows = 1 + torch.randn(90, DIM, generator=torch.Generator().manual_seed(3)).double()
    rests = []
    for left_out in range(20):
        moments = Moments(DIM)
        moments.update(rows[torch.arange(90) % 20 != left_out])
        rests.append(frechet_distance(moments, REFERENCE))
    values, mean = scored(rows, 13), sum(rests) / 20
    deviation = math.sqrt(19 / 20 * sum((rest - mean) ** 2 for rest in rests))
    assert values["fd_rows_high"] - values["fd_rows"] == pytest.approx(2.093024 * deviation, rel=1e-6)
    assert values["fd_rows"] - values["fd_rows_low"] == pytest.approx(2.093024 * deviation, rel=1e-6)
    assert values["fd_rows_low"] > 0
    assert values["fd_rows_bias"] == pytest.approx(19 * (mean - values["fd_rows"]), rel=1e-6)


def test_intervals_change_no_score_and_do_not_depend_on_the_batch_size():
    rows = torch.randn(100, DIM, generator=torch.Generator().manual_seed(1))
    plain = score_stream([batch(rows)], [FrechetDistance(NETWORK, REFERENCE)], ALONE)
    values = scored(rows)
    assert list(values) == ["fd_rows", "fd_rows_low", "fd_rows_high", "fd_rows_bias"]
    assert values["fd_rows"] == plain["fd_rows"]
    assert scored(rows, 7) == pytest.approx(values, rel=1e-9)
    others = Gaussian(torch.ones(DIM), torch.eye(DIM))
    distance = FrechetDistance(NETWORK, REFERENCE, intervals=True)
    ratio = score_stream([batch(rows)], [FrechetRatio([distance], [others])], ALONE)
    assert ratio["fdr_mean"] == ratio["fdr_rows"] == values["fd_rows"] / 4
    assert ratio["fd_rows_low"] == values["fd_rows_low"]


def ranks(world: World, rows: Tensor) -> dict[str, float]:
    parts = [batch(rows[first : first + 9], first) for first in range(9 * world.rank, len(rows), 9 * world.size)]
    return score_stream(parts, [FrechetDistance(NETWORK, REFERENCE, intervals=True)], world)


def test_two_processes_find_the_same_interval(run_ranks: Any):
    rows = torch.randn(100, DIM, generator=torch.Generator().manual_seed(1))
    for values in run_ranks(ranks, 2, rows):
        assert values == pytest.approx(scored(rows), rel=1e-9)


def test_an_interval_needs_enough_images():
    with pytest.raises(UserError, match="needs at least 40 images, and there are 39"):
        scored(torch.randn(39, DIM))
    assert "fd_rows_low" in scored(torch.randn(40, DIM))


def test_shares_have_wilsons_interval():
    generator = torch.Generator().manual_seed(2)
    real, fake = (torch.randn(count, DIM, generator=generator) for count in (50, 80))
    values = score_stream([batch(fake)], [PrecisionRecall(NETWORK, Manifold(real), intervals=True)], ALONE)
    assert list(values) == ["precision_rows", "recall_rows", "precision_rows_low", "precision_rows_high"]
    ends = (values["precision_rows_low"], values["precision_rows_high"])
    assert ends == wilson_interval(round(80 * values["precision_rows"]), 80)
    neighbours = NearestNeighbours(NETWORK, real, torch.arange(50) % 2, intervals=True)
    values = score_stream([batch(fake)], [neighbours], ALONE)
    ends = (values["knn_accuracy_rows_low"], values["knn_accuracy_rows_high"])
    assert ends == wilson_interval(round(80 * values["knn_accuracy_rows"]), 80)


def test_the_interval_of_a_share_agrees_with_wilsons_definition():
    low, high = wilson_interval(8, 10)
    for share in (low, high):  # at a bound, the observed share is z standard errors away
        assert abs(0.8 - share) / math.sqrt(share * (1 - share) / 10) == pytest.approx(1.959964, abs=1e-5)
    assert wilson_interval(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(10, 10)[1] == pytest.approx(1, abs=1e-12)
