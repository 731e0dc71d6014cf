import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from scipy.optimize import minimize

from raekit.errors import UserError
from raekit.evaluation.probe import _Regression, linear_probe, probe, untrained
from raekit.evaluation.streaming import images_of
from raekit.models.autoencoder import Autoencoder
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.registry import HALF, EncoderSpec


def blobs(count: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` points around three corners, with very different scales in each dimension."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    points = np.eye(3)[labels] * 4 + spread * generator.normal(size=(count, 3))
    return (points * [1, 100, 0.01] + 7).astype(np.float32), labels


def test_only_linearly_separable_classes_are_found():
    result = linear_probe(*blobs(300, 0), *blobs(200, 1))
    assert result.accuracy > 0.97
    assert result.low < result.accuracy < result.high
    assert result.images == 200
    features, labels = blobs(300, 0)
    guessed = linear_probe(features, np.random.default_rng(0).permutation(labels), *blobs(200, 1), penalty=1.0)
    assert guessed.accuracy < 0.6
    heldout = blobs(200, 1)
    assert linear_probe(features, labels, heldout[0], (heldout[1] + 1) % 3, penalty=1.0).accuracy < 0.1


def test_the_penalty_is_the_penalty_of_the_mean_loss():
    """Compares with a direct minimisation of the loss in the docstring of `Probe`, for two classes."""
    generator = np.random.default_rng(0)
    labels = np.arange(80) % 2
    features = generator.normal(size=(80, 2)) + labels[:, None]
    result = linear_probe(features, labels, features, labels, penalty=0.5)
    x = (features - features.mean(0)) / features.std(0)

    def loss(w: np.ndarray) -> float:
        z = x @ w[:2] + w[2]
        return np.logaddexp(0, np.where(labels == 1, -z, z)).mean() + 0.5 / 2 * (w[:2] ** 2).sum()

    w = minimize(loss, np.zeros(3)).x
    regression = _Regression(torch.from_numpy(features), torch.arange(2))
    assert regression.fit(torch.from_numpy(features), torch.from_numpy(labels), torch.arange(80), 0.5)
    assert regression.weights.flatten().tolist() == pytest.approx(w, abs=1e-3)
    assert result.accuracy == result.training == ((x @ w[:2] + w[2] > 0) == (labels == 1)).mean()
    assert result.penalty == 0.5


def test_the_penalty_is_chosen_by_images_that_were_not_fitted(monkeypatch):
    """One feature of 400 depends on the class. With a small penalty the probe fits only the training images."""
    generator = np.random.default_rng(0)

    def noisy(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.integers(0, 2, count)
        noise = generator.normal(size=(count, 400))
        noise[:, 0] += 2 * labels
        return noise, labels

    train, heldout = noisy(1000), noisy(1000)
    chosen, loose = linear_probe(*train, *heldout), linear_probe(*train, *heldout, penalty=1e-6)
    assert loose.training == 1.0
    assert chosen.penalty >= 1e-3
    assert chosen.accuracy > loose.accuracy
    monkeypatch.setattr("raekit.evaluation.probe.PENALTIES", (1e6, 1e-3, 1e5))  # the large penalties leave no weights
    assert linear_probe(*train, *heldout).penalty == 1e-3


@pytest.mark.parametrize("penalty", [None, 1.0])
def test_held_out_images_change_nothing_about_the_fit(penalty, monkeypatch):
    monkeypatch.setattr("raekit.evaluation.probe.PENALTIES", (1.0,))
    train = blobs(300, 0, spread=3.0)
    of_other_scales = np.array([[0, 0, 0], [1, 1e5, 1]], np.float32)
    results = [linear_probe(*train, *heldout, penalty=penalty) for heldout in (train, (of_other_scales, np.arange(2)))]
    assert results[0].training == results[1].training


def test_blocks_change_nothing(monkeypatch):
    whole = linear_probe(*blobs(300, 0, spread=3.0), *blobs(200, 1, spread=3.0), penalty=0.01)
    monkeypatch.setattr("raekit.evaluation.probe._BLOCK", 7)
    assert linear_probe(*blobs(300, 0, spread=3.0), *blobs(200, 1, spread=3.0), penalty=0.01) == whole


def test_the_loss_of_many_classes_is_minimised():
    """Compares with a direct minimisation of the loss in the docstring of `Probe`, for three classes."""
    features, labels = blobs(90, 0, spread=3.0)
    result = linear_probe(features, labels, features, labels, penalty=0.1)
    x = (features - features.mean(0, dtype=np.float64)) / features.std(0, dtype=np.float64)

    def loss(flat: np.ndarray) -> float:
        w = flat.reshape(4, 3)
        z = x @ w[:3] + w[3]
        return (np.logaddexp.reduce(z, 1) - z[np.arange(90), labels]).mean() + 0.1 / 2 * (w[:3] ** 2).sum()

    w = minimize(loss, np.zeros(12)).x.reshape(4, 3)
    assert result.accuracy == ((x @ w[:3] + w[3]).argmax(1) == labels).mean()


@pytest.mark.parametrize("constant", [1.0, 0.1])
def test_a_constant_feature_does_no_harm(constant):
    features, labels = blobs(100, 0)
    features = np.concatenate([features, np.full((100, 1), constant, np.float32)], 1)
    assert linear_probe(features, labels, features, labels).accuracy > 0.9


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.nan, math.inf])
def test_an_invalid_penalty_is_rejected(penalty):
    with pytest.raises(UserError, match="penalty: "):
        linear_probe(*blobs(30, 0), *blobs(30, 1), penalty=penalty)


def test_a_single_class_is_rejected():
    features, labels = blobs(30, 0)
    with pytest.raises(UserError, match="at least two classes"):
        linear_probe(features, labels * 0, features, labels)


def test_untrained_weights_have_the_same_shapes_and_do_not_change_the_encoder(tiny_model):
    encoder = load_encoder(str(tiny_model))
    for parameter in encoder.model.parameters():
        parameter.add_(1)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    twin = untrained(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)  # which changes the state
    again = untrained(encoder)
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in before.items())
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(not torch.equal(*pair) for pair in zip(twin.parameters(), encoder.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(twin.parameters(), again.parameters(), strict=True))


def test_untrained_weights_of_a_transformers_encoder_come_from_its_configuration():
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    spec = EncoderSpec(
        family="dinov2_with_registers",
        width=12,
        patch_size=14,
        image_size=28,
        prefix_tokens=5,
        mean=HALF[0],
        std=HALF[1],
    )
    model = transformers.Dinov2WithRegistersModel(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 3.0)
    twin = untrained(Encoder("dino", spec, model))
    tokens = twin(torch.rand(2, 3, 28, 28))
    assert tokens.shape == (2, 4, 12)
    torch.testing.assert_close(tokens.std(-1, correction=0), torch.ones(2, 4), rtol=0.05, atol=0)
    assert all(not (value == 3).all() for value in twin.model.parameters())


@pytest.mark.parametrize("tokens", ["mean", "all"])
def test_colours_are_read_from_latents(tiny_model, images, tokens):
    results = probe(str(tiny_model), images, tokens=tokens, penalty=0.01)
    assert list(results) == [str(tiny_model), "random weights"]
    for result in results.values():
        assert result.images == 9
        assert result.accuracy == 1.0


def test_an_encoder_without_a_decoder_is_probed_too(tiny_model, images, tmp_path):
    (tmp_path / "encoder").symlink_to(tiny_model / "encoder")
    alone = probe(str(tmp_path), images, penalty=0.01)
    assert alone["random weights"] == probe(str(tiny_model), images, penalty=0.01)["random weights"]


def test_a_baseline_is_probed_without_random_weights(images):
    results = probe("pixels@16", images, penalty=0.01)
    assert {name: result.accuracy for name, result in results.items()} == {"pixels@16": 1.0}


def test_an_autoencoders_latents_are_whitened(tiny_model, images, tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        Autoencoder, "encode", lambda model, x: encoded.append(len(x)) or torch.zeros(len(x), *model.latent_shape)
    )
    result = probe(str(tiny_model), images, penalty=0.01)
    assert sum(encoded) == 39
    assert result[str(tiny_model)].accuracy == pytest.approx(1 / 3)


def test_images_without_a_label_do_not_count(tiny_model, images, monkeypatch):
    def without_blue(batches, world):
        for batch in images_of(batches, world):
            yield replace(batch, labels=batch.labels - 1)  # -1 for the first class

    monkeypatch.setattr("raekit.evaluation.probe.images_of", without_blue)
    result = probe(str(tiny_model), images, penalty=0.01)[str(tiny_model)]
    assert (result.images, result.accuracy) == (6, 1.0)


def test_a_source_without_labels_is_rejected(tiny_model, images):
    with pytest.raises(UserError, match=r"flat:.* has no labels"):
        probe(str(tiny_model), f"flat:{Path(images.removeprefix('folder:'))}")
