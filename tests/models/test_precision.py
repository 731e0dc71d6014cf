"""Networks that hold their weights in bfloat16."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import ContextConfig, DenoiserConfig, TransformerConfig
from raekit.models.layers import RMSNorm
from raekit.models.precision import set_dtype

PART = TransformerConfig(width=32, depth=2, heads=2)
CONFIG = DenoiserConfig(channels=16, grid=(4, 4), backbone=PART, head=PART, num_classes=3)


def randomised(model: Denoiser) -> Denoiser:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"head": None},
        {"norm": "layer", "mlp": "gelu"},
        {"qk_norm": True},
        {"qk_norm": True, "norm": "layer"},
        {"positions": "none"},
        {"rotary": False},
        {"adaln_shift": False},
        {"context": ContextConfig(), "base_depth": 1},
        {"head": replace(PART, width=48), "base_depth": 2},
        {"num_classes": 0},
    ],
)
def test_a_denoiser_in_bf16_is_close_and_gives_float32(changed):
    exact = randomised(Denoiser(replace(CONFIG, **changed)))
    held = copy.deepcopy(exact).set_dtype(torch.bfloat16)
    assert held.dtype == torch.bfloat16
    x, t = torch.randn(3, 16, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    mixed = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]])
    for labels in (torch.tensor([0, 2, 1]), mixed, None) if exact.label else (None,):
        out = held(x, t, labels)
        assert out.dtype == torch.float32
        assert 0 < relative(out, exact(x, t, labels)) < 0.03
        if exact.config.base_depth:
            pairs = zip(held(x, t, labels, with_base=True), exact(x, t, labels, with_base=True), strict=True)
            assert all(0 < relative(ours, theirs) < 0.03 for ours, theirs in pairs)
        if exact.config.head:
            assert torch.equal(held(x, t, labels, features=held.features(x, t, labels)), out)


def test_rotary_tables_and_the_embeddings_of_time_and_class_stay_float32():
    exact = randomised(Denoiser(CONFIG))
    held = copy.deepcopy(exact).set_dtype(torch.bfloat16)
    unchanged = {**dict(exact.named_parameters()), **dict(exact.named_buffers())}
    for name, tensor in (*held.named_parameters(), *held.named_buffers()):
        kept = name.startswith(("time.", "label.")) or "rotary" in name
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        if kept:
            assert torch.equal(tensor, unchanged[name])
    near = torch.tensor([0.7, 0.7001])
    assert not torch.equal(*held.time(near))
    assert torch.equal(held.time(near), exact.time(near))


def test_a_decoder_in_bf16_is_close():
    exact = Decoder(DecoderConfig(token_dim=16, grid=(4, 4), patch_size=2, width=32, depth=2, heads=2, hidden=64))
    held = copy.deepcopy(exact)
    set_dtype(held, torch.bfloat16)
    latents = torch.randn(2, 16, 4, 4)
    assert 0 < relative(held(latents).float(), exact(latents)) < 0.02


def test_the_types_of_counters_and_of_kept_parts_do_not_change():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    set_dtype(module, torch.bfloat16, keep=[module[2]])
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == {
        **{f"0.{name}": torch.bfloat16 for name in ("weight", "bias", "running_mean", "running_var")},
        "0.num_batches_tracked": torch.int64,
        "1.weight": torch.bfloat16,
        "1.bias": torch.bfloat16,
        "2.0.weight": torch.float32,
        "2.0.bias": torch.float32,
    }
    set_dtype(module, torch.float32)
    assert module[1].weight.dtype == torch.float32


def test_statistics_of_the_norm_are_float32_in_bf16():
    norm = RMSNorm(4096)
    x = 1 + torch.randn(3, 4096)
    set_dtype(norm, torch.bfloat16)
    out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = x.bfloat16().float() * (x.bfloat16().double().square().mean(1, keepdim=True) + norm.eps).rsqrt().float()
    assert torch.equal(out, exact.bfloat16())
