"""What does each lever bring? One at a time, in turns with the code as it is."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

import choices
from gpu.setting import Setting
from harness import denoiser, interleaved, named, report, training_step
from machine import MatmulRate
from raekit.flow.sampling import Sampling, sample_latents
from raekit.models.denoiser import Denoiser
from raekit.training.optim import OptimConfig, adamw
from sampling import casting


def training_choices(setting: Setting) -> None:
    """Fused AdamW, compilation by block, aligned SwiGLU and other choices in a training step, each undone"""
    options = ["--size", setting.pick("tiny", "XL"), "--batch", str(setting.pick(2, 32)), "--out", str(setting.out)]
    options += ["--repeats", str(setting.pick(1, 3)), "--precision", "bf16"]
    setting.attempt("choices in a training step", partial(choices.main, options))


def training_levers(setting: Setting) -> None:
    """The residual stream in bf16, and weights cast once, in a compiled training step"""
    size, batch = setting.pick(("tiny", 2), ("XL", 32))

    def step(narrow_residual: bool = False, cast_once: bool = False) -> Callable[[], None]:
        model = denoiser(size, setting.device)
        model.narrow_residual = narrow_residual
        if not setting.tiny:
            model.compile()
        optimizer = adamw(OptimConfig(), model.parameters())
        return training_step(model, optimizer, batch, "bf16", setting.device, cast_once=cast_once)

    rate = MatmulRate(torch.bfloat16, setting.device)
    turns = {
        "as it is": step(),
        "residual stream in bf16": step(narrow_residual=True),
        "weights cast once": step(cast_once=True),
    }
    times = interleaved(turns, setting.pick(1, 5), setting.device, rate)
    title = f"levers of a training step, {named(size)}, batch {batch}, bf16"
    report(title, times, batch, setting.device, setting.out, rate=rate)


def sampling_levers(setting: Setting) -> None:
    """bf16 weights, CUDA graphs, and compilation by block and as one, in sampling at batch 1 and 8"""
    steps, size = setting.pick((2, "tiny"), (50, "XL"))

    def held(compile: Callable[..., object] | None = None, **options: str) -> Denoiser:
        model = denoiser(size, setting.device).eval().set_dtype(torch.bfloat16)
        if compile:
            compile(model, **options)
        return model

    for batch in setting.pick((1,), (1, 8)):
        labels = torch.zeros(batch, dtype=torch.int64, device=setting.device)

        def sample(model: Denoiser, labels: torch.Tensor = labels) -> None:
            casts = nullcontext() if model.dtype == torch.bfloat16 else casting("bf16", setting.device)
            with casts:
                indices = torch.arange(len(labels))
                sample_latents(model, labels, indices, 0, Sampling(steps=steps), setting.device)

        models = {"float32 weights": denoiser(size, setting.device).eval(), "bf16 weights": held()}
        if not setting.tiny:
            models |= {
                "compiled by block": held(Denoiser.compile),
                "compiled as one": held(nn.Module.compile),
                "one CUDA graph": held(nn.Module.compile, mode="reduce-overhead"),
            }
        rate = MatmulRate(torch.bfloat16, setting.device)
        turns = {name: partial(sample, model) for name, model in models.items()}
        times = interleaved(turns, setting.pick(1, 5), setting.device, rate)
        title = f"levers of sampling, {named(size)}, batch {batch}, {steps} Euler steps, bf16"
        report(title, times, batch, setting.device, setting.out, rate=rate)
