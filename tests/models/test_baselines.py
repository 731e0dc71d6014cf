"""The baselines, compared with diffusers' own VAE."""

import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from raekit.errors import UserError
from raekit.models.autoencoder import load_autoencoder
from raekit.models.baselines import VAE, Baseline, BaselineConfig, VAESize

WEIGHTS = "diffusion_pytorch_model.safetensors"


def diffusers_vae(folder: Path) -> Any:
    return AutoencoderKL.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pixels", BaselineConfig(baseline="pixels")),
        ("pixels@64", BaselineConfig(baseline="pixels", image_size=64)),
        ("vae:someone/something", BaselineConfig(baseline="vae:someone/something")),
        ("vae:a@b@512", BaselineConfig(baseline="vae:a@b", image_size=512)),
        ("pixels2", None),
        ("builtin:emoji", None),
    ],
)
def test_names(name: str, expected: BaselineConfig | None):
    assert BaselineConfig.named(name) == expected


def test_pixels():
    model = load_autoencoder("pixels@8")
    images = torch.rand(2, 3, 8, 8)
    latents = model.encode(images)
    assert (model.latent_shape, model.image_size) == ((3, 8, 8), 8)
    assert torch.allclose(latents, 2 * images - 1, atol=1e-5)
    assert torch.allclose(model.decode(latents), images, atol=1e-6)


def test_a_vae_is_that_of_diffusers(vae: Path):
    model, theirs = load_autoencoder(f"vae:{vae}@16"), diffusers_vae(vae)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs.encode(2 * images - 1).latent_dist.mode() * theirs.config.scaling_factor
        decoded = (theirs.decode(expected / theirs.config.scaling_factor).sample + 1) / 2
    latents = model.encode(images)
    assert (model.latent_shape, model.image_size) == ((4, 8, 8), 16)
    assert torch.allclose(latents, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(model.decode(latents), decoded.clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("shift", [0.25, 0.0])
def test_a_vae_that_shifts(vae: Path, tmp_path: Path, shift: float):
    theirs = diffusers_vae(vae)
    theirs.register_to_config(shift_factor=shift, scaling_factor=0.5)
    theirs.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    model = load_autoencoder(f"vae:{tmp_path}@16")
    with torch.no_grad():
        expected = (theirs.encode(2 * images - 1).latent_dist.mode() - shift) * 0.5
    assert torch.allclose(model.encode(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(model.unwhiten(model.whiten(expected)), expected, atol=1e-5)


def test_a_vae_with_statistics_of_its_channels_is_refused(vae: Path, tmp_path: Path):
    theirs = diffusers_vae(vae)
    theirs.register_to_config(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its config\.json sets latents_mean or latents_std"):
        load_autoencoder(f"vae:{tmp_path}@16")


def test_a_vae_computes_in_bfloat16(vae: Path):
    model, exact = load_autoencoder(f"vae:{vae}@16", torch.bfloat16), load_autoencoder(f"vae:{vae}@16")
    latents = torch.randn(1, *model.latent_shape)
    images = model.decode(latents)
    assert images.dtype == torch.float32
    assert 0 < (images - exact.decode(latents)).norm() / images.norm() < 0.02


def test_only_the_encoder_computes_in_bfloat16(vae: Path):
    model, exact = (load_autoencoder(f"vae:{vae}@16", encoder_dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    images = torch.rand(1, 3, 16, 16)
    latents = model.encode(images)
    assert latents.dtype == torch.float32
    assert 0 < (latents - exact.encode(images)).norm() / latents.norm() < 0.02
    assert torch.equal(model.decode(latents), exact.decode(latents))


def test_a_vae_in_training_decodes_a_sample_of_its_posterior():
    torch.manual_seed(0)
    model, images = VAE(VAESize(channels=2, widths=(32, 32)), 16), torch.rand(2, 3, 16, 16)
    noise = torch.randn(2, *model.latent_shape)
    with torch.no_grad():
        decoded, divergence = model(images, noise)
        mean, log_variance = model.vae.encode(2 * images - 1).latent_dist.parameters.chunk(2, 1)
        expected = (model.vae.decode(mean + (log_variance / 2).exp() * noise).sample + 1) / 2
    torch.testing.assert_close(decoded, expected)
    nats = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2
    torch.testing.assert_close(divergence, nats)


def test_a_folder_names_the_weights(vae: Path, tmp_path: Path):
    model = load_autoencoder(f"vae:{vae}@16")
    model.save(tmp_path)
    again = load_autoencoder(str(tmp_path))
    assert isinstance(again, Baseline)
    assert again.config == replace(model.config, weights=model.weights)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.encode(images), model.encode(images))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    load_autoencoder(str(tmp_path), torch.bfloat16)


def test_a_vae_of_other_weights_under_the_same_path_is_rejected(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(vae, tmp_path / "models" / "vae")
    monkeypatch.chdir(tmp_path)
    load_autoencoder("vae:models/vae@16").save(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "models")
    assert load_autoencoder(str(tmp_path / "model")).config.baseline == f"vae:{tmp_path}/models/vae"
    state = load_file(tmp_path / "models" / "vae" / WEIGHTS)
    save_file({key: value + 1 for key, value in state.items()}, tmp_path / "models" / "vae" / WEIGHTS)
    with pytest.raises(UserError, match="its weights are not the weights that the model was made with"):
        load_autoencoder(str(tmp_path / "model"))


def test_errors(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, message in (
        ("vae:", "no weights are named"),
        ("vae:nowhere", "neither a folder nor OWNER/NAME on the Hub"),
        (f"vae:{tmp_path}/moved", "moved: no such folder; if the VAE of a model was moved, write its new folder as"),
        ("vae:no-such/vae", "hf download no-such/vae"),
        (f"vae:{vae}@15", "the image size 15 must be a multiple of 2"),
        ("pixels@0", "image_size"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_autoencoder(name)
    shutil.copytree(vae, tmp_path / "partial")
    state = load_file(vae / WEIGHTS)
    lost = state.popitem()[0]
    save_file(state, tmp_path / "partial" / WEIGHTS)
    with pytest.raises(UserError, match=f"missing {re.escape(lost)}; download it again"):
        load_autoencoder(f"vae:{tmp_path / 'partial'}@16")
    (tmp_path / "partial" / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="could not be loaded"):
        load_autoencoder(f"vae:{tmp_path / 'partial'}@16")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=re.escape("pip install 'raekit[vae]'")):
        load_autoencoder(f"vae:{vae}@16")


def test_no_pickle_is_read(vae: Path, tmp_path: Path):
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (ran,)  # type: ignore[return-value]

    shutil.copy(vae / "config.json", tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match="could not be loaded"):
        load_autoencoder(f"vae:{tmp_path}@16")
    assert not ran.exists()
    pickle.loads((tmp_path / "diffusion_pytorch_model.bin").read_bytes())
    assert ran.exists()


@pytest.mark.parametrize("name", ["pixels@65536", "pixels@" + "9" * 5000, "pixels@4097", "pixels@0"])
def test_baselines_of_impossible_sizes_are_rejected(name: str):
    with pytest.raises(UserError, match=r"autoencoder\.image_size: \d+ must be from 1 to 4,096"):
        load_autoencoder(name)


@pytest.mark.parametrize("name", ["foo", "", "pixel", "vea:x"])
def test_an_unknown_baseline_is_rejected(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(f'{{"kind": "autoencoder", "baseline": "{name}"}}')
    with pytest.raises(UserError, match=f"autoencoder.baseline: '{name}' is unknown; use pixels or vae:WHERE"):
        load_autoencoder(str(tmp_path))
