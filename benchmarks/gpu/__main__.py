"""Run steps of the measurements on a GPU: `on_gpu.sh` calls this."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from gpu import correct, levers, speed
from gpu.setting import Setting
from raekit.distributed import prepare_device

STEPS: dict[str, Callable[[Setting], bool | None]] = {
    "correct-encoder": partial(correct.training, name="encoder"),
    "correct-decoder": partial(correct.training, name="decoder"),
    "correct-denoiser": partial(correct.training, name="denoiser"),
    "correct-sampling": correct.sampling,
    "correct-use": correct.use,
    "waits": correct.waits,
    "train-256": speed.train_256,
    "train-512": speed.train_512,
    "train-largest": speed.train_largest,
    "train-raev2": speed.train_raev2,
    "train-data": speed.train_data,
    "stage1": speed.stage1,
    "autoencoder": speed.autoencoder,
    "sampling-1": partial(speed.sampling, batch=1),
    "sampling-8": partial(speed.sampling, batch=8),
    "sampling-64": partial(speed.sampling, batch=64, steps=10),
    "sampling-256": partial(speed.sampling, batch=256, steps=4),
    "fid": speed.fid,
    "levers-choices": levers.training_choices,
    "levers-training": levers.training_levers,
    "levers-sampling": levers.sampling_levers,
    "growth": speed.growth,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="on_gpu.sh", description=__doc__)
    parser.add_argument("step", choices=["list", "all", *STEPS])
    parser.add_argument("--out", type=Path, default=Path("on_gpu"), help="folder: OUT/STEP/results.json and results.md")
    parser.add_argument("--tiny", action="store_true", help="small sizes, nothing compiled: a test for a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    arguments = parser.parse_args()
    if arguments.step == "list":
        for name, step in STEPS.items():
            print(f"{name:18}{(getattr(step, 'func', step).__doc__ or '').splitlines()[0]}")
        return 0
    device = prepare_device(arguments.device)
    failed = []
    if arguments.tiny:
        torch.set_num_threads(1)
    for name in STEPS if arguments.step == "all" else [arguments.step]:
        began = time.perf_counter()
        stance = torch.compiler.set_stance("force_eager") if arguments.tiny else nullcontext()
        with tempfile.TemporaryDirectory() as scratch, stance:
            setting = Setting(device, arguments.tiny, arguments.out / name, Path(scratch))
            if STEPS[name](setting) is False:
                failed.append(name)
        print(f"\n{name}: {time.perf_counter() - began:.1f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
