"""Linear layers with bfloat16 products on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.models import linear as module
from raekit.models.linear import Linear, linear, widen_linear
from raekit.training.throughput import flop_counter

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Compute bf16 products in pieces of 64 rows, on every processor."""
    monkeypatch.setattr(module, "NATIVE", False)
    monkeypatch.setattr(module, "PIECE", 1)


def tensors(shape: tuple[int, ...] = (2, 3, 24), width: int = 150, biased: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(width, shape[-1]) / 5, torch.randn(width)
    return [each.to(BF16).requires_grad_() for each in (x, weight, bias)[: 3 if biased else 2]]


def passes(function, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of the inputs."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.float().square().mean(), inputs)]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("width", [150, 7, 1])
@pytest.mark.parametrize("shape", [(2, 3, 24), (5, 24), (24,), (0, 3, 24), (50, 240)])
def test_the_product_and_its_gradients_are_those_of_torch(shape: tuple[int, ...], width: int, biased: bool):
    inputs = tensors(shape, width, biased=biased)
    for ours, exact in zip(passes(linear, inputs), passes(F.linear, inputs), strict=True):
        assert ours.dtype == BF16
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_the_sum_is_rounded_once():
    x, weight = torch.full((1, 4096), 1 / 64, dtype=BF16), torch.full((1, 4096), 1 / 64, dtype=BF16)
    assert linear(x, weight).item() == 1  # a sum in bfloat16 would stop to grow before


@pytest.mark.parametrize("native", [True, False])
def test_float32_is_left_to_torch(monkeypatch, native: bool):
    monkeypatch.setattr(module, "NATIVE", native)
    x, weight, bias = (each.detach().float() for each in tensors())
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_where_torch_is_fast_it_computes(monkeypatch):
    monkeypatch.setattr(module, "NATIVE", True)
    monkeypatch.setattr(module, "_widened", None)
    inputs = tensors()
    assert torch.equal(linear(*inputs), F.linear(*inputs))


def test_autocast_rounds_the_inputs_first():
    layer, x = Linear(24, 150), torch.randn(2, 24)
    with torch.autocast("cpu", BF16):
        out = layer(x)
    assert torch.equal(out, linear(x.to(BF16), layer.weight.to(BF16), layer.bias.to(BF16)))
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.any()


def test_types_that_differ_stay_an_error():
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(2, 24), torch.randn(3, 24).to(BF16))


def test_a_compiled_product_is_the_same():
    inputs = tensors()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, passes(compiled, inputs), passes(linear, inputs)))


def test_the_operation_keeps_its_promises_to_torch():
    for inputs in (tensors(), tensors(biased=False)):
        torch.library.opcheck(torch.ops.raekit.linear.default, tuple(inputs))


def test_its_flops_are_counted():
    counts = []
    for function in (linear, F.linear):
        with flop_counter() as counter:
            passes(function, tensors())
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 6 * 24 * 150] * 2


def test_the_layers_of_another_library_are_changed_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 70), nn.Sequential(nn.GELU(), nn.Linear(70, 5, bias=False)), nn.LayerNorm(5))
    model, x, names = model.to(BF16), torch.randn(3, 24).to(BF16), [*model.state_dict()]
    before = model(x)
    widen_linear(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [Linear, Linear]
    assert [*model.state_dict()] == names
    torch.testing.assert_close(model(x), before, rtol=2e-2, atol=2e-2)


def test_a_step_in_bf16_is_the_same_with_and_without_it(monkeypatch):
    losses = []
    for native in (True, False):
        monkeypatch.setattr(module, "NATIVE", native)
        torch.manual_seed(0)
        model = nn.Sequential(Linear(24, 96), nn.GELU(), Linear(96, 24))
        optimizer, loss = torch.optim.AdamW(model.parameters(), 1e-2), torch.zeros(())
        for x in torch.randn(20, 8, 24, generator=torch.Generator().manual_seed(1)):
            with torch.autocast("cpu", BF16):
                loss = (model(x) - x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
