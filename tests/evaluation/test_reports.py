import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from PIL import Image

from raekit.config import to_dict
from raekit.errors import UserError
from raekit.evaluation.reports import Comparison, Report, flat, read_report, score_rows, write_report


def report(guidance: str | None = None, **results: float) -> Report:
    return Report(
        names={"model": "a | b <script>", "reference": ["r.npz"]},
        hash=f"hash {guidance}",
        images=f"images {guidance}",
        results=results
        or {"fid": 2.5, "fid_low": 2.25, "fid_high": 2.75, "fid_bias": 0.5, "kid": 0.1, "kid_std": 0.01},
        notes=("An early estimate.",),
        settings={"count": 60, "sampling": {"guidance": guidance, "steps": 2}, "references": [{"hash": "1"}]},
        environment={"torch": "2", "processes": 1},
    )


def written(folder: Path, made: Report, picture: bool = True) -> Path:
    folder.mkdir()
    if picture:
        Image.new("RGB", (40, 40), "red").save(folder / "samples.png")
    write_report(made, folder)
    return folder


def height(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.height


def test_a_report_is_written_for_machines_and_people(tmp_path):
    made = report("cfg:2.0")
    folder = written(tmp_path / "out", made)
    assert read_report(folder) == read_report(folder / "report.json") == made
    assert made.metrics == ["fid", "kid"]
    head, *rows = score_rows(made)
    assert head == ["metric", "value", "95 % interval", "bias, deviation"]
    assert rows == [["fid ↓", "2.5", "2.25 to 2.75", "bias +0.5"], ["kid ↓", "0.1", "", "deviation 0.01"]]
    assert score_rows(replace(made, results={"fid": 2.5})) == [["metric", "value"], ["fid ↓", "2.5"]]
    text = (folder / "report.md").read_text()
    assert "| fid ↓ | 2.5 | 2.25 to 2.75 | bias +0.5 |" in text
    assert "| sampling.guidance | cfg:2.0 |" in text
    assert "| reference | r.npz |" in text
    assert "| model | a \\| b \\<script\\> |" in text
    assert text.startswith("# a \\| b \\<script\\>\n")
    odd = replace(made, names={"model": "x](y)\n# [`z`] *b* fd_a_b", "reference": []}, notes=("<b> \n- x",))
    text = (written(tmp_path / "odd", odd) / "report.md").read_text()
    assert text.startswith(r"# x\](y) # \[\`z\`\] \*b\* fd_a_b" + "\n")
    assert "\n- \\<b\\> - x\n" in text
    page = (folder / "report.html").read_text()
    assert "<td>reference</td><td>r.npz</td>" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=.(?!data:)", page)
    for word in ("hash cfg:2.0", "images cfg:2.0", "An early estimate.", "2.25 to 2.75", "sampling.steps", "torch"):
        assert word in page
    assert "<img" not in (written(tmp_path / "bare", made, picture=False) / "report.html").read_text()


def test_an_invalid_report_is_named(tmp_path):
    with pytest.raises(UserError, match=r"report\.json: no such file"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**to_dict(report()), "results": {"fid": "good"}}))
    with pytest.raises(UserError, match=r"report\.json: results\.fid: "):
        read_report(tmp_path)


def test_nested_settings_are_flattened():
    values = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, {"e": 3}], "f": [1, 2], "g": None}
    assert flat(values) == {"a.b": 1, "d.0.e": 2, "d.1.e": 3, "f": [1, 2], "g": None}


def test_reports_are_named_by_the_setting_in_which_they_differ(tmp_path, monkeypatch):
    plain, guided = written(tmp_path / "a", report()), written(tmp_path / "b", report("cfg:2.0", fid=2.0, recall=0.5))
    compared = Comparison([plain, guided / "report.json"])
    assert compared.labels == ["guidance none", "guidance cfg:2.0"]
    assert compared.rows() == [
        ["fid ↓", "2.5 (2.25 to 2.75)", "2"],
        ["kid ↓", "0.1", ""],
        ["recall ↑", "", "0.5"],
    ]
    assert compared.notes() == ["settings differ in sampling.guidance: none | cfg:2.0"]
    compared.write(tmp_path / "c.md")
    assert "| fid ↓ | 2.5 (2.25 to 2.75) | 2 |" in (tmp_path / "c.md").read_text()
    compared.write(tmp_path / "c.html")
    assert "guidance cfg:2.0" in (tmp_path / "c.html").read_text()
    texts: list[str] = []
    monkeypatch.setattr(Axes, "set_xticks", lambda axes, ticks, labels, **options: texts.extend(labels))
    compared.write(tmp_path / "c.png")
    assert texts == ["2.5", "2", "0.1", "none", "none", "0.5"]
    with_samples = height(tmp_path / "c.png")
    (plain / "samples.png").unlink()
    compared.write(tmp_path / "d.png")
    assert height(tmp_path / "d.png") < with_samples
    with pytest.raises(UserError, match=r"must end in \.png, \.md or \.html"):
        compared.write(tmp_path / "c.txt")


def test_baselines_are_one_setting_of_a_comparison(tmp_path):
    made = report()
    settings = [{**made.settings, "baselines": rows} for rows in ({}, {"training images": {"count": 9, "seed": 0}})]
    places = [written(tmp_path / str(i), replace(made, settings=each)) for i, each in enumerate(settings)]
    assert Comparison(places).notes() == ["settings differ in baselines: no | yes"]


def test_the_reason_against_a_comparison_is_given(tmp_path):
    first = report()
    second = replace(
        first,
        settings={**first.settings, "count": 50, "references": [{"hash": "2"}]},
        environment={**first.environment, "torch": "3"},
    )
    places = [written(tmp_path / name, made) for name, made in (("a", first), ("b", second), ("c", first))]
    compared = Comparison(places[:2])
    assert compared.labels == [str(place) for place in places[:2]]
    notes = "; ".join(compared.notes())
    for words in (
        "differ in count: 60 | 50",
        "environment differ in torch: 2 | 3",
        "must not be compared",
        "are higher",
    ):
        assert words in notes
    assert Comparison([places[0], places[2]]).notes() == ["same settings; the images are identical"]
    with pytest.raises(UserError, match="at least two"):
        Comparison(places[:1])
