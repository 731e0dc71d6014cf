"""Kill work (SIGKILL) at random moments, resume it each time, and compare the results with uninterrupted work.

    python tools/kill_resume.py
    python tools/kill_resume.py --kills 20 --folder /tmp/kills --only encoder generation

The work is a training of every stage, with selection, evaluation, milestones and checkpoints in the background, a
cache of latents, and a folder of samples. The script prints in which activity each kill fell, and exits with 0 if all
results are identical to the bit: checkpoints (weights, averages, moments, step), artifacts, milestones, losses, shards
and images. The training "processes" runs in one and in two processes by turns. Its checkpoints and losses must agree
with a training in one process to 1e-5.
"""

import argparse
import hashlib
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

SMALL = ["--train.batch-size", "4", "--train.log-every", "1", "--data.source", "{images}"]
SAVES = ["--train.checkpoint-every", "4", "--train.milestones", "5", "17"]
ENCODER = [
    *("--data.image-size", "16", "--encoder.image-size", "16", "--encoder.patch-size", "4"),
    *("--encoder.depth", "1", "--encoder.width", "32", "--encoder.heads", "2"),
]
DECODER = [
    *("--decoder.depth", "1", "--decoder.width", "32", "--decoder.heads", "2", "--decoder.hidden", "64"),
    *("--perceptual", "None"),
]
GAN = ["--adversarial.discriminator-start", "10", "--adversarial.start", "12"]
DENOISER = [
    *["--denoiser.backbone.depth", "1", "--denoiser.backbone.width", "32", "--denoiser.backbone.heads", "2"],
    *["--denoiser.head.depth", "1", "--denoiser.head.width", "32", "--denoiser.head.heads", "2"],
    "--denoiser.allow-narrow",
]
WORKS = {
    "encoder": ["train", "emoji_encoder", "--train.steps", "30", "--score-every", "10", *ENCODER, *SMALL, *SAVES],
    "background": [
        *("train", "emoji_encoder", "--train.steps", "30", "--score-every", "10", *ENCODER, *SMALL, *SAVES),
        *("--train.background-saves", "True"),
    ],
    "processes": [
        *("train", "emoji_encoder", "--train.steps", "30", "--score-every", "10", *ENCODER, *SMALL, *SAVES),
        # The gradient of a key's bias is nothing but rounding. With a small epsilon, AdamW magnifies this rounding.
        *("--train.precision", "fp32", "--optim.eps", "1e-5"),
    ],
    "decoder": [
        *("train", "emoji_decoder_gan", "--train.steps", "30", *DECODER, *GAN, *SMALL, *SAVES),
        *("--selection.every", "10", "--selection.features", "builtin:vit-tiny"),
    ],
    "denoiser": [
        *("train", "emoji_dit_dh", "--train.steps", "30", *DENOISER, *SMALL, *SAVES),
        *("--evaluation.every", "10", "--evaluation.count", "20", "--evaluation.steps", "4"),
        *("--evaluation.features", "builtin:vit-tiny"),
    ],
    "cache": [
        *("latents", "cache", "builtin:emoji", "--source", "{images}", "--out", "{out}", "--batch-size", "4"),
        *("--shard-size", "32"),
    ],
    "generation": [
        *("generate", "builtin:emoji", "--class", "0", "--count", "32", "--steps", "2", "--batch-size", "4"),
        *("--out", "{out}"),
    ],
}
EVERY = 10  # steps between evaluations
TOLERANCE = {"processes": 1e-5}  # the other results are identical
START_UP = 0.1
"""The share of kills while a process starts. The other kills happen while it works."""


