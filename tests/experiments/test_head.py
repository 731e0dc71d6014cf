import math
from pathlib import Path

import pytest

from raekit.experiments.studies import head
from raekit.experiments.studies.engine.plan import Result, Verdict
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig
from raekit.stages.generation import GenerationConfig


def results(factors: dict[int, float], spread: float) -> list[Result]:
    """Return results in which the DiT's distance is a factor times the DiT^DH's, with a spread over seeds."""
    found = []
    for seed in head.SEEDS:
        for place, (n, factor) in enumerate(factors.items()):
            wide = 0.1 * (1 + seed)  # the seeds differ more than the networks
            plain = wide * factor * math.exp(spread * (seed - 1) * (-1) ** place)
            for network, value in (("DiT", plain), ("DiT-DH", wide)):
                settings = {"network": network, "dimension": n, "seed": seed}
                found.append(Result(settings, {"distance": value, "flops": 1000}))
    return found


@pytest.mark.parametrize(
    ("factors", "spread", "verdicts"),
    [
        ({12: 0.7, 192: 3.0}, 0.02, (Verdict.SHOWN, Verdict.SHOWN, Verdict.SHOWN)),
        ({12: 2.0, 192: 0.5}, 0.02, (Verdict.NOT_SHOWN, Verdict.NOT_SHOWN, Verdict.NOT_SHOWN)),
        ({12: 0.9, 192: 1.2}, 0.5, (Verdict.UNDECIDED, Verdict.UNDECIDED, Verdict.UNDECIDED)),
    ],
)
def test_the_verdicts_follow_from_pairs_of_a_seed(tmp_path: Path, factors, spread, verdicts):
    assert tuple(claim.verdict for claim in head.judge(results(factors, spread), tmp_path)) == verdicts


@pytest.mark.parametrize("n", head.DIMENSIONS)
def test_the_two_networks_cost_about_the_same(tmp_path: Path, n):
    flops = {}
    for run in head.plan(tmp_path, quick=False):
        if run.settings["dimension"] == n:
            assert isinstance(run.config, GenerationConfig)
            side = run.config.data.image_size
            size = DenoiserConfig(**vars(run.config.denoiser), channels=3, grid=(side, side), num_classes=0)
            flops[run.settings["network"]] = head.forward_flops(Denoiser(size))
    assert flops["DiT-DH"] == pytest.approx(flops["DiT"], rel=0.05)
