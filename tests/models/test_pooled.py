"""The networks of FDr6, compared with the forward pass of `transformers`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raekit.errors import UserError
from raekit.evaluation.metrics import FDR6
from raekit.models.pooled import POOLED, load_pooled

WIDTH, SIZE, PATCH = 16, 32, 8
NAMES = pytest.mark.parametrize("name", POOLED)


def checkpoint(name: str, side: int) -> Any:
    """Return a tiny random model for images of `side` pixels, as its repository on the Hub holds it."""
    import transformers as t

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"patch_size": PATCH, "image_size": side}
    mlp: dict[str, Any] = {"intermediate_size": 24}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    match name:
        case "convnextv2":
            config = t.ConvNextV2Config(hidden_sizes=[4, 8, 8, WIDTH], depths=[1, 1, 1, 1], image_size=side)
            model: Any = t.ConvNextV2ForImageClassification(config)
        case "dinov2_cls":
            model = t.Dinov2Model(t.Dinov2Config(mlp_ratio=2, **sizes))
        case "mae_cls":
            mlp |= {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
            model = t.ViTMAEForPreTraining(t.ViTMAEConfig(**sizes, **mlp))
        case "siglip2_pool":
            model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config={**sizes, **mlp}))
        case _:
            model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config={**sizes, **mlp}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(float("norm" in key and key.endswith("weight")), 0.3)
    return model


def save(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, side: int = SIZE, size: int = SIZE) -> Path:
    """Save a tiny model for `side` pixels, and let the network run it at `size` pixels."""
    checkpoint(name, side).save_pretrained(folder)
    monkeypatch.setitem(POOLED, name, replace(POOLED[name], width=WIDTH, size=size))
    return folder


def vector(name: str, folder: Path, pixels: Tensor) -> Tensor:
    """Return the features by transformers' own classes."""
    import transformers as t

    with torch.no_grad():
        if name == "convnextv2":
            model: Any = t.ConvNextV2ForImageClassification.from_pretrained(folder).convnextv2
            return model.eval()(pixels).last_hidden_state.mean((2, 3))
        if name == "dinov2_cls":
            return t.Dinov2Model.from_pretrained(folder).eval()(pixels).last_hidden_state[:, 0]
        if name == "mae_cls":
            model = t.ViTMAEForPreTraining.from_pretrained(folder, mask_ratio=0.0).vit
            return model.eval()(pixels).last_hidden_state[:, 0]
        if name == "siglip2_pool":
            return t.SiglipModel.from_pretrained(folder).vision_model.eval()(pixels).pooler_output
        config: Any = t.CLIPConfig.from_pretrained(folder)
        config.vision_config.hidden_act = "gelu"
        tower: Any = t.CLIPModel.from_pretrained(folder, config=config).vision_model.eval()
        states = tower(pixels).last_hidden_state[:, 0]
        return tower.post_layernorm(states)


def test_the_networks_are_those_of_fdr6():
    facts = {name: (spec.hub_id, spec.size, spec.width) for name, spec in POOLED.items()}
    assert facts == {
        "convnextv2": ("facebook/convnextv2-base-22k-224", 224, 1024),
        "dinov2_cls": ("facebook/dinov2-large", 256, 1024),
        "mae_cls": ("facebook/vit-mae-large", 224, 1024),
        "siglip2_pool": ("google/siglip2-so400m-patch16-256", 224, 1152),
        "clip_cls": ("openai/clip-vit-large-patch14", 256, 1024),
    }
    assert list(FDR6) == ["inception", *POOLED]


@NAMES
def test_features_are_the_vectors_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = load_pooled(name, save(name, tmp_path, monkeypatch))
    images = torch.rand(3, 3, SIZE, SIZE)
    mean, std = torch.tensor(POOLED[name].colours).view(2, 3, 1, 1)
    found = network(images)
    assert found.shape == (3, WIDTH)
    assert found.std(0).min() > 1e-4
    torch.testing.assert_close(found, vector(name, tmp_path, (images - mean) / std), atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(images), found)


@NAMES
def test_other_images_are_resized_without_aliasing_or_clamping(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    network = load_pooled(name, save(name, tmp_path, monkeypatch))
    images = (torch.rand(2, 3, 40, 40) > 0.5).float()
    resized = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    assert resized.max() > 1
    torch.testing.assert_close(network(images), network(resized))


@pytest.mark.parametrize("name", ["dinov2_cls", "siglip2_pool", "clip_cls"])
def test_images_are_padded_to_patches_and_positions_resampled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A network for 5 x 5 patches gets an image of 20 pixels: 3 x 3 patches, of which the last ones are padded."""
    import transformers as t

    network = load_pooled(name, save(name, tmp_path / "trained", monkeypatch, side=40, size=20))
    assert network.resize == "bicubic, antialiased, not clamped, to 20 x 20, padded to 24 x 24"
    # The same network, saved for images of 24 pixels.
    whole: Any = {"dinov2_cls": t.Dinov2Model, "siglip2_pool": t.SiglipModel, "clip_cls": t.CLIPModel}[name]
    model = checkpoint(name, 24)
    trained = whole.from_pretrained(tmp_path / "trained").state_dict()
    key = next(key for key in trained if "position_embedding" in key and "text_model" not in key)
    table = trained[key].reshape(-1, WIDTH)
    prefix = len(table) - 25
    patches = table[prefix:].T.reshape(1, WIDTH, 5, 5)
    patches = F.interpolate(patches, (3, 3), mode="bicubic", antialias=True).reshape(WIDTH, 9).T
    trained[key] = torch.cat([table[:prefix], patches]).view_as(model.state_dict()[key])
    model.load_state_dict(trained)
    model.save_pretrained(tmp_path / "resampled")

    images = torch.rand(2, 3, 20, 20)
    mean, std = torch.tensor(POOLED[name].colours).view(2, 3, 1, 1)
    pixels = torch.zeros(2, 3, 24, 24)
    pixels[:, :, :20, :20] = (images - mean) / std
    expected = vector(name, tmp_path / "resampled", pixels)
    torch.testing.assert_close(network(images), expected, atol=1e-5, rtol=1e-4)


@NAMES
def test_a_network_that_cannot_be_had_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = POOLED[name].hub_id
    with pytest.raises(UserError, match=rf"^fdr6 {name}: {repository}: .*run `hf download {repository}`"):
        load_pooled(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"^fdr6 {name}: {tmp_path}/empty could not be loaded \(OSError: no config"):
        load_pooled(name, tmp_path / "empty")
    folder = save(name, tmp_path / "tiny", monkeypatch)
    monkeypatch.setitem(POOLED, name, replace(POOLED[name], width=1024))
    with pytest.raises(UserError, match=rf"^fdr6 {name}: {folder} has 16 features instead of 1024; give {repository}"):
        load_pooled(name, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "bert"}))
    with pytest.raises(UserError, match=rf"^fdr6 {name}: {folder} holds a model of type 'bert', not"):
        load_pooled(name, folder)


def test_a_config_of_endless_depth_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save("convnextv2", tmp_path, monkeypatch)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"depths": [1, 1, 10**9, 1]}))
    with pytest.raises(UserError, match=r"^fdr6 convnextv2: .* depths: \[1, 1, 1000000000, 1\] in config.json"):
        load_pooled("convnextv2", folder)


def test_images_have_the_published_colours():
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    expected = {"siglip2_pool": ((0.5,) * 3, (0.5,) * 3), "clip_cls": clip}
    assert {name: spec.colours for name, spec in POOLED.items()} == {
        name: expected.get(name, imagenet) for name in POOLED
    }
