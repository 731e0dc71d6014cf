"""Inference and training on a virtual GPU: tensors stay on the device, and no step makes the host wait."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raekit import randomness
from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.flow.guidance import parse_guidance
from raekit.flow.sampling import Sampling
from raekit.inference.generation import generate, images_to_noise, interpolate, noise_to_images
from raekit.inference.model import load
from raekit.models.autoencoder import load_autoencoder
from raekit.models.baselines import VAESize
from raekit.models.denoiser_config import TransformerConfig
from raekit.models.discriminator import DiscriminatorConfig
from raekit.models.encoders import load_encoder
from raekit.models.vit import ViTConfig
from raekit.stages import generation
from raekit.stages.alignment import AlignmentConfig
from raekit.stages.compression import CompressionConfig
from raekit.stages.decoder_losses import AdversarialConfig, PerceptualConfig
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig
from raekit.stages.representation import RepresentationConfig
from raekit.stages.run import StageConfig, train
from raekit.training.optim import OptimConfig
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig
from tests.virtual_gpu import GPU, virtual_gpu

NETWORKS = ("encoder", "vae", "decoder", "denoiser", "aligned denoiser")


def test_tensors_on_two_devices_cannot_be_combined():
    with virtual_gpu() as waits:
        remote = torch.ones(2, 3).to(GPU)
        assert remote.device == GPU
        assert (remote * 2 + torch.tensor(1.0)).tolist() == [[3.0] * 3] * 2
        assert waits() == 2  # to the device and back
        with pytest.raises(RuntimeError, match=r"add.*two devices: GPU \(2, 3\), CPU \(3,\)"):
            torch.add(remote, torch.ones(3))
        assert remote.sum().item() == 6
        assert remote.cpu().device.type == "cpu"
        assert waits() == 4
        assert remote[remote > 0].shape == (6,)  # the host waits for the number of elements
        assert waits() == 5
        remote[torch.tensor([0]).to(GPU, non_blocking=True)] += 1
        assert waits() == 5


@pytest.mark.parametrize(
    ("sampling", "waits_a_step"),
    [
        (Sampling(steps=4), 0),
        (Sampling(steps=4, guidance=parse_guidance("cfg:2.0@0.2-0.9")), 0),
        (Sampling(steps=4, solver="heun"), 0),
        (Sampling(steps=4, solver="euler-maruyama"), 0),
        (Sampling(steps=4, reuse=2), 0),
        (Sampling(steps=8, reuse=0.8), 0),
    ],
)
def test_samples(tiny_model, sampling, waits_a_step):
    expected = samples(tiny_model, torch.device("cpu"), sampling)
    with virtual_gpu() as waits:
        made = samples(tiny_model, GPU, sampling)
        assert made.device == GPU
        once = waits()
        samples(tiny_model, GPU, replace(sampling, steps=2 * sampling.steps))
        assert waits() - 2 * once == waits_a_step * sampling.steps
        made = made.cpu()
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_samples_of_adaptive_steps(tiny_model):
    sampling = Sampling(solver="dopri5")
    expected = samples(tiny_model, torch.device("cpu"), sampling)
    with virtual_gpu():
        made = samples(tiny_model, GPU, sampling).cpu()
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-3)


def samples(model: Path, device: torch.device, sampling: Sampling) -> torch.Tensor:
    (made,) = generate(load(str(model), device), labels=[0, 2], sampling=sampling)
    return made.images


def test_conversion_between_images_and_noise(tiny_model):
    pictures = torch.rand(2, 3, 16, 16)

    def there_and_back(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        model = load(str(tiny_model), device)
        noise = images_to_noise(model, pictures, labels=[0, 1])
        way = list(interpolate(model, seeds=(0, 1), labels=(0, 1), frames=3))
        return noise_to_images(model, noise, labels=[0, 1]).cpu(), torch.cat([part.images.cpu() for part in way])

    expected = there_and_back(torch.device("cpu"))
    with virtual_gpu():
        made = there_and_back(GPU)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


def test_an_encoder_at_another_size_does_not_wait_for_its_positions():
    encoder, images = load_encoder("builtin:vit-tiny", 32), torch.rand(1, 3, 32, 32)
    expected = encoder(images)
    with virtual_gpu() as waits:
        encoder, remote = encoder.to(GPU), images.to(GPU)
        before = waits()
        made = encoder(remote)
        assert waits() == before
        made = made.cpu()
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


def test_an_interpolation_draws_its_noise_where_generation_does(tiny_model, monkeypatch):
    normal, drawn = randomness.normal, set[tuple[str, str]]()

    def recorded(seed: int, stream: str, positions: Any, shape: Any, device: Any = "cpu") -> torch.Tensor:
        drawn.add((stream, str(device)))
        return normal(seed, stream, positions, shape, device)

    monkeypatch.setattr(randomness, "normal", recorded)
    sampling = Sampling(steps=3, solver="euler-maruyama")
    with virtual_gpu():
        model = load(str(tiny_model), GPU)
        list(generate(model, [0], sampling=sampling))
        expected = set(drawn)
        drawn.clear()
        list(interpolate(model, seeds=(0, 1), labels=(0, 1), frames=2, sampling=sampling))
    assert drawn == expected


@pytest.fixture
def config(images, tiny_model, vgg) -> Callable[[str], StageConfig]:
    optim = OptimConfig(lr=1e-3)
    shared = {
        "data": DataConfig(source=images, image_size=16, flip=True),
        "train": TrainConfig(steps=3, batch_size=6, micro_batch=3, precision="fp32", monitor_every=2, log_every=2),
        "optim": optim,
        "ema": (0.5,),
    }

    def make(name: str) -> StageConfig:
        if name == "encoder":
            vit = ViTConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2)
            return RepresentationConfig(encoder=vit, decoder_width=16, decoder_depth=1, **shared)
        if name == "decoder":
            discriminator = DiscriminatorConfig(backbone=str(tiny_model), blocks=(0,), kernel_size=3)
            return ReconstructionConfig(
                encoder=str(tiny_model),
                decoder=DecoderSize(width=16, depth=1, heads=2, hidden=32, patch_size=4),
                perceptual=PerceptualConfig(weights=vgg),
                adversarial=AdversarialConfig(discriminator=discriminator, start=1, optim=optim),
                **shared,
            )
        if name == "vae":
            return CompressionConfig(vae=VAESize(channels=2, widths=(32, 32)), **shared)
        part = TransformerConfig(width=16, depth=2, heads=2)
        if name == "aligned denoiser":
            size = DenoiserSize(backbone=part, head=part)
            term = AlignmentConfig(encoder=str(tiny_model), block=1, hidden=8)
            return GenerationConfig(autoencoder=str(tiny_model), denoiser=size, alignment=term, **shared)
        size = DenoiserSize(backbone=part, head=part, qk_norm=True, base_depth=1)
        return GenerationConfig(autoencoder=str(tiny_model), denoiser=size, time_law="logit-normal", **shared)

    return make


@pytest.mark.parametrize("name", NETWORKS)
def test_training(config, tmp_path, name):
    def losses(run: Path, device: torch.device) -> list[dict[str, float]]:
        train(config(name), run, World(device=device))
        return [
            {
                key: value
                for key, value in record.items()
                if key == "step" or ("/" in key and not key.endswith("/seconds"))
            }
            for record in read_metrics(run)
        ]

    expected = losses(tmp_path / "cpu", torch.device("cpu"))
    with virtual_gpu():
        made = losses(tmp_path / "gpu", GPU)
    assert made == [pytest.approx(record, rel=1e-4, abs=1e-5) for record in expected]


def test_the_decoder_stays_on_the_host_where_only_the_encoder_is_needed(config, tmp_path, monkeypatch):
    loaded = []

    def load_and_keep(*arguments, **options):
        loaded.append(load_autoencoder(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(generation, "load_autoencoder", load_and_keep)
    with virtual_gpu():
        train(config("denoiser"), tmp_path, World(device=GPU))
        (autoencoder,) = loaded
        places = {name: tensor.device for name, tensor in autoencoder.state_dict().items()}
        assert {place for name, place in places.items() if name.startswith("decoder.")} == {torch.device("cpu")}
        assert {place for name, place in places.items() if not name.startswith("decoder.")} == {GPU}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_host_waits_for_no_step(config, tmp_path, name, monkeypatch):
    monkeypatch.setattr("raekit.training.throughput._measured", lambda device, dtype: 1e12)  # waits, once in a process

    def waits(steps: int) -> int:
        whole = config(name)
        settings = replace(whole.train, steps=steps, monitor_every=None, log_every=100)
        with virtual_gpu() as count:
            train(replace(whole, train=settings), tmp_path / str(steps), World(device=GPU))
            return count()

    assert waits(3) == waits(6)
