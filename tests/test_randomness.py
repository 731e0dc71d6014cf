import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from raekit.randomness import address, normal, numpy_generator, uniform

DRAWS = pytest.mark.parametrize("draw", [normal, uniform])


@DRAWS
def test_a_row_depends_only_on_its_own_address(draw):
    whole = draw(3, "noise", range(10), (2, 3))
    assert whole.shape == (10, 2, 3)
    assert whole.dtype == torch.float32
    assert torch.equal(draw(3, "noise", [7], (2, 3))[0], whole[7])
    assert torch.equal(draw(3, "noise", torch.tensor([9, 0, 4]), (2, 3)), whole[[9, 0, 4]])


@DRAWS
def test_other_seeds_streams_and_positions_give_other_numbers(draw):
    rows = [draw(seed, stream, [p], (4,)) for seed in (0, 1) for stream in ("a", "b") for p in (0, 1)]
    assert len(torch.cat(rows).unique()) == 8 * 4


@DRAWS
def test_drawing_leaves_the_global_generators_alone(draw):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  # pyright: ignore
    draw(0, "a", range(3), (4,))
    numpy_generator(0, "a", 0).random()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002  # pyright: ignore


def test_empty_draws():
    assert normal(0, "a", [], (2,)).shape == (0, 2)
    assert uniform(0, "a", []).shape == (0,)


def test_numbers_never_change():
    # Recorded values. A change of the addressing would change every sample and every training run.
    assert address(0, "noise", 0) == ADDRESS
    assert normal(0, "noise", [0], (2,))[0].tolist() == pytest.approx(NORMALS, abs=1e-6)
    assert numpy_generator(0, "noise", 0).random() == pytest.approx(UNIFORM, abs=1e-12)


ADDRESS = 5896936850830624319
NORMALS = [-0.8308052, -0.6905085]
UNIFORM = 0.7994590524812552


def test_neighbouring_positions_are_independent():
    x = normal(0, "noise", range(4000), (2,)).numpy()
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.06
    u = uniform(0, "time", range(4000)).numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(u, x[:, 0])[0, 1]) < 0.06
    assert u.min() >= 0
    assert u.max() < 1


def test_neighbouring_seeds_are_independent():
    x = np.array([normal(seed, "noise", [0], (1,)).item() for seed in range(2000)])
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.08


@given(seed=st.integers(0, 2**40), stream=st.text(max_size=8), position=st.integers(0, 2**40))
def test_addresses_fit_a_generator(seed: int, stream: str, position: int):
    assert 0 <= address(seed, stream, position) < 2**64
    torch.Generator().manual_seed(address(seed, stream, position))


def test_addresses_of_a_stream_do_not_collide():
    # numpy uses all 64 bits of a seed. The CPU generator of torch (Mersenne twister) uses only the low 32.
    low = np.array([address(5, "order", p) & 0xFFFFFFFF for p in range(100_000)])
    assert len(np.unique(low)) == len(low)
