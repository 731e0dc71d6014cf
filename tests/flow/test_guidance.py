import pytest
import torch

from raekit.errors import UserError
from raekit.flow.guidance import Guidance, classifier_free, parse_guidance


class Field:
    """A constant velocity that counts its evaluations."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        self.calls += 1
        return torch.full_like(x, self.value)


X = torch.zeros(2, 3, 2, 2)


@pytest.mark.parametrize(("scale", "expected"), [(1.7, 2 + 1.7 * 3), (0.0, 2.0), (0.25, 2.75), (-1.0, -1.0)])
def test_scale_is_measured_from_the_unconditional(scale: float, expected: float):
    guided = classifier_free(Field(5), Field(2), Guidance(scale=scale))
    assert torch.allclose(guided(X, 0.5), torch.full_like(X, expected))


@pytest.mark.parametrize(
    ("t", "inside"), [(0.0, False), (0.19, False), (0.2, True), (0.5, True), (0.8, True), (0.81, False), (1.0, False)]
)
def test_outside_its_interval_guidance_costs_nothing(t: float, inside: bool):
    conditional, unconditional = Field(5), Field(2)
    out = classifier_free(conditional, unconditional, Guidance(scale=2, start=0.2, end=0.8))(X, t)
    assert torch.equal(out, torch.full_like(X, 8 if inside else 5))
    assert (conditional.calls, unconditional.calls) == (1, int(inside))


def test_whole_interval_by_default():
    unconditional = Field(2)
    guided = classifier_free(Field(5), unconditional, Guidance(scale=2))
    for t in (0.0, 0.5, 1.0):
        guided(X, t)
    assert unconditional.calls == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cfg:2", Guidance(scale=2)),
        ("cfg:1.42@0.1-0.9", Guidance(scale=1.42, start=0.1, end=0.9)),
        ("cfg:0@0-1", Guidance(scale=0)),
    ],
)
def test_parse(text: str, expected: Guidance):
    assert parse_guidance(text) == expected


@pytest.mark.parametrize("text", ["", "2.0", "cfg", "cfg:", "cfg:two", "auto:2", "cfg:2@0.1", "cfg:2@a-b", "cfg:2:3"])
def test_parse_names_the_text_and_the_form(text: str):
    with pytest.raises(UserError, match=f"guidance: '{text}' is not of the form cfg:SCALE"):
        parse_guidance(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg:2@0.9-0.1", "interval 0.9-0.1"),
        ("cfg:2@0.5-1.5", "interval 0.5-1.5"),
        ("cfg:1", "scale of 1 has no effect"),
        ("cfg:nan", "scale of nan"),
        ("cfg:inf", "scale of inf"),
        ("cfg:2@nan-1", "interval nan-1"),
    ],
)
def test_impossible_guidance_is_named(text: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_guidance(text)
