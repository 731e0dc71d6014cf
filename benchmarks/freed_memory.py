"""What does it bring on a CPU to keep freed memory (`raekit.distributed.memory`)?

    python benchmarks/freed_memory.py [--work step sampling] [--size S] [--batch 8] [--repeats 5] [--out DIR]

Two processes take turns: one returns freed memory to the system as glibc does by default, the other keeps it. MiB is
the largest resident set of a process, with everything that it holds.

- step: a compiled training step of DiT^DH in bf16.
- sampling: two Euler steps, with compiled blocks and weights held in bf16.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import torch

from harness import SIZES, denoiser, interleaved, named, report, training_step
from machine import MatmulRate, peak_memory
from raekit.distributed import CPU, prepare_device
from raekit.flow.sampling import Sampling, sample_latents
from raekit.training.optim import OptimConfig, adamw

WORK = ("step", "sampling")
VARIANTS = {
    "returned": {"MALLOC_TRIM_THRESHOLD_": str(2**26), "MALLOC_MMAP_THRESHOLD_": str(2**25)},
    "kept": {},
}
"""What each process sets for glibc's malloc. By itself, glibc adapts both sizes, up to those of `returned`."""


def runner(work: str, size: str, batch: int) -> Callable[[], object]:
    """Return a call that does one run of the work."""
    model = denoiser(size, CPU)
    if work == "step":
        model.compile()
        return training_step(model, adamw(OptimConfig(), model.parameters()), batch, "bf16", CPU)
    model.eval().set_dtype(torch.bfloat16).compile(dynamic=False)
    labels = torch.arange(batch) % model.config.num_classes
    return lambda: sample_latents(model, labels, torch.arange(batch), 0, Sampling(steps=2), CPU)


def serve(pipe: Connection, work: str, size: str, batch: int) -> None:
    """Do a run for each message, and answer with the largest resident set so far, until the message is None."""
    prepare_device("cpu")
    run = runner(work, size, batch)
    while pipe.recv() is not None:
        run()
        pipe.send(peak_memory(CPU))


def compare(work: str, size: str, batch: int, repeats: int, out: Path | None) -> None:
    """Print the table of one kind of work."""
    processes, pipes = multiprocessing.get_context("spawn"), {}
    for name, settings in VARIANTS.items():
        pipes[name], theirs = processes.Pipe()
        with patch.dict(os.environ, settings):
            processes.Process(target=serve, args=(theirs, work, size, batch), daemon=True).start()
        theirs.close()  # so that a process that dies is noticed
    peaks: dict[str, int] = {}

    def run(name: str) -> None:
        pipes[name].send(True)
        peaks[name] = pipes[name].recv()

    for name in VARIANTS:
        run(name)  # before the rate is measured, because processes that start or compile are busy
    rate = MatmulRate(torch.bfloat16, CPU)
    runs = interleaved({name: (lambda name=name: run(name)) for name in VARIANTS}, repeats, CPU, rate)
    for name, pipe in pipes.items():
        pipe.send(None)
        runs[name].peak = peaks[name]
    report(f"freed memory, {work}, {named(size)}, batch {batch}, bf16", runs, batch, CPU, out, rate=rate)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=WORK, choices=WORK)
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    for work in arguments.work:
        compare(work, arguments.size, arguments.batch, arguments.repeats, arguments.out)


if __name__ == "__main__":
    main()
