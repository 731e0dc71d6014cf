import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from raekit.config import read_json
from raekit.data.loader import DataConfig
from raekit.errors import Stopped, UserError
from raekit.evaluation.reports import read_report
from raekit.experiments import demo
from raekit.experiments.demo import FIRST_LEG, PER_CLASS, Clock, Demo, next_leg, recipes, run_demo, source_of
from raekit.training.tracking import read_metrics


@pytest.mark.parametrize(
    ("classes", "base_depth", "methods"),
    [(("a", "b"), 0, ["cfg"]), (("a", "b"), 2, ["cfg", "internal"]), ((), 2, ["internal"]), ((), 0, [])],
)
def test_the_guidance_suits_the_model(classes, base_depth, methods):
    shown: Any = SimpleNamespace(steps=15)
    model: Any = SimpleNamespace(
        classes=classes, denoiser=SimpleNamespace(config=SimpleNamespace(base_depth=base_depth))
    )
    assert [rule.method for rule in Demo.sampling(shown, model).guidance] == methods


def silent(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
    assert 0 <= done <= total


def test_quick_demo_resumes_after_an_interrupt_and_writes_a_complete_report(tmp_path: Path):
    command = [sys.executable, "-m", "raekit", "demo", "--quick", "--run", str(tmp_path)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "decoder" / "metrics.jsonl").is_file() and first.poll() is None:
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == Stopped.STATUS, errors
    assert list((tmp_path / "decoder" / "checkpoints").glob("step-*"))
    seconds = Clock(tmp_path / "clock.json").seconds()

    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert Clock(tmp_path / "clock.json").seconds() > seconds

    html = (tmp_path / "report.html").read_text()
    # Two pictures of samples, two of reconstructions, two curves.
    assert len(re.findall(r'src="data:image/png;base64,', html)) == 6
    assert not re.search(r'(src|href)="http', html)
    # The built-in models come first.
    assert html.index("What the built-in models do") < html.index("What was trained here") < html.index("Scores")
    report = read_report(tmp_path / "evaluation" / "built-in")
    rows = {*report.baselines, "samples of the built-in model", "samples of the denoiser trained here"}
    assert rows >= {"held-out images", "training images", "reconstructions", "decoded noise"}
    assert all(row in html for row in rows)
    assert "internal guidance and 4 evaluations" in html
    assert f"few samples ({report.settings['count']})" in html
    distance = {name: row["fd_emoji_classifier"] for name, row in report.baselines.items() if name != "held-out images"}
    # Reconstructions have the same objects and colours as the held-out images; training images have others.
    assert distance["reconstructions"] < distance["training images"] < distance["decoded noise"]
    assert [record["step"] for record in read_metrics(tmp_path / "denoiser")][-1] == 40
    with Image.open(tmp_path / "pictures" / "samples.png") as picture:
        assert picture.size == (PER_CLASS * 66 + 2, 9 * 66 + 2)

    with pytest.raises(UserError, match=r"other options \(--minutes 12 --quick\)"):
        run_demo(tmp_path, minutes=3, quick=False, progress=silent)


def test_a_folder_of_images_is_fine_tuned(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "PER_CLASS", 2)
    folder = Path(images.partition(":")[2]) / "train"
    run_demo(tmp_path, minutes=1, quick=True, progress=silent, images=folder)
    html = (tmp_path / "report.html").read_text()
    assert "What the built-in models do" not in html
    assert all(name in html for name in ("<span>blue</span>", "<span>green</span>", "<span>red</span>", str(folder)))
    for stage in ("decoder", "denoiser"):
        assert read_json(tmp_path / stage / "config.json")["init_from"] == "builtin:emoji"


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_demo_without_time_is_rejected(tmp_path: Path, minutes):
    with pytest.raises(UserError, match="--minutes"):
        run_demo(tmp_path, minutes=minutes, quick=False, progress=silent)


def test_folders_of_images(tmp_path: Path, images: str):
    folder = Path(images.partition(":")[2]) / "train"
    assert source_of(folder) == f"folder:{folder}"
    assert source_of(folder / "red") == f"flat:{folder / 'red'}"
    with pytest.raises(UserError, match=r"--images: .* has no images \(.*\.png, "):
        source_of(tmp_path)
    with pytest.raises(UserError, match=r"--images: .* is not a folder"):
        source_of(tmp_path / "none")


def test_a_folder_without_held_out_images_is_rejected_before_the_training(images: str, tmp_path: Path):
    folder = tmp_path / "mine" / "red"
    folder.mkdir(parents=True)
    shutil.copy(Path(images.removeprefix("folder:")) / "train" / "red" / "02.png", folder)
    with pytest.raises(UserError, match=r"^--images: .* no images in the split 'heldout'.*; give more images"):
        run_demo(tmp_path / "run", minutes=1, quick=True, progress=silent, images=folder.parent)
    assert not (tmp_path / "run").exists()


def test_without_classes_nothing_is_conditional(images: str, tmp_path: Path):
    flat = images.replace("folder:", "flat:")
    assert not recipes(tmp_path, DataConfig(source=flat, image_size=64), own=True)[1].conditional
    assert recipes(tmp_path, DataConfig(source=images, image_size=64), own=True)[1].conditional


def test_the_clock_goes_on_after_a_restart(tmp_path: Path):
    now = [100.0]
    clock = Clock(tmp_path / "clock.json", lambda: now[0])
    now[0] = 130.0
    assert clock.seconds() == 30.0
    clock.keep()
    now[0] = 900.0  # the time between the two starts does not count
    clock = Clock(tmp_path / "clock.json", lambda: now[0])
    now[0] = 905.0
    assert clock.seconds() == 35.0


class Machine:
    """A simulated machine: it trains one step in `seconds(time)` seconds, and everything else takes no time."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def train(self, config: Any, run: Path, world, report, progress, change):
        assert change
        for step in range(self.done, config.train.steps):
            self.now += self.seconds(self.now)
            report(step + 1, {"denoiser/loss": 1.0})
        self.done = config.train.steps
        self.planned = config.optim.decay_end

    done = planned = 0


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (lambda now: 0.5, 1000),  # a quiet machine
        (lambda now: 0.5 if now < 300 else 1.0, 750),  # another process takes half of it from the middle on
        (lambda now: 1.0 if now < 300 else 0.5, 800),  # or takes it until the middle
        (lambda now: 40.0, 13),  # a slow machine
    ],
)
def test_a_training_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds, steps: int):
    machine = Machine(seconds)
    monkeypatch.setattr(demo, "train", machine.train)
    _, config = recipes(tmp_path, DataConfig(source="emoji", image_size=64), own=False)
    shown = Demo.__new__(Demo)
    shown.run, shown.world, shown.progress = tmp_path, None, silent  # type: ignore[assignment]
    shown.options = demo.Options(minutes=10, quick=False, images=None)
    shown.clock = Clock(tmp_path / "clock.json", lambda: machine.now)
    shown.train("denoiser", config, until=600.0, reserve=100.0)
    assert machine.now == pytest.approx(500, rel=0.2)
    assert machine.now + 100 * seconds(machine.now) / seconds(0) <= 1.2 * 600
    assert machine.done == pytest.approx(steps, rel=0.25)
    assert machine.planned == machine.done  # the learning rate has reached its end
    assert read_json(tmp_path / "denoiser.json") == {"steps": machine.done}
    before = machine.now
    shown.train("denoiser", config, until=600.0, reserve=100.0)  # a restart finds it finished
    assert machine.now == before


def test_legs_end_with_the_time():
    assert next_leg(8, 300.0, 0.5) == (608, 208)
    assert next_leg(208, 5.0, 0.5) == (218, 218)
    assert next_leg(208, -3.0, 0.5) == (209, 209)
    assert FIRST_LEG > 1  # one step gives no speed


def test_a_busy_machine_leaves_out_the_scores():
    assert demo.has_time_for_scores(sampling=25.0, seconds=720.0)
    assert not demo.has_time_for_scores(sampling=144.0, seconds=720.0)


def test_the_seconds_of_the_first_picture_are_kept_for_a_restart(tmp_path: Path):
    now, made = [0.0], []

    def samples(name: str, model: Any) -> None:
        made.append(name)
        now[0] += 20.0

    shown = Demo.__new__(Demo)
    shown.run, shown.clock, shown.builtin = tmp_path, Clock(tmp_path / "clock.json", lambda: now[0]), None  # type: ignore[assignment]
    shown.samples = samples  # type: ignore[method-assign]
    assert shown.sampling_seconds() == 20.0
    assert shown.sampling_seconds() == 20.0
    assert made == ["built-in samples"]
