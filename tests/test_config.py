import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raekit.config import (
    Defines,
    Mark,
    OnPurpose,
    Operation,
    Place,
    changes,
    check_sizes,
    configclass,
    differences,
    from_dict,
    read_json,
    read_lines,
    replaced,
    to_dict,
    to_json,
)
from raekit.errors import UserError
from raekit.stages.decoder_losses import DecoderLossConfig
from raekit.training.optim import OptimConfig


@configclass
class Inner:
    width: int
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"width: {self.width} must be positive")


@configclass
class Outer:
    name: str
    inner: Inner
    grid: tuple[int, int] = (4, 4)
    law: Literal["uniform", "logit-normal"] = "uniform"
    head: Inner | None = None


CONFIG = Outer(name="a", inner=Inner(width=3), grid=(2, 5), head=Inner(width=4, rate=1e-8))


def test_configurations_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.name = "b"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Inner(3)  # pyright: ignore[reportCallIssue]


def test_json_round_trip():
    values = json.loads(to_json(to_dict(CONFIG)))
    assert values["grid"] == [2, 5]
    assert from_dict(Outer, values, "here") == CONFIG


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_exactly(rate: float):
    assert from_dict(Inner, json.loads(to_json(to_dict(Inner(width=1, rate=rate)))), "here").rate == rate


def changed(**changes: Any) -> dict[str, Any]:
    return to_dict(CONFIG) | changes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(widht=3), "here: widht: "),
        (changed(inner={"width": 3, "rat": 1}), r"here: inner.rat: "),
        (changed(inner={"width": "wide"}), r"here: inner.width: "),
        (changed(inner={}), r"here: inner.width: Field required"),
        (changed(law="normal"), r"here: law: .*'uniform' or 'logit-normal'"),
        (changed(grid=[1, 2, 3]), r"here: grid"),
        (None, r"here: Outer: "),
        ([], r"here: Outer: "),
    ],
)
def test_faults_name_their_field(values: Any, message: str):
    with pytest.raises(UserError, match=message):
        from_dict(Outer, values, "here")


def test_all_faults_are_listed_at_once():
    with pytest.raises(UserError, match=r"law: .*; extra: "):
        from_dict(Outer, changed(law=3, extra=1), "here")


def test_broken_invariants_name_the_file_too():
    with pytest.raises(UserError, match=r"^here: width: 0 must be positive$"):
        from_dict(Outer, changed(inner={"width": 0}), "here")


def test_sizes_out_of_range_are_rejected():
    check_sizes("part", width=1, depth=65_536)
    for value in (-1, 0, 65_537):
        with pytest.raises(UserError, match=rf"^part\.depth: {value} must be from 1 to 65,536$"):
            check_sizes("part", width=1, depth=value)
    with pytest.raises(UserError, match="from 1 to 8"):
        check_sizes("part", limit=8, depth=9)


def test_files(tmp_path: Path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read"):
        read_json(tmp_path)
    with pytest.raises(UserError, match=f"{path}: no such file"):
        read_json(path)
    path.write_text(to_json(to_dict(CONFIG)))
    assert read_json(path) == to_dict(CONFIG)
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UserError, match=f"{path}: not valid JSON"):
        read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=f"{path}: not valid JSON"):
        read_json(path)


def test_only_the_last_line_of_records_may_be_torn(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(path, lambda record: True, torn=True) == [{"step": 1}, {"step": 2}]
    with pytest.raises(UserError, match="line 3 is damaged"):
        read_lines(path, lambda record: True)
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_lines(path, lambda record: True, torn=True)


def test_differences():
    old, new = to_dict(CONFIG), changed(name="b", inner={"width": 3, "rate": 0.2}, head=None)
    assert set(differences(old, new)) == {
        'name: "a" -> "b"',
        "inner.rate: 0.1 -> 0.2",
        'head: {"width": 4, "rate": 1e-08} -> null',
    }
    assert list(differences(old, to_dict(CONFIG))) == []


def test_differences_of_fields_on_one_side():
    assert list(differences({"a": 1}, {"b": 2})) == ["a: 1 -> null", "b: null -> 2"]


@configclass
class Scores:
    every: int
    law: Defines[str] = "a"


@configclass
class Run:
    seed: int = 0
    rate: OnPurpose[float] = 0.1
    workers: Operation[int | None] = None
    place: Operation[Place | None] = None
    scores: Operation[Scores | None] = None
    inner: Inner = Inner(width=3)


@configclass
class Nested:
    run: Run
    name: Place = "b"


def test_a_change_has_the_part_that_its_field_declares():
    old = Run(scores=Scores(every=1))
    new = Run(seed=1, rate=0.2, workers=4, place="a", scores=Scores(every=2, law="b"), inner=Inner(width=4))
    assert [(change.part, str(change)) for change in changes(old, new)] == [
        (Mark.DEFINES, "seed: 0 -> 1"),
        (Mark.ON_PURPOSE, "rate: 0.1 -> 0.2"),
        (Mark.OPERATION, "workers: null -> 4"),
        (Mark.OPERATION, 'place: null -> "a"'),
        (Mark.OPERATION, "scores.every: 1 -> 2"),
        (Mark.DEFINES, 'scores.law: "a" -> "b"'),
        (Mark.DEFINES, "inner.width: 3 -> 4"),
    ]
    assert [change.part for change in changes(old, Run())] == [Mark.OPERATION]
    assert list(changes(old, old)) == []


def test_marked_fields_are_replaced_at_any_depth():
    outer = Nested(run=Run(place="a", seed=3))
    assert replaced(outer, Mark.PLACE, str.upper) == Nested(run=Run(place="A", seed=3), name="B")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(value: float):
    @configclass
    class Parent:
        rate: float = 1.0

    @configclass
    class Child(Parent):
        scale: float = 1.0

    for make in (Parent, Child):
        with pytest.raises(UserError, match=r"rate: Input should be a finite number"):
            make(rate=value)
        with pytest.raises(UserError, match=r"file.json: .*rate: "):
            from_dict(make, {"rate": value}, "file.json")
    with pytest.raises(UserError, match=r"scale: Input should be a finite number"):
        Child(scale=value)
    configs: Any = ((OptimConfig, "lr"), (DecoderLossConfig, "noise"))
    for config, field in configs:
        with pytest.raises(UserError, match=f"{field}: Input should be a finite number"):
            config(**{field: value})


def test_a_value_that_is_none_of_the_choices_is_refused_in_python():
    @configclass
    class Kind:
        kind: Operation[Literal["one", "two"]] = "one"
        other: Literal["x"] | None = None

    assert Kind(kind="two").kind == "two"
    with pytest.raises(UserError, match=r"Kind\.kind: Input should be 'one' or 'two' \(given: 'three'\)"):
        Kind(kind="three")  # type: ignore[arg-type]
