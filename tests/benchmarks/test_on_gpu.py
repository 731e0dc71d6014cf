"""The measurements on a GPU, run with small sizes on the CPU: they work on the day that there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu.__main__ import STEPS
from gpu.correct import stage
from gpu.setting import Checks, Setting
from raekit.distributed import CPU
from raekit.stages.reconstruction import ReconstructionConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks/on_gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.timeout(600)
def test_every_step_runs_and_leaves_its_results(tmp_path: Path):
    done = run("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == STEPS.keys()
    for name in STEPS:
        tables = json.loads((tmp_path / name / "results.json").read_text())
        text = (tmp_path / name / "results.md").read_text()
        assert all(f"## {table['title']}" in text for table in tables)
        assert all(len(table["rows"][0]) == len(table["columns"]) for table in tables)
        assert "not measured" not in text
        assert "FAIL" not in text


def test_the_list_explains_every_step():
    lines = run("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*STEPS]
    assert all(len(line.split()) > 4 for line in lines)


def setting(tmp_path: Path) -> Setting:
    return Setting(CPU, True, tmp_path / "out", tmp_path)


def test_a_difference_above_its_tolerance_fails(tmp_path: Path):
    checks = Checks("checks", setting(tmp_path))
    expected = torch.tensor([3.0, 4.0])
    checks.compare("close", expected + torch.tensor([0.0, 0.01]), expected, 1e-2)
    assert checks.publish()
    for wrong in (expected + 1, torch.tensor([float("nan"), 4.0]), torch.ones(3)):
        checks = Checks("checks", setting(tmp_path))
        checks.compare("far", wrong, expected, 1e-2)
        assert not checks.publish()
    assert "FAIL" in (tmp_path / "out/results.md").read_text()


def test_a_measurement_that_does_not_fit_is_noted(tmp_path: Path):
    def large() -> None:
        raise torch.OutOfMemoryError("no memory")

    assert not setting(tmp_path).attempt("a large step", large)
    assert "not measured: does not fit into memory" in (tmp_path / "out/results.md").read_text()


@pytest.mark.parametrize("name", ["encoder", "decoder", "denoiser"])
def test_short_trainings_have_every_loss_from_the_first_step(name: str, tmp_path: Path):
    config = stage(name, setting(tmp_path), steps=3)
    assert config.train.steps == 3
    if name == "decoder":
        assert isinstance(config, ReconstructionConfig)
        assert config.adversarial
        assert config.adversarial.start == 0
