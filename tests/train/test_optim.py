import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raekit.config import from_dict, to_dict
from raekit.errors import UserError
from raekit.train.optim import OptimConfig, adamw, learning_rate

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
    quarter = learning_rate(config, 35)  # of the cosine
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
    # Decoupled decay, then a step of lr * g / (|g| + eps), the first moments being those of one gradient.
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.1 * 0.2 - 0.1 * 2 / 2.3))
