import json
import math
from pathlib import Path

import pytest
import torch

from raekit.config import read_json
from raekit.errors import UserError
from raekit.experiments import studies
from raekit.experiments.studies import guidance, run_study, width
from raekit.experiments.studies.engine import execution
from raekit.experiments.studies.engine.plan import Estimate, Verdict, at_least, estimate, within
from raekit.experiments.studies.engine.training import small_decoder
from raekit.progress import silent

EVERY = pytest.mark.parametrize("name", studies.names())


def numbers(out: Path) -> object:
    record = read_json(out / "study.json")
    return [(run["settings"], run["values"]) for run in record["runs"]], record["claims"]


def test_the_interval_of_three_seeds_is_students():
    value = estimate([1.0, 2.0, 3.0])
    assert value.mean == 2
    assert value.high - value.mean == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert estimate([1.0]).high == math.inf


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.95, 1.05, Verdict.SHOWN),
        (1.05, 1.15, Verdict.UNDECIDED),
        (0.8, 1.2, Verdict.UNDECIDED),
        (1.1, 1.1, Verdict.UNDECIDED),
        (0.9, 1.0, Verdict.UNDECIDED),
        (1.2, 1.3, Verdict.NOT_SHOWN),
    ],
)
def test_an_interval_across_a_bound_decides_nothing(low, high, verdict):
    assert within(Estimate((low + high) / 2, low, high), 0.9, 1.1) == verdict


@pytest.mark.parametrize("high", [2.0, math.inf])
def test_a_single_seed_decides_nothing(high):
    assert within(estimate([1.0]), 0, high) == Verdict.UNDECIDED


def test_undecided_statements_may_still_be_enough():
    shown, undecided, not_shown = Verdict.SHOWN, Verdict.UNDECIDED, Verdict.NOT_SHOWN
    assert at_least(2, [shown, shown, not_shown]) == shown
    assert at_least(2, [shown, undecided, not_shown]) == undecided
    assert at_least(2, [shown, not_shown, not_shown]) == not_shown


@EVERY
def test_a_study_says_what_it_claims_and_costs_and_its_runs_differ(name, tmp_path: Path):
    found = studies.find(name)
    assert found.summary.endswith(".")
    assert found.cost
    for quick in (True, False):
        runs = found.study.plan(tmp_path, quick)
        assert len({run.name for run in runs}) == len({json.dumps(dict(run.settings)) for run in runs}) == len(runs)
        assert len({run.settings["seed"] for run in runs}) >= (2 if quick else 3)


def test_the_parts_of_a_study_are_all_of_its_runs(tmp_path: Path):
    runs = studies.find("width").study.plan(tmp_path, quick=False)
    parts = [execution.share(f"{k}/7", runs) for k in range(1, 8)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
    for wrong in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(UserError, match="must be K/N"):
            execution.share(wrong, runs)


def test_an_interrupted_study_in_two_parts_gives_the_numbers_of_one_run(tmp_path: Path):
    def interrupt(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        if what.startswith("run 2 ") and done == 4:
            raise KeyboardInterrupt

    split, straight = tmp_path / "split", tmp_path / "straight"
    with pytest.raises(KeyboardInterrupt):
        run_study("width", split, quick=True, only="1/2", progress=interrupt)
    assert run_study("width", split, quick=True, only="2/2") == len(width.plan(split, quick=True)) / 2 - 1
    first = next((split / "runs").glob("*/result.json"))
    before = first.stat().st_mtime_ns
    claims = run_study("width", split, quick=True, only="1/2")
    assert isinstance(claims, list)
    assert first.stat().st_mtime_ns == before
    run_study("width", straight, quick=True)
    assert numbers(split) == numbers(straight)
    page = (split / "study.md").read_text()
    for claim in claims:
        assert claim.verdict in page
        assert (split / f"{claim.name}.svg").read_bytes() == (straight / f"{claim.name}.svg").read_bytes()
        assert (split / f"{claim.name}.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="other settings; choose another --out"):
        run_study("width", split)


def test_a_trial_reports_every_claim_and_makes_the_shared_parts_once(tmp_path: Path):
    claims = run_study("guidance", tmp_path, quick=True)
    assert isinstance(claims, list)
    page = (tmp_path / "study.md").read_text()
    for claim in claims:
        assert claim.found in page
        assert (tmp_path / f"{claim.name}.png").stat().st_size > 10_000
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    guidance.prepare(tmp_path, True, "cpu", silent)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_shared_model_of_another_config_is_rejected(tmp_path: Path):
    (tmp_path / "finished.json").write_text('{"config": "of another training"}')
    with pytest.raises(UserError, match="other settings; choose another --out"):
        execution.train_shared(small_decoder(2, 0, "heldout"), tmp_path, "cpu", silent, "decoder")


def test_a_wrong_name_is_corrected(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean width"):
        run_study("widht", tmp_path)


def test_the_best_linear_predictor_of_one_image_reaches_the_bound():
    single = torch.zeros(16, dtype=torch.float64)
    assert width.best_linear(single, range(17)) == pytest.approx([(16 - d) / 16 for d in range(17)])


def test_no_linear_predictor_beats_the_bound_of_many_images():
    variances = torch.linspace(0, 6, 16, dtype=torch.float64)
    bound, best = width.bounds(variances, range(17)), width.best_linear(variances, range(17))
    assert all(low <= reached + 1e-12 for low, reached in zip(bound, best, strict=True))
    assert bound[0] == pytest.approx(1 + 3)


def test_the_closed_form_is_the_least_squares_fit_of_samples():
    generator = torch.Generator().manual_seed(0)
    variances = torch.tensor([0.5, 2.0], dtype=torch.float64)
    x = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) * variances.sqrt()
    noise = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    x_t, v = (x + noise) / 2, noise - x  # t = 0.5, the only time of `times=1`
    fit = x_t @ torch.linalg.lstsq(x_t, v).solution
    assert width.best_linear(variances, [2], times=1)[0] == pytest.approx((v - fit).square().mean().item(), rel=0.01)


def test_the_shared_parts_are_made_once(tmp_path: Path):
    width.prepare(tmp_path, True, "cpu", silent)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(made) == len(width.WIDTHS)
    width.prepare(tmp_path, True, "cpu", silent)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
