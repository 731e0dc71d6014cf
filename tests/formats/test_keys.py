"""Test that raekit computes the same as the published networks.

The published arithmetic is implemented here a second time, from the spec, on the published state dicts.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raekit.errors import UserError
from raekit.formats.decoder_files import checked_decoder
from raekit.formats.decoder_keys import (
    DECODERS,
    decoder_config,
    decoder_state,
    encoder_colours,
    published_decoder_config,
    published_decoder_state,
    statistics,
)
from raekit.formats.denoiser_files import read_denoiser
from raekit.formats.denoiser_keys import denoiser_config, denoiser_state, denoiser_v2_config
from raekit.formats.denoiser_shapes import denoiser_arguments
from raekit.formats.guesses import guess
from raekit.formats.states import unwrap
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import SIZES, DenoiserConfig, TransformerConfig
from raekit.weights import load_strict
from tests.reference import check, state_dict

State = dict[str, Tensor]

DIT = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 6,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 3,
    "use_qknorm": True,
}
DIT_DH = {
    "input_size": 3,
    "patch_size": 1,
    "in_channels": 10,
    "hidden_size": [24, 48],
    "depth": [2, 1],
    "num_heads": [2, 3],
    "num_classes": 4,
    "use_qknorm": True,
    "mlp_ratio": 3.0,
}


def denoiser_shapes(values: dict[str, Any], classes: int | None = None) -> dict[str, list[int]]:
    """Return the tensor names and shapes of a published v1 denoiser (RAE v1's code)."""
    c, p, side = values["in_channels"], values["patch_size"], values["input_size"] // values["patch_size"]
    wide = isinstance(values["hidden_size"], list)
    widths, depths, heads = (
        value if wide else [value] for value in (values["hidden_size"], values["depth"], values["num_heads"])
    )
    d, last = widths[0], widths[-1]
    shapes: dict[str, list[int]] = {"pos_embed": [1, side**2, d]} if values.get("use_pos_embed", True) else {}
    embeds = {"s_embedder": d, "x_embedder": last} if wide else {"x_embedder": d}
    for name, width in embeds.items():
        shapes |= {f"{name}.proj.weight": [width, c, p, p], f"{name}.proj.bias": [width]}
    if wide and d != last:
        shapes |= {"s_projector.weight": [last, d], "s_projector.bias": [last]}
    shapes |= {"t_embedder.W": [256]} | matrix("t_embedder.mlp.0", d, 512) | matrix("t_embedder.mlp.2", d, d)
    shapes["y_embedder.embedding_table.weight"] = [classes or values["num_classes"] + 1, d]
    for name, width, count in zip(("enc_", "dec_") if wide else ("",), widths, heads, strict=True):
        if not values.get("use_rope", True):
            break
        shapes |= {f"{name}feat_rope.freqs_{f}": [side**2, width // count] for f in ("cos", "sin")}
    parts = [(width, count) for width, depth, count in zip(widths, depths, heads, strict=True) for _ in range(depth)]
    for i, (width, count) in enumerate(parts):
        hidden = int(width * values.get("mlp_ratio", 4.0))
        block = matrix("attn.qkv", 3 * width, width) | matrix("attn.proj", width, width)
        block |= matrix("adaLN_modulation.1", (4 if values.get("wo_shift") else 6) * width, width)
        if values.get("use_swiglu", True):
            hidden = int(2 / 3 * hidden)
            block |= matrix("mlp.w12", 2 * hidden, width) | matrix("mlp.w3", width, hidden)
        else:
            block |= matrix("mlp.fc1", hidden, width) | matrix("mlp.fc2", width, hidden)
        if values.get("use_rmsnorm", True):
            block |= {"norm1.weight": [width], "norm2.weight": [width]}
        if values.get("use_qknorm"):
            kinds = ("weight",) if values.get("use_rmsnorm", True) else ("weight", "bias")
            block |= {f"attn.{part}_norm.{kind}": [width // count] for part in "qk" for kind in kinds}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    final = matrix("linear", p * p * c, last) | matrix("adaLN_modulation.1", 2 * last, last)
    if values.get("use_rmsnorm", True):
        final["norm_final.weight"] = [last]
    return shapes | {f"final_layer.{name}": shape for name, shape in final.items()}


def matrix(name: str, out: int, into: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [out, into], f"{name}.bias": [out]}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Apply RMSNorm if the state has a weight but no bias. Otherwise apply LayerNorm, affine if it has both."""
    if f"{name}.weight" in state and f"{name}.bias" not in state:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"] if f"{name}.bias" in state else x


def turned(x: Tensor, state: State, rope: str) -> Tensor:
    if f"{rope}.freqs_cos" not in state:
        return x
    quarter_turn = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * state[f"{rope}.freqs_cos"] + quarter_turn * state[f"{rope}.freqs_sin"]


def block(state: State, index: int, heads: int, rope: str, x: Tensor, c: Tensor) -> Tensor:
    name = f"blocks.{index}"
    m: list[Any] = list(linear(state, f"{name}.adaLN_modulation.1", F.silu(c)).split(x.shape[-1], -1))
    if len(m) == 4:
        m = [0, m[0], m[1], 0, m[2], m[3]]
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x) * (1 + m[1]) + m[0]).chunk(3, -1)
    )
    if f"{name}.attn.q_norm.weight" in state:
        eps = 1e-5 if f"{name}.attn.q_norm.bias" in state else 1e-6
        q, k = norm(state, f"{name}.attn.q_norm", q, eps), norm(state, f"{name}.attn.k_norm", k, eps)
    q, k = turned(q, state, rope), turned(k, state, rope)
    out = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + m[2] * linear(state, f"{name}.attn.proj", out)
    inner = norm(state, f"{name}.norm2", x) * (1 + m[4]) + m[3]
    if f"{name}.mlp.fc1.weight" in state:
        hidden = F.gelu(linear(state, f"{name}.mlp.fc1", inner), approximate="tanh")
        return x + m[5] * linear(state, f"{name}.mlp.fc2", hidden)
    gate, value = linear(state, f"{name}.mlp.w12", inner).chunk(2, -1)
    return x + m[5] * linear(state, f"{name}.mlp.w3", F.silu(gate) * value)


def published_denoiser(state: State, values: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Compute a v1 denoiser's output in float64 (RAE v1)."""
    state = {key: value.double() for key, value in state.items()}
    x, p, wide = x.double(), values["patch_size"], isinstance(values["hidden_size"], list)

    def embed(name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"], stride=p).flatten(2).mT

    angles = 2 * math.pi * t.double()[:, None] * state["t_embedder.W"]
    time = linear(state, "t_embedder.mlp.0", torch.cat([angles.sin(), angles.cos()], -1))
    time = linear(state, "t_embedder.mlp.2", F.silu(time))[:, None]
    c = time + state["y_embedder.embedding_table.weight"][y][:, None]
    if wide:
        c = F.silu(c)
        (depth, head_depth), (heads, head_heads) = values["depth"], values["num_heads"]
        s = embed("s_embedder") + state.get("pos_embed", 0)
        for i in range(depth):
            s = block(state, i, heads, "enc_feat_rope", s, c)
        c = F.silu(s + time)
        c = linear(state, "s_projector", c) if "s_projector.weight" in state else c
        tokens = embed("x_embedder")
        for i in range(depth, depth + head_depth):
            tokens = block(state, i, head_heads, "dec_feat_rope", tokens, c)
    else:
        tokens = embed("x_embedder") + state.get("pos_embed", 0)
        for i in range(values["depth"]):
            tokens = block(state, i, values["num_heads"], "feat_rope", tokens, c)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, -1)
    out = linear(state, "final_layer.linear", norm(state, "final_layer.norm_final", tokens) * (1 + scale) + shift)
    side = values["input_size"] // p
    out = out.view(len(x), side, side, p, p, -1)
    return torch.einsum("bhwpqc->bchpwq", out).reshape(x.shape)


V2 = {
    "input_size": 4,
    "patch_size": [2, 2],
    "in_channels": 5,
    "hidden_size": [24, 32],
    "depth": [3, 1],
    "num_heads": [2, 2],
    "num_classes": 4,
    "base_model_depth": 2,
    "num_t_tokens": 2,
    "num_c_tokens": 3,
}


def denoiser_v2_shapes(values: dict[str, Any]) -> dict[str, list[int]]:
    """Return the tensor names and shapes of a published RAE v2 denoiser (RAE v2)."""
    c, p = values["in_channels"], values["patch_size"][0]
    d, last = values["hidden_size"]
    tokens, context = (values["input_size"] // p) ** 2, values["num_t_tokens"] + values["num_c_tokens"]
    shapes = {f"{name}.proj.weight": [width, c, p, p] for name, width in (("s_embedder", d), ("x_embedder", last))}
    shapes |= {"s_embedder.proj.bias": [d], "x_embedder.proj.bias": [last], "t_embedder.W": [256]}
    shapes |= matrix("s_projector", last, d) | matrix("t_embedder.mlp.0", d, 512) | matrix("t_embedder.mlp.2", d, d)
    shapes |= {
        "t_embedder.learnable_tokens": [values["num_t_tokens"], d],
        "ctx_embedder.learnable_tokens": [values["num_c_tokens"], d],
        "ctx_embedder.embedding_table.weight": [values["num_classes"] + 1, d],
    }
    for i in range(sum(values["depth"])):
        head = i >= values["depth"][0]
        width, count = (last, values["num_heads"][1]) if head else (d, values["num_heads"][0])
        hidden = int(2 / 3 * 4 * width)
        block = {"norm1.weight": [width], "norm2.weight": [width]}
        block |= {f"attn.{part}_norm.weight": [width // count] for part in "qk"}
        for part in ("q", "k", "v", "proj"):
            block |= matrix(f"attn.{part}", width, width)
        block |= matrix("mlp.w1", hidden, width) | matrix("mlp.w2", hidden, width) | matrix("mlp.w3", width, hidden)
        if head:
            block |= matrix("adaln_modulation.1", 6 * width, width)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    for name, width in (("final_layer", last), ("base_final_layer", d)):
        final = {"norm.weight": [width]} | matrix("linear", p * p * c, width)
        final |= matrix("adaln_modulation.1", 2 * width, width)
        shapes |= {f"{name}.{key}": shape for key, shape in final.items()}
    for name, count, part in (
        ("enc", tokens + context, d // values["num_heads"][0]),
        ("dec", tokens, last // values["num_heads"][1]),
    ):
        shapes |= {f"{name}_rope.freqs_{f}": [count, part] for f in ("cos", "sin")}
    return shapes


def published_denoiser_v2(
    state: State, values: dict[str, Any], x: Tensor, t: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute an RAE v2 denoiser's full and base output in float64 (RAE v2)."""
    state = {key: value.double() for key, value in state.items()}
    x, p, depth = x.double(), values["patch_size"][0], values["depth"][0]

    def embed(name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"], stride=p).flatten(2).mT

    def run(i: int, tokens: Tensor, rope: str, heads: int, m: list[Any]) -> Tensor:
        name = f"blocks.{i}"
        inner = norm(state, f"{name}.norm1", tokens) * (1 + m[1]) + m[0]
        q, k, v = (
            linear(state, f"{name}.attn.{part}", inner).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        q, k = (turned(norm(state, f"{name}.attn.{n}_norm", part), state, rope) for n, part in (("q", q), ("k", k)))
        out = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + m[2] * linear(state, f"{name}.attn.proj", out)
        inner = norm(state, f"{name}.norm2", tokens) * (1 + m[4]) + m[3]
        hidden = F.silu(linear(state, f"{name}.mlp.w1", inner)) * linear(state, f"{name}.mlp.w2", inner)
        return tokens + m[5] * linear(state, f"{name}.mlp.w3", hidden)

    def final(name: str, tokens: Tensor, c: Tensor) -> Tensor:
        shift, scale = linear(state, f"{name}.adaln_modulation.1", F.silu(c)).chunk(2, -1)
        out = linear(state, f"{name}.linear", norm(state, f"{name}.norm", tokens) * (1 + scale) + shift)
        side = values["input_size"] // p
        return torch.einsum("bhwpqc->bchpwq", out.view(len(x), side, side, p, p, -1)).reshape(x.shape)

    angles = 2 * math.pi * t.double()[:, None] * state["t_embedder.W"]
    time = F.silu(linear(state, "t_embedder.mlp.0", torch.cat([angles.sin(), angles.cos()], -1)))
    time = linear(state, "t_embedder.mlp.2", time)[:, None]
    label = state["ctx_embedder.embedding_table.weight"][y][:, None]
    image = embed("s_embedder")
    tokens = [image, state["t_embedder.learnable_tokens"] + time, state["ctx_embedder.learnable_tokens"] + label]
    s, base = torch.cat(tokens, 1), image
    for i in range(depth):
        s = run(i, s, "enc_rope", values["num_heads"][0], [0, 0, 1, 0, 0, 1])
        if i + 1 == values["base_model_depth"]:
            base = F.silu(s[:, : image.shape[1]] + time)
    c = linear(state, "s_projector", F.silu(s[:, : image.shape[1]] + time))
    tokens = embed("x_embedder")
    for i in range(depth, sum(values["depth"])):
        m = linear(state, f"blocks.{i}.adaln_modulation.1", F.silu(c)).chunk(6, -1)
        tokens = run(i, tokens, "dec_rope", values["num_heads"][1], list(m))
    return final("final_layer", tokens, c), final("base_final_layer", base, base)


@pytest.mark.parametrize(
    "values",
    [V2, V2 | {"patch_size": [1, 1], "input_size": 3, "hidden_size": [32, 24], "base_model_depth": 3}],
    ids=["patches of 2", "base at the end"],
)
def test_denoiser_v2_agrees_with_the_published_arithmetic(values: dict[str, Any]):
    state = state_dict(denoiser_v2_shapes(values), context=values["num_t_tokens"] + values["num_c_tokens"])
    config = denoiser_v2_config(values)
    model = Denoiser(config).eval()
    load_strict(model, denoiser_state(state, config), "test")
    x, t, y = inputs(values)
    for ours, theirs in zip(model(x, t, y, with_base=True), published_denoiser_v2(state, values, x, t, y), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_released_v2_fits_by_name_and_shape():
    values = {
        "input_size": 16,
        "patch_size": [1, 1],
        "in_channels": 1024,
        "hidden_size": [1440, 2048],
        "depth": [28, 2],
        "num_heads": [20, 16],
        "num_classes": 1000,
    }
    shapes = denoiser_v2_shapes({**values, "num_t_tokens": 4, "num_c_tokens": 8})
    assert shapes["enc_rope.freqs_cos"] == [268, 72]
    with torch.device("meta"):
        state = {k: torch.empty(v) for k, v in shapes.items()}
        model = Denoiser(denoiser_v2_config(values))
    assert denoiser_v2_config(denoiser_arguments(state)) == model.config
    assert guess(state).startswith("a denoiser of RAE v2 (28 x 1440, head 2 x 2048) for latents 1024x16x16")
    load_strict(model, denoiser_state(state, model.config), "test")
    assert model.config.base_depth == 8
    del state["blocks.3.attn.k.weight"]
    with pytest.raises(
        UserError, match=r"missing blocks\.3\.attention\.qkv\.weight.*unexpected blocks\.3\.attn\.q\.weight"
    ):
        load_strict(model, denoiser_state(state, model.config), "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rope": True}, "version 2: use_rope"),
        ({"hidden_size": 24}, "version 2: hidden_size"),
        ({"base_model_depth": 4}, "denoiser.base_depth: 4 must be at most denoiser.backbone.depth = 3"),
        ({"patch_size": [1, 2]}, "patch_size"),
    ],
)
def test_unsupported_v2_arguments_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        denoiser_v2_config(V2 | changes)


def inputs(values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    side = values["input_size"]
    return torch.randn(3, values["in_channels"], side, side), torch.tensor([0.1, 0.5, 0.95]), torch.tensor([0, 2, 1])


OPTIONS = pytest.mark.parametrize(
    "values",
    [
        DIT,
        DIT | {"use_qknorm": False, "patch_size": 1, "mlp_ratio": 2.5, "hidden_size": 36, "num_heads": 3},
        DIT_DH,
        DIT_DH | {"hidden_size": [48, 48], "num_heads": [4, 2]},
        DIT_DH | {"hidden_size": [8, 8], "num_heads": [1, 2]},
        DIT_DH | {"patch_size": 3},
        DIT_DH | {"use_rmsnorm": False, "use_swiglu": False},
        DIT_DH | {"use_rmsnorm": False, "use_qknorm": False, "wo_shift": True},
        DIT_DH | {"use_pos_embed": False},
        DIT_DH | {"use_rope": False},
        DIT | {"use_rope": False, "use_rmsnorm": False},
        DIT | {"use_swiglu": False, "wo_shift": True, "learn_sigma": False, "use_gembed": True},
    ],
    ids=[
        "DiT, patches of 2, QK-norm",
        "DiT, odd sizes",
        "DiT-DH, QK-norm",
        "DiT-DH without projector",
        "narrow DiT-DH",
        "DiT-DH, patches of 3",
        "DiT-DH, LayerNorm, GELU",
        "DiT-DH, LayerNorm, no shift",
        "DiT-DH without positions",
        "DiT-DH without rotary",
        "DiT without rotary, LayerNorm",
        "DiT, GELU, no shift",
    ],
)


@OPTIONS
def test_denoiser_agrees_with_the_published_arithmetic(values: dict[str, Any]):
    state = state_dict(denoiser_shapes(values))
    config = denoiser_config(values)
    model = Denoiser(config).eval()
    load_strict(model, denoiser_state(state, config), "test")
    x, t, y = inputs(values)
    expected = published_denoiser(state, values, x, t, y)
    assert (model(x, t, y) - expected).norm() < 1e-5 * expected.norm()


@OPTIONS
def test_reference_cases_with_other_options(values: dict[str, Any], tmp_path: Path):
    shapes = denoiser_shapes(values)
    x, t, y = inputs(values)
    v = published_denoiser(state_dict(shapes), values, x, t, y)
    kind = "ditdh" if isinstance(values["hidden_size"], list) else "dit"
    config = json.dumps(values | {"kind": kind, "shapes": shapes})
    np.savez(tmp_path / "case.npz", config=config, x=x, t=t, y=y, v=v.float())
    assert [line[:2] for line in check(tmp_path / "case.npz")] == [("ok", "v")]


def test_network_without_class_dropout_gets_a_zero_null_class():
    values = DIT | {"class_dropout_prob": 0.0}
    config = denoiser_config(values)
    ours = denoiser_state(state_dict(denoiser_shapes(values, classes=3)), config)
    model = Denoiser(config)
    load_strict(model, ours, "test")
    assert not ours["label.weight"][3].any()
    assert ours["label.weight"][:3].any(1).all()


def test_released_sizes_fit_by_name_and_shape():
    values = {
        "input_size": 16,
        "patch_size": 1,
        "in_channels": 768,
        "hidden_size": [1152, 2048],
        "depth": [28, 2],
        "num_heads": [16, 16],
    }
    shapes = denoiser_shapes({**values, "num_classes": 1000})
    assert len(shapes) == 382
    with torch.device("meta"):
        state = {k: torch.empty(v) for k, v in shapes.items() if k != "pos_embed" and "freqs" not in k}
        model = Denoiser(denoiser_config(values))
    load_strict(model, denoiser_state(state, model.config), "test")


@pytest.mark.parametrize(
    ("size", "tensors", "parameters"), [("S", 190, 196.5), ("B", 190, 294.3), ("L", 334, 621.7), ("XL", 382, 838.7)]
)
@pytest.mark.parametrize("side", [16, 32])
def test_published_sizes_fit_with_their_tables_on_the_meta_device(size, tensors, parameters, side):
    backbone = SIZES[size]
    values = {
        "input_size": side,
        "patch_size": 1,
        "in_channels": 768,
        "hidden_size": [backbone.width, 2048],
        "depth": [backbone.depth, 2],
        "num_heads": [backbone.heads, 16],
    }
    shapes = denoiser_shapes({**values, "num_classes": 1000})
    assert len(shapes) == tensors
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        model = Denoiser(denoiser_config(values))
    load_strict(model, denoiser_state(unwrap({"ema": state}), model.config), "test")
    if side == 16:
        own = sum(value.numel() for key, value in state.items() if "freqs" not in key)
        assert own == pytest.approx(parameters * 1e6, abs=5e4)
    assert denoiser_config(denoiser_arguments(state)) == model.config
    assert guess(state).startswith(f"a DiT^DH-{size} (")
    with pytest.raises(UserError, match="pos_embed: is"):
        denoiser_state({"pos_embed": state["pos_embed"][:, 1:]}, model.config)


def test_denoiser_config():
    assert denoiser_config(DIT_DH) == DenoiserConfig(
        channels=10,
        grid=(3, 3),
        backbone=TransformerConfig(width=24, depth=2, heads=2),
        head=TransformerConfig(width=48, depth=1, heads=3),
        num_classes=4,
        mlp_ratio=3.0,
        qk_norm=True,
        shift=math.sqrt(90 / 4096),
    )
    assert denoiser_config(DIT_DH | {"num_heads": 2, "patch_size": [1, 1]}).head == TransformerConfig(
        width=48, depth=1, heads=2
    )
    assert denoiser_config(DIT).head is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (DIT_DH | {"patch_size": [1, 2]}, "patch_size"),
        (DIT_DH | {"use_rope": False, "use_pos_embed": False}, "denoiser.rotary: off"),
        (DIT | {"use_gembed": False}, "use_gembed"),
        (DIT_DH | {"depth": 3}, "hidden_size and depth must both be pairs"),
        (DIT | {"learn_sigma": True}, "learn_sigma"),
        ({k: v for k, v in DIT.items() if k != "depth"}, "depth"),
        (DIT | {"num_heads": 3}, "heads = 3"),
    ],
)
def test_unsupported_arguments_are_named(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        denoiser_config(values)


def load_denoiser(changes: dict[str, Tensor | None], values: dict[str, Any] = DIT_DH) -> None:
    config = denoiser_config(values)
    state = state_dict(denoiser_shapes(values)) | changes
    load_strict(Denoiser(config), denoiser_state({k: v for k, v in state.items() if v is not None}, config), "test.pt")


def table(name: str, values: dict[str, Any] = DIT_DH) -> Tensor:
    return state_dict({name: denoiser_shapes(values)[name]})[name]


def test_fixed_tables_may_be_absent_or_rounded():
    load_denoiser({"pos_embed": None, "enc_feat_rope.freqs_cos": None, "dec_feat_rope.freqs_sin": None})
    load_denoiser({"pos_embed": table("pos_embed").bfloat16()})


@pytest.mark.parametrize("name", ["enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_sin"])
def test_wrong_rotary_table_is_rejected(name: str):
    right = table(name)
    for wrong in other_tables(right):
        with pytest.raises(UserError, match=f"{name}: not the fixed table"):
            load_denoiser({name: wrong})
    with pytest.raises(UserError, match=f"{name}: is .* for the configured grid"):
        load_denoiser({name: torch.cat([right, right], -2)})


def other_tables(right: Tensor) -> list[Tensor]:
    """Return tables that differ from the fixed one: slightly, in the order of the axes, in the order of channels."""
    side = math.isqrt(right.shape[-2])
    transposed = right.unflatten(-2, (side, side)).transpose(-3, -2).flatten(-3, -2)
    return [right + 3e-4, right + 0.01, transposed, right.flip(-1), torch.zeros_like(right)]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("values", [DIT, DIT_DH, DIT_DH | {"use_rope": False}], ids=["DiT", "DiT-DH", "without rotary"])
def test_learned_positions_of_a_denoiser_are_read(values: dict[str, Any], number: int, tmp_path: Path):
    state = state_dict(denoiser_shapes(values))
    state["pos_embed"] = other_tables(table("pos_embed", values))[number]
    torch.save({"ema": state}, tmp_path / "learned.pt")
    parts = read_denoiser(tmp_path / "learned.pt", denoiser_config(values))
    assert parts.config == replace(denoiser_config(values), positions="learned")
    model = parts.build()
    assert torch.equal(model.state_dict()["positions"], state["pos_embed"][0])
    x, t, y = inputs(values)
    expected = published_denoiser(state, values, x, t, y)
    assert (model(x, t, y) - expected).norm() < 1e-5 * expected.norm()


def test_fixed_positions_of_a_denoiser_keep_their_bits(tmp_path: Path):
    state = state_dict(denoiser_shapes(DIT_DH))
    x, t, y = inputs(DIT_DH)
    found, fixed = [], table("pos_embed")
    for number, given in enumerate((None, fixed, fixed.bfloat16(), fixed.half(), fixed.bfloat16().float())):
        path = tmp_path / f"{number}.pt"
        torch.save({k: v for k, v in (state | {"pos_embed": given}).items() if v is not None}, path)
        parts = read_denoiser(path, denoiser_config(DIT_DH))
        assert parts.config == denoiser_config(DIT_DH)
        found.append(parts.build()(x, t, y))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t_embedder.W": None}, "missing time.frequencies"),
        ({"blocks.2.attn.qkv.bias": None}, "missing head_blocks.0.attention.qkv.bias"),
        ({"extra.weight": torch.ones(1)}, "unexpected extra.weight"),
        ({"blocks.3.norm1.weight": torch.ones(48)}, "unexpected head_blocks.1.norm1.weight"),
        ({"blocks.0.attn.qkv.weight": torch.ones(71, 24)}, r"blocks.0.attention.qkv.weight is \(71, 24\)"),
        ({"x_embedder.proj.weight": torch.ones(48, 10, 2, 2)}, r"head_embed.weight is \(48, 40\), expected \(48, 10\)"),
        ({"y_embedder.embedding_table.weight": torch.ones(7, 24)}, r"label.weight is \(7, 24\), expected \(5, 24\)"),
    ],
)
def test_denoiser_is_read_strictly(changes: dict[str, Tensor | None], message: str):
    with pytest.raises(UserError, match=f"test.pt: the weights do not fit Denoiser: .*{message}"):
        load_denoiser(changes)


# The decoder.

DECODER = {
    "model_type": "vit_mae",
    "hidden_size": 999,
    "image_size": 999,
    "patch_size": 999,
    "decoder_hidden_size": 24,
    "decoder_intermediate_size": 40,
    "decoder_num_attention_heads": 3,
    "decoder_num_hidden_layers": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "num_channels": 3,
}
DECODER_CONFIG = decoder_config(DECODER, token_dim=10, grid=(3, 3), patch_size=4)


def decoder_shapes(
    width: int = 24, layers: int = 2, hidden: int = 40, token_dim: int = 10, tokens: int = 9, patch: int = 4
) -> dict[str, list[int]]:
    """Return the tensor names and shapes of a published decoder (RAE v1's code)."""
    shapes: dict[str, list[int]] = {"decoder_pos_embed": [1, tokens + 1, width], "trainable_cls_token": [1, 1, width]}
    shapes |= matrix("decoder_embed", width, token_dim) | matrix("decoder_pred", 3 * patch**2, width)
    norms = ["decoder_norm"]
    for i in range(layers):
        name = f"decoder_layers.{i}"
        for part in ("query", "key", "value"):
            shapes |= matrix(f"{name}.attention.attention.{part}", width, width)
        shapes |= matrix(f"{name}.attention.output.dense", width, width)
        shapes |= matrix(f"{name}.intermediate.dense", hidden, width) | matrix(f"{name}.output.dense", width, hidden)
        norms += [f"{name}.layernorm_before", f"{name}.layernorm_after"]
    return shapes | {f"{norm}.{kind}": [width] for norm in norms for kind in ("weight", "bias")}


def published_decoder(state: State, latents: Tensor, side: int = 3) -> Tensor:
    """Compute a decoder's output in float64 (RAE v1)."""
    state = {key: value.double() for key, value in state.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    x = linear(state, "decoder_embed", latents.double().flatten(2).mT)
    if x.shape[1] != side**2:
        square = x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1))
        x = F.interpolate(square, (side, side), mode="bilinear", align_corners=False).flatten(2).mT
    x = torch.cat([state["trainable_cls_token"].expand(len(x), -1, -1), x], 1) + state["decoder_pos_embed"]
    for i in range(2):
        name = f"decoder_layers.{i}"
        y = norm(f"{name}.layernorm_before", x)
        q, k, v = (
            linear(state, f"{name}.attention.attention.{part}", y).unflatten(-1, (3, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        out = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(state, f"{name}.attention.output.dense", out)
        hidden = linear(state, f"{name}.intermediate.dense", norm(f"{name}.layernorm_after", x))
        x = x + linear(state, f"{name}.output.dense", hidden / 2 * (1 + torch.erf(hidden / math.sqrt(2))))
    out = linear(state, "decoder_pred", norm("decoder_norm", x))[:, 1:].view(-1, side, side, 4, 4, 3)
    return torch.einsum("bhwpqc->bchpwq", out).reshape(-1, 3, 4 * side, 4 * side)


@pytest.mark.parametrize("side", [3, 5])
def test_decoder_agrees_with_the_published_arithmetic(side: int, tmp_path: Path):
    state = state_dict(decoder_shapes())
    model = Decoder(DECODER_CONFIG).eval()
    load_strict(model, decoder_state(state, DECODER_CONFIG), "test")
    latents = torch.randn(2, 10, side, side)
    expected = published_decoder(state, latents)
    assert (model(latents) - expected).norm() < 1e-5 * expected.norm()
    case = {"kind": "decoder", "token_dim": 10, "grid": 3, "decoder_hidden_size": 24, "layers": 2, "heads": 3}
    case |= {"intermediate": 40, "patch": 4, "layer_norm_eps": 1e-12, "shapes": decoder_shapes()}
    np.savez(tmp_path / "case.npz", config=json.dumps(case), z=latents, img=expected.float())
    assert [line[:2] for line in check(tmp_path / "case.npz")] == [("ok", "img")]


def load_decoder(changes: dict[str, Tensor | None]) -> None:
    state = state_dict(decoder_shapes()) | changes
    ours = decoder_state({k: v for k, v in state.items() if v is not None}, DECODER_CONFIG)
    load_strict(Decoder(DECODER_CONFIG), ours, "model.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_norm.bias": None}, "missing norm.bias"),
        ({"decoder_layers.1.attention.attention.key.bias": None}, "missing blocks.1.attention.qkv.bias"),
        ({"mask_token": torch.ones(1)}, "unexpected mask_token"),
        ({"decoder_layers.2.layernorm_before.bias": torch.ones(24)}, "unexpected blocks.2.norm1.bias"),
        ({"trainable_cls_token": torch.ones(1, 1, 20)}, r"cls_token is \(20,\)"),
    ],
)
def test_decoder_is_read_strictly(changes: dict[str, Tensor | None], message: str):
    with pytest.raises(UserError, match=f"model.pt: the weights do not fit Decoder: .*{message}"):
        load_decoder(changes)


def test_decoder_for_another_grid_is_rejected():
    with pytest.raises(UserError, match=r"decoder_pos_embed: is \(1, 17, 24\), expected \(1, 10, 24\)"):
        load_decoder({"decoder_pos_embed": torch.zeros(1, 17, 24)})
    with pytest.raises(UserError, match="decoder_pos_embed: not the fixed table"):
        load_decoder({"decoder_pos_embed": torch.zeros(1, 10, 24)})
    load_decoder({"decoder_pos_embed": None})


@pytest.mark.parametrize("change", [3e-4, 0.01, 1.0])
def test_learned_positions_of_a_decoder_round_trip(change: float):
    state = state_dict(decoder_shapes())
    state["decoder_pos_embed"] += change * torch.randn(1, 10, 24)  # of the class token, too
    config, ours = checked_decoder(state, DECODER_CONFIG, "test")
    assert config == replace(DECODER_CONFIG, positions="learned")
    model = Decoder(config).eval()
    load_strict(model, ours, "test")
    latents = torch.randn(2, 10, 3, 3)
    expected = published_decoder(state, latents)
    assert (model(latents) - expected).norm() < 1e-5 * expected.norm()
    back = published_decoder_state(model.state_dict(), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, only 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias = False"),
        ({"num_channels": 4}, "num_channels = 4"),
        ({"decoder_hidden_size": "wide"}, "decoder config: width"),
        ({"decoder_num_attention_heads": 5}, "decoder.heads = 5"),
    ],
)
def test_error_names_the_fault_in_a_decoder_configuration(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        decoder_config(DECODER | changes, 10, (3, 3), 4)


def test_error_names_missing_decoder_fields():
    with pytest.raises(UserError, match="decoder_intermediate_size, layer_norm_eps missing"):
        decoder_config(
            {k: v for k, v in DECODER.items() if k not in ("decoder_intermediate_size", "layer_norm_eps")},
            10,
            (3, 3),
            4,
        )


def test_released_vit_xl_fits_by_name_and_shape():
    shapes = decoder_shapes(width=1152, layers=28, hidden=4096, token_dim=768, tokens=256, patch=16)
    assert len(shapes) == 456
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(415.35e6, abs=5e3)
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    state["decoder_pos_embed"] = state_dict({"decoder_pos_embed": shapes["decoder_pos_embed"]})["decoder_pos_embed"]
    config = DecoderConfig(token_dim=768, grid=(16, 16), patch_size=16, **DECODERS["ViT-XL"])
    with torch.device("meta"):
        model = Decoder(config)
    load_strict(model, decoder_state(state, config), "test")
    assert published_decoder_state(model.state_dict(), config).keys() == shapes.keys()
    assert guess(state) == "a ViT-XL decoder for 768 channels, 256 tokens, patches of 16 pixels"


def test_published_decoder_round_trip():
    state = state_dict(decoder_shapes())
    back = published_decoder_state(decoder_state(state, DECODER_CONFIG), DECODER_CONFIG)
    assert back.keys() == state.keys()
    assert all(torch.allclose(back[key], state[key], rtol=0, atol=1e-6) for key in state)
    assert decoder_config(published_decoder_config(DECODER_CONFIG), 10, (3, 3), 4) == DECODER_CONFIG


def test_pixels_in_the_encoders_colours():
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    ours = decoder_state(state_dict(decoder_shapes()), DECODER_CONFIG)
    pixels, colours = Decoder(DECODER_CONFIG).eval(), Decoder(DECODER_CONFIG).eval()
    load_strict(pixels, ours, "test")
    load_strict(colours, encoder_colours(ours, mean, std), "test")
    latents = torch.randn(2, 10, 3, 3)
    expected = (pixels(latents) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert (colours(latents) - expected).norm() < 1e-5 * expected.norm()


# Statistics and checkpoints.


def test_statistics():
    mean, var = torch.randn(2, 3, 3), torch.rand(2, 3, 3).double()
    got = statistics({"mean": mean, "var": var})
    assert got[0] is not None
    assert torch.equal(got[0], mean)
    assert torch.equal(got[1], var.float())
    assert statistics({"mean": None, "var": var})[0] is None
    assert statistics({"var": var})[0] is None


def test_another_eps_is_added_to_the_variance():
    var = torch.rand(2, 3, 3)
    assert torch.allclose(statistics({"var": var}, eps=1e-3)[1] + 1e-5, var + 1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": torch.ones(2, 3, 3)}, r"var must be a floating-point tensor of shape \(C, H, W\)"),
        ({"var": torch.ones(2)}, r"var must be a floating-point tensor of shape \(C, H, W\)"),
        ({"var": torch.ones(2, 3, 3), "mean": torch.ones(2, 3, 4)}, r"mean must be None or .* as var, \(2, 3, 3\)"),
        ({"var": torch.ones(2, 3, 3), "std": torch.ones(2, 3, 3)}, "unknown std"),
    ],
)
def test_error_names_the_fault_in_statistics(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"statistics: {message}"):
        statistics(values)


W, V = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"a.b": W},
        {"ema": {"a.b": W}, "model": {"a.b": V}, "step": 3},
        {"model": {"a.b": W}, "optimizer": {"state": {}}},
        {"ema": None, "model": {"module.a.b": W}},
        {"module._orig_mod.a.b": W},
        {"_orig_mod.module.a.b": W},
    ],
)
def test_checkpoints_are_unwrapped(checkpoint: Any):
    state = unwrap(checkpoint)
    assert list(state) == ["a.b"]
    assert torch.equal(state["a.b"], W)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "holds no state dict"),
        ([W], "holds no state dict"),
        ({"ema": {}}, "holds no state dict"),
        ({"epoch": 3, "a.b": W}, "these are not tensors: epoch"),
    ],
)
def test_contents_that_are_not_a_checkpoint(checkpoint: Any, message: str):
    with pytest.raises(UserError, match=f"checkpoint: .*{message}"):
        unwrap(checkpoint)
