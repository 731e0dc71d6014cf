"""Training of a VAE, and its use as a latent space."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.inference.pipeline import Pipeline
from raekit.inference.publish import prepared
from raekit.models.autoencoder import load_autoencoder
from raekit.models.baselines import VAE, Baseline, VAESize
from raekit.stages.compression import CompressionConfig, build
from raekit.stages.decoder_losses import PerceptualConfig
from raekit.stages.inspection import describe_folder
from raekit.stages.run import train
from raekit.stages.watch import HeldoutConfig, PicturesConfig
from raekit.training.optim import OptimConfig
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig, Trainer

ONE = World()
SIZE = VAESize(channels=2, widths=(32, 32))


@pytest.fixture
def config(images) -> CompressionConfig:
    return CompressionConfig(
        data=DataConfig(source=images, image_size=16),
        vae=SIZE,
        train=TrainConfig(steps=40, batch_size=8, precision="fp32", log_every=1),
        optim=OptimConfig(lr=5e-3),
        ema=(0.5,),
        samples=PicturesConfig(every=40, count=2),
        heldout=HeldoutConfig(every=40, count=4),
    )


def test_a_trained_vae_is_a_latent_space_of_unit_scale(config, tmp_path):
    run = tmp_path / "run"
    train(config, run, ONE)
    losses = [record["vae/l1"] for record in read_metrics(run) if "vae/l1" in record]
    assert losses[-1] < 0.8 * losses[0]
    assert (run / "samples").is_dir()
    model = load_autoencoder(str(run))
    assert isinstance(model, Baseline)
    assert model.latent_shape == (2, 8, 8)
    assert model.trained_on == config.data.source  # by which an evaluation finds the held-out images
    batch = next(iter(Loader(config.data, 0).once(64, ONE)))
    latents = model.encode(batch.pixels())
    assert abs(latents.mean()) < 0.3  # measured over the training images
    assert 0.7 < latents.std() < 1.3

    # diffusers reads the same VAE.
    theirs: Any = AutoencoderKL.from_pretrained(run / "artifact" / "vae")
    with torch.no_grad():
        mean = theirs.encode(2 * batch.pixels() - 1).latent_dist.mode()
    whitened = (mean - theirs.config.shift_factor) * theirs.config.scaling_factor
    assert torch.allclose(latents, whitened, rtol=1e-3, atol=1e-3)


def test_a_trained_vae_can_be_described_and_moved(config, tmp_path):
    short = replace(config.train, steps=2, milestones=(1,))
    train(replace(config, train=short, samples=None, heldout=None), tmp_path / "run", ONE)
    text = describe_folder(str(tmp_path / "run"))
    assert f"  autoencoder: no weights of its own, uses vae:{tmp_path / 'run' / 'artifact' / 'vae'}\n" in text
    (tmp_path / "run").rename(tmp_path / "moved")
    for name in ("moved", "moved@1"):  # a milestone is written under another name, and then renamed
        model = load_autoencoder(str(tmp_path / name))
        assert isinstance(model, Baseline)
        folder = tmp_path / "moved" / ("artifact" if name == "moved" else "milestones/step-00000001")
        assert model.config.baseline == f"vae:{folder / 'vae'}"
    pipeline = Pipeline.from_pretrained(tmp_path / "moved")
    with (
        pytest.raises(UserError, match=r"moved/artifact/vae: a published model names its VAE"),
        prepared(pipeline, "owner/name"),
    ):
        pass


def test_the_divergence_is_of_the_posterior():
    torch.manual_seed(0)
    model = VAE(SIZE, 16)
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        decoded, divergence = model(images, torch.zeros(3, *model.latent_shape))
        posterior = model.vae.encode(2 * images - 1).latent_dist
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(posterior.mean, posterior.std), normal)
    assert torch.allclose(divergence, expected.sum((1, 2, 3)), rtol=1e-4)
    assert torch.allclose(model.baseline().decode(posterior.mean), decoded.clamp(0, 1), atol=1e-5)


def test_the_loss_has_the_weighted_divergence(config, tmp_path):
    def spread(weight: float) -> float:
        torch.manual_seed(0)
        stage = build(replace(config, kl_weight=weight), Path(tmp_path), ONE)
        batch = next(stage.batches(0))
        loss, metrics = stage.objectives[0].loss(batch, 0)
        assert torch.allclose(loss, metrics["l1"] + weight * metrics["kl"])
        return loss.item()

    assert spread(1.0) > spread(0.0)


def test_settings_that_do_not_fit_are_rejected(config, tmp_path):
    with pytest.raises(UserError, match=r"data\.image_size: 16 must be a multiple of 32"):
        build(replace(config, vae=VAESize(widths=(32,) * 6)), tmp_path, ONE)
    with pytest.raises(UserError, match=r"vae\.widths: \(48,\) must be multiples of 32"):
        VAESize(widths=(48,))
    with pytest.raises(UserError, match=r"kl_weight: -1\.0 must not be negative"):
        replace(config, kl_weight=-1)


def test_the_divergence_is_a_mean_over_images(config, tmp_path):
    torch.manual_seed(0)
    stage = build(config, Path(tmp_path), ONE)
    batch = next(stage.batches(0))
    whole, *parts = (stage.objectives[0].loss(part, 0)[1]["kl"].item() for part in (batch, *batch.split(4)))
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-4)


def test_lpips_has_its_weight_from_its_start_on(config, tmp_path, vgg):
    torch.manual_seed(0)
    perceptual = PerceptualConfig(weight=0.5, start=2, weights=vgg)
    stage = build(replace(config, perceptual=perceptual, kl_weight=0.0), Path(tmp_path), ONE)
    batch = next(stage.batches(0))
    for step, weight in ((1, 0.0), (2, 0.5)):
        loss, metrics = stage.objectives[0].loss(batch, step)
        assert ("lpips" in metrics) == (step == 2)
        assert loss.item() == pytest.approx((metrics["l1"] + weight * metrics.get("lpips", 0)).item(), rel=1e-5)


def test_the_average_is_exported_and_watched(config, tmp_path):
    config = replace(config, train=replace(config.train, steps=2), heldout=HeldoutConfig(every=2, count=4))
    torch.manual_seed(0)
    stage = build(config, tmp_path, ONE)
    objective = stage.objectives[0]
    Trainer(tmp_path, config.train, stage.objectives, stage.batches, ONE).fit()
    stage.export(tmp_path / "made")
    theirs: Any = AutoencoderKL.from_pretrained(tmp_path / "made" / "vae")
    average, trained = (network.vae.state_dict() for network in (objective.averaged, objective.module))  # type: ignore[union-attr]
    assert all(torch.equal(value, average[name]) for name, value in theirs.state_dict().items())
    assert not all(torch.equal(value, trained[name]) for name, value in average.items())
    used = []
    for network in (objective.averaged, objective.module):
        network.register_forward_pre_hook(lambda module, inputs: used.append(module))
    (losses,) = (each for each in stage.periodics if each.name == "heldout")
    losses.call(2)
    assert used == [objective.module, objective.averaged]
    copied = []
    objective.averaged.baseline = lambda: copied.append(1) or load_autoencoder("pixels@16")  # type: ignore[union-attr]
    (pictures,) = (each for each in stage.periodics if each.name == "samples")
    pictures.call(2)
    assert copied
