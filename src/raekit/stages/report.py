"""A page about one run, at any moment: curves, pictures, scores, speed, events and settings."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from raekit import __version__
from raekit.config import read_json, to_json
from raekit.distributed.locks import holder
from raekit.evaluation.pages import write_page
from raekit.pictures import embed
from raekit.progress import duration
from raekit.stages.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Points, draw
from raekit.stages.record import read_history, read_values
from raekit.training.checkpoint import checkpoints
from raekit.training.tracking import pictures_of, read_metrics

_log = logging.getLogger(__name__)
_SHOWN = 12
"""The most pictures of earlier steps."""
_THUMBNAIL = 480
"""The longest side of the pictures of earlier steps in pixels."""
_SPEED = {
    "images_per_second": "images/s",
    "step_seconds": "seconds per step",
    "data_wait": "share of time waiting for data",
    "tflops": "TFLOP/s of a process",
    "mfu": "MFU",
    "matmul_share": "share of the measured matmul rate",
    "peak_memory_gib": "peak memory in GiB",
}
_NOT_DRAWN = {"step", "seconds_left", "step_seconds"}
Records = Sequence[dict[str, float]]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write a page about a run, of any stage, that trains, has stopped or has finished.

    Args:
        run: The folder of the run.
        out: The HTML file. Default: RUN/report.html.

    Returns:
        The path of the page, which needs no other file.

    Raises:
        UserError: `run` is not a run, or the page cannot be written.
    """
    config = read_values(run)
    records, history = read_metrics(run), read_history(run)
    step = int(records[-1]["step"]) if records else 0
    restarts = [start["step"] for start in history if start["step"]]
    path = out or run / "report.html"
    write_page(
        path,
        "run.html",
        version=__version__,
        name=run.absolute().name,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        stage=config["stage"],
        step=step,
        steps=config["train"]["steps"],
        status=_status(run, step, config["train"]["steps"], records),
        facts=_facts(records, history),
        charts=_charts(records, restarts),
        restarts=restarts,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        pictures=_pictures(run),
        scores=_scores(records),
        timings=_timings(run, records, history),
        events=_events(records, history),
        data=_data(run, config, step),
        settings=to_json(config),
    )
    return path


def _status(run: Path, step: int, steps: int, records: Records) -> str:
    """Return whether the run trains now."""
    if owner := holder(run):
        seconds = _last(records).get("seconds_left") if records else None
        left = "" if seconds is None else f", {duration(seconds)} left"
        return f"in training on {owner['host']}{left}"
    if step >= steps:
        return "finished"
    newest = checkpoints(run / "checkpoints")
    return f"stopped; {f'the newest checkpoint is {newest[-1].name}' if newest else 'there is no checkpoint'}"


def _last(records: Records) -> dict[str, float]:
    """Return the newest value of each name, without names that only the record of another device has."""
    newest: dict[str, float] = {}
    for record in records:
        if "mfu" in record or "matmul_share" in record:
            for name in ("mfu", "matmul_share"):
                newest.pop(name, None)
        newest |= record
    return newest


