import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.models import layers
from raekit.models.layers import (
    Attention,
    DiTBlock,
    FinalLayer,
    MLPKind,
    NormKind,
    RMSNorm,
    SwiGLU,
    TimeEmbedding,
    ViTBlock,
    gelu_mlp,
    patchify,
    rotary_table,
    rotate,
    sincos_positions,
    to_grid,
    to_tokens,
    unpatchify,
    watch_logits,
)
from raekit.models.precision import set_dtype
from raekit.training import ema
from raekit.training.optim import OptimConfig, build_optimizer


@pytest.mark.parametrize(("size", "grid"), [(1, (3, 3)), (2, (2, 3)), (4, (3, 1))])
def test_patchify_round_trip(size: int, grid: tuple[int, int]):
    images = torch.randn(2, 5, grid[0] * size, grid[1] * size)
    patches = patchify(images, size)
    assert patches.shape == (2, grid[0] * grid[1], size * size * 5)
    assert torch.equal(unpatchify(patches, size, grid), images)


def test_patchify_order():
    images = torch.randn(1, 3, 4, 6)
    patches = patchify(images, 2)
    for token in range(6):
        row, column = divmod(token, 3)
        for pixel in range(4):
            y, x = divmod(pixel, 2)
            expected = images[0, :, 2 * row + y, 2 * column + x]
            assert torch.equal(patches[0, token, 3 * pixel : 3 * pixel + 3], expected)


def test_tokens_are_row_major():
    latents = torch.randn(2, 5, 3, 4)
    tokens = to_tokens(latents)
    assert torch.equal(tokens[:, 4 * 2 + 1], latents[:, :, 2, 1])
    assert torch.equal(to_grid(tokens, (3, 4)), latents)


def test_sincos_positions_against_the_formula():
    width, (height, columns) = 24, (3, 5)
    table = sincos_positions(width, (height, columns)).numpy()
    expected = np.zeros((height * columns, width))
    quarter = width // 4
    for token in range(height * columns):
        row, column = divmod(token, columns)
        for k in range(quarter):
            frequency = 10000 ** (-k / quarter)
            for part, value in enumerate(
                (
                    math.sin(column * frequency),
                    math.cos(column * frequency),
                    math.sin(row * frequency),
                    math.cos(row * frequency),
                )
            ):
                expected[token, part * quarter + k] = value
    np.testing.assert_allclose(table, expected, atol=1e-7)


