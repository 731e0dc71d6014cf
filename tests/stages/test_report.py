"""The page about a run."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raekit.distributed import World
from raekit.distributed.locks import lock
from raekit.errors import UserError
from raekit.stages.curves import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP, draw, short, ticks
from raekit.stages.report import write_report


def written(folder: Path, records: list[dict[str, float]], starts: Sequence[dict[str, Any]] = ()) -> Path:
    """Write the files of a run of stage 2."""
    start = {"host": "node-1", "device": "cpu", "processes": 1, "raekit": "0.1.0", "torch": "2.11.0"}
    start |= {"peak_tflops": 0.5, "peak_stated": False}
    history = [{"step": 0, "time": "2026-11-01T10:00:00+00:00", **start}, *({**start, **each} for each in starts)]
    config = {"stage": "generation", "data": {"source": "<emoji>"}, "train": {"steps": 400, "batch_size": 10}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "inputs.json").write_text(json.dumps({"data": {"count": 100, "classes": {"a": 60, "b": 40}}}))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return folder


def record(step: int, **more: float) -> dict[str, float]:
    speed = {"images_per_second": 20.0, "step_seconds": 0.5, "data_wait": 0.1, "tflops": 0.2, "matmul_share": 0.4}
    rest = {"peak_memory_gib": 1.5, "seconds_left": 3600.0, "denoiser/skipped": 0.0}
    return {"step": step, "denoiser/loss": 1 / step, **speed, **rest, **more}


def text_of(path: Path) -> str:
    """Return the text of a page without tags and with single spaces."""
    html = path.read_text()
    assert not re.search(r"https?://|<script|<link", html)  # it needs no other file
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL))


def test_the_page_has_the_newest_values_events_and_times(tmp_path):
    records = [record(step) for step in range(10, 201, 10)]
    for each in records[5:]:
        each["denoiser/skipped"] = 2.0
    records += [{"step": 200, "evaluation/fid": 7.25, "evaluation/seconds": 90.0, "heldout/loss": 0.75}]
    restart = {"step": 100, "time": "2026-11-02T12:30:00+00:00", "host": "node-2", "changes": {"optim.lr": [0.1, 0.05]}}
    text = text_of(write_report(written(tmp_path / "my run", records, [restart])))
    for expected in (
        "my run",
        "generation · step 200 of 400 · stopped; there is no checkpoint",
        "0.005 denoiser loss",
        "20 images/s",
        "10% waiting for data",
        "40% of the matmul rate of 0.5 TFLOP/s, measured with a matrix product",
        "evaluation/fid 7.25 (step 200)",
        "100 2026-11-02 12:30 resumed on node-2, cpu, 1 process optim.lr: 0.1 → 0.05",
        "60 2 steps of denoiser skipped: the gradient was not finite",
        "training steps 0:01:40 of this 10.0 s waiting for data",
        "evaluation 0:01:30 once",
        "images 100 in 2 classes",
        "seen so far 2,000 images, 20 epochs",
        "source &lt;emoji&gt;",
    ):
        assert expected in text
    assert text.count("skipped: the gradient") == 1
    html = (tmp_path / "my run" / "report.html").read_text()
    # The restart is marked in each drawing but one, of a score that has one value.
    assert html.count('class="restart"') == html.count("<svg") - 1 > 1


def test_the_page_of_a_run_in_training_says_so(tmp_path):
    run = written(tmp_path / "run", [record(10)])
    with lock(run, World()):
        assert re.search(r"step 10 of 400 · in training on \S+, 1 h 00 min left", text_of(write_report(run)))
    assert "in training" not in text_of(write_report(run))


def test_a_run_without_a_record_has_a_page(tmp_path):
    assert "No record yet" in text_of(write_report(written(tmp_path / "run", [])))


def test_a_finished_run_whose_device_changed_shows_the_share_of_the_last_device(tmp_path):
    newest = record(400, mfu=0.3)
    del newest["matmul_share"]
    text = text_of(write_report(written(tmp_path / "run", [record(200), newest])))
    assert "step 400 of 400 · finished" in text
    assert "30% MFU" in text
    assert "of the matmul rate" not in text


def test_the_newest_picture_is_whole_and_earlier_ones_are_small(tmp_path):
    run = written(tmp_path / "run", [record(10)])
    (run / "samples").mkdir()
    for step in range(1, 31):
        Image.new("RGB", (600, 300), (step, 0, 0)).save(run / "samples" / f"step-{step:08d}.png")
    html = write_report(run, tmp_path / "page.html").read_text()
    shown = [int(step) for step in re.findall(r'alt="step (\d+)"', html)]
    assert (shown[:2], shown[-1], len(shown)) == ([30, 29], 1, 13)
    assert shown == sorted(shown, reverse=True)


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path, caplog):
    run = written(tmp_path / "run", [record(10)])
    (run / "samples").mkdir()
    for step in (1, 2):
        Image.new("RGB", (60, 30)).save(run / "samples" / f"step-{step:08d}.png")
    newest = run / "samples" / "step-00000002.png"
    newest.write_bytes(newest.read_bytes()[:60])
    assert re.findall(r'alt="step (\d+)"', write_report(run).read_text()) == ["1"]
    assert f"{newest}: cannot be read and is left out of the report (" in caplog.text


@pytest.mark.parametrize("file", ["metrics.jsonl", "history.jsonl"])
@pytest.mark.parametrize("damage", ['{"a": 1}', "null", "[]", "{", "", '{"step": null}', "\udcff"])
def test_a_damaged_line_is_named(tmp_path, file, damage):
    run = written(tmp_path / "run", [record(10), record(20)], [{"step": 10}])
    first, second = (run / file).read_text().splitlines()
    (run / file).write_text(f"{first}\n{damage}\n{second}\n", errors="surrogateescape")
    with pytest.raises(UserError, match=rf"^{run / file}: line 2 is damaged; remove this line"):
        write_report(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        write_report(tmp_path)


def test_a_curve_is_drawn_to_scale():
    chart = draw("loss", {"a": [(0, 0.0), (50, 5.0), (100, 10.0)]}, marks=[50, 300])
    assert chart
    (curve,) = chart.curves
    middle = ((LEFT + RIGHT) / 2, (BOTTOM + TOP) / 2)
    assert curve.dots == [(LEFT, BOTTOM), middle, (RIGHT, TOP)]
    assert curve.line == " ".join(f"{float(x)},{float(y)}" for x, y in curve.dots)
    assert (curve.mean, curve.last) == ("", 10.0)
    assert chart.marks == [middle[0]]
    assert [label for _, label in chart.across] == ["0", "20", "40", "60", "80", "100"]
    assert chart.up[0] == (BOTTOM, "0")
    assert chart.up[-1] == (TOP, "10")


def test_a_long_curve_is_thinned_and_the_first_values_do_not_set_the_scale():
    points = [(step, 1000.0 if step < 10 else 1.0 + step % 2) for step in range(10_000)]
    chart = draw("loss", {"a": points})
    assert chart
    assert len(chart.curves[0].line.split()) <= MOST_POINTS
    assert max(float(label) for _, label in chart.up) < 10
    assert chart.curves[0].mean


@pytest.mark.parametrize("points", [[], [(1, float("nan")), (2, float("inf"))]])
def test_nothing_finite_is_not_drawn(points):
    assert draw("loss", {"a": points}) is None


def test_one_value_and_a_flat_curve_are_drawn():
    for points in ([(5, 2.0)], [(1, 0.0), (9, 0.0)]):
        chart = draw("loss", {"a": points})
        assert chart
        assert all(TOP < y < BOTTOM for _, y in chart.curves[0].dots)


def test_a_scale_can_start_at_zero():
    chart = draw("speed", {"a": [(1, 10.0), (2, 12.0)]}, zero=True)
    assert chart
    assert chart.up[0] == (BOTTOM, "0")
    assert chart.curves[0].dots[1] == (RIGHT, TOP)


def test_ticks_are_round_numbers():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(2, 108, 5) == [20, 40, 60, 80, 100]
    assert ticks(0.013, 0.049, 4) == [0.02, 0.03, 0.04]
    assert [short(value) for value in (0, 950, 12_000, 1_500_000, 0.00025)] == ["0", "950", "12k", "1.5M", "0.00025"]
