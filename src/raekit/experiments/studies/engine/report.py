"""Write what a study found: study.json, study.md and the figures."""

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from raekit import __version__
from raekit.config import Mark, read_json, replaced, to_dict, to_json
from raekit.experiments.studies.engine.plan import Claim, Run
from raekit.files import whole

_SIZE = (6.4, 3.8)
"""Width and height of a figure in inches."""


def write_report(name: str, about: str, quick: bool, runs: Sequence[Run], claims: Sequence[Claim], out: Path) -> None:
    """Write study.json, study.md, and each claim's figure as PNG and SVG, to the folder `out`."""
    for claim in claims:
        _save(claim, out)
    rows = []
    for run in runs:
        place = out / "runs" / run.name
        rows.append(
            {
                "name": run.name,
                "settings": dict(run.settings),
                "values": read_json(place / "result.json")["values"],
                # Without the folder of the study, so that the record is the same wherever the study ran.
                "config": to_dict(replaced(run.config, Mark.PLACE, lambda name: name.replace(f"{out}{os.sep}", ""))),
            }
        )
    record = {
        "study": name,
        "about": about.strip().splitlines(),
        "quick": quick,
        "raekit": __version__,
        "commit": _commit(),
        "machine": _machine(),
        "claims": [
            {field: getattr(claim, field) for field in ("name", "text", "paper", "found", "verdict")}
            for claim in claims
        ],
        "runs": rows,
    }
    with whole(out / "study.json") as partial:
        partial.write_text(to_json(record), encoding="utf-8")
    with whole(out / "study.md") as partial:
        partial.write_text(_page(name, about, record, claims), encoding="utf-8")


def _page(name: str, about: str, record: dict[str, Any], claims: Sequence[Claim]) -> str:
    """Return the text of study.md."""
    lines = [f"# {name}: {about.strip().splitlines()[0]}", ""]
    if record["quick"]:
        lines += ["This is a trial with `--quick`. Its numbers say nothing about the claims.", ""]
    lines += ["| claim | paper | here | verdict |", "|---|---|---|---|"]
    lines += [f"| {claim.text} | {claim.paper} | {claim.found} | **{claim.verdict}** |" for claim in claims]
    for claim in claims:
        lines += ["", f"![{claim.caption}]({claim.name}.png)", "", claim.caption]
    machine = record["machine"]
    seeds = sorted({run["settings"]["seed"] for run in record["runs"]})
    lines += [
        "",
        f"{len(record['runs'])} runs, seeds {', '.join(map(str, seeds))}, raekit {record['raekit']}"
        f" (commit {record['commit'] or 'unknown'}), {machine['processor']}, torch {machine['torch']}. "
        "`study.json` has all settings and numbers.",
        "",
        "```",
        *about.strip().splitlines()[2:],
        "```",
    ]
    return "\n".join(lines) + "\n"


def _save(claim: Claim, out: Path) -> None:
    """Draw a figure, and save it as PNG and SVG."""
    import matplotlib  # slow to import
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "raekit", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=_SIZE, dpi=200, layout="constrained")
        claim.draw(figure)
        for kind in ("png", "svg"):
            with whole(out / f"{claim.name}.{kind}") as partial:
                # Without its date, the file is the same for the same numbers.
                figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else {})


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(named, platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    """Return the commit of the code, if it runs from a git checkout."""
    here = Path(__file__)
    command = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*command, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        found = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
