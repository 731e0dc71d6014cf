"""Reports of evaluations: the scores and everything that they depend on, in files for machines and for people."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from raekit.config import configclass, from_dict, read_json, to_dict, to_json
from raekit.errors import UserError
from raekit.evaluation.pages import write_page
from raekit.files import check_file, whole
from raekit.pictures import embed

LITERATURE = 50_000
"""The number of images behind published scores."""

_DISTANCES = ("fid", "sfid", "clean_fid", "fd_")
_LOWER = (*_DISTANCES, *(f"{kind}{name}" for kind in "ri" for name in _DISTANCES), "fdr", "kid", "lpips")
_HIGHER = ("inception_score", "precision", "recall", "psnr", "ssim", "knn_accuracy", "class_accuracy")
_PARTS = ("low", "high", "bias", "std")


@configclass
class Report:
    """One evaluation.

    Attributes:
        names: the names of the model and of the files.
        hash: 16 hexadecimal digits that identify `settings`.
        images: 16 hexadecimal digits that identify the pixels of the images.
        results: the metrics. `NAME_low`, `NAME_high`, `NAME_bias` and `NAME_std` belong to the metric NAME.
        baselines: the metrics of further images, which give a meaning to `results`, by the name of these images.
        notes: what a reader should know.
        settings: everything that determines the images and their scores.
        environment: the software and the machine.
    """

    names: dict[str, Any]
    hash: str
    images: str
    results: dict[str, float]
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, without the parts that belong to another metric."""
        return [name for name in self.results if not _is_part(name, self.results)]


def write_report(report: Report, out: Path) -> None:
    """Write OUT/report.md, OUT/report.html and, last, OUT/report.json.

    The HTML page contains OUT/samples.png and the pictures of the baselines, OUT/baselines/*.png, where they exist.
    """
    picture = out / "samples.png"
    with whole(out / "report.md") as partial:
        partial.write_text(_markdown(report), "utf-8", "backslashreplace")
    write_page(
        out / "report.html",
        "evaluation.html",
        title=str(report.names["model"]),
        report=report,
        rows=score_rows(report),
        baselines=baseline_rows(report) if report.baselines else [],
        settings=_texts(report.settings),
        names=_texts(report.names),
        environment=_texts(report.environment),
        picture=embed(picture.read_bytes()) if picture.is_file() else None,
        pictures={
            path.stem.replace("-", " "): embed(path.read_bytes()) for path in sorted((out / "baselines").glob("*.png"))
        },
    )
    with whole(out / "report.json") as partial:
        partial.write_text(to_json(to_dict(report)), "utf-8")


def score_rows(report: Report) -> list[list[str]]:
    """Return a heading, and a row for each metric: its name, value, 95 % interval, and its bias or deviation.

    An empty column is left out.
    """
    rows = [[_heading(name), *_cells(report, name)] for name in report.metrics]
    head = ("metric", "value", "95 % interval", "bias, deviation")
    columns = [column for column in zip(head, *rows, strict=True) if not rows or any(column[1:])]
    return [list(row) for row in zip(*columns, strict=True)]


def baseline_rows(report: Report) -> list[list[str]]:
    """Return a table of the evaluated images and the baselines: a heading, then a row for each set of images."""
    sets = {"these images": report.results, **report.baselines}
    shared = dict.fromkeys(name for values in report.baselines.values() for name in values)
    rows = [["", *map(_heading, shared)]]
    rows += [[row, *(f"{v[m]:.4g}" if m in v else "" for m in shared)] for row, v in sets.items()]
    return rows