def work(name: str, out: Path, images: str, processes: int) -> None:
    """Run a command of `WORKS` in this process or in two new ones, with its output in a file next to `out`."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    arguments = [argument.format(images=images, out=out) for argument in WORKS[name]]
    arguments += ["--run", str(out)] if arguments[0] == "train" else []
    sys.argv = ["raekit", *arguments, *(["--processes", str(processes)] if processes > 1 else [])]
    from raekit.cli import main

    main()


def step_of(run: Path) -> int:
    """Return the last step that the run has recorded."""
    from raekit.training.tracking import read_metrics

    records = read_metrics(run)
    return int(records[-1]["step"]) if records else 0


def children(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Lives:
    """Starts each command in a new process. The processes are forked from a server that has done the imports."""

    def __init__(self, name: str, images: str) -> None:
        self.name, self.images = name, images
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["raekit.cli", "raekit.recipes", "raekit.stages.run", "raekit.inference"])

    def start(self, out: Path, processes: int = 1) -> ForkServerProcess:
        process = self.context.Process(target=work, args=(self.name, out, self.images, processes))
        process.start()
        return process

    def finish(self, out: Path, processes: int = 1) -> float:
        """Run the command to its end; return the seconds."""
        began = time.monotonic()
        process = self.start(out, processes)
        process.join()
        if process.exitcode:
            sys.exit(f"FAIL: exit status {process.exitcode} without a kill; see {out.with_suffix('.log')}")
        return time.monotonic() - began


def activity(name: str, out: Path, began: float) -> str:
    """Return what a process that was started at the time `began` and killed was doing, from what it left."""
    from raekit.files import PARTIAL
    from raekit.training.tracking import read_metrics

    torn = [path for path in out.rglob(f"*{PARTIAL}") if path.stat().st_mtime >= began]  # not of an earlier life
    left = {path.name.removesuffix(PARTIAL) for path in torn}
    if left & {"artifact", "autoencoder", "encoder", "denoiser"}:
        return "exporting"
    if any(name.startswith("step-") for name in left):
        return "saving"
    if left or WORKS[name][0] != "train":
        return "writing" if left else "working"
    newest = (read_metrics(out) or [{"step": -1}])[-1]
    due = newest["step"] % EVERY == 0 and "images_per_second" in newest
    return "evaluating" if due else "training or starting"


def kill(
    lives: Lives, out: Path, kills: int, randomly: random.Random, seconds: Sequence[float]
) -> tuple[int, Counter[str]]:
    """Kill the work up to `kills` times, each time after it has run for a random part of the time that it takes.

    Args:
        lives: starts the work.
        out: the folder of the results.
        kills: the number of kills.
        randomly: draws the moments.
        seconds: what the work takes without a kill in one process, in two processes and so on. The lives take turns.

    Returns:
        The number of kills, which is lower than `kills` if the work ends early, and how many fell in each activity.
    """
    seen: Counter[str] = Counter()
    for number in range(kills):
        processes = number % len(seconds) + 1
        # A life is long enough to get past the next checkpoint, or short enough to die while it starts. Several
        # processes import torch first, which takes most of their time.
        longest = START_UP if randomly.random() < START_UP else 0.5 if processes == 1 else 1.0
        delay = randomly.uniform(0, longest) * seconds[processes - 1]
        began = time.time()
        process = lives.start(out, processes)
        process.join(delay)
        if process.exitcode == 0:
            return number, seen
        if process.exitcode:
            sys.exit(f"FAIL: exit status {process.exitcode} before a kill; see {out.with_suffix('.log')}")
        assert process.pid
        for pid in (process.pid, *children(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.join()
        doing = activity(lives.name, out, began)
        seen[doing] += 1
        where = f"{processes} process(es), {doing}, at step {step_of(out)}"
        print(f"  killed after {delay:5.2f} s in {where}", flush=True)
    return kills, seen


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def contents(run: Path) -> dict[str, Any]:
    """Return the results: tensors of the last checkpoint, logged losses, and digests of models, shards and images."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from raekit.training.checkpoint import checkpoints
    from raekit.training.tracking import read_metrics

    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
        else:
            found[name] = value if isinstance(value, torch.Tensor | float) else repr(value)

    if (run / "checkpoints").is_dir():
        newest = checkpoints(run / "checkpoints")[-1]
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_to_torch_save(newest, Path(scratch) / "state.pt")
            add(newest.name, torch.load(Path(scratch) / "state.pt"))
    for path in filter(Path.is_file, run.rglob("*")):
        if path.suffix in (".safetensors", ".png", ".webp") or path.parent.parent.name in ("artifact", "milestones"):
            found[str(path.relative_to(run))] = digest(path.read_bytes())
    for record in read_metrics(run):
        if "images_per_second" in record:  # a record of training, not of an evaluation; times and speeds have no slash
            add(f"metrics.step {record['step']}", {name: value for name, value in record.items() if "/" in name})
    return found


def differences(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> list[str]:
    """Return the names of the values that differ; with a tolerance, of the numbers that differ by more."""
    import torch

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            if tolerance and one.is_floating_point():
                return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
            return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
        if tolerance and isinstance(one, float) and isinstance(other, float):
            return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
        if tolerance and isinstance(one, bytes) and isinstance(other, bytes):
            return True  # the rounding of a weight changes the digest of its file
        return one == other

    return [name for name in expected | found if not same(found.get(name), expected.get(name))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--folder", type=Path, help="empty folder for the results. Default: a temporary folder")
    parser.add_argument("--images", default="emoji", help="data source of the training images")
    parser.add_argument("--only", nargs="*", default=list(WORKS), choices=list(WORKS), help="kinds of work")
    options = parser.parse_args()
    total, randomly = 0, random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            sys.exit(f"{folder}: not empty; give an empty folder")
        for number, name in enumerate(options.only):
            share = options.kills * (number + 1) // len(options.only) - options.kills * number // len(options.only)
            lives = Lives(name, options.images)
            alone, tolerance = folder / f"{name}-alone", TOLERANCE.get(name, 0.0)
            seconds = [lives.finish(alone)]
            if tolerance:
                seconds.append(lives.finish(folder / f"{name}-two", processes=2))
            expected, kills, runs, seen = contents(alone), 0, 0, Counter[str]()
            print(f"{name}: {max(seconds):.1f} s without a kill, {len(expected)} values", flush=True)
            while kills < share:  # work that ends before the last kill is followed by the same work again
                runs += 1
                out = folder / f"{name}-{runs}"
                done, activities = kill(lives, out, share - kills, randomly, seconds)
                kills, seen = kills + done, seen + activities
                lives.finish(out)
                different = differences(contents(out), expected, tolerance)
                if different:
                    sys.exit(f"FAIL: {name}: {len(different)} of {len(expected)} values differ: {different[:10]}")
            spread = ", ".join(f"{count} {what}" for what, count in seen.items())
            agree = f"agree to {tolerance:g}" if tolerance else "are identical"
            print(f"{name}: {kills} kills in {runs} run(s) ({spread}); all values {agree}", flush=True)
            total += kills
    print(f"OK: {total} kills, nothing lost")


if __name__ == "__main__":
    main()
