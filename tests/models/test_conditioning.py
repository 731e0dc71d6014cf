"""A condition other than classes needs only a new module."""

from pathlib import Path

import torch
from torch import Tensor, nn

from raekit import randomness
from raekit.data.loader import Batch
from raekit.distributed import World
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling, denoise
from raekit.models.conditioning import ClassCondition
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig, TransformerConfig
from raekit.stages.generation import flow_matching_loss
from raekit.training.objective import Metrics, Objective
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig, Trainer

GIVEN = randomness.normal(0, "given", range(8), (5,))


class Described(nn.Module):
    """A condition on five numbers, as a text embedding would be; NaN stands for no condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.known, self.nothing = nn.Linear(5, width), nn.Parameter(torch.zeros(width))

    def forward(self, given: Tensor | None, count: int) -> Tensor:
        if given is None:
            return self.nothing.expand(count, -1)
        return torch.where(given.isnan().any(1, keepdim=True), self.nothing, self.known(given.nan_to_num()))

    def without(self, given: Tensor, dropped: Tensor) -> Tensor:
        return given.masked_fill(dropped[:, None], torch.nan)


def test_a_condition_of_ones_own_is_trained_and_guides(tmp_path: Path):
    torch.manual_seed(0)
    part = TransformerConfig(width=16, depth=2, heads=2)
    condition = Described(16)
    model = Denoiser(DenoiserConfig(channels=4, grid=(2, 2), backbone=part), condition)
    target = torch.tanh(GIVEN @ torch.ones(5))[:, None, None, None].expand(-1, 4, 2, 2)  # depends on the condition only

    def loss(batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        items = batch.positions % 8
        dropped = randomness.uniform(0, "dropout", batch.positions, ()) < 0.2
        given = condition.without(GIVEN[items], dropped)
        return flow_matching_loss(model, target[items], given, batch.positions, seed=0, time_law="uniform", alpha=1.0)

    def batches(start: int):
        while True:
            positions = torch.arange(start, start + 32)
            yield Batch(torch.zeros(32, 3, 1, 1, dtype=torch.uint8), torch.full((32,), -1), positions)
            start += 32

    objective = Objective(name="denoiser", module=model, loss=loss, optim=OptimConfig(lr=3e-3, decay="constant"))
    config = TrainConfig(steps=150, batch_size=32, precision="fp32")
    Trainer(tmp_path, config, [objective], batches, World()).fit()
    model.eval()
    noise = randomness.normal(0, "sample", range(8), (4, 2, 2))

    def samples(given: Tensor | None, *rules: Guidance) -> Tensor:
        return denoise(model, lambda stream: noise, given, Sampling(steps=8, guidance=rules))

    described, nothing = samples(GIVEN), samples(None)
    assert (described - target).abs().mean() < 0.5 * (nothing - target).abs().mean()
    assert torch.allclose(samples(condition.without(GIVEN, torch.ones(8, dtype=torch.bool))), nothing, atol=1e-5)
    guided = samples(GIVEN, Guidance(scale=2.0))
    assert ((guided - nothing).norm() > 1.2 * (described - nothing).norm()).item()


def test_unknown_classes_are_no_class():
    condition = ClassCondition(3, 4)
    given = torch.tensor([0, -1, 2])
    dropped = torch.tensor([False, False, True])
    assert condition.without(given, dropped).tolist() == [0, 3, 3]
    assert torch.equal(condition(None, 2), condition.weight[[3, 3]])
