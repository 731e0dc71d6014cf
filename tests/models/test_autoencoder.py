import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raekit.config import from_dict, to_dict
from raekit.errors import UserError
from raekit.inference.model import reconstruct
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.registry import LayersConfig
from raekit.models.vit import ViT, ViTConfig

VIT = ViTConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2, mean=(0.4, 0.5, 0.6), std=(0.5, 0.25, 0.2))


@pytest.fixture
def model() -> Autoencoder:
    decoder = DecoderConfig(token_dim=16, grid=(4, 4), patch_size=8, width=16, depth=1, heads=2, hidden=24)
    return Autoencoder(AutoencoderConfig(encoder="own", decoder=decoder), Encoder("own", VIT.spec, ViT(VIT))).eval()


def test_shapes(model: Autoencoder):
    assert model.latent_shape == (16, 4, 4)
    assert model.image_size == 32
    latents = model.encode(torch.rand(2, 3, 20, 20))
    assert latents.shape == (2, 16, 4, 4)
    assert model.decode(latents).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "got uint8; divide by 255"),
        (torch.full((1, 3, 16, 16), 255.0), "got values from 255 to 255"),
        (torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16), "got values from -1 to 1"),
        (torch.full((1, 3, 16, 16), float("nan")), "got values from nan to nan"),
        (torch.zeros(3, 16, 16), r"got the shape \(3, 16, 16\)"),
        (torch.zeros(1, 1, 16, 16), r"got the shape \(1, 1, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), r"got the shape \(0, 3, 16, 16\)"),
        (np.zeros((1, 3, 16, 16)), "got ndarray"),
    ],
)
def test_only_images_are_encoded(model: Autoencoder, images: Any, message: str):
    with pytest.raises(UserError, match=rf"images: expected a float tensor \(B, 3, H, W\) in \[0, 1\], {message}"):
        model.encode(images)
    with pytest.raises(UserError, match=message):
        model.encoder(images)


@pytest.mark.parametrize("latents", [torch.zeros(1, 16, 2, 8), torch.zeros(16, 4, 4), torch.zeros(1, 16, 4, 4).long()])
def test_only_its_latents_are_decoded(model: Autoencoder, latents: torch.Tensor):
    with pytest.raises(UserError, match=r"latents: expected a float tensor \(B, 16, 4, 4\), got"):
        model.decode(latents)


def test_a_loaded_autoencoder_is_frozen_and_can_be_pickled(tiny_model: Path, tmp_path: Path):
    decoder = DecoderConfig(token_dim=16, grid=(4, 4), patch_size=8, width=16, depth=1, heads=2, hidden=24)
    config = AutoencoderConfig(encoder=str(tiny_model), decoder=decoder)
    Autoencoder(config, load_encoder(config.encoder)).eval().save(tmp_path)
    model = Autoencoder.load(str(tmp_path))
    latents = torch.randn(2, 16, 4, 4)
    images = model.decode(latents)
    assert images.numpy().shape == (2, 3, 32, 32)
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy.decode(latents), images)
    assert torch.equal(copy.encode(images), model.encode(images))
    model.decode(latents.requires_grad_()).mean().backward()  # gradients reach the latents all the same
    assert latents.grad is not None


def test_rectangles(tiny_model: Path, tmp_path: Path):
    decoder = DecoderConfig(token_dim=16, grid=(3, 5), patch_size=8, width=16, depth=1, heads=2, hidden=24)
    config = AutoencoderConfig(encoder=str(tiny_model), encoder_size=(12, 20), decoder=decoder)
    assert from_dict(AutoencoderConfig, to_dict(config), "test") == config
    model = Autoencoder(config, load_encoder(config.encoder, config.encoder_size)).eval()
    assert model.latent_shape == (16, 3, 5)
    assert model.image_shape == (24, 40)
    with pytest.raises(UserError, match="images of 24 x 40 pixels, and square ones are needed"):
        _ = model.image_size
    images = torch.rand(2, 3, 24, 40)
    expected = reconstruct(model, images)
    assert expected.shape == images.shape
    model.save(tmp_path)
    assert torch.equal(reconstruct(Autoencoder.load(str(tmp_path)), images), expected)


def test_layers_are_remembered(tiny_model: Path, tmp_path: Path):
    config = Autoencoder.load(str(tiny_model)).config
    layers = LayersConfig(blocks=(0,), combine="sum", token_mean=True)
    config = replace(config, layers=layers)
    model = Autoencoder(config, load_encoder(str(tiny_model), layers=layers)).eval()
    model.save(tmp_path)
    loaded = Autoencoder.load(str(tmp_path))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert not torch.allclose(loaded.encode(images), Autoencoder.load(str(tiny_model)).encode(images))
    assert loaded.config.layers == layers