def interleaved_rotation(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pairs (0 1) (2 3) .. of x (N, head_dim), turned by the row (first half of them) or the column."""
    out = np.empty_like(x)
    pairs = x.shape[1] // 2
    for token in range(len(x)):
        row, column = divmod(token, grid[1])
        for pair in range(pairs):
            k, position = pair % (pairs // 2), row if pair < pairs // 2 else column
            angle = position * 10000 ** (-2 * k / pairs)
            a, b = x[token, 2 * pair], x[token, 2 * pair + 1]
            out[token, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            out[token, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def test_rotation_is_the_published_one_after_a_permutation():
    head_dim, grid = 16, (3, 4)
    x = np.random.default_rng(0).standard_normal((12, head_dim))
    permutation = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    cos, sin = rotary_table(head_dim, grid)
    ours = rotate(torch.from_numpy(x[:, permutation]), (cos, sin)).numpy()
    np.testing.assert_allclose(ours, interleaved_rotation(x, grid)[:, permutation], atol=1e-6)


def test_rotated_products_depend_on_relative_positions_alone():
    grid = (4, 5)
    rotary = rotary_table(8, grid)
    q, k = (torch.randn(8).expand(20, 8) for _ in range(2))
    products = (rotate(q, rotary) @ rotate(k, rotary).T).view(*grid, *grid)
    assert torch.allclose(products[0, 0, 2, 3], products[1, 1, 3, 4], atol=1e-5)
    assert torch.allclose(products[2, 0, 0, 3], products[3, 1, 1, 4], atol=1e-5)
    assert not torch.allclose(products[0, 0, 2, 3], products[0, 0, 3, 2], atol=1e-3)


def test_bf16_is_rotated_in_float32():
    torch.manual_seed(0)
    rotary = rotary_table(16, (3, 4))
    x, gradient = (torch.randn(2, 12, 16).bfloat16() for _ in range(2))
    ours, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    turned = rotate(ours, rotary)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(exact, rotary).bfloat16())
    turned.backward(gradient)
    rotate(exact, rotary).backward(gradient.float())
    assert ours.grad is not None
    assert exact.grad is not None
    assert torch.equal(ours.grad, exact.grad.bfloat16())


def test_rms_norm():
    norm = RMSNorm(6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-6)


def test_rms_norm_has_float32_statistics_in_float16():
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)  # whose square overflows
    out = RMSNorm(8)(x)
    assert out.dtype == torch.float16
    assert torch.allclose(out, torch.ones_like(out))


@pytest.mark.parametrize("qk_norm", [None, "rms", "layer"])
def test_attention_against_the_formula(qk_norm: NormKind | None):
    width, heads, grid = 16, 2, (2, 3)
    layer = Attention(width, heads, qk_norm)
    if qk_norm:
        for norm in (layer.q_norm, layer.k_norm):
            for parameter in norm.parameters():
                torch.nn.init.normal_(parameter)
    x = torch.randn(2, 6, width)
    rotary = rotary_table(width // heads, grid)
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, dim=-1)
    out = []
    for head in range(heads):
        channels = slice(head * 8, head * 8 + 8)
        qh = rotate(layer.q_norm(q[..., channels]), rotary)
        kh = rotate(layer.k_norm(k[..., channels]), rotary)
        out.append((qh @ kh.mT / math.sqrt(8)).softmax(-1) @ v[..., channels])
    expected = F.linear(torch.cat(out, -1), layer.out.weight, layer.out.bias)
    assert torch.allclose(layer(x, rotary), expected, atol=1e-5)


def test_qk_norm_bounds_the_logits():
    # Scaled inputs change nothing but the values: the attention pattern stays.
    layer = Attention(8, 2, "rms")
    torch.nn.init.zeros_(layer.qkv.bias)
    torch.nn.init.zeros_(layer.out.bias)
    x = torch.randn(1, 5, 8) * 10
    assert torch.allclose(layer(100 * x), 100 * layer(x), rtol=1e-3, atol=1e-3)


def test_swiglu():
    layer = SwiGLU(6, 10)
    x = torch.randn(3, 6)
    gate, value = (x @ layer.w_in.weight.T + layer.w_in.bias).split(10, dim=-1)
    expected = (gate * gate.sigmoid() * value) @ layer.w_out.weight.T + layer.w_out.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def whole_numbers(*shape: int) -> Tensor:
    """Small whole numbers: their bf16 products and sums are exact in any order."""
    return torch.randint(-1, 2, shape).float()


def swiglu_of_whole_numbers(hidden: int) -> tuple[SwiGLU, Tensor]:
    torch.manual_seed(0)
    layer = SwiGLU(4, hidden)
    for parameter in layer.parameters():
        parameter.data = whole_numbers(*parameter.shape)
    return layer, whole_numbers(2, 3, 4)


def pass_in_bf16(layer: SwiGLU, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input; the gradients of the weights stay with the layer."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.square().sum().backward()
    assert x.grad is not None
    return out, x.grad


@pytest.mark.parametrize("hidden", [5, 64, 65])
def test_aligned_swiglu_is_the_same_function(monkeypatch, hidden: int):
    """To the bit, gradients included. SiLU is the only inexact part, so ReLU takes its place."""
    monkeypatch.setattr(F, "silu", F.relu)
    layer, x = swiglu_of_whole_numbers(hidden)
    plain, _ = swiglu_of_whole_numbers(hidden)
    aligned = pass_in_bf16(layer, x)
    monkeypatch.setattr(layers, "ALIGNMENT", 1)
    for ours, theirs in zip(aligned, pass_in_bf16(plain, x), strict=True):
        assert ours.any()
        assert torch.equal(ours, theirs)
    for name, parameter in layer.named_parameters():
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        assert gradient.any()
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_aligned_swiglu_with_silu():
    torch.manual_seed(0)
    layer, x = SwiGLU(6, 10), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=2e-2, atol=2e-2)


def test_swiglu_aligns_bf16_products_and_leaves_float32_alone(monkeypatch):
    layer, x = SwiGLU(6, 65), torch.randn(3, 6)
    linear, shapes = F.linear, []

    def spy(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shapes.append((*weight.shape, len(bias)))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        layer.bfloat16()(x.bfloat16())  # autocast copies nothing
    layer.float()(x)
    assert shapes == [(256, 6, 256), (6, 128, 6)] + 2 * [(130, 6, 130), (6, 65, 6)]


def test_weights_held_in_bf16_are_aligned_and_written_at_the_published_width(monkeypatch):
    monkeypatch.setattr(F, "silu", F.relu)
    layer, x = swiglu_of_whole_numbers(5)
    expected, published = layer(x), layer.state_dict()
    for _ in range(2):  # the second time changes nothing
        set_dtype(layer, torch.bfloat16)
        assert [*map(tuple, (p.shape for p in layer.parameters()))] == [(128, 4), (128,), (4, 64), (4,)]
        assert torch.equal(layer(x.bfloat16()), expected.bfloat16())
    for name, tensor in layer.state_dict().items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, published[name].bfloat16())


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_optimizers_and_averages_do_not_see_the_alignment(monkeypatch, method: Any):
    monkeypatch.setattr(F, "silu", F.relu)
    trained = []
    for aligned in (True, False):
        layer, x = swiglu_of_whole_numbers(5)
        monkeypatch.setattr(layers, "ALIGNMENT", 64 if aligned else 1)
        average = ema.averaged_copy(layer)
        optimizer = build_optimizer(OptimConfig(method=method, lr=0.1, weight_decay=0.1), layer)
        pass_in_bf16(layer, x)
        optimizer.step()
        ema.update(average, layer, 0.5)
        shapes = {p.shape for p in layer.parameters()}
        state = [value for values in optimizer.state.values() for value in values.values()]
        assert {value.shape for value in state if value.ndim} == shapes
        trained.append([*layer.state_dict().values(), *average.state_dict().values(), *state])
    start = swiglu_of_whole_numbers(5)[0].state_dict()
    assert not any(torch.equal(a, b) for a, b in zip(trained[0], start.values(), strict=False))
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_vit_block_against_the_formula():
    block = ViTBlock(8, 2, 12, eps=1e-6)
    x = torch.randn(2, 5, 8)
    y = x + block.attention(F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, 1e-6))
    hidden = F.linear(F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, 1e-6), *parameters(block.mlp[0]))
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    assert torch.allclose(block(x), y + F.linear(gelu, *parameters(block.mlp[2])), atol=1e-5)


def parameters(layer: torch.nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, torch.nn.Linear)
    return layer.weight, layer.bias


def test_dit_block_without_modulation_passes_its_input():
    block = DiTBlock(8, 2, 12)
    assert block.modulation is not None
    torch.nn.init.zeros_(block.modulation.weight)
    torch.nn.init.zeros_(block.modulation.bias)
    x = torch.randn(2, 6, 8)
    assert torch.equal(block(x, torch.randn(2, 1, 8), None), x)


def test_one_condition_for_all_tokens_equals_the_same_for_each():
    block, final = DiTBlock(8, 2, 12, qk_norm=True), FinalLayer(8, 4)
    x, condition = torch.randn(2, 6, 8), torch.randn(2, 1, 8)
    assert torch.allclose(block(x, condition, None), block(x, condition.expand(-1, 6, -1), None), atol=1e-6)
    assert torch.allclose(final(x, condition), final(x, condition.expand(-1, 6, -1)), atol=1e-6)


def test_each_token_follows_its_own_condition():
    block = DiTBlock(8, 2, 12)
    with torch.no_grad():
        block.attention.out.weight.zero_()  # no exchange between tokens
    x, condition = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    changed = condition.clone()
    changed[:, 2] += 1
    same = (block(x, condition, None) == block(x, changed, None)).all(-1)[0]
    assert same.tolist() == [True, True, False, True]


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("adaln", [True, "no shift", False])
def test_dit_block_against_the_formula(norm: NormKind, mlp: MLPKind, adaln: Any):
    # Shift, scale, gate of the attention, then of the MLP.
    block = DiTBlock(8, 2, 12, norm=norm, mlp=mlp, adaln=adaln)
    x, condition = torch.randn(1, 4, 8), torch.randn(1, 1, 8)
    m = [torch.zeros(()), torch.zeros(()), torch.ones(())] * 2
    if block.modulation:
        given = F.linear(F.silu(condition), *parameters(block.modulation)).split(8, dim=-1)
        for place, part in zip(range(6) if adaln is True else (1, 2, 4, 5), given, strict=True):
            m[place] = part

    def normal(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    y = x + m[2] * block.attention(normal(x) * (1 + m[1]) + m[0])
    expected = y + m[5] * block.mlp(normal(y) * (1 + m[4]) + m[3])
    assert torch.allclose(block(x, condition, None), expected, atol=1e-6)


def test_gelu_mlp_with_tanh():
    layer = gelu_mlp(6, 10, "tanh")
    x = torch.randn(3, 6)
    hidden = F.linear(x, *parameters(layer[0]))
    gelu = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    assert torch.allclose(layer(x), F.linear(gelu, *parameters(layer[2])), atol=1e-6)


def test_the_gelu_of_a_dit_block_is_its_tanh_approximation():
    block, x = DiTBlock(8, 2, 12, mlp="gelu"), 3 * torch.randn(3, 8)
    hidden = F.linear(x, *parameters(block.mlp[0]))  # type: ignore[index]
    expected = F.linear(F.gelu(hidden, approximate="tanh"), *parameters(block.mlp[2]))  # type: ignore[index]
    assert torch.allclose(block.mlp(x), expected, atol=1e-7)


def test_tokens_without_a_place_are_not_turned():
    rotary = rotary_table(8, (2, 3), unplaced=2)
    x = torch.randn(1, 1, 8, 8)
    turned = rotate(x, rotary)
    assert torch.equal(turned[:, :, 6:], x[:, :, 6:])
    assert torch.equal(turned[:, :, :6], rotate(x[:, :, :6], rotary_table(8, (2, 3))))


def test_time_embedding_features():
    embedding = TimeEmbedding(4, frequencies=3)
    t = torch.tensor([0.25, 1.0])
    angles = 2 * math.pi * t[:, None] * embedding.frequencies
    expected = embedding.mlp(torch.cat([angles.sin(), angles.cos()], 1))
    assert torch.allclose(embedding(t), expected, atol=1e-6)


def test_time_embedding_is_float32_under_autocast():
    embedding, t = TimeEmbedding(8), torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        out = embedding(t)
    assert out.dtype == torch.float32
    assert torch.equal(out, embedding(t))


@pytest.mark.parametrize("qk_norm", [None, "rms"])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_largest_logit_is_that_of_the_softmax(monkeypatch, qk_norm: NormKind | None, rotated: bool):
    torch.manual_seed(0)
    layers = [Attention(8, 2, qk_norm) for _ in range(2)]
    inputs = [3 * torch.randn(3, 4, 8) for _ in layers]
    rotary = rotary_table(4, (2, 2)) if rotated else None
    logits = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits.append((q @ k.mT / 2).abs().max())
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with watch_logits(nn.ModuleList(layers)) as seen:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x, rotary)
    assert seen["max_logit"].item() == pytest.approx(max(logits).item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layers[0].max_logit(inputs[0], rotary).dtype == torch.float32
    layers[0](100 * inputs[0], rotary)
    assert seen["max_logit"].item() == pytest.approx(max(logits[:2]).item(), rel=1e-5)


def test_a_large_negative_logit_counts_for_any_number_of_tokens():
    layer, x = Attention(8, 2), torch.randn(1, 7, 8)
    with torch.no_grad():
        layer.qkv.bias.zero_()
        layer.qkv.weight[8:16] = -layer.qkv.weight[:8]  # a token's logit for itself is negative
    queries = F.linear(x, layer.qkv.weight[:8]).unflatten(-1, (2, 4))
    expected = queries.square().sum(-1).max() / math.sqrt(4)
    assert layer.max_logit(x).item() == pytest.approx(expected.item(), rel=1e-5)