def _facts(records: Records, history: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the newest values: a name, the value, and a remark."""
    last = _last(records)
    losses = {name: value for name, value in last.items() if name.endswith("/loss")}
    facts = [
        (name.replace("/", " ").replace("heldout", "held-out"), f"{value:.4g}", "") for name, value in losses.items()
    ]
    peak = history[-1] if history and "peak_tflops" in history[-1] else None
    of = ""
    if peak:
        known = f"the data sheet of {peak['device']}" if peak["peak_stated"] else "measured with a matrix product"
        of = f"of {peak['peak_tflops']:.3g} TFLOP/s, {known}"
    for name, text, note in (
        ("images_per_second", "{:.4g} images/s", ""),
        ("step_seconds", "{:.3g} s per step", ""),
        ("data_wait", "{:.0%} waiting for data", ""),
        ("tflops", "{:.3g} TFLOP/s", "in each process"),
        ("mfu", "{:.0%} MFU", of),
        ("matmul_share", "{:.0%} of the matmul rate", of),
        ("peak_memory_gib", "{:.3g} GiB", "peak memory of a process"),
    ):
        if name in last:
            value, _, what = text.format(last[name]).partition(" ")
            facts.append((what, value, note))
    return facts


def _series(records: Records) -> dict[str, Points]:
    """Return the points of every logged name."""
    series: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            if name not in _NOT_DRAWN and not name.endswith("/seconds"):
                series[name].append((record["step"], value))
    return dict(series)


def _charts(records: Records, restarts: Sequence[int]) -> dict[str, list[Chart]]:
    """Return the drawings of each section of the page."""
    series = _series(records)
    heldout = {name: series.pop(name) for name in list(series) if name.startswith("heldout/")}
    groups: dict[str, dict[str, dict[str, Points]]] = {"Loss": {}, "Scores": {}, "More values": {}, "Speed": {}}
    for name, points in series.items():
        prefix, _, rest = name.partition("/")
        if name in _SPEED:
            groups["Speed"][_SPEED[name]] = {name: points}
        elif prefix in ("evaluation", "samples"):
            # The averages of one metric share a drawing.
            metric = name.rpartition("/")[2]
            groups["Scores"].setdefault(metric, {})[rest] = points
        elif rest == "loss":
            groups["Loss"][prefix] = {name: points} | (heldout if not groups["Loss"] else {})
        elif not (rest == "skipped" and not any(value for _, value in points)):
            groups["More values"][name] = {name: points}
    sections = {}
    for section, drawings in groups.items():
        drawn = [draw(title, curves, restarts, zero=section == "Speed") for title, curves in drawings.items()]
        sections[section] = [chart for chart in drawn if chart]
    return {section: charts for section, charts in sections.items() if charts}


def _pictures(run: Path) -> list[dict[str, Any]]:
    """Return the newest picture, and some earlier ones from new to old, each with its step and its data URL."""
    found = pictures_of(run)
    earlier, newest = found[:-1], found[-1:]
    if len(earlier) > _SHOWN:
        earlier = [earlier[round(i * (len(earlier) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
    shown = []
    for step, path in [*newest, *reversed(earlier)]:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # a damaged file can raise almost any type of exception in Pillow
            _log.warning("%s: cannot be read and is left out of the report (%s)", path, error)
            continue
        if shown and max(image.size) > _THUMBNAIL:
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        file = BytesIO()
        image.save(file, format="PNG")
        shown.append({"step": step, "url": embed(file.getvalue()), "small": max(image.size) <= _THUMBNAIL})
    return shown


def _scores(records: Records) -> list[tuple[str, str, str, str]]:
    """Return a row for each value that is measured between steps: its name, and its last, lowest and highest values."""
    rows = []
    for name, points in _series(records).items():
        if name.partition("/")[0] in ("evaluation", "heldout"):
            best = [points[-1], min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])]
            cells = [f"{value:.4g} (step {int(step):,})" for step, value in best]
            rows.append((name, *cells))
    return rows


def _timings(run: Path, records: Records, history: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return what the time was spent on: a name, the duration, and a remark."""
    training = waiting = before = 0.0
    calls: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        if "step_seconds" in record:
            seconds = (record["step"] - before) * record["step_seconds"]
            training, waiting, before = training + seconds, waiting + seconds * record["data_wait"], record["step"]
        for name, value in record.items():
            if name.endswith("/seconds"):
                calls[name.removesuffix("/seconds")].append(value)
    rows = [("training steps", _duration(training), f"of this {_duration(waiting)} waiting for data")]
    rows += [(name, _duration(sum(values)), _times(len(values))) for name, values in calls.items()]
    if history and records:
        end = time.time() if holder(run) else (run / "metrics.jsonl").stat().st_mtime
        total = end - datetime.fromisoformat(history[0]["time"]).timestamp()
        rows.append(("since the first start", _duration(total), "with the time between starts"))
    return rows


def _times(count: int) -> str:
    return f"{count} times" if count > 1 else "once"


def _duration(seconds: float) -> str:
    """Return seconds as text, from a minute on as h:mm:ss."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _events(records: Records, history: Sequence[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Return starts, changes and skipped steps: the step, the time if it is known, and what happened."""
    events = []
    before: dict[str, Any] = {}
    for start in history:
        processes = start["processes"]
        where = f"{start['host']}, {start['device']}, {processes} process{'es' if processes > 1 else ''}"
        facts = {"raekit": start["raekit"], "torch": start["torch"]}
        versions = ", ".join(f"{name} {value}" for name, value in facts.items() if before.get(name) != value)
        what = "resumed" if before else "started"
        lines = [f"{what} on {where}{versions and ' with ' + versions}"]
        lines += [
            f"{field}: {json.dumps(old)} → {json.dumps(new)}" for field, (old, new) in start.get("changes", {}).items()
        ]
        events.append((start["step"], start["time"].replace("T", " ")[:16], "\n".join(lines)))
        before = start
    skipped: dict[str, float] = {}
    for record in records:
        for name, value in record.items():
            if name.endswith("/skipped"):
                if new := int(value - skipped.get(name, 0)):
                    steps = "step" if new == 1 else "steps"
                    text = f"{new} {steps} of {name.removesuffix('/skipped')} skipped: the gradient was not finite"
                    events.append((int(record["step"]), "", text))
                skipped[name] = value
    return sorted(events, key=lambda event: event[0])


def _data(run: Path, config: dict[str, Any], step: int) -> list[tuple[str, str]]:
    """Return what the run trains on."""
    rows = [("source", config["data"]["source"])]
    if (run / "inputs.json").is_file():
        images = read_json(run / "inputs.json")["data"]
        seen = step * config["train"]["batch_size"]
        rows.append(
            ("images", f"{images['count']:,}" + (f" in {len(images['classes'])} classes" if images["classes"] else ""))
        )
        rows.append(("seen so far", f"{seen:,} images, {seen / images['count']:.3g} epochs"))
    saved = [path.name for path in checkpoints(run / "checkpoints")]
    milestones = sorted(path.name for path in (run / "milestones").glob("step-*[0-9]"))
    rows.append(("checkpoints", ", ".join(saved) or "none"))
    if milestones:
        rows.append(("milestones", ", ".join(milestones)))
    return rows
