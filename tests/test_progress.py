import io

import pytest
from rich.console import Console

from raekit.progress import Display, hours


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
        "work: 50/100  32.0 images/s, 0:01 left  loss 1",
        "work: 100/100  32.0 images/s  loss 1",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (1, "0:01"), (3540, "0:59"), (3541, "1:00"), (9e4, "25:00")]
)
def test_a_duration_is_shown_in_hours_and_minutes(seconds, text):
    assert hours(seconds) == text


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
    assert "loss 1" in file.getvalue()
