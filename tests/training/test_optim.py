import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raekit.config import from_dict, to_dict
from raekit.errors import UserError
from raekit.training import muon
from raekit.training.optim import OptimConfig, adamw, build_optimizer, learning_rate

RATES = st.floats(1e-6, 1e-1)


@given(
    lr=RATES,
    final_lr=RATES,
    warmup=st.integers(0, 50),
    span=st.integers(1, 200),
    from_zero=st.booleans(),
    decay=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_a_schedule_warms_up_then_goes_from_lr_to_final_lr_and_stays(lr, final_lr, warmup, span, from_zero, decay):
    end = warmup + span
    config = OptimConfig(
        lr=lr, final_lr=final_lr, warmup_steps=warmup, warmup_from_zero=from_zero, decay=decay, decay_end=end
    )
    for step in range(warmup):
        assert learning_rate(config, step) == pytest.approx(lr * (step + 1) / warmup if from_zero else lr)
    assert learning_rate(config, warmup) == pytest.approx(lr)
    last = lr if decay == "constant" else final_lr
    for step in (end, end + 1, 10 * end):
        assert learning_rate(config, step) == pytest.approx(last)
    between = [learning_rate(config, step) for step in range(warmup, end + 1)]
    assert between == sorted(between, reverse=last <= lr) or last == pytest.approx(lr)


def test_half_way_a_schedule_is_half_way():
    for decay in ("linear", "cosine"):
        config = OptimConfig(lr=2e-4, final_lr=2e-5, warmup_steps=10, decay=decay, decay_end=110)
        assert learning_rate(config, 60) == pytest.approx(1.1e-4)
    quarter = learning_rate(config, 35)  # after a quarter of the cosine
    assert quarter == pytest.approx(2e-5 + 1.8e-4 * (1 + 0.5**0.5) / 2)


def test_a_decay_that_ends_before_it_begins_is_refused():
    for end in (0, 10):
        with pytest.raises(UserError, match=rf"optim\.decay_end: {end} must be after optim\.warmup_steps = 10"):
            OptimConfig(decay="linear", warmup_steps=10, decay_end=end)


def test_the_config_goes_through_json():
    config = OptimConfig(decay="cosine", decay_end=5, betas=(0.5, 0.7))
    assert from_dict(OptimConfig, to_dict(config), "config.json") == config


def test_adamw_takes_every_field():
    weight = nn.Parameter(torch.ones(3))
    optimizer = adamw(OptimConfig(lr=0.1, betas=(0.6, 0.7), weight_decay=0.2, eps=0.3), [weight])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.6, 0.7), 0.2, 0.3)
    assert group["fused"]
    weight.grad = torch.full((3,), 2.0)
    optimizer.step()
    # Decoupled weight decay, then a step of lr * g / (|g| + eps), since the moments contain a single gradient.
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.1 * 0.2 - 0.1 * 2 / 2.3))


def blocks_and_more() -> nn.ModuleDict:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)) for _ in range(2))
    return nn.ModuleDict({"embed": nn.Linear(4, 4), "blocks": blocks, "classes": nn.Embedding(5, 4)})


def with_gradients(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    return module


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


MUON = OptimConfig(method="muon", lr=0.01, betas=(0.6, 0.7), momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 1e-7), (torch.float32, 3e-4)])
def test_muon_moves_the_matrices_but_of_convolutions_and_adamw_the_rest(dtype, off, monkeypatch):
    """torch's Muon multiplies in bfloat16 everywhere: in float32, an update differs from torch's by rounding."""
    monkeypatch.setattr(muon, "precision", lambda device: dtype)
    module = blocks_and_more()
    start = copy.deepcopy(module)
    optimizer = build_optimizer(MUON, module, [module["embed"]])  # type: ignore[call-overload]
    expected = copy.deepcopy(module)
    matrices = [p for name, p in expected.named_parameters() if not name.startswith("embed") and p.ndim == 2]
    others = [p for p in expected.parameters() if all(p is not m for m in matrices)]
    assert (len(matrices), len(others)) == (5, 10)
    by_hand = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.6, 0.7)),
    ]
    for step in range(3):
        torch.manual_seed(step)
        with_gradients(module)
        torch.manual_seed(step)
        with_gradients(expected)
        for one in (optimizer, *by_hand):
            one.step()
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=off)
    # A step of Muon is about as large as a step of AdamW: its root mean square is 0.2 times the learning rate.
    (one,) = [name for name, _ in module.named_parameters() if name == "blocks.0.0.weight"]
    build_optimizer(MUON, with_gradients(start), [start["embed"]]).step()  # type: ignore[call-overload]
    moved = start.get_parameter(one) - blocks_and_more().get_parameter(one)
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)


def test_a_step_of_muon_that_is_not_finite_changes_nothing():
    module = blocks_and_more()
    optimizer = build_optimizer(MUON, module, [module["embed"]])  # type: ignore[call-overload]
    for bad in (True, False, True):
        before, state = weights(module), copy.deepcopy(optimizer.state_dict()["state"])
        for parameter in with_gradients(module).parameters():
            assert parameter.grad is not None
            if bad:
                parameter.grad[0] = float("nan")
        optimizer.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        optimizer.step()
        assert all(torch.equal(a, b) == bad for a, b in zip(before, weights(module), strict=True))
        for i, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                assert value.isfinite().all()
                assert not bad or torch.equal(value, state[i][name] if i in state else torch.zeros_like(value))


def test_muon_multiplies_in_float32_on_a_cpu():
    assert muon.precision(torch.device("cpu")) == torch.float32
    assert muon.precision(torch.device("cuda")) == torch.bfloat16


def test_muon_without_matrices_is_refused():
    with pytest.raises(UserError, match=r"optim\.method: muon trains matrices, but this module has none"):
        build_optimizer(MUON, nn.LayerNorm(4))
    with pytest.raises(UserError, match=r"optim\.momentum: 1\.0 must be"):
        OptimConfig(momentum=1)
