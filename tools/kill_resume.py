"""Kill a training run (SIGKILL) at random moments, resume it each time, and compare it with an uninterrupted run.

    python tools/kill_resume.py
    python tools/kill_resume.py --kills 20 --folder /tmp/kills -- emoji_decoder --train.steps 300 --no-train.compile

The arguments after `--` go to `raekit train`. The script exits with 0 if the last checkpoint (weights, averages,
moments, step), the artifact and the loss of every step are bit-identical.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

DEFAULT = ["emoji_encoder", "--train.steps", "200", "--train.batch-size", "8", "--train.checkpoint-every", "7"]
START_UP = 0.2
"""The share of kills while a process starts. The other kills happen while the process trains."""


def train(run: Path, arguments: list[str]) -> None:
    """Run `raekit train` in this process, with its output in a file next to the run."""
    log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv = ["raekit", "train", *arguments, "--train.log-every", "1", "--run", str(run)]
    from raekit.cli import main

    main()


def step_of(run: Path) -> int:
    """Return the last step that the run has recorded."""
    from raekit.train.tracking import read_metrics

    records = read_metrics(run)
    return int(records[-1]["step"]) if records else 0


class Lives:
    """Starts each training in a new process. The processes are forked from a server that has done the imports."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["raekit.cli", "raekit.recipes", "raekit.stages.run"])

    def start(self, run: Path) -> ForkServerProcess:
        process = self.context.Process(target=train, args=(run, self.arguments))
        process.start()
        return process

    def finish(self, run: Path) -> None:
        join(self.start(run), run)


def join(process: ForkServerProcess, run: Path) -> None:
    process.join()
    if process.exitcode:
        sys.exit(
            f"FAIL: a training that was not killed gave exit code {process.exitcode}; see {run.with_suffix('.log')}"
        )


def timed(lives: Lives, run: Path) -> tuple[int, float, float]:
    """Train without a kill. Return the number of steps, the seconds until the first step, and the seconds per step."""
    began = time.monotonic()
    process = lives.start(run)
    while not step_of(run) and process.is_alive():
        time.sleep(0.002)
    started = time.monotonic()
    join(process, run)
    steps = step_of(run)
    return steps, started - began, (time.monotonic() - started) / steps


def kill(lives: Lives, run: Path, kills: int, randomly: random.Random, timing: tuple[int, float, float]) -> int:
    """Kill the run up to `kills` times: near random steps, or while it starts.

    Returns the number of kills, which is lower than `kills` if the run ends early.
    """
    steps, start_up, step_time = timing
    for number, target in enumerate(sorted(randomly.uniform(0, 0.9 * steps) for _ in range(kills)), 1):
        starts = randomly.random() < START_UP
        delay = randomly.uniform(0, start_up if starts else 2 * step_time)
        process = lives.start(run)
        while not starts and step_of(run) < target and process.is_alive():
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.join()
        if process.exitcode == 0:
            return number - 1
        if process.exitcode != -9:
            sys.exit(f"FAIL: exit code {process.exitcode} before kill {number}; see {run.with_suffix('.log')}")
        saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        saving = " while saving" if any(name.endswith(".partial") for name in saved) else ""
        print(f"kill {number:2}: at step {step_of(run)}{saving}; checkpoints: {', '.join(saved) or 'none'}")
    return kills


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(run: Path) -> dict[str, str]:
    """Return digests of the run: tensors of the last checkpoint, files of the artifact, logged metrics."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from raekit.train.checkpoint import checkpoints
    from raekit.train.tracking import read_metrics

    found: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
        else:
            found[name] = digest(value.numpy().tobytes()) if isinstance(value, torch.Tensor) else repr(value)

    newest = checkpoints(run / "checkpoints")[-1]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(newest, Path(scratch) / "state.pt")
        add(newest.name, torch.load(Path(scratch) / "state.pt"))
    for path in filter(Path.is_file, (run / "artifact").rglob("*")):
        found[str(path.relative_to(run))] = digest(path.read_bytes())
    for record in read_metrics(run):
        if record.pop("images_per_second", None):  # a record of training, not of an evaluation
            add(f"metrics.step {record.pop('step')}", record)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--folder", type=Path, help="empty folder for the runs. Default: a temporary folder")
    parser.add_argument("train", nargs="*", default=DEFAULT, metavar="ARGUMENT", help="of raekit train, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            sys.exit(f"{folder}: not empty; give an empty folder")
        lives, randomly = Lives(options.train), random.Random(options.seed)
        timing = timed(lives, folder / "alone")
        print(
            f"uninterrupted: {timing[0]} steps, first after {timing[1]:.1f} s, then {1000 * timing[2]:.0f} ms per step"
        )
        expected, kills, runs = contents(folder / "alone"), 0, 0
        while kills < options.kills:  # a run that ends before the last kill is followed by another run
            runs += 1
            run = folder / f"killed{runs}"
            kills += kill(lives, run, options.kills - kills, randomly, timing)
            lives.finish(run)
            found = contents(run)
            different = [name for name in expected | found if expected.get(name) != found.get(name)]
            for name in different[:10]:
                print(f"differs: {name}")
            if different:
                sys.exit(f"FAIL: {len(different)} of {len(expected)} values differ")
    print(f"OK: {kills} kills, {runs} run(s), and all {len(expected)} values are bit-identical")


if __name__ == "__main__":
    main()
