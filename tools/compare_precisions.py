"""Train a recipe of stage 2 in float32 and in bfloat16 with one seed, and compare the losses (docs/results/bf16.md).

python tools/compare_precisions.py [RECIPE] [--steps 600] [--batch-size 32] [--folder FOLDER] [--picture FILE.png]

On a processor without bfloat16 instructions, torch multiplies bfloat16 matrices a thousand times slower than float32
matrices. This script computes each product of bfloat16 matrices as the matrix units of a GPU do: exact products, summed
in float32, rounded at the end. All other bfloat16 operations are torch's. Attention computes in float32 and rounds its
inputs and outputs, while a GPU also rounds the attention probabilities.
"""

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from raekit import recipes
from raekit.distributed import World
from raekit.stages.generation import GenerationConfig
from raekit.stages.run import train
from raekit.train.tracking import read_metrics

_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_PRODUCTS = {
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default),
    *(_ATTENTION, _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default),
}
LAST = 0.2
"""The share of steps, at the end, whose losses are averaged."""


class MatrixUnits(TorchDispatchMode):
    """Multiplies bfloat16 matrices in float32 and rounds the results to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if func not in _PRODUCTS or not any(x.dtype == torch.bfloat16 for x in tensors):
            return func(*args, **(kwargs or {}))
        self.products += 1
        exact = func(*(x.float() if isinstance(x, Tensor) else x for x in args), **(kwargs or {}))
        if func is _ATTENTION:
            return (exact[0].bfloat16(), exact[1])  # the second output is always float32
        return tree_map(lambda x: x.bfloat16() if isinstance(x, Tensor) else x, exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="emoji_dit_dh")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("runs/precisions"))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    base = recipes.find(arguments.recipe).config
    if not isinstance(base, GenerationConfig):
        parser.error(f"{arguments.recipe}: not a recipe of stage 2; give a recipe that trains a denoiser")
    curves: dict[str, np.ndarray] = {}
    for precision in ("fp32", "bf16"):
        config = replace(
            base,
            train=replace(
                base.train,
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                precision=precision,
                log_every=10,
                monitor_every=100,
                checkpoint_every=arguments.steps,
            ),
            optim=replace(base.optim, decay_end=arguments.steps),
        )
        run = arguments.folder / f"{arguments.recipe}-{precision}"
        with MatrixUnits() if precision == "bf16" else nullcontext() as units:
            train(config, run, World(), lambda step, values: print(step, values["denoiser/loss"], flush=True))
        if units:
            print(f"{units.products} products of bfloat16 matrices")
        logged = read_metrics(run)
        curves[precision] = np.array([(row["step"], row["denoiser/loss"], row["denoiser/grad_norm"]) for row in logged])
        print(
            f"{precision}: largest logit {max(row.get('denoiser/max_logit', 0) for row in logged):.2f}, "
            f"skipped steps {sum(row['denoiser/skipped'] for row in logged):.0f}"
        )
    exact, rounded = (curve[:, 1] for curve in curves.values())
    last = max(int(LAST * len(exact)), 1)
    print(
        f"| loss, last {LAST:.0%} of the steps | fp32 {exact[-last:].mean():.5f} | bf16 {rounded[-last:].mean():.5f} "
        f"| {rounded[-last:].mean() / exact[-last:].mean() - 1:+.3%} |"
    )
    print(f"largest difference of a logged loss: {np.abs(rounded / exact - 1).max():.3%}")
    if arguments.picture:
        figure, (losses, differences) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for name, curve in curves.items():
            losses.plot(curve[:, 0], curve[:, 1], label=name)
        losses.set(xlabel="step", ylabel="loss", yscale="log")
        losses.legend()
        differences.plot(curves["fp32"][:, 0], 100 * (rounded / exact - 1))
        differences.set(xlabel="step", ylabel="bf16 relative to fp32, %")
        figure.savefig(arguments.picture, dpi=80)


if __name__ == "__main__":
    main()