def read_report(place: Path) -> Report:
    """Read a report from its report.json, or from the folder that `raekit evaluate` wrote."""
    path = place / "report.json" if place.is_dir() else place
    return from_dict(Report, read_json(path), path)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as {"a.b": value}. A list of plain values stays one value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings for a comparison. Of the baselines, they only say whether there are any."""
    if "baselines" not in settings:
        return dict(settings)
    return {**settings, "baselines": "yes" if settings["baselines"] else "no"}


def check_comparison(path: Path) -> None:
    """Raise UserError unless a comparison can be written to `path`."""
    if path.suffix not in (".png", ".md", ".html"):
        raise UserError(f"--out: {path} must end in .png, .md or .html")
    check_file(path)


class Comparison:
    """Reports side by side.

    Attributes:
        labels: a name for each report: the one setting in which the reports differ, otherwise the report's place.
        settings: the settings that differ, as {setting: a value for each report}.
        environment: the parts of the environment that differ, in the same form.
        metrics: the names of all metrics.
    """

    def __init__(self, places: Sequence[Path]):
        if len(places) < 2:
            raise UserError("compare: give at least two reports")
        self.reports = [read_report(place) for place in places]
        self.places = [place if place.is_dir() else place.parent for place in places]
        self.settings = _differing([flat(told(report.settings)) for report in self.reports])
        self.environment = _differing([flat(report.environment) for report in self.reports])
        self.metrics = list(dict.fromkeys(name for report in self.reports for name in report.metrics))
        (varied, *rest) = self.settings or [""]
        values = [str(value) for value in self.settings.get(varied, ())]
        if varied and not rest and len(set(values)) == len(values):
            last = varied.rpartition(".")[2]
            self.labels = [f"{last} {'none' if value == 'None' else value}" for value in values]
        else:
            self.labels = [str(place) for place in places]

    def rows(self) -> list[list[str]]:
        """Return a row for each metric: its name, and its value in each report."""
        return [[_heading(name), *(_text(report, name) for report in self.reports)] for name in self.metrics]

    def notes(self) -> list[str]:
        """Return what a reader should know about the differences."""
        found = []
        for name, parts in ("settings", self.settings), ("environment", self.environment):
            found += [f"{name} differ in {key}: {' | '.join(map(_plain, values))}" for key, values in parts.items()]
        if not self.settings:
            same = len({report.images for report in self.reports}) == 1
            found.append(f"same settings; the images are {'identical' if same else 'different'}")
        if any(key.startswith("references.") and key.endswith(".hash") for key in self.settings):
            found.append("the references differ, so the distances must not be compared")
        if "count" in self.settings:
            found.append("the numbers of images differ, and Frechet distances of fewer images are higher")
        return found

    def write(self, path: Path) -> None:
        """Write the comparison to a `.md`, `.html` or `.png` file; UserError for any other suffix."""
        check_comparison(path)
        if path.suffix == ".md":
            notes = [f"- {_escaped(note)}" for note in self.notes()]
            text = "\n".join([_table([["", *self.labels], *self.rows()]), "", *notes, ""])
            with whole(path) as partial:
                partial.write_text(text, "utf-8", "backslashreplace")
        elif path.suffix == ".html":
            write_page(
                path,
                "comparison.html",
                labels=self.labels,
                rows=self.rows(),
                notes=self.notes(),
                picture=embed(self.picture()),
            )
        else:
            png = self.picture()
            with whole(path) as partial:
                partial.write_bytes(png)

    def picture(self) -> bytes:
        """Return a PNG: the first images of each report, and a panel of bars, with intervals, for each metric."""
        from matplotlib.figure import Figure  # slow to import
        from PIL import Image

        samples = [place / "samples.png" for place in self.places]
        with_samples = all(path.is_file() for path in samples)
        number, columns = len(self.reports), max(len(self.metrics), 1)
        width = max(2.1 * columns, 3.0 * number if with_samples else 0, 4.0)
        figure = Figure(figsize=(width, 5.6 if with_samples else 2.6), dpi=150, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr]
        parts = figure.add_gridspec(2, 1, height_ratios=(3, 2)) if with_samples else figure.add_gridspec(1, 1)
        colours = [f"C{index}" for index in range(number)]
        if with_samples:
            above = figure.add_subfigure(parts[0]).subplots(1, number, squeeze=False)[0]
            for axes, path, label, colour in zip(above, samples, self.labels, colours, strict=True):
                axes.set_axis_off()
                axes.set_title(label, fontsize=9, color=colour)
                with Image.open(path) as picture:
                    axes.imshow(picture, interpolation="nearest")
        below = figure.add_subfigure(parts[-1]).subplots(1, columns, squeeze=False)[0]
        for axes, name in zip(below, self.metrics, strict=True):
            values = [report.results.get(name, math.nan) for report in self.reports]
            ends = [
                [report.results.get(f"{name}_{end}", math.nan) for end in ("low", "high")] for report in self.reports
            ]
            spread = [
                [value - low for value, (low, _) in zip(values, ends, strict=True)],
                [high - value for value, (_, high) in zip(values, ends, strict=True)],
            ]
            bars = axes.bar(range(number), values, yerr=spread, color=colours, capsize=3, width=0.7)
            heading = _heading(name)
            axes.set_title(heading, fontsize=min(9, 240 / len(heading)))  # long names fit their panel too
            axes.set_xticks(
                range(number), ["none" if math.isnan(value) else f"{value:.4g}" for value in values], fontsize=8
            )
            axes.tick_params("y", labelsize=7)
            if not with_samples and name == self.metrics[-1]:
                figure.legend(bars.patches, self.labels, loc="outside lower center", fontsize=8, ncols=number)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


def _differing(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for part in parts for key in part)
    values = {key: [part.get(key) for part in parts] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _is_part(name: str, results: Mapping[str, float]) -> bool:
    metric, _, part = name.rpartition("_")
    return part in _PARTS and metric in results


def _arrow(name: str) -> str:
    """Return an arrow that points to better values."""
    return "↓" if name.startswith(_LOWER) else "↑" if name.startswith(_HIGHER) else ""


def _heading(name: str) -> str:
    return f"{name} {_arrow(name)}".rstrip()


def _cells(report: Report, name: str) -> tuple[str, str, str]:
    """Return the value, its interval, and its bias and deviation."""
    results = report.results
    interval = ""
    if f"{name}_low" in results:
        interval = f"{results[f'{name}_low']:.4g} to {results[f'{name}_high']:.4g}"
    rest = [f"bias {results[f'{name}_bias']:+.3g}"] if f"{name}_bias" in results else []
    rest += [f"deviation {results[f'{name}_std']:.3g}"] if f"{name}_std" in results else []
    return f"{results[name]:.6g}", interval, ", ".join(rest)


def _text(report: Report, name: str) -> str:
    if name not in report.results:
        return ""
    value, interval, _ = _cells(report, name)
    return value + (f" ({interval})" if interval else "")


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return nested values as {"a.b": text}."""
    return {key: _plain(value) for key, value in flat(values).items()}


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _markdown(report: Report) -> str:
    settings = [["setting", "value"], ["hash", report.hash], ["images", report.images]]
    for part in report.names, report.settings, report.environment:
        settings += map(list, _texts(part).items())
    notes = [f"- {_escaped(note)}" for note in report.notes]
    baselines = [_table(baseline_rows(report)), ""] if report.baselines else []
    title = f"# {_escaped(str(report.names['model']))}"
    parts = [title, "", _table(score_rows(report)), "", *baselines, *notes, "", _table(settings), ""]
    return "\n".join(parts)


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line: names of files and classes may hold any character."""
    return re.sub(r"[\\`*|\[\]<>&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, whose head is the first row."""
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
