"""Reports of evaluations: the scores with all that moves them, in files for machines and for people, side by side."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raekit.config import configclass, from_dict, read_json, to_dict, to_json
from raekit.errors import UserError
from raekit.files import whole
from raekit.pages import embed, write_page

LITERATURE = 50_000
"""The number of images that published scores are of."""

_DISTANCES = ("fid", "sfid", "clean_fid", "fd_")
_LOWER = (*_DISTANCES, *(f"r{name}" for name in _DISTANCES), "fdr", "kid", "lpips")
_HIGHER = ("inception_score", "precision", "recall", "psnr", "ssim")
_PARTS = ("low", "high", "bias", "std")


@configclass
class Report:
    """One evaluation.

    `results` are the metrics, `NAME_low`, `NAME_high`, `NAME_bias` and `NAME_std` what goes with the metric NAME.
    `settings` is all that the images and their scores are a function of, `hash` 16 digits of it; `images` 16 digits of
    the images' pixels. `names` tells how the model and the files were called, `environment` what it ran on, `notes`
    what a reader should know.
    """

    names: dict[str, Any]
    hash: str
    images: str
    results: dict[str, float]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics themselves."""
        return [name for name in self.results if not _is_part(name, self.results)]


def write_report(report: Report, out: Path) -> None:
    """Write OUT/report.md, OUT/report.html, with OUT/samples.png in it if there is one, and at last OUT/report.json."""
    picture = out / "samples.png"
    with whole(out / "report.md") as partial:
        partial.write_text(_markdown(report))
    write_page(
        out / "report.html",
        "evaluation.html",
        title=str(report.names["model"]),
        report=report,
        rows=score_rows(report),
        settings=flat(report.settings),
        names=flat(report.names),
        environment=flat(report.environment),
        picture=embed(picture.read_bytes()) if picture.is_file() else None,
    )
    with whole(out / "report.json") as partial:
        partial.write_text(to_json(to_dict(report)))


def score_rows(report: Report) -> list[list[str]]:
    """Of each metric its name, its value, its 95 % interval, and what else goes with it."""
    return [[f"{name} {_arrow(name)}".rstrip(), *_cells(report, name)] for name in report.metrics]


def read_report(place: Path) -> Report:
    """The report in a file, or in a folder that `raekit evaluate --reference` wrote; UserError if there is none."""
    path = place / "report.json" if place.is_dir() else place
    return from_dict(Report, read_json(path), path)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} for nested values; lists of plain values stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


class Comparison:
    """Reports side by side.

    `labels` names each by the settings that only they differ in, or else by its place; `settings` has the differing
    ones, {setting: a value for each report}, `environment` likewise.
    """

    def __init__(self, places: Sequence[Path]):
        if len(places) < 2:
            raise UserError("compare: give at least two reports")
        self.reports = [read_report(place) for place in places]
        self.places = [place if place.is_dir() else place.parent for place in places]
        self.settings = _differing([flat(report.settings) for report in self.reports])
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
        """The name of each metric and its value in each report."""
        return [
            [f"{name} {_arrow(name)}".rstrip(), *(_text(report, name) for report in self.reports)]
            for name in self.metrics
        ]

    def notes(self) -> list[str]:
        """What the reader should know of the differences."""
        found = []
        for name, parts in ("settings", self.settings), ("environment", self.environment):
            found += [f"{name} differ in {key}: {' | '.join(map(_plain, values))}" for key, values in parts.items()]
        if not self.settings:
            same = len({report.images for report in self.reports}) == 1
            found.append(f"same settings; the images {'are the same, pixel by pixel' if same else 'are others'}")
        if any(key.startswith("references.") and key.endswith(".hash") for key in self.settings):
            found.append("the references are others, so that distances must not be compared")
        if "count" in self.settings:
            found.append("the numbers of images are others, and Frechet distances of fewer are higher")
        return found

    def write(self, path: Path) -> None:
        """Write a `.md`, `.html` or `.png`; UserError for any other."""
        if path.suffix == ".md":
            text = "\n".join([_table([["", *self.labels], *self.rows()]), "", *(f"- {n}" for n in self.notes()), ""])
            with whole(path) as partial:
                partial.write_text(text)
        elif path.suffix == ".html":
            write_page(
                path,
                "comparison.html",
                labels=self.labels,
                rows=self.rows(),
                notes=self.notes(),
                picture=embed(self.picture()),
            )
        elif path.suffix == ".png":
            png = self.picture()
            with whole(path) as partial:
                partial.write_bytes(png)
        else:
            raise UserError(f"--out: {path} must end in .png, .md or .html")

    def picture(self) -> bytes:
        """A PNG: the first images of each report, and a panel of bars, with intervals, for each metric."""
        from matplotlib.figure import Figure  # imported late: it is slow, and only this needs it
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
            axes.set_title(f"{name} {_arrow(name)}", fontsize=9)
            axes.set_xticks(range(number), [f"{value:.4g}" for value in values], fontsize=8)
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
    """Which direction is better."""
    return "↓" if name.startswith(_LOWER) else "↑" if name.startswith(_HIGHER) else ""


def _cells(report: Report, name: str) -> tuple[str, str, str]:
    """The value, its interval and what else goes with it."""
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


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _markdown(report: Report) -> str:
    scores = [["metric", "value", "95 % interval", ""]]
    scores += score_rows(report)
    settings = [["setting", "value"], ["hash", report.hash], ["images", report.images]]
    for part in report.names, report.settings, report.environment:
        settings += [[key, _plain(value)] for key, value in flat(part).items()]
    notes = [f"- {note}" for note in report.notes]
    return "\n".join([f"# {report.names['model']}", "", _table(scores), "", *notes, "", _table(settings), ""])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
