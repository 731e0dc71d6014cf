import numpy as np
import pytest
import torch
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.moments import Moments


def correlated(count: int, dim: int, seed: int = 0) -> Tensor:
    """Return float32 rows whose mean is large compared with their deviation."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mixing + 50


def collect(batches: tuple[Tensor, ...], dim: int, diagonal: bool = False) -> Moments:
    moments = Moments(dim, diagonal=diagonal)
    for batch in batches:
        moments.update(batch)
    return moments


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_moments_match_numpy_for_any_batch_size_and_order(size):
    rows = correlated(500, 12)
    moments = collect(rows.flip(0).split(size), 12)
    exact = rows.double().numpy()
    assert moments.count == 500
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(exact, rowvar=False), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(moments.variance, exact.var(0), rtol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_part_is_removed(diagonal):
    rows = correlated(500, 12)
    part, rest = (collect((x,), 12, diagonal) for x in (rows[:30], rows[30:]))
    left = collect((rows,), 12, diagonal).without(part)
    assert left.count == rest.count
    torch.testing.assert_close(left.mean, rest.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(left.scatter, rest.scatter, rtol=1e-10, atol=1e-8)
    with pytest.raises(ValueError, match="30 of 30"):
        part.without(part)


@pytest.mark.parametrize("size", [7, 64])
def test_diagonal_moments_flatten_latents(size):
    latents = correlated(300, 4 * 3 * 3).reshape(300, 4, 3, 3)
    moments = collect(latents.split(size), 36, diagonal=True)
    exact = latents.double().flatten(1).numpy()
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, exact.var(0), rtol=1e-12)


def test_a_large_mean_costs_no_precision():
    rows = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near, far = collect(rows.split(100), 3), collect((rows + 1e6).split(100), 3)
    torch.testing.assert_close(far.covariance, near.covariance, rtol=1e-8, atol=1e-8)


def test_wrong_sizes_and_too_few_samples_are_rejected():
    moments = Moments(3)
    moments.update(torch.zeros(0, 3))
    assert moments.count == 0
    with pytest.raises(ValueError, match="4 elements"):
        moments.update(torch.zeros(2, 4))
    with pytest.raises(UserError, match="at least one sample"):
        _ = moments.variance
    moments.update(torch.zeros(1, 3))
    with pytest.raises(UserError, match="at least two samples"):
        _ = moments.covariance


def reduced(world: World, rows: Tensor) -> list[Tensor]:
    """Return moments over all processes: full, diagonal, and full when only the main process has rows."""
    mine = rows[world.rank :: world.size].split(7)
    full = collect(mine, rows.shape[1]).reduce(world)
    diagonal = collect(mine, rows.shape[1], diagonal=True).reduce(world)
    sided = collect(rows.split(7) if world.is_main else (), rows.shape[1]).reduce(world)
    assert full.count == diagonal.count == sided.count == len(rows)
    return [full.mean, full.covariance, diagonal.mean, diagonal.variance, sided.mean, sided.covariance]


def test_two_processes_give_what_one_gives(run_ranks):
    rows = correlated(150, 10)
    one = reduced(World(), rows)
    for two in run_ranks(reduced, 2, rows):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-10)
