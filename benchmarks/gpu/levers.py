"""What does each lever bring? One at a time, in turns with the code as it is.

A lever that the library has by itself by now is to be undone here, or left out.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import choices
from gpu.setting import Setting
from harness import compiled, denoiser, interleaved, named, report, training_step
from machine import MatmulRate
from raekit.flow.sampling import Sampling, sample_latents
from raekit.models.denoiser import Denoiser
from raekit.models.layers import DiTBlock, SwiGLU
from raekit.train.optim import OptimConfig, adamw


def training_choices(setting: Setting) -> None:
    """Fused AdamW, compilation by block and as a whole, and other choices in a training step, each undone"""
    options = ["--size", setting.pick("tiny", "XL"), "--batch", str(setting.pick(2, 32)), "--out", str(setting.out)]
    options += ["--repeats", str(setting.pick(1, 3)), "--precision", "bf16"]
    setting.attempt("choices in a training step", partial(choices.main, options))


def padded(model: Denoiser, multiple: int = 128) -> None:
    """Replace each SwiGLU by one whose hidden width is the next multiple: 5461 becomes 5504."""
    for block in [*model.blocks, *model.head_blocks]:
        assert isinstance(block, DiTBlock)
        assert isinstance(block.mlp, SwiGLU)
        out = block.mlp.w_out
        block.mlp = SwiGLU(out.out_features, -(-out.in_features // multiple) * multiple).to(out.weight.device)


def narrow_residual(model: Denoiser) -> None:
    """Keep the backbone's residual stream in bf16: under autocast only the position table makes it float32."""
    assert model.positions is not None
    model.positions = model.positions.bfloat16()


def training_levers(setting: Setting) -> None:
    """SwiGLU padded from 5461 to 5504, and the residual stream in bf16, in a compiled training step"""
    size, batch = setting.pick(("tiny", 2), ("XL", 32))
    changes: dict[str, Callable[[Denoiser], None]] = {
        "as it is": lambda model: None,
        "padded SwiGLU": padded,
        "residual stream in bf16": narrow_residual,
    }

    def step(change: Callable[[Denoiser], None]) -> Callable[[], None]:
        model = denoiser(size, setting.device)
        change(model)
        if not setting.tiny:
            compiled(model)
        return training_step(model, adamw(OptimConfig(), model.parameters()), batch, "bf16", setting.device)

    rate = MatmulRate(torch.bfloat16, setting.device)
    turns = {name: step(change) for name, change in changes.items()}
    times = interleaved(turns, setting.pick(1, 5), setting.device, rate)
    title = f"levers of a training step, {named(size)}, batch {batch}, bf16"
    report(title, times, batch, setting.device, setting.out, rate=rate)


def narrow_weights(model: Denoiser) -> Denoiser:
    """Hold the weights of the blocks' linear layers in bf16, so that autocast has nothing to cast."""
    for block in [*model.blocks, *model.head_blocks]:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.to(torch.bfloat16)
    return model


def with_graphs(model: Denoiser) -> Denoiser:
    """Compile the whole network and replay its kernels as one CUDA graph."""
    model.compile(mode="reduce-overhead")
    return model


def as_a_whole(model: Denoiser) -> Denoiser:
    model.compile()
    return model


def sampling_levers(setting: Setting) -> None:
    """bf16 weights, CUDA graphs, and compilation by block and as a whole, in sampling at batch 1 and 8"""
    steps = setting.pick(2, 50)
    levers: dict[str, Callable[[Denoiser], Denoiser]] = {"eager": lambda model: model, "bf16 weights": narrow_weights}
    if not setting.tiny:
        levers |= {
            "compiled by block": compiled,
            "compiled as a whole": as_a_whole,
            "CUDA graphs": with_graphs,
            "bf16 weights, compiled by block": lambda model: compiled(narrow_weights(model)),
            "bf16 weights, CUDA graphs": lambda model: with_graphs(narrow_weights(model)),
        }
    size = setting.pick("tiny", "XL")
    for batch in setting.pick((1,), (1, 8)):
        labels = torch.zeros(batch, dtype=torch.int64, device=setting.device)

        def sample(model: Denoiser, labels: torch.Tensor = labels) -> None:
            how = Sampling(steps=steps, precision="bf16")
            sample_latents(model, labels, torch.arange(len(labels)), 0, how, setting.device)

        models = {name: change(denoiser(size, setting.device).eval()) for name, change in levers.items()}
        rate = MatmulRate(torch.bfloat16, setting.device)
        turns = {name: partial(sample, model) for name, model in models.items()}
        times = interleaved(turns, setting.pick(1, 5), setting.device, rate)
        title = f"levers of sampling, {named(size)}, batch {batch}, {steps} Euler steps, bf16"
        report(title, times, batch, setting.device, setting.out, rate=rate)
