import math
from pathlib import Path

import pytest

from raekit.experiments.studies import shift
from raekit.experiments.studies.engine.plan import Result, Verdict
from raekit.experiments.studies.engine.shifts import best_shift

BEST = 0.7


def test_the_best_shift_is_the_vertex_of_a_parabola():
    shifts = [0.5, 1, 2, 4, 8]
    assert best_shift(shifts, [(math.log(s / 2.5)) ** 2 + 1 for s in shifts]) == pytest.approx(2.5, rel=0.1)
    exact = [math.exp(math.log(s / 2.5) ** 2) for s in shifts]
    assert best_shift(shifts, exact) == pytest.approx(2.5)
    assert best_shift(shifts, [1, 2, 3, 4, 5]) == 0.5


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"),
    [
        (4, 0.02, Verdict.SHOWN),
        (10, 0.02, Verdict.NOT_SHOWN),
        (4, 0.4, Verdict.UNDECIDED),
        (100, 0.02, Verdict.UNDECIDED),  # the best shift lies beyond the largest that was tried
    ],
)
def test_the_verdict_follows_from_the_best_shifts(tmp_path: Path, factor, spread, verdict):
    results = []
    for side, best in ((8, BEST), (16, BEST * math.sqrt(factor)), (32, BEST * factor)):
        for seed in shift.SEEDS:
            mine = best * math.exp(spread * (seed - 1) * (1 if side == 8 else -1))
            for base in shift.BASES:
                alpha = math.sqrt(3 * side * side / base)
                value = math.exp(math.log(alpha / mine) ** 2)
                results.append(
                    Result({"dimension": 3 * side * side, "shift": alpha, "seed": seed}, {"distance": value})
                )
    assert shift.judge(results, tmp_path)[0].verdict == verdict
