import math
from pathlib import Path

import pytest

from raekit.experiments.studies import convergence
from raekit.experiments.studies.convergence import PIXELS, RAE, REPA, VAE, Curve, speedup
from raekit.experiments.studies.engine.plan import Result, Verdict

STEPS = [50, 100, 200, 400]


def results(factors: dict[str, float], spread: float) -> list[Result]:
    """Return results in which distances are a factor times the distance on RAE latents, with a spread over seeds."""
    found = []
    for seed in convergence.SEEDS:
        for space in convergence.NAMES:
            level = (1 + seed) * factors.get(space, 1.0)  # the seeds differ more than the latents
            level *= math.exp(spread * (seed - 1)) if space == RAE else 1
            values = {
                "steps": STEPS,
                "distances": [level * 40 / step for step in STEPS],
                "accuracies": [0.5] * len(STEPS),
                "flops": 10**9,
                "reconstruction": {"distance": 0.5, "psnr": 20.0},
            }
            found.append(Result({"space": space, "seed": seed}, values))
    return found


@pytest.mark.parametrize(
    ("factors", "spread", "verdict"),
    [
        ({VAE: 1.5, REPA: 1.4, PIXELS: 3}, 0.02, Verdict.SHOWN),
        ({VAE: 0.7, REPA: 0.6, PIXELS: 0.5}, 0.02, Verdict.NOT_SHOWN),
        ({VAE: 1.1, REPA: 1.1, PIXELS: 1.1}, 0.5, Verdict.UNDECIDED),
    ],
)
def test_the_verdicts_follow_from_pairs_of_a_seed(tmp_path: Path, factors, spread, verdict):
    assert {claim.verdict for claim in convergence.judge(results(factors, spread), tmp_path)} == {verdict}


def test_the_speedup_is_the_ratio_of_the_costs_of_the_same_distance():
    slow = Curve([1, 2, 4, 8], [80, 40, 20, 10])
    assert speedup(Curve([1, 2, 4, 8], [40, 20, 10, 5]), slow) == pytest.approx(2)
    assert speedup(slow, Curve([1, 2, 4, 8], [40, 20, 10, 5])) == pytest.approx(1 / 2)
    assert speedup(Curve([3, 6, 12, 24], [80, 40, 20, 10]), slow) == pytest.approx(1 / 3)
    # At most the ratio of the last checkpoint and the first, because nothing is known before the first.
    assert speedup(Curve([1, 2, 4, 8], [5, 4, 3, 2]), slow) == 8
    # A curve that rises again has reached its smallest distance.
    assert speedup(Curve([1, 2, 4, 8], [80, 40, 5, 9]), slow) > 2
