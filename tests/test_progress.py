import io

import pytest
from rich.console import Console

from raekit.progress import Display, SamplingProgress, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("raekit.progress.time.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_appears_at_most_every_ten_seconds(clock):
    file = io.StringIO()
    with Display(Console(file=file, width=200)) as display:
        for done in range(0, 101, 10):
            clock[0] = done / 4
            display("work", done, 100, "loss 1", unit=8)
    assert file.getvalue().splitlines() == [
        "work: 50/100  32.0 images/s, 13 s left  loss 1",
        "work: 100/100  32.0 images/s  loss 1",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.5, "1 s"), (59, "59 s"), (61, "2 min"), (3541, "1 h 00 min"), (9e4, "25 h 00 min")],
)
def test_a_duration_has_units(seconds, text):
    assert duration(seconds) == text


def test_the_rate_of_a_name_that_returns_counts_from_its_return(clock):
    file = io.StringIO()
    with Display(Console(file=file, width=200)) as display:
        for start in (0, 1000):
            for done in (20, 100):
                clock[0] = start + done / 10
                display("work", done, 100)
    assert file.getvalue().splitlines()[-1] == "work: 100/100  10.0 images/s"


def test_units_that_are_no_images_have_no_rate(clock):
    file = io.StringIO()
    with Display(Console(file=file, width=200)) as display:
        for clock[0] in (1.0, 11.0, 21.0):
            display("fits", int(clock[0]), 21, unit=0)
    assert file.getvalue().splitlines() == ["fits: 11/21  10 s left", "fits: 21/21"]


def test_quiet_shows_nothing(clock):
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=True), quiet=True) as display:
        display("work", 1, 1)
    assert file.getvalue() == ""


def test_on_a_terminal_there_are_bars(clock):
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=True, width=200)) as display:
        display("work", 1, 4)
        clock[0] = 2.0
        display("work", 3, 4, "loss 1")
    assert "3/4" in file.getvalue()
    assert "1 s left" in file.getvalue()
    assert "loss 1" in file.getvalue()


def test_sampling_reports_the_evaluations_within_a_batch(clock):
    file = io.StringIO()
    with Display(Console(file=file, width=200)) as display:
        progress = SamplingProgress(display, "generate", 2, 6)
        for _ in range(2):
            for _ in range(3):
                clock[0] += 11
                progress.watch()
            clock[0] += 11
            progress.finish(2)
    assert file.getvalue().splitlines() == [
        "generate: 2/6  evaluation 1",
        "generate: 2/6  evaluation 2",
        "generate: 2/6  evaluation 3",
        "generate: 4/6  0.061 images/s, 33 s left",
        "generate: 4/6  0.061 images/s, 22 s left  evaluation 1",
        "generate: 4/6  0.061 images/s, 11 s left  evaluation 2",
        "generate: 4/6  0.061 images/s, 0 s left  evaluation 3",
        "generate: 6/6  0.052 images/s",
    ]
