import json
import math
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raekit.errors import UserError
from raekit.training import tracking
from raekit.training.tracking import Tracking, pictures_of, read_metrics, steps_to


def write(run, step, steps):
    tracker = Tracking(run, step)
    for at in steps:
        tracker.scalars(at, {"loss": 1 / at})
    tracker.close()


def test_scalars_are_read_back_in_order(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    assert read_metrics(tmp_path) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_every_record_is_on_disk_at_once(tmp_path):
    tracker = Tracking(tmp_path, 0)
    tracker.scalars(1, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    tracker.close()


def test_going_on_drops_the_records_of_steps_that_will_come_again(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4, 5])
    write(tmp_path, 3, [4, 5, 6])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 0.3'])
def test_a_torn_last_line_is_left_out_and_written_over(tmp_path, torn):
    write(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 2, [3])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ['{"a": 1}', '{"step": 1, "loss": "low"}'])
def test_a_damaged_line_is_not_written_over(tmp_path, line):
    write(tmp_path, 0, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        write(tmp_path, 1, [2])


def test_a_record_that_cannot_be_written_is_one_message(tmp_path):
    tracker = Tracking(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: could not be written \(Is a directory\); check the disk"):
        tracker.scalars(1, {"loss": 1.0})


def test_what_is_not_finite_can_be_written_and_read(tmp_path):
    tracker = Tracking(tmp_path, 0)
    tracker.scalars(1, {"loss": float("nan"), "norm": float("inf")})
    tracker.close()
    record = read_metrics(tmp_path)[0]
    assert np.isnan(record["loss"])
    assert np.isinf(record["norm"])


RED = Image.new("RGB", (4, 3), "red")


def tracked(run: Path, name: str) -> str:
    """Write three steps and a picture, and resume after the second step. Return the name of the run in its tracker."""
    names = []
    for step in (0, 2):
        made = Tracking(run, step, [name], {"train": {"steps": 5}})
        for at in range(step + 1, step + 4):
            made.scalars(at, {"net/loss": at / 2})
        made.images(step + 3, {"samples": RED})
        made.close()
        names.append(json.loads((run / "tracker.json").read_text())["run"])
    assert names[0] == names[1]
    return names[0]


LOSSES = {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 2.5}


def test_tensorboard_gets_values_pictures_and_the_config(tmp_path):
    tracked(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    # The step that came again is there once.
    assert [(e.step, e.value) for e in events.Scalars("net/loss")] == list(LOSSES.items())
    pictures = events.Images("samples")
    assert [picture.step for picture in pictures] == [5]
    assert Image.open(BytesIO(pictures[0].encoded_image_string)).getpixel((0, 0)) == (255, 0, 0)
    assert '"steps": 5' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_weights_and_biases_gets_values_pictures_and_the_config(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("WANDB_MODE", "offline")
    name = tracked(tmp_path, "wandb")
    losses, configs = {}, []
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    for file in files:
        data, at = file.read_bytes(), 7  # after the header of the file
        while at < len(data):
            size = int.from_bytes(data[at + 4 : at + 6], "little")  # after a checksum of four bytes
            record = Record.FromString(data[at + 7 : at + 7 + size])
            at += 7 + size
            configs += [json.loads(item.value_json) for item in record.config.update if item.key == "train"]
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "net/loss" in items:
                losses[record.history.step.num] = json.loads(items["net/loss"])
    assert losses == LOSSES
    assert configs == [{"steps": 5}] * 2
    pictures = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    assert [Image.open(path).convert("RGB").getpixel((0, 0)) for path in pictures] == [(255, 0, 0)] * 2


def test_trackio_gets_values_pictures_and_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    name = tracked(tmp_path, "trackio")
    assert SQLiteStorage.get_runs("raekit") == [name]
    logs = SQLiteStorage.get_logs("raekit", name)
    assert {log["step"]: log["net/loss"] for log in logs if "net/loss" in log} == LOSSES
    assert [log["step"] for log in logs if "samples" in log] == [3, 5]
    assert (SQLiteStorage.get_run_config("raekit", name) or {})["train"] == {"steps": 5}
    pictures = list(tmp_path.glob("trackio/media/**/*.png"))
    assert [Image.open(path).convert("RGB").getpixel((0, 0)) for path in pictures] == [(255, 0, 0)] * 2


def test_a_run_that_starts_again_from_nothing_has_another_name_in_its_trackers(tmp_path):
    names = set()
    for _ in range(2):
        Tracking(tmp_path / "a run: 1", 0, ["tensorboard"]).close()
        names.add(json.loads((tmp_path / "a run: 1" / "tracker.json").read_text())["run"])
    assert len(names) == 2
    assert all(re.fullmatch(r"a-run-1-[0-9a-f]{8}", name) for name in names)


def test_a_long_name_of_a_run_is_cut(tmp_path):
    Tracking(tmp_path / ("long" * 40), 0, ["tensorboard"]).close()
    name = json.loads((tmp_path / ("long" * 40) / "tracker.json").read_text())["run"]
    assert len(name) <= 64, "the longest name that Weights & Biases allows"


@pytest.mark.parametrize("when", ["start", "scalars", "images", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, monkeypatch, caplog, when):
    calls = []

    class Failing:
        def __init__(self, run: Path, step: int, name: str) -> None:
            self.note("start")

        def note(self, what: str) -> None:
            calls.append(what)
            if what == when:
                raise RuntimeError("no connection")

        def config(self, values: object) -> None:
            self.note("config")

        def scalars(self, step: int, values: object) -> None:
            self.note("scalars")

        def images(self, step: int, images: object) -> None:
            self.note("images")

        def close(self) -> None:
            self.note("close")

    monkeypatch.setitem(tracking._TRACKERS, "wandb", Failing)
    made = Tracking(tmp_path, 0, ["wandb"])
    for step in (1, 2):
        made.scalars(step, {"loss": 1.0})
        made.images(step, {"samples": RED})
    made.close()
    assert calls.count(when) == 1
    assert calls[-1] == when
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed and gets no more values (RuntimeError: no connection)"
    ]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert [step for step, _ in pictures_of(tmp_path)] == [1, 2]


def test_pictures_of_steps_that_will_come_again_are_dropped(tmp_path):
    made = Tracking(tmp_path, 0)
    for step in (2, 4):
        made.images(step, {"samples": RED})
    assert pictures_of(tmp_path) == [(step, tmp_path / "samples" / f"step-0000000{step}.png") for step in (2, 4)]
    (tmp_path / "samples" / "step-best.png").touch()  # a file of the user
    for resumed in (3, 2):
        Tracking(tmp_path, resumed)
        assert [step for step, _ in pictures_of(tmp_path)] == [2]
    assert (tmp_path / "samples" / "step-best.png").exists()


def test_steps_to_a_target_are_read_from_the_curve():
    values = {10: 8.0, 15: math.nan, 20: 4.0, 30: 5.0, 40: 1.0}
    records = [{"step": step, "fid": value} for step, value in values.items()] + [{"step": 50, "loss": 1.0}]
    assert steps_to(records, "fid", 9) == 10
    assert steps_to(records, "fid", 6) == 15
    assert steps_to(records, "fid", 4) == 20
    assert steps_to(records, "fid", 2) == 37.5
    assert steps_to(records, "fid", 0.5) is None
    with pytest.raises(UserError, match="sfid: no such metric in the records; choose from: fid, loss"):
        steps_to(records, "sfid", 1)
