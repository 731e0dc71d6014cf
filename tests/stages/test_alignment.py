"""The alignment of a denoiser's tokens with an encoder's (REPA)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.inference.model import load
from raekit.models.denoiser_config import DenoiserSize, TransformerConfig
from raekit.models.encoders import load_encoder
from raekit.stages.alignment import Aligned, AlignmentConfig
from raekit.stages.generation import GenerationConfig, build
from raekit.stages.run import train
from raekit.stages.watch import HeldoutConfig, SamplesConfig
from raekit.training.optim import OptimConfig
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig

ONE = World()
PART = TransformerConfig(width=16, depth=2, heads=2)


@pytest.fixture
def config(images, tiny_model) -> GenerationConfig:
    return GenerationConfig(
        data=DataConfig(source=images, image_size=16),
        autoencoder=str(tiny_model),
        denoiser=DenoiserSize(backbone=PART, head=PART),
        alignment=AlignmentConfig(encoder=str(tiny_model), block=1, hidden=8),
        train=TrainConfig(steps=2, batch_size=6, precision="fp32", log_every=1),
        optim=OptimConfig(lr=1e-3),
        ema=(0.5, 0.9),
        samples=SamplesConfig(every=2, count=2, steps=2),
        heldout=HeldoutConfig(every=2, count=4),
    )


def test_the_term_is_the_similarity_of_tokens_after_a_block(config, tmp_path):
    losses, expected = {}, torch.zeros(())
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        stage = build(replace(config, alignment=replace(config.alignment, weight=weight)), tmp_path, ONE)
        objective = stage.objectives[0]
        network = objective.module
        assert isinstance(network, Aligned)
        with torch.no_grad():
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        seen: list[Tensor] = []
        network.denoiser.blocks[0].register_forward_hook(lambda block, inputs, output, kept=seen: kept.append(output))
        batch = next(Loader(config.data, 0).stream(0, 6, ONE))
        losses[weight], metrics = objective.loss(batch, 0)
        tokens = load_encoder(config.alignment.encoder)(batch.pixels())
        expected = F.cosine_similarity(network.projector(seen[0]), tokens, dim=-1).mean()
        assert metrics["alignment"].item() == pytest.approx(expected.item(), rel=1e-4)
        losses[weight].backward()
        first = network.projector[0]
        assert isinstance(first, nn.Linear)
        assert first.weight.grad is not None
        assert first.weight.grad.any() == (weight > 0)
    assert (losses[0.5] - losses[0.0]).item() == pytest.approx(-0.5 * expected.item(), rel=1e-3)


def test_a_run_trains_the_projector_and_exports_the_denoiser_only(config, tmp_path):
    run = tmp_path / "run"
    train(config, run, ONE)
    assert "denoiser/alignment" in read_metrics(run)[0]
    found = load(str(run))
    assert not [key for key in found.denoiser.state_dict() if "projector" in key]
    train(replace(config, train=replace(config.train, steps=3)), run, ONE, change=True)  # resumes with its projector
    assert read_metrics(run)[-1]["step"] == 3


def in_two(world: World, config: GenerationConfig, run: Path) -> None:
    train(replace(config, heldout=None, samples=None), run, world)
    # The evaluation of step 2 comes before the first step of this process.
    train(replace(config, train=replace(config.train, steps=3)), run, world, change=True)


def test_two_processes_resume_into_an_evaluation(config, tmp_path, run_ranks):
    run_ranks(in_two, 2, config, tmp_path / "run")
    steps = [each["step"] for each in read_metrics(tmp_path / "run") if "heldout/loss" in each]
    assert steps == [2, 3]
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3


def test_the_weights_of_the_denoiser_start_as_without_alignment(config, tmp_path):
    states = []
    for term in (config.alignment, None):
        torch.manual_seed(0)
        module = build(replace(config, alignment=term), tmp_path, ONE).objectives[0].module
        states.append((module.denoiser if isinstance(module, Aligned) else module).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_an_alignment_that_does_not_fit_is_rejected(config, tmp_path):
    def fails(match: str, **changed) -> None:
        with pytest.raises(UserError, match=match):
            build(replace(config, alignment=replace(config.alignment, **changed)), tmp_path, ONE)

    fails(r"alignment\.block: 3, but the backbone has 2 blocks", block=3)
    fails(
        r"alignment\.encoder_size: .* grid of \(2, 2\) tokens .* but the denoiser has \(4, 4\); set it to 16",
        encoder_size=8,
    )
    fails(r"alignment\.weight: -1\.0 must not be negative", weight=-1)
    with pytest.raises(UserError, match="alignment: not with a base output"):
        build(replace(config, denoiser=replace(config.denoiser, base_depth=1)), tmp_path, ONE)
    with pytest.raises(UserError, match="alignment: needs the training images"):
        replace(config, latents="latents")
