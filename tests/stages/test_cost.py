"""The estimate of `--dry-run` and of the advice after out of memory, compared with the memory that torch allocates."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from raekit.data.loader import DataConfig, Rows
from raekit.distributed import World
from raekit.models.autoencoder import load_autoencoder
from raekit.models.discriminator import DiscriminatorConfig
from raekit.models.encoders import load_encoder
from raekit.models.linear import Linear
from raekit.models.perceptual import load_perceptual
from raekit.recipes import find
from raekit.stages.cost import _Memory, cost_of
from raekit.stages.decoder_losses import AdversarialConfig, PerceptualConfig
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig
from raekit.stages.run import build
from raekit.training.objective import Objective
from raekit.training.optim import OptimConfig, build_optimizer
from raekit.training.precision import autocast
from raekit.training.trainer import TrainConfig

ONE = World()


def allocated(action: Callable[[], None]) -> int:
    """Return the largest number of bytes that torch allocates during `action` and has not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]
        largest = max(largest, now)
    return largest


def weights(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_estimate_agrees_with_the_measured_peak(precision, dtype, tmp_path):
    config = find("emoji_dit_dh").config
    config = replace(config, train=replace(config.train, batch_size=8, precision=precision))
    stage = build(config, tmp_path, ONE)
    (objective,) = stage.objectives
    batch = next(stage.batches(0))
    cost = cost_of(objective, batch.split(2)[0], config.train, ONE)
    assert not any(parameter.grad is not None for parameter in objective.module.parameters())
    for parameter in objective.module.parameters():  # part of the state
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with autocast(precision, ONE.device):
            loss, _ = objective.loss(batch, 0)
        loss.backward()

    frozen = weights(load_autoencoder("builtin:emoji", dtype).encoder)
    assert cost.fixed + 8 * cost.image == pytest.approx(allocated(step) + frozen, rel=0.15)


@dataclass(frozen=True)
class Vectors(Rows):
    positions: torch.Tensor
    x: torch.Tensor


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_the_state_is_that_of_the_optimizer_and_of_one_shard(method):
    network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    optim = OptimConfig(method=method)

    def loss(batch: Vectors, step: int):
        return network(batch.x).square().mean(), {}

    objective = Objective(name="network", module=network, loss=loss, optim=optim, convolutions=[network[0]], ema=(0.9,))
    batch, settings = Vectors(torch.arange(4), torch.randn(4, 8)), TrainConfig(steps=1, batch_size=4)
    state = cost_of(objective, batch, settings, ONE).state
    assert cost_of(objective, batch, replace(settings, shard=2), ONE).state == state // 2
    optimizer = build_optimizer(optim, network, objective.convolutions)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    loss(batch, 0)[0].backward()
    optimizer.step()
    moments = sum(value.nbytes for each in optimizer.state.values() for value in each.values() if value.ndim)
    assert state == 3 * weights(network) + moments  # weights, gradients and the average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_count_once(packing: None, dtype: torch.dtype):
    layer = Linear(64, 128, bias=False).requires_grad_(False).to(dtype)
    with torch.no_grad(), _Memory(layer) as memory:
        for _ in range(2):
            layer(torch.zeros(0, 64, dtype=dtype))
    assert layer.packed == (dtype == torch.bfloat16)
    assert memory.peak == 64 * 128 * dtype.itemsize


def test_frozen_networks_count(images: str, tiny_model: Path, vgg: str, tmp_path: Path):
    config = ReconstructionConfig(
        data=DataConfig(source=images, image_size=16),
        encoder=str(tiny_model),
        decoder=DecoderSize(width=16, depth=1, heads=2, hidden=32, patch_size=4),
        train=TrainConfig(steps=3, batch_size=2, precision="fp32"),
        optim=OptimConfig(),
    )
    gan = AdversarialConfig(
        discriminator=DiscriminatorConfig(backbone="builtin:vit-tiny", blocks=(0,), kernel_size=3),
        start=1,
        optim=OptimConfig(),
    )
    fixed = []
    for perceptual, adversarial in (None, None), (PerceptualConfig(weights=vgg), None), (None, gan):
        chosen = replace(config, perceptual=perceptual, adversarial=adversarial)
        stage = build(chosen, tmp_path, ONE)
        fixed.append(cost_of(stage.objectives[0], next(stage.batches(0)), chosen.train, ONE).fixed)
    assert fixed[1] - fixed[0] == pytest.approx(weights(load_perceptual(vgg)), rel=0.2)
    assert fixed[2] - fixed[0] == pytest.approx(weights(load_encoder("builtin:vit-tiny")), rel=0.3)
