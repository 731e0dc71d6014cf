import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from raekit import demo
from raekit.demo import PER_CLASS, run_demo
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.reports import read_report
from raekit.train.tracking import read_metrics


def silent(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
    assert 0 <= done <= total


def test_quick_demo_resumes_after_an_interrupt_and_writes_a_complete_report(tmp_path: Path):
    command = [sys.executable, "-m", "raekit", "demo", "--quick", "--run", str(tmp_path)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "decoder" / "metrics.jsonl").is_file() and first.poll() is None:
        time.sleep(0.2)
    time.sleep(3)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 75, errors
    assert list((tmp_path / "decoder" / "checkpoints").glob("step-*"))

    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout

    html = (tmp_path / "report.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', html)) == 5  # samples, guided, reconstructions, two curves
    assert not re.search(r'(src|href)="http', html)
    report = read_report(tmp_path / "evaluation" / "samples")
    scores = {**report.baselines, "samples": report.results}
    records = read_metrics(tmp_path / "decoder")
    for name, start in (("discriminator/loss", 30), ("decoder/gan", 32)):  # of 40 steps
        assert min(record["step"] for record in records if name in record) == start + 1
    assert set(scores) >= {"held-out images", "training images", "reconstructions", "decoded noise", "samples"}
    assert all(row in html for row in scores)
    # Even after a minute of training, reconstructions are much closer to real images than decoded noise.
    assert scores["reconstructions"]["fd_vit_tiny"] < scores["decoded noise"]["fd_vit_tiny"]
    with Image.open(tmp_path / "pictures" / "samples.png") as picture:
        assert picture.size == (PER_CLASS * 66 + 2, 9 * 66 + 2)

    with pytest.raises(UserError, match="--quick"):
        run_demo(tmp_path, minutes=3, quick=False, progress=silent)


def test_a_plan_without_time_is_rejected(tmp_path: Path):
    with pytest.raises(UserError, match="--minutes"):
        run_demo(tmp_path, minutes=0, quick=False, progress=silent)


def test_plan_divides_the_time_by_measured_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seconds = {"time the decoder": 0.5, "time the denoiser": 2.0}
    monkeypatch.setattr(demo, "_seconds_per_step", lambda name, *rest: seconds[name])
    world, (decoder, denoiser) = World(), demo._recipes(tmp_path)
    plan = demo._plan(tmp_path, 10, False, decoder, denoiser, world, silent)
    assert (plan.decoder_steps, plan.denoiser_steps) == (240, 165)
    monkeypatch.setattr(demo, "_seconds_per_step", lambda *arguments: pytest.fail("timed again"))
    assert demo._plan(tmp_path, 10, False, decoder, denoiser, world, silent) == plan


def test_a_step_is_timed_by_the_training_itself(tmp_path: Path):
    decoder, _ = demo._recipes(tmp_path)
    small = replace(decoder, train=replace(decoder.train, batch_size=2))
    reported = []
    seconds = demo._seconds_per_step(
        "time",
        small,
        tmp_path / "run",
        World(),
        lambda what, done, total, text="", unit=1: reported.append((done, unit)),
    )
    assert 0 < seconds < 60
    assert reported == [(step, 2) for step in range(1, demo.CALIBRATION_STEPS + 1)]
