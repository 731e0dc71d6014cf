"""Stop and kill a training of two launchers with two processes each, at random moments, and resume it each time.

    python tools/kill_world.py
    python tools/kill_world.py --each 10 --folder /tmp/world -- emoji_encoder --train.steps 300

The launchers are two `torchrun` on this machine that meet over the loopback device, as on two machines. Each life ends
with SIGTERM, SIGUSR1 or SIGKILL, sent to one random process, which may be a launcher. The script exits with 0 if every
life ends within --limit seconds, no step is lost after a signal that asks to stop, and all losses agree with an
uninterrupted run of one process to 1e-5. The arguments after `--` go to `raekit train`.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_resume import children, step_of

DEFAULT = [
    *("emoji_encoder", "--train.steps", "400", "--train.batch-size", "8", "--train.checkpoint-every", "9"),
    *("--encoder.depth", "1", "--encoder.width", "32", "--encoder.heads", "2", "--score-every", "100"),
    *(
        "--data.image-size",
        "16",
        "--encoder.image-size",
        "16",
        "--encoder.patch-size",
        "4",
        "--train.precision",
        "fp32",
    ),
]
HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


class World:
    """Two launchers with two processes each."""

    def __init__(self, run: Path, arguments: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "kill", "--max-restarts", "0"]
        meet += ["--rdzv-conf", "join_timeout=60"]  # of a launcher whose peer was killed before they met
        train = ["train", *arguments, "--train.log-every", "1", "--run", str(run)]
        command = [*torchrun, *meet, "--signals-to-handle", HANDLED, "-m", "raekit", "--", *train]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.log = run.with_suffix(".log").open("a")
        self.launchers = [
            subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment, start_new_session=True)
            for _ in range(2)
        ]

    def processes(self) -> list[int]:
        """Return the ids of the launchers and of their processes that still run."""
        return [pid for launcher in self.launchers for pid in (launcher.pid, *children(launcher.pid)) if runs(pid)]

    def ended(self, known: list[int], seconds: float) -> bool:
        """Wait for the end of the processes `known`; after `seconds`, kill those that are left and return False."""
        deadline = time.monotonic() + seconds
        while any(map(runs, known)) and time.monotonic() < deadline:
            time.sleep(0.1)
            [launcher.poll() for launcher in self.launchers]
        late = [pid for pid in known if runs(pid)]
        for pid in late:
            os.kill(pid, signal.SIGKILL)
        [launcher.wait() for launcher in self.launchers]
        return not late


def runs(pid: int) -> bool:
    """Return whether a process runs. One that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def life(
    run: Path, arguments: list[str], number: signal.Signals, target: int, randomly: random.Random, limit: float
) -> None:
    """Start the world, send `number` to one process near step `target`, and wait for the end of all."""
    from raekit.training import checkpoint

    world = World(run, arguments)
    began = time.monotonic()
    while step_of(run) < target and world.processes() and time.monotonic() - began < 5 * limit:
        time.sleep(0.02)
    time.sleep(randomly.uniform(0, 0.5))
    everyone = world.processes()
    if not everyone:
        sys.exit(f"FAIL: the world ended by itself at step {step_of(run)}; see {run.with_suffix('.log')}")
    chosen, at = randomly.choice(everyone), step_of(run)
    who = "a launcher" if chosen in {launcher.pid for launcher in world.launchers} else "a process"
    os.kill(chosen, number)
    sent = time.monotonic()
    in_time = world.ended(everyone, limit)
    complete = [checkpoint.step_of(path) for path in checkpoint.checkpoints(run / "checkpoints")]
    statuses = ", ".join(str(launcher.returncode) for launcher in world.launchers)
    print(
        f"{number.name:7} to {who:10} at step {at:4}: all ended after {time.monotonic() - sent:4.1f} s, launchers with "
        f"{statuses}; newest checkpoint {complete[-1] if complete else 'none'}",
        flush=True,
    )
    if not in_time:
        sys.exit(f"FAIL: processes still ran {limit:.0f} s after {number.name}")
    if number != signal.SIGKILL and at and max(complete, default=0) < at:
        sys.exit(f"FAIL: {number.name} lost the steps after {complete[-1:]}")


def losses(run: Path) -> dict[int, float]:
    from raekit.training.tracking import read_metrics

    return {int(r["step"]): v for r in read_metrics(run) for name, v in r.items() if name.endswith("/loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=10, help="how often each signal is sent")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--limit", type=float, default=120, help="seconds in which all processes must end")
    parser.add_argument("--folder", type=Path, help="empty folder for the runs. Default: a temporary folder")
    parser.add_argument("train", nargs="*", default=DEFAULT, metavar="ARGUMENT", help="of raekit train, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        randomly, run = random.Random(options.seed), folder / "world"
        alone = [sys.executable, "-m", "raekit", "train", *options.train, "--train.log-every", "1"]
        subprocess.run([*alone, "--run", str(folder / "alone")], check=True, stdout=subprocess.DEVNULL)
        expected = losses(folder / "alone")
        signals = [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL] * options.each
        randomly.shuffle(signals)
        steps = sorted(randomly.randint(1, int(0.95 * len(expected))) for _ in signals)
        for number, target in zip(signals, steps, strict=True):
            life(run, options.train, number, target, randomly, options.limit)
        world = World(run, options.train)
        world.ended([launcher.pid for launcher in world.launchers], 3600)
        found = losses(run)
        worst = max(abs(found[step] - loss) / abs(loss) for step, loss in expected.items() if step in found)
        if found.keys() != expected.keys() or worst > 1e-5:
            sys.exit(f"FAIL: {len(found)} of {len(expected)} losses, which differ by up to {worst:.1e}")
    print(f"OK: {len(signals)} signals, {len(expected)} steps, losses differ from one process by {worst:.1e}")


if __name__ == "__main__":
    main()
