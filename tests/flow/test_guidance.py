from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from raekit.errors import UserError
from raekit.flow.guidance import (
    METHODS,
    Guidance,
    Method,
    check_guidance,
    guided,
    parse_guidance,
    pieces,
    with_interval_ends,
)
from raekit.flow.solvers import time_grid

X = torch.zeros(2, 3, 2, 2)


VALUES: dict[Method, float] = {"cfg": 2, "auto": 3, "internal": 4}


class Field:
    """Return constant velocities, 5 and the worse ones in VALUES, and record which methods were asked for."""

    def __init__(self) -> None:
        self.asked: list[list[Method]] = []

    def __call__(self, x: Tensor, t: float, methods: Collection[Method]) -> tuple[Tensor, dict[Method, Tensor]]:
        self.asked.append(list(methods))
        return torch.full_like(x, 5), {name: torch.full_like(x, VALUES[name]) for name in methods}


def at(t: float, *rules: Guidance) -> tuple[float, list[Method]]:
    """The guided velocity, the same everywhere, and what was asked for."""
    field = Field()
    out = guided(field, rules)(X, t)
    assert (out == out[0, 0, 0, 0]).all()
    assert len(field.asked) == 1
    return out[0, 0, 0, 0].item(), field.asked[0]


@pytest.mark.parametrize("scale", [1.7, 0.0, 0.25, -1.0])
@pytest.mark.parametrize("method", METHODS)
def test_scale_is_measured_from_the_worse_prediction(method: Method, scale: float):
    worse = VALUES[method]
    v, asked = at(0.5, Guidance(method=method, scale=scale))
    assert v == pytest.approx(worse + scale * (5 - worse))
    assert asked == [method]


def test_without_rules_it_is_the_velocity():
    assert at(0.5) == (5, [])


@pytest.mark.parametrize(
    ("t", "inside"), [(0.0, False), (0.19, False), (0.2, True), (0.5, True), (0.8, True), (0.81, False), (1.0, False)]
)
@pytest.mark.parametrize("method", METHODS)
def test_outside_its_interval_guidance_costs_nothing(method: Method, t: float, inside: bool):
    v, asked = at(t, Guidance(method=method, scale=2, start=0.2, end=0.8))
    assert v == (2 * 5 - VALUES[method] if inside else 5)
    assert asked == ([method] if inside else [])


@pytest.mark.parametrize("end", [0.1, 0.3, 0.7, 0.9, 1.0])
def test_an_interval_is_compared_in_float32(end: float):
    point = torch.tensor(end)
    before, beyond = torch.nextafter(point, torch.tensor(0.0)).item(), torch.nextafter(point, torch.tensor(2.0)).item()
    until = Guidance(scale=2, start=0.05, end=end)
    assert [until.holds(t) for t in (before, point.item(), beyond)] == [True, True, False]
    if end < 1:
        since = Guidance(scale=2, start=end)
        assert [since.holds(t) for t in (before, point.item(), beyond)] == [False, True, True]


def test_whole_interval_by_default():
    rounded = time_grid(50, 6**0.5)[0]
    assert rounded > 1
    for t in (0.0, 0.5, 1.0, rounded):
        assert at(t, Guidance(scale=2))[1] == ["cfg"]


def test_methods_add_up_in_their_own_intervals():
    rules = Guidance(method="internal", scale=1.5, start=0.1), Guidance(scale=3, end=0.6)
    assert at(0.05, *rules) == (5 + 2 * 3, ["cfg"])
    assert at(0.5, *rules) == (5 + 0.5 * 1 + 2 * 3, ["internal", "cfg"])
    assert at(0.5, *reversed(rules))[0] == at(0.5, *rules)[0]
    assert at(0.9, *rules) == (5.5, ["internal"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cfg:2", [Guidance(scale=2)]),
        ("2.0", [Guidance(scale=2)]),
        ("2.0@0.1-0.9+internal:1.5", [Guidance(scale=2, start=0.1, end=0.9), Guidance(method="internal", scale=1.5)]),
        ("cfg:2.0@0.1-0.9", [Guidance(scale=2, start=0.1, end=0.9)]),
        ("cfg:0@0-1", [Guidance(scale=0)]),
        ("auto:1.42", [Guidance(method="auto", scale=1.42)]),
        ("internal:1.78@0.1-1.0", [Guidance(method="internal", scale=1.78, start=0.1, end=1)]),
        ("internal:1.78@0.1-1+cfg:1.5", [Guidance(method="internal", scale=1.78, start=0.1), Guidance(scale=1.5)]),
    ],
)
def test_parse(text: str, expected: list[Guidance]):
    assert parse_guidance(text) == tuple(expected)


