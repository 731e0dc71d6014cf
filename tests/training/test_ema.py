import copy

import torch
from torch import nn

from raekit.training import ema


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(1))

    def forward(self, x):
        return self.linear(x) + self.get_buffer("count")


def test_an_average_is_the_weighted_sum_of_all_weights_so_far():
    module = Counter()
    average = ema.averaged_copy(module)
    history = [copy.deepcopy(module.linear.weight.detach())]
    for step in range(1, 6):
        with torch.no_grad():
            module.linear.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
            module.get_buffer("count").add_(1)
        ema.update(average, module, 0.8)
        history.append(module.linear.weight.detach().clone())
    expected = 0.8**5 * history[0] + sum(0.2 * 0.8 ** (5 - i) * history[i] for i in range(1, 6))
    torch.testing.assert_close(average.get_parameter("linear.weight"), expected)
    assert average.get_buffer("count") == 6  # copied, not averaged


def test_a_decay_of_zero_copies_and_of_one_keeps():
    module = Counter()
    follow, keep = ema.averaged_copy(module), ema.averaged_copy(module)
    before = module.linear.weight.detach().clone()
    with torch.no_grad():
        module.linear.weight.add_(1)
    ema.update(follow, module, 0.0)
    ema.update(keep, module, 1.0)
    assert torch.equal(follow.get_parameter("linear.weight"), module.linear.weight)
    assert torch.equal(keep.get_parameter("linear.weight"), before)


def test_an_averaged_copy_is_for_evaluation_and_shares_nothing():
    module = Counter().train()
    average = ema.averaged_copy(module)
    assert not average.training
    assert module.training
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in module.parameters())
    before = average(torch.ones(1, 3))
    with torch.no_grad():
        module.linear.weight.zero_()
    assert torch.equal(average(torch.ones(1, 3)), before)


def test_a_decay_warms_up_to_its_value():
    assert [ema.warmed_up(0.9, n) for n in (0, 1, 10)] == [1 / 10, 2 / 11, 11 / 20]
    assert ema.warmed_up(0.9, 80) == 0.9
    assert ema.warmed_up(0.05, 0) == 0.05
