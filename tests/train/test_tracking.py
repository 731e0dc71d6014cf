import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raekit.errors import UserError
from raekit.train.tracking import Tracker, read_metrics, steps_to


def write(run, step, steps, **options):
    tracker = Tracker(run, step, **options)
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
    tracker = Tracker(tmp_path, 0)
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


def test_what_is_not_finite_can_be_written_and_read(tmp_path):
    tracker = Tracker(tmp_path, 0)
    tracker.scalars(1, {"loss": float("nan"), "norm": float("inf")})
    tracker.close()
    record = read_metrics(tmp_path)[0]
    assert np.isnan(record["loss"])
    assert np.isinf(record["norm"])


def test_tensorboard_gets_the_same(tmp_path):
    tracker = Tracker(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3):
        tracker.scalars(step, {"loss": step / 2})
    tracker.close()
    write(tmp_path, 2, [3, 4], tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    # The step that came again is there once.
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("loss")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 0.333333),
        (4, 0.25),
    ]
    tracker_only = {path.name for path in tmp_path.iterdir()}
    assert tracker_only == {"metrics.jsonl", "tensorboard"}


def test_steps_to_a_target_are_read_from_the_curve():
    values = {10: 8.0, 20: 4.0, 30: 5.0, 40: 1.0}
    records = [{"step": step, "fid": value} for step, value in values.items()] + [{"step": 50, "loss": 1.0}]
    assert steps_to(records, "fid", 9) == 10
    assert steps_to(records, "fid", 6) == 15
    assert steps_to(records, "fid", 4) == 20
    assert steps_to(records, "fid", 2) == 37.5
    assert steps_to(records, "fid", 0.5) is None
    with pytest.raises(UserError, match="sfid: no such metric in the records; choose from: fid, loss"):
        steps_to(records, "sfid", 1)
