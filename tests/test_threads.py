"""The number of threads on a busy machine."""

import pytest
import torch

from raekit.distributed import threads


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("fastest", "expected"), [(1, 1), (4, 4), (16, 16)])
def test_the_fastest_number_of_threads_is_set(monkeypatch: pytest.MonkeyPatch, fastest: int, expected: int):
    monkeypatch.setattr(threads, "MOST", 16)
    assert threads.fit_threads(lambda n: -abs(n - fastest)) == expected == torch.get_num_threads()


def test_of_equal_speeds_the_most_threads_are_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads, "MOST", 6)
    tried: list[int] = []

    def rate(threads: int) -> float:
        tried.append(threads)
        return 1.0

    assert threads.fit_threads(rate) == 6
    assert tried == [6, 3, 1]


def test_the_speed_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads, "SECONDS", 0.01)
    assert threads.fit_threads() == torch.get_num_threads()
    assert threads._rate(1) > 0
