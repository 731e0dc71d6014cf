"""How fast is a training step of DiT^DH? Forward, backward, clipping and AdamW on cached latents.

    python benchmarks/denoiser_step.py [--size S] [--batch 4] [--precision bf16] [--repeats 5] [--out DIR]

Eager and compiled steps, without and with activation checkpointing, take turns in one process. The table gives the
ratio to the first step with its range over the turns. On a CPU where raekit computes bf16 products itself
(`raekit.models.linear`), `--only` also takes steps with torch's products. `rate` is the share of the machine's matmul
rate, measured in the same run and precision, that the step reaches. Only the multiplications of a step without
checkpointing count. Each variant has its own weights and moments; if they do not fit into memory together, choose some
with `--only`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode

from harness import SIZES, denoiser, interleaved, named, report, training_step
from machine import MatmulRate
from raekit.distributed import prepare_device
from raekit.models import linear
from raekit.training.optim import OptimConfig, adamw
from raekit.training.precision import compute_dtype
from raekit.training.recompute import checkpoint_blocks

VARIANTS = ("eager", "compiled", "eager, checkpointed", "compiled, checkpointed")
TORCH = ("eager, products by torch", "compiled, products by torch")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--grid", type=int, default=16, help="side of the latents: 16 at 256 pixels, 32 at 512")
    parser.add_argument("--batch", type=int, help="default: 4 on a CPU, 64 on a GPU")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument(
        "--only", nargs="+", choices=(*VARIANTS, *TORCH), metavar="NAME", help="default: all but the last two"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    device = prepare_device()
    batch = arguments.batch or (64 if device.type == "cuda" else 4)

    def stepper(variant: str, batch: int = batch) -> Callable[[], None]:
        model = denoiser(arguments.size, device, grid=arguments.grid)
        if "checkpointed" in variant:
            checkpoint_blocks([*model.blocks, *model.head_blocks])
        if "compiled" in variant:
            model.compile()
        step = training_step(model, adamw(OptimConfig(), model.parameters()), batch, arguments.precision, device)
        if variant not in TORCH:
            return step

        def native() -> None:
            with patch.object(linear, "NATIVE", True):
                step()

        return native

    counter = FlopCounterMode(display=False)
    with counter:  # of one image, so that it does not count for the peak memory of the others
        stepper("eager", batch=1)()
    variants = {variant: stepper(variant) for variant in arguments.only or VARIANTS}
    rate = MatmulRate(compute_dtype(arguments.precision, device), device)
    times = interleaved(variants, arguments.repeats, device, rate)
    title = f"training step, {named(arguments.size, arguments.grid)}, batch {batch}, {arguments.precision}"
    report(title, times, batch, device, arguments.out, flops=batch * counter.get_total_flops(), rate=rate)


if __name__ == "__main__":
    main()