@pytest.mark.parametrize("text", ["cfg:2.0", "auto:1.4@0.1-0.9", "internal:-0.123456789@0.0-0.5", "cfg:2.0@1e-05-0.9"])
def test_a_rule_is_written_as_it_is_read(text: str):
    (rule,) = parse_guidance(text)
    assert str(rule) == text


@pytest.mark.parametrize(
    "text",
    ["", "two", "cfg", "cfg:", "cfg:two", "weak:2", "cfg:2@0.1", "cfg:2@a-b", "cfg:2:3", "cfg:2+", "cfg:2+auto"],
)
def test_parse_names_the_text_and_the_form(text: str):
    with pytest.raises(UserError) as error:
        parse_guidance(text)
    assert f"guidance: {text!r} is not of the form METHOD:SCALE" in str(error.value)
    assert "cfg, auto, internal, as in cfg:2.0@0.1-0.9" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg:2@0.9-0.1", "interval 0.9-0.1"),
        ("cfg:2@0.5-1.5", "interval 0.5-1.5"),
        ("auto:1", "scale of 1 has no effect"),
        ("cfg:2+internal:1.0", "scale of 1 has no effect"),
        ("cfg:nan", "scale: Input should be a finite number"),
        ("cfg:inf", "scale: Input should be a finite number"),
        ("cfg:2@nan-1", "start: Input should be a finite number"),
    ],
)
def test_impossible_guidance_is_named(text: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_guidance(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg:2+cfg:3@0.1-0.2", "guidance: cfg is given twice"),
        ("auto:2", "guidance: auto needs a weaker model"),
        ("cfg:2@0.6-0.8", r"cfg would have no effect, .* falls into 0\.6-0\.8 \(the nearest is 0\.5\)"),
        ("internal:2+cfg:2@0-0.2", "cfg would have no effect"),
    ],
)
def test_guidance_without_effect_is_refused(text: str, message: str):
    check_guidance(parse_guidance("internal:2+cfg:2@0.5-0.6"), {"auto": "needs a weaker model"}, [1.0, 0.5])
    with pytest.raises(UserError, match=message):
        check_guidance(parse_guidance(text), {"auto": "needs a weaker model"}, [1.0, 0.5])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cfg:2", [1.0, 0.7, 0.5, 0.2, 0.0]),
        ("cfg:2@0.45-1.0", [1.0, 0.7, 0.45, 0.2, 0.0]),
        ("cfg:2@0.45-0.55", [1.0, 0.7, 0.55, 0.45, 0.0]),
        ("cfg:2@0.01-0.02", [1.0, 0.7, 0.02, 0.01, 0.0]),
        ("cfg:2@0.98-0.99", [1.0, 0.99, 0.98, 0.2, 0.0]),
        ("cfg:2@0.1-0.6+internal:2@0.1-0.9", [1.0, 0.9, 0.6, 0.1, 0.0]),
    ],
)
def test_the_ends_of_intervals_replace_the_nearest_inner_times(text: str, expected: list[float]):
    times, rules = [1.0, 0.7, 0.5, 0.2, 0.0], parse_guidance(text)
    assert with_interval_ends(times, rules) == expected
    assert with_interval_ends(times[::-1], rules) == expected[::-1]


def test_ends_outside_of_the_grid_leave_it():
    rules = parse_guidance("cfg:2@0.1-0.9")
    assert with_interval_ends([0.8, 0.5, 0.2], rules) == [0.8, 0.5, 0.2]


def test_too_few_steps_for_the_ends_of_intervals():
    rules = parse_guidance("cfg:2@0.1-0.6")
    assert with_interval_ends([1.0, 0.7, 0.2, 0.0], rules) == [1.0, 0.6, 0.1, 0.0]
    with pytest.raises(
        UserError, match=r"steps: 2 is too few for guidance that changes at 0\.6, 0\.1; take at least 3"
    ):
        with_interval_ends([1.0, 0.5, 0.0], rules)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_rule_acts_in_complete_pieces(reverse: bool):
    cfg, internal = Guidance(scale=3), Guidance(method="internal", scale=1.5)
    times = [time_grid(1, 6**0.5)[0], 0.9, 0.6, 0.3, 0.1, 0.0]
    assert times[0] > 1
    expected = [(times[:3], (internal,)), (times[2:5], (cfg, internal)), (times[4:], (cfg,))]
    if reverse:
        times, expected = times[::-1], [(piece[::-1], rules) for piece, rules in reversed(expected)]
    assert pieces(times, parse_guidance("cfg:3@0-0.6+internal:1.5@0.1-1")) == expected


def test_an_unknown_method_is_rejected():
    method: Any = "CFG"
    with pytest.raises(UserError, match="method: Input should be 'cfg', 'auto' or 'internal'"):
        Guidance(method=method, scale=2.0)
