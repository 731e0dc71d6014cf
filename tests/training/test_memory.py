from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from raekit.distributed import World
from raekit.training.memory import divisors, fitting

GPU = torch.device("cuda")


def found(world: World, share: int, room: float, each: int = 10) -> tuple[int, list[int]]:
    """Return what `fitting` finds where a step takes 100 bytes and `each` for an image, and `room` bytes are there."""
    tried: list[int] = []

    def peak(trial: Callable[[], None], device: torch.device) -> float:
        trial()
        return 100 + each * tried[-1]

    with patch("raekit.training.memory.peak", peak), patch("raekit.training.memory.capacity", lambda device: room):
        return fitting(share, tried.append, world), tried


@pytest.mark.parametrize(
    ("share", "room", "expected"),
    [(16, 1000, 16), (16, 260, 16), (16, 259, 8), (12, 180, 6), (12, 159, 4), (7, 150, 1), (128, 111, 1), (128, 50, 1)],
)
def test_the_largest_part_that_fits_is_found_by_two_small_trials(share, room, expected):
    assert found(World(device=GPU), share, room) == (expected, [1, 4])


def test_a_trial_is_never_larger_than_the_share():
    assert found(World(device=GPU), 2, 115) == (1, [1, 2])
    assert found(World(device=GPU), 3, 130) == (3, [1, 3])


def test_images_that_take_no_measurable_memory_all_fit():
    assert found(World(device=GPU), 16, 200, each=0) == (16, [1, 4])


def test_on_a_cpu_everything_fits_without_a_trial():
    assert found(World(), 16, 0) == (16, [])
    assert found(World(device=GPU), 1, 0) == (1, [])


def in_two(world: World) -> int:
    return found(replace(world, device=GPU), 16, 1000 if world.is_main else 150)[0]


def test_all_processes_find_the_same(run_ranks):
    assert run_ranks(in_two, 2) == [4, 4]


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
