from pathlib import Path

import pytest

from raekit.experiments.studies import guidance
from raekit.experiments.studies.engine.plan import Result, Verdict

LEVELS = (0.2, 0.9, 1.6)
"""The distance of unguided samples of each seed, which differ more than the gains."""


def results(auto: float, always: float, inside: float, spread: float = 0.01) -> list[Result]:
    """Return results in which each rule changes the distance by a constant and a spread over seeds."""
    changes = {rule: auto if rule.startswith("auto") else always for rule in guidance.RULES}
    changes |= {guidance.UNGUIDED: 0.0, guidance.INTERVAL: inside}
    found = []
    for seed, level in enumerate(LEVELS):
        values = {}
        for place, (rule, change) in enumerate(changes.items()):
            distance = level + change + spread * (seed - 1) * (-1) ** place * (rule != guidance.UNGUIDED)
            values[rule] = {"distance": distance, "precision": 0.8, "recall": 0.6 - change, "accuracy": 0.5 - change}
        found.append(Result({"seed": seed}, values))
    return found


def test_a_gain_is_a_mean_over_pairs_of_a_seed():
    change = guidance.gain(results(auto=-0.3, always=0.2, inside=0), f"auto:{guidance.SMALL}", "distance")
    assert change.mean == pytest.approx(-0.3)
    assert change.high - change.low < 0.1  # although the seeds differ by 1.4


@pytest.mark.parametrize(
    ("changes", "spread", "verdicts"),
    [
        ((-0.3, 0.2, 0.0), 0.01, {"distance": Verdict.SHOWN, "interval": Verdict.SHOWN, "recall": Verdict.SHOWN}),
        ((0.3, -0.2, -0.3), 0.01, {"distance": Verdict.NOT_SHOWN, "interval": Verdict.NOT_SHOWN}),
        ((0.3, 0.2, 0.0), 0.01, {"recall": Verdict.NOT_SHOWN, "classes": Verdict.NOT_SHOWN}),
        ((-0.3, 0.2, 0.0), 0.5, {"distance": Verdict.UNDECIDED, "interval": Verdict.UNDECIDED}),
    ],
)
def test_the_verdicts_follow_from_the_gains(tmp_path: Path, changes, spread, verdicts):
    claims = {claim.name: claim.verdict for claim in guidance.judge(results(*changes, spread=spread), tmp_path)}
    assert claims | verdicts == claims