def test_an_autoencoder_in_bf16_is_close_and_its_latents_and_images_stay_float32(tiny_model: Path):
    exact, model = Autoencoder.load(str(tiny_model)), Autoencoder.load(str(tiny_model), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in (model.var, model.encoder.mean, model.encoder.std)} == {torch.float32}
    images = torch.rand(2, 3, *exact.image_shape)
    latents = exact.encode(images)
    for ours, theirs in ((model.encode(images), latents), (model.decode(latents), exact.decode(latents))):
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02


def test_an_encoder_of_lower_precision_is_saved_as_it_was(tiny_model: Path, tmp_path: Path):
    model = Autoencoder.load(str(tiny_model), encoder_dtype=torch.bfloat16)
    assert model.encoder.dtype == torch.bfloat16
    assert {p.dtype for p in model.decoder.parameters()} == {torch.float32}
    model.save(tmp_path)
    pairs = zip(load_encoder(str(tmp_path)).parameters(), load_encoder(str(tiny_model)).parameters(), strict=True)
    assert all(torch.equal(new, old) for new, old in pairs)


def test_latents_are_the_tokens_in_rows(model: Autoencoder):
    images = torch.rand(2, 3, 16, 16)
    latents = model.tokens(images)
    assert torch.equal(latents[:, :, 2, 1], model.encoder(images)[:, 2 * 4 + 1])


@pytest.mark.parametrize("with_mean", [True, False])
def test_whitening_round_trip(model: Autoencoder, with_mean: bool):
    mean = torch.randn(16, 4, 4) if with_mean else None
    var = torch.rand(16, 4, 4) + 0.01
    model.set_statistics(mean, var)
    latents = torch.randn(2, 16, 4, 4)
    expected = (latents - (0 if mean is None else mean)) / (var + 1e-5).sqrt()
    assert torch.allclose(model.whiten(latents), expected, atol=1e-5)
    assert torch.allclose(model.unwhiten(model.whiten(latents)), latents, atol=1e-5)


def test_measured_statistics_whiten_each_element(model: Autoencoder):
    latents = model.tokens(torch.rand(64, 3, 16, 16))
    model.set_statistics(latents.mean(0), latents.var(0, correction=0))
    white = model.whiten(latents)
    assert torch.allclose(white.mean(0), torch.zeros(()), atol=1e-4)
    assert torch.allclose(white.var(0, correction=0), torch.ones(()), atol=0.1)


@pytest.mark.parametrize(
    "change", [lambda v: v[0], lambda v: v * math.nan, lambda v: -v - 1, lambda v: None, lambda v: v.numpy()]
)
def test_wrong_statistics_are_rejected(model: Autoencoder, change: Any):
    good = torch.ones(model.latent_shape)
    before = model.var.clone()
    with pytest.raises(UserError, match="statistics: "):
        model.set_statistics(None, change(good))
    assert torch.equal(model.var, before)


def test_without_statistics_nothing_is_moved(model: Autoencoder):
    images = torch.rand(2, 3, 16, 16)
    assert torch.allclose(model.encode(images), model.tokens(images), rtol=1e-4)


def test_statistics_follow_the_model_and_stay_its_own(model: Autoencoder):
    mean, var = torch.zeros(16, 4, 4), torch.ones(16, 4, 4)
    model.set_statistics(mean.double(), var.double())
    assert model.mean is not None
    assert model.mean.dtype == model.var.dtype == torch.float32
    assert {"mean", "var"} <= dict(model.named_buffers()).keys()
    model.set_statistics(None, var)
    assert "mean" not in dict(model.named_buffers())
    model.set_statistics(mean, var)
    assert "mean" in dict(model.named_buffers())


def test_encode_adds_no_noise_and_keeps_no_gradient(model: Autoencoder):
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    latents = model.train().encode(images)
    assert torch.equal(latents, model.eval().encode(images))
    assert not latents.requires_grad


def test_decode_clamps(model: Autoencoder):
    assert isinstance(model.decoder.out, nn.Linear)
    with torch.no_grad():
        model.decoder.out.weight *= 100
    latents = torch.randn(2, 16, 4, 4)
    images = model.decode(latents)
    assert images.min() == 0
    assert images.max() == 1
    raw = model.to_pixels(model.decoder(model.unwhiten(latents)))
    assert raw.min() < 0
    assert raw.max() > 1
    assert torch.equal(images, raw.clamp(0, 1))


def test_pixels_leave_the_encoders_colours(model: Autoencoder):
    pixels = model.to_pixels(torch.ones(1, 3, 2, 2))
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([0.9, 0.75, 0.8]))


def test_only_the_decoder_is_trained(model: Autoencoder):
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}
    model.to_pixels(model.decoder(model.unwhiten(model.tokens(torch.rand(1, 3, 16, 16))))).sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
