"""The benchmarks that measure errors, on a model with random weights."""

import json
from pathlib import Path

import pytest

import islands
import solvers
from raekit.flow import sampling


def figures(folder: Path) -> dict:
    (table,) = json.loads((folder / "results.json").read_text())
    return table["figures"]


def test_solvers_fill_a_table_in_several_calls(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(solvers, "REFERENCE", sampling.Sampling(steps=40, solver="abm"))
    command = ["--model", str(tiny_model), "--count", "3", "--evaluations", "4", "20", "--out", str(tmp_path)]
    solvers.main([*command, "--solvers", "euler", "--grids", "full"])
    first = figures(tmp_path)
    assert first["euler full 4"]["median error"] > first["euler full 20"]["median error"] > 0
    assert first["euler full 4"]["largest error"] > first["euler full 4"]["median error"]
    solvers.main([*command, "--solvers", "abm", "euler"])
    assert figures(tmp_path).items() > first.items()
    assert len(figures(tmp_path)) == 8


def test_judges_need_a_reference(tmp_path: Path):
    with pytest.raises(SystemExit):
        solvers.main(["--judge", "classifier:builtin:emoji", "--out", str(tmp_path)])


def test_every_float32_part_moves_the_latents(tiny_model: Path, tmp_path: Path):
    islands.main(["--model", str(tiny_model), "--count", "3", "--steps", "3", "--out", str(tmp_path)])
    errors = figures(tmp_path)
    assert errors.pop("bf16")[1] == 0
    assert all(0 < each < 0.5 for pair in errors.values() for each in pair)
