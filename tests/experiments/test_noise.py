import math
from pathlib import Path

import pytest

from raekit.experiments.studies import noise
from raekit.experiments.studies.engine.plan import Result, Verdict


def results(late: float, early: float, psnr: float, halfway: float, spread: float) -> list[Result]:
    """Return results in which noise divides distances by `late`, `early` and `halfway`, and adds `psnr`."""
    found = []
    for seed in noise.SEEDS:
        level = 1.0 + seed  # the seeds differ more than the decoders
        for law, tau in noise.NOISES:
            plain = (law, tau) == noise.NONE
            factor = math.exp(spread * (seed - 1)) if plain else 1.0
            values = {
                noise.LATE: dict.fromkeys(noise.JUDGES, level * factor / (1 if plain else late)),
                noise.EARLY: dict.fromkeys(noise.JUDGES, level * 5 / factor / (1 if plain else early)),
                noise.REAL: {
                    **dict.fromkeys(noise.JUDGES, 0.5),
                    "psnr": 20 + seed + (0 if plain else psnr + spread * (seed - 1)),
                },
                noise.HALFWAY: {noise.CLASSIFIER: level * factor / (1 if plain else halfway)},
            }
            found.append(Result({"law": law, "tau": tau, "seed": seed}, values))
    return found


@pytest.mark.parametrize(
    ("late", "early", "psnr", "halfway", "spread", "verdicts"),
    [
        (1.5, 2.0, -0.3, 1.2, 0.01, [Verdict.SHOWN] * 4),
        (1.5, 2.0, -0.3, 0.8, 0.01, [*[Verdict.SHOWN] * 3, Verdict.NOT_SHOWN]),
        (0.7, 0.5, 0.3, 1.2, 0.01, [Verdict.NOT_SHOWN] * 4),
        (1.2, 1.4, -0.1, 1.1, 0.5, [Verdict.UNDECIDED] * 4),
    ],
)
def test_the_verdicts_follow_from_pairs_of_a_seed(tmp_path: Path, late, early, psnr, halfway, spread, verdicts):
    claims = noise.judge(results(late, early, psnr, halfway, spread), tmp_path)
    assert [claim.verdict for claim in claims] == verdicts
