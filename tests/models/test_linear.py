"""Linear layers with bfloat16 products on a CPU."""

import copy
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.models import linear as module
from raekit.models.layers import SwiGLU
from raekit.models.linear import Linear, linear, widen_linear
from raekit.models.precision import set_dtype
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


@pytest.fixture
def packed(packing: None) -> tuple[Linear, Tensor]:
    """Return a layer with a packed weight, and the plain weight."""
    layer = Linear(24, 150).to(BF16).requires_grad_(False)
    weight = layer.weight.data.clone()
    assert layer.to("cpu").weight.is_mkldnn
    return layer, weight


@pytest.mark.parametrize("shape", [(2, 3, 24), (5, 24), (24,), (0, 3, 24), (50, 24)])
def test_a_packed_weight_multiplies_as_a_plain_one(packed: tuple[Linear, Tensor], shape: tuple[int, ...]):
    layer, weight = packed
    x = torch.randn(shape, dtype=BF16)
    exact = F.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), exact, rtol=2e-2, atol=2e-2)
    wide = torch.cat([x, x], -1)[..., :24]  # rows apart from each other
    torch.testing.assert_close(layer(wide), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_packed_weights_can_be_compiled(packed: tuple[Linear, Tensor]):
    layer, weight = packed
    x = torch.randn(5, 24, dtype=BF16)
    compiled = torch.compile(lambda x: F.silu(layer(x)), fullgraph=True)
    torch.testing.assert_close(compiled(x), F.silu(F.linear(x, weight, layer.bias)), rtol=2e-2, atol=2e-2)


def test_packed_layers_keep_their_type_rules_flops_and_gradients_of_inputs(packed: tuple[Linear, Tensor]):
    layer, weight = packed
    x = torch.randn(2, 24)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    with torch.autocast("cpu", BF16):
        exact = F.linear(x, weight, layer.bias)
        with flop_counter() as counter:
            torch.testing.assert_close(layer(x), exact, rtol=2e-2, atol=2e-2)
    assert counter.get_total_flops() == 2 * 2 * 24 * 150
    x = x.to(BF16).requires_grad_()
    (ours,) = torch.autograd.grad(layer(x).sum(), x)
    (exact,) = torch.autograd.grad(F.linear(x, weight, layer.bias).sum(), x)
    torch.testing.assert_close(ours, exact, rtol=2e-2, atol=2e-2)


def test_a_packed_weight_that_is_to_be_trained_has_its_gradient(packed: tuple[Linear, Tensor]):
    layer, weight = packed
    layer.requires_grad_()
    x = torch.randn(5, 24, dtype=BF16)
    ours = torch.autograd.grad(layer(x).sum(), [layer.weight, layer.bias])
    weight.requires_grad_()
    exact = torch.autograd.grad(F.linear(x, weight, layer.bias).sum(), [weight, layer.bias])
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.to_dense(), other, rtol=2e-2, atol=2e-2)


def test_outside_the_layer_a_packed_weight_is_plain(packed: tuple[Linear, Tensor]):
    layer, weight = packed
    assert torch.equal(layer.state_dict()["weight"], weight)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.weight, weight)
        assert twin(torch.ones(24, dtype=BF16)).shape == (150,)
    assert layer.packed
    layer.load_state_dict({"weight": 2 * weight, "bias": layer.bias})
    assert torch.equal(layer.weight, 2 * weight)
    assert torch.equal(layer.to("cpu").float().weight, 2 * weight.float())
    layer = layer.to(BF16)
    assert layer.packed
    layer.requires_grad_()
    layer.to("cpu")
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, 2 * weight)


def test_models_pack_frozen_bf16_weights_only(packing: None, monkeypatch: pytest.MonkeyPatch):
    model = SwiGLU(16, 21)
    trained = copy.deepcopy(model).to(BF16)
    assert not trained.w_in.packed
    x = torch.randn(2, 16, dtype=BF16)
    set_dtype(model.requires_grad_(False), BF16)
    before = model(x)
    assert model.to("cpu").w_in.packed
    torch.testing.assert_close(model(x), before, rtol=2e-2, atol=2e-2)
    assert model.state_dict()["w_in.weight"].shape == (42, 16)
    set_dtype(model, torch.float32)
    assert model.w_in.weight.dtype == torch.float32
    monkeypatch.setattr(module, "NATIVE", False)
    assert not copy.deepcopy(model).to(BF16).w_in.packed
