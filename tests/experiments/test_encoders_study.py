from pathlib import Path

import pytest
import torch

from raekit.config import to_dict
from raekit.experiments.studies import encoders
from raekit.experiments.studies.engine.plan import Result, Verdict, rank_correlation


def results(order: dict[str, int], distilled: float, spread: float = 0.01) -> list[Result]:
    """Return results in which the distance grows from encoder to encoder.

    Args:
        order: +1 for each measure that grows with the distance, -1 for each that falls.
        distilled: Factor on the distance of the distilled encoder.
        spread: Difference of the distances between the seeds, relative to the distance.
    """
    found = []
    for seed in encoders.SEEDS:
        for place, (name, latents) in enumerate(encoders.LATENTS.items()):
            factor = distilled if name == encoders.DISTILLED else 1.0
            shaken = 1 + spread * (seed - 1) * (-1) ** place
            values = {measure: 1 + 0.1 * sign * place for measure, sign in order.items()}
            values["reconstruction"] = values["ifid"]
            values["distance"] = (2 + 0.2 * place) * (1 + seed) * factor * shaken  # the seeds differ more
            found.append(Result({"encoder": name, "label": latents.label, "seed": seed}, values))
    return found


@pytest.mark.parametrize(
    ("signs", "distilled", "spread", "verdict"),
    [
        ((-1, -1, 1, 1), 0.8, 0.01, Verdict.SHOWN),
        ((1, 1, -1, -1), 1.3, 0.01, Verdict.NOT_SHOWN),
        ((0, 0, 0, 0), 1.0, 0.4, Verdict.UNDECIDED),
    ],
)
def test_the_verdicts_follow_from_ranks_and_pairs(tmp_path: Path, signs, distilled, spread, verdict):
    order = dict(zip(encoders.MEASURES, signs, strict=True))
    claims = encoders.judge(results(order, distilled, spread), tmp_path)
    assert [claim.verdict for claim in claims] == [verdict] * 5


def test_a_rank_correlation_depends_on_the_order_only_and_few_pairs_decide_nothing():
    x = [0.1, 0.2, 0.5, 0.9, 1.5, 7.0, 8.0, 9.0]
    perfect = rank_correlation(x, [value**3 for value in x])
    assert perfect.mean == pytest.approx(1)
    assert 0.5 < perfect.low < 1
    # Spearman's formula 1 - 6 sum d^2 / (n (n^2 - 1)) for one exchange of neighbours
    assert rank_correlation(x, [2, 1, 3, 4, 5, 6, 7, 8]).mean == pytest.approx(1 - 6 * 2 / (8 * 63))
    weak = rank_correlation(x, [3, 8, 1, 6, 4, 2, 7, 5])
    assert weak.low < 0 < weak.high
    assert rank_correlation([1, 2, 3], [1, 2, 3])[1:] == (-1, 1)
    assert rank_correlation([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]).mean == 0


def test_spatial_structure_is_the_likeness_of_near_minus_far_tokens():
    generator = torch.Generator().manual_seed(0)
    unrelated = torch.randn(50, 64, 4, 4, generator=generator)
    assert abs(encoders.spatial_structure(unrelated)) < 0.02
    halves = torch.randn(50, 64, 2, 1, 1, generator=generator).expand(-1, -1, 2, 8, 1).reshape(50, 64, 4, 4)
    # 20 of the 24 pairs of neighbours lie in one half, and 4 of the 30 pairs that are at least 4 steps apart.
    assert encoders.spatial_structure(halves) == pytest.approx(20 / 24 - 4 / 30, abs=0.02)


def test_an_encoder_in_the_folder_of_the_study_takes_part(tmp_path: Path):
    own = {run.name for run in encoders.plan(tmp_path, quick=False)}
    (tmp_path / encoders.GUEST).mkdir()
    added = {run.name for run in encoders.plan(tmp_path, quick=False)} - own
    names = [encoders.GUEST, "student", "student-masked"]
    assert added == {f"{name}-seed{seed}" for name in names for seed in encoders.SEEDS}
    student = to_dict(encoders._encoder(encoders.PRETRAINED["student-masked"], tmp_path, quick=False))
    assert student["teacher"]["encoder"] == f"dinov2:{tmp_path / encoders.GUEST}"
    assert student["mask_ratio"] == 0.6
