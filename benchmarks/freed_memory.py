"""What does it bring on a CPU to keep freed memory (`raekit.distributed.memory`)?

    python benchmarks/freed_memory.py [--work step sampling encode decode] [--size S] [--batch 8] [--repeats 5]
        [--out DIR]

Processes take turns. Some return freed memory to the system as glibc does by default, and as other programs do; the
others keep it. MiB is the largest resident set of a process, with everything that it holds.

- step: a compiled training step of DiT^DH in bf16.
- sampling: two Euler steps in bf16. The first process has float32 weights, which each evaluation casts, and does not
  compile, like the published sampler. The others have compiled blocks and weights held in bf16.
- encode, decode: DINOv2-B and a ViT-XL decoder in bf16, not compiled. The first process has diffusers' `AutoencoderRAE`
  (needs diffusers), the others have raekit's model with the same weights.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from harness import SIZES, denoiser, interleaved, named, report, training_step
from machine import MatmulRate, peak_memory, reset_peak_memory
from raekit.distributed import CPU, prepare_device
from raekit.flow.sampling import Sampling, sample_latents
from raekit.models.denoiser import Denoiser
from raekit.training.optim import OptimConfig, adamw

Settings = dict[str, str]
Prepare = Callable[[str, int], Callable[[], object]]
"""Takes the size of the denoiser and the batch. Returns a call that does one run of the work."""

RETURNED: Settings = {"MALLOC_TRIM_THRESHOLD_": str(2**26), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""The largest values that glibc's malloc chooses by itself."""
KEPT: Settings = {}
DECODER = "ViT-XL"


def step(size: str, batch: int) -> Callable[[], object]:
    model = denoiser(size, CPU)
    model.compile()
    return training_step(model, adamw(OptimConfig(), model.parameters()), batch, "bf16", CPU)


def sampling(size: str, batch: int, *, cast: bool) -> Callable[[], object]:
    model = denoiser(size, CPU).eval()
    if not cast:
        model = Denoiser.build(model.config, model.state_dict(), "the benchmark", torch.bfloat16).to(CPU)
        model.compile(dynamic=False)
    labels = torch.arange(batch) % model.config.num_classes

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast, cache_enabled=False):
            return sample_latents(model, labels, torch.arange(batch), 0, Sampling(steps=2), CPU)

    return run


def coding(size: str, batch: int, *, task: str, peer: bool) -> Callable[[], object]:
    import autoencoder  # here, because it needs diffusers

    theirs = autoencoder.peer(DECODER)
    images, latents = torch.rand(batch, 3, 224, 224), torch.randn(batch, 768, 16, 16)
    if peer:
        theirs.to(torch.bfloat16)
        images, latents = images.bfloat16(), latents.bfloat16()
        run = partial(theirs.encode, images) if task == "encode" else partial(theirs.decode, latents)
    else:
        ours = autoencoder.ours(theirs, DECODER, torch.bfloat16).to(CPU)
        run = partial(ours.encode, images) if task == "encode" else partial(ours.decode, latents)
    return torch.inference_mode()(run)


WORK: dict[str, dict[str, tuple[Settings, Prepare]]] = {
    "step": {"returned": (RETURNED, step), "kept": (KEPT, step)},
    "sampling": {
        "float32 weights, returned": (RETURNED, partial(sampling, cast=True)),
        "bf16 weights, returned": (RETURNED, partial(sampling, cast=False)),
        "bf16 weights, kept": (KEPT, partial(sampling, cast=False)),
    },
} | {
    task: {
        "diffusers, returned": (RETURNED, partial(coding, task=task, peer=True)),
        "raekit, returned": (RETURNED, partial(coding, task=task, peer=False)),
        "raekit, kept": (KEPT, partial(coding, task=task, peer=False)),
    }
    for task in ("encode", "decode")
}
"""The tables, and the processes of each."""


def serve(pipe: Connection, prepare: Prepare, size: str, batch: int) -> None:
    """Do a run for each message, and answer with the largest resident set so far, until the message is None."""
    prepare_device("cpu")
    run = prepare(size, batch)
    reset_peak_memory(CPU)  # loading takes more than one copy of the weights
    while pipe.recv() is not None:
        run()
        pipe.send(peak_memory(CPU))


def compare(work: str, size: str, batch: int, repeats: int, out: Path | None) -> None:
    """Print the table of one kind of work."""
    processes, pipes = multiprocessing.get_context("spawn"), {}
    for name, (settings, prepare) in WORK[work].items():
        pipes[name], theirs = processes.Pipe()
        with patch.dict(os.environ, settings):
            processes.Process(target=serve, args=(theirs, prepare, size, batch), daemon=True).start()
        theirs.close()  # so that a process that dies is noticed
    peaks: dict[str, int] = {}

    def run(name: str) -> None:
        pipes[name].send(True)
        peaks[name] = pipes[name].recv()

    for name in pipes:
        run(name)  # before the rate is measured, because processes that start or compile are busy
    rate = MatmulRate(torch.bfloat16, CPU)
    runs = interleaved({name: (lambda name=name: run(name)) for name in pipes}, repeats, CPU, rate)
    for name, pipe in pipes.items():
        pipe.send(None)
        runs[name].peak = peaks[name]
    network = named(size) if work in ("step", "sampling") else f"DINOv2-B and a {DECODER} decoder"
    report(f"freed memory, {work}, {network}, batch {batch}, bf16", runs, batch, CPU, out, rate=rate)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=[*WORK], choices=WORK)
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    for work in arguments.work:
        compare(work, arguments.size, arguments.batch, arguments.repeats, arguments.out)


if __name__ == "__main__":
    main()
