"""Train a recipe of stage 2 in float32, in bf16, and in bf16 with a bf16 residual stream (docs/results/bf16.md).

python tools/compare_precisions.py [RECIPE] [--steps 600] [--batch-size 32] [--seeds 3] [--latents FOLDER]
    [--folder FOLDER] [--picture FILE.png]

Trainings of one seed start from the same weights and see the same images, noise and times. Finished trainings in
--folder are not repeated. On a processor without bf16 instructions, torch multiplies bf16 matrices a thousand times
slower than float32 matrices. There this script computes each product of bf16 matrices as the matrix units of a GPU do:
exact products, summed in float32, rounded at the end. All other bf16 operations are torch's. Attention then computes in
float32 and rounds its inputs and outputs, while a GPU also rounds the attention probabilities.
"""

import argparse
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from raekit import recipes
from raekit.distributed import CPU, World
from raekit.stages.generation import GenerationConfig
from raekit.stages.run import train
from raekit.training.precision import Precision, compute_dtype
from raekit.training.tracking import read_metrics

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if func not in _PRODUCTS or not any(x.dtype == torch.bfloat16 for x in tensors):
            return func(*args, **(kwargs or {}))
        exact = func(*(x.float() if isinstance(x, Tensor) else x for x in args), **(kwargs or {}))
        if func is _ATTENTION:
            return (exact[0].bfloat16(), exact[1])  # the second output is always float32
        return tree_map(lambda x: x.bfloat16() if isinstance(x, Tensor) else x, exact)


VARIANTS: dict[str, tuple[Precision, Literal["fp32", "bf16"]]] = {
    "float32": ("fp32", "fp32"),
    "bf16": ("bf16", "fp32"),
    "bf16 residual": ("bf16", "bf16"),
}
"""The precision of each training and of its residual stream."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="emoji_dit_dh")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--latents", help="latents of `raekit latents cache`")
    parser.add_argument("--folder", type=Path, default=Path("runs/precisions"))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    base = recipes.find(arguments.recipe).config
    if not isinstance(base, GenerationConfig):
        parser.error(f"{arguments.recipe}: not a recipe of stage 2; give a recipe that trains a denoiser")
    native = compute_dtype("auto", CPU) == torch.bfloat16
    curves: dict[str, list[np.ndarray]] = {name: [] for name in VARIANTS}
    for seed, (name, (precision, residual)) in product(range(arguments.seeds), VARIANTS.items()):
        steps = arguments.steps
        config = replace(
            base,
            latents=arguments.latents,
            residual=residual,
            train=replace(
                base.train,
                steps=steps,
                batch_size=arguments.batch_size,
                precision=precision,
                seed=seed,
                log_every=10,
                monitor_every=100,
                checkpoint_every=steps,
            ),
            optim=replace(base.optim, decay_end=steps, warmup_steps=min(base.optim.warmup_steps, steps // 2)),
            samples=None,
            heldout=None,
        )
        run = arguments.folder / f"{arguments.recipe}-{name.replace(' ', '-')}-{seed}"
        with nullcontext() if native or precision == "fp32" else MatrixUnits():
            train(config, run, World(), lambda step, values: print(step, values["denoiser/loss"], flush=True))
        logged = read_metrics(run)
        curves[name].append(np.array([(row["step"], row["denoiser/loss"]) for row in logged]))
        print(
            f"{name}, seed {seed}: largest logit {max(row.get('denoiser/max_logit', 0) for row in logged):.2f}, "
            f"skipped steps {sum(row['denoiser/skipped'] for row in logged):.0f}",
            flush=True,
        )
    losses = {name: np.stack(curve)[:, :, 1] for name, curve in curves.items()}  # (seeds, records)
    exact = losses["float32"]
    last = max(int(LAST * exact.shape[1]), 1)
    print(f"| | loss, last {LAST:.0%} of the steps | relative to float32, by seed | largest difference of a record |")
    for name, loss in losses.items():
        ends = loss[:, -last:].mean(1) / exact[:, -last:].mean(1) - 1
        by_seed = ", ".join(f"{end:+.2%}" for end in ends)
        print(f"| {name} | {loss[:, -last:].mean():.4f} | {by_seed} | {np.abs(loss / exact - 1).max():.2%} |")
    if arguments.picture:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        steps = curves["float32"][0][:, 0]
        for number, (name, loss) in enumerate(losses.items()):
            left.plot(steps, loss.mean(0), label=name)
            for seed, curve in enumerate(100 * (loss / exact - 1)):
                right.plot(steps, curve, f"C{number}", label=None if seed else name)
        left.set(xlabel="step", ylabel="loss, mean of the seeds", yscale="log")
        left.legend()
        right.set(xlabel="step", ylabel="relative to float32, %")
        figure.savefig(arguments.picture, dpi=80)


if __name__ == "__main__":
    main()
