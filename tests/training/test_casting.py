"""Weights that are cast once for all passes of a step."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raekit.models.layers import DiTBlock, SwiGLU, ViTBlock, rotary_table
from raekit.training.casting import CastWeights, cast_weights
from raekit.training.recompute import checkpoint_blocks

ROTARY = rotary_table(8, (2, 2))
DIT = partial(DiTBlock, 16, 2, 21, qk_norm=True)  # a hidden width that is not aligned


class Narrowing(TorchDispatchMode):
    """Counts the casts of float32 tensors of a shape to bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.count += args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def blocks(make: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    made = [make() for _ in range(2)]
    for block in made:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.2)
    return made


def passes(layers: list[nn.Module], weights: CastWeights, parts: int = 3) -> Tensor:
    """Return the sum of the losses of `parts` micro-batches, whose gradients stay with the layers."""
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(parts):
        x, condition = torch.randn(2, 2, 4, 16, generator=generator).unbind()
        with weights.used():
            with torch.autocast("cpu", torch.bfloat16):
                for layer in layers:
                    x = layer(x, condition, ROTARY) if isinstance(layer, DiTBlock) else layer(x)
            loss = x.float().square().mean()
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("make", [DIT, partial(ViTBlock, 16, 2, 32, 1e-6)])
def test_a_step_with_weights_cast_once_is_the_same_to_the_bit(make, checkpointed: bool):
    results = []
    for once in (False, True):
        layers = blocks(make)
        if checkpointed:
            checkpoint_blocks(layers)
        with Narrowing((48, 16)) as seen:
            loss = passes(layers, CastWeights(layers if once else [], torch.bfloat16))
        assert seen.count == len(layers) * (1 if once else 6 if checkpointed else 3)
        gradients = [parameter.grad for layer in layers for parameter in layer.parameters()]
        assert all(each is not None and each.dtype == torch.float32 and each.any() for each in gradients)
        results.append([loss, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides this warning, but not when it is an error
def test_a_compiled_step_with_weights_cast_once_is_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        layers = blocks(DIT)
        if compiled:
            for layer in layers:
                layer.compile()
        loss = passes(layers, CastWeights(layers, torch.bfloat16))
        results.append([loss, *(parameter.grad for layer in layers for parameter in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_only_linear_layers_are_cast_and_swiglu_is_aligned():
    (block, _), plain = blocks(DIT), nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False))
    copies = cast_weights(block, torch.bfloat16)
    assert {name for name, _ in block.named_parameters()} - {*copies} == {
        *(f"{norm}.weight" for norm in ("norm1", "norm2", "attention.q_norm", "attention.k_norm"))
    }
    assert copies["mlp.w_in.weight"].shape == (128, 16)
    assert {copy.dtype for copy in copies.values()} == {torch.bfloat16}
    assert {*cast_weights(plain, torch.bfloat16)} == {"0.weight", "0.bias", "2.weight"}


def test_the_parameters_return_after_a_pass_that_fails():
    layers = blocks(DIT)
    assert isinstance(layers[0].mlp, SwiGLU)
    before = [*layers[0].named_parameters()]
    weights = CastWeights(layers, torch.bfloat16)
    with pytest.raises(RuntimeError), weights.used():  # noqa: PT012
        assert layers[0].mlp.w_in.bias.dtype == torch.bfloat16
        layers[0](torch.zeros(1, 4, 3), torch.zeros(1, 1, 3), ROTARY)
    after = [*layers[0].named_parameters()]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))
