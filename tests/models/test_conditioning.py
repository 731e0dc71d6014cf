"""A condition other than classes needs only a new module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from raekit import randomness
from raekit.data.loader import Batch
from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling, denoise
from raekit.inference.generation import generate, images_to_noise, noise_to_images, trajectory
from raekit.inference.model import Model
from raekit.models.autoencoder import load_autoencoder
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
    model = Denoiser(DenoiserConfig(channels=4, grid=(2, 2), num_classes=0, backbone=part), condition)
    target = torch.tanh(GIVEN @ torch.ones(5))[:, None, None, None].expand(-1, 4, 2, 2)  # depends on the condition only

    def loss(batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        items = batch.positions % 8
        dropped = randomness.uniform(0, "dropout", batch.positions, ()) < 0.2
        given = condition.without(GIVEN[items], dropped)
        return flow_matching_loss(model, target[items], given, batch.positions, seed=0, time_law="uniform")

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


def small(condition: Described | None = None, classes: int = 0) -> Denoiser:
    part = TransformerConfig(width=16, depth=1, heads=2)
    torch.manual_seed(0)
    config = DenoiserConfig(channels=3, grid=(2, 2), num_classes=classes, backbone=part)
    return Denoiser(config, condition)


def test_a_denoiser_with_a_condition_of_its_own_is_saved_and_loaded(tmp_path: Path):
    model = small(Described(16))
    model.save(tmp_path)
    given = Described(16)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    loaded = Denoiser.load(tmp_path, condition=given)
    assert_close(given.state_dict(), before, rtol=0, atol=0)
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="has a condition of its own; load it in Python"):
        Denoiser.load(tmp_path)


def test_what_a_condition_gives_is_checked():
    latents, times = torch.zeros(2, 3, 2, 2), torch.zeros(2)
    with pytest.raises(UserError, match=r"condition gives \(2, 12\) for 2 images, but the denoiser needs \(2, 16\)"):
        small(Described(12))(latents, times, GIVEN[:2])
    with pytest.raises(UserError, match=r"condition gives \(3, 16\) for 2 images"):
        small(Described(16))(latents, times, GIVEN[:3])


def test_a_condition_replaces_the_classes():
    with pytest.raises(UserError, match=r"denoiser\.num_classes: 3 must be 0"):
        small(Described(16), classes=3)
    with pytest.raises(UserError, match="labels: the denoiser has no classes and no condition"):
        small()(torch.zeros(2, 3, 2, 2), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_images_are_generated_with_a_condition_of_ones_own():
    denoiser = small(Described(16)).eval()
    for layer in (denoiser.final.out, denoiser.final.modulation):
        torch.nn.init.normal_(layer.weight, std=0.1)
    model, sampling = Model(load_autoencoder("pixels@2"), denoiser), Sampling(steps=2)

    def images(given: Tensor | None, **options: Any) -> Tensor:
        batches = generate(model, given, sampling=sampling, batch_size=2, **options)
        return torch.cat([batch.images for batch in batches])

    made = images(GIVEN[:3])
    assert torch.equal(images(GIVEN[:3].double()), made)  # numpy's usual type
    assert torch.equal(images(GIVEN[:3], indices=[2]), made[2:])
    assert not torch.allclose(made, images(None, count=3))
    assert {label for batch in generate(model, GIVEN[:3], sampling=sampling) for label in batch.labels.tolist()} == {-1}
    noise = images_to_noise(model, made, GIVEN[:3], sampling)
    assert noise_to_images(model, noise, GIVEN[:3], sampling).shape == made.shape
    frames = trajectory(model, GIVEN[:3], frames=2, sampling=sampling)[1]
    torch.testing.assert_close(frames[-1], made)  # not equal: other batches, so other rounding
    with pytest.raises(UserError, match="labels: the model has a condition of its own; give a float tensor"):
        images([0, 1])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="labels: 3 given for 2 images"):
        images_to_noise(model, made[:2], GIVEN[:3], sampling)
