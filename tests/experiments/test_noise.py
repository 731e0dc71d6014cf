import math
from pathlib import Path

import pytest

from raekit.experiments.studies import noise
from raekit.experiments.studies.engine.plan import Result, Verdict


def results(late: float, early: float, psnr: float, spread: float) -> list[Result]:
    """Return results in which noise divides the distances by `late` and `early` and adds `psnr`, with a spread."""
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
            }
            found.append(Result({"law": law, "tau": tau, "seed": seed}, values))
    return found


@pytest.mark.parametrize(
    ("late", "early", "psnr", "spread", "verdicts"),
    [
        (1.5, 2.0, -0.3, 0.01, (Verdict.SHOWN, Verdict.SHOWN, Verdict.SHOWN)),
        (0.7, 0.5, 0.3, 0.01, (Verdict.NOT_SHOWN, Verdict.NOT_SHOWN, Verdict.NOT_SHOWN)),
        (1.2, 1.4, -0.1, 0.5, (Verdict.UNDECIDED, Verdict.UNDECIDED, Verdict.UNDECIDED)),
    ],
)
def test_the_verdicts_follow_from_pairs_of_a_seed(tmp_path: Path, late, early, psnr, spread, verdicts):
    claims = noise.judge(results(late, early, psnr, spread), tmp_path)
    assert tuple(claim.verdict for claim in claims) == verdicts
