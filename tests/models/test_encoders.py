from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raekit.config import to_dict, to_json
from raekit.errors import UserError
from raekit.models import encoders
from raekit.models.encoders import FAMILIES, REGISTRY, Encoder, EncoderSpec, ViT, ViTConfig, load_encoder
from raekit.models.layers import patchify

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
NAMES = pytest.mark.parametrize("name", sorted(REGISTRY))
NATIVE = 3  # side of the tiny models' position tables, in patches


def tiny_model(family: str, patch_size: int) -> nn.Module:
    """A random `transformers` model of a family, as its checkpoints on the Hub hold it, affine parts included."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": patch_size,
        "image_size": NATIVE * patch_size,
    }
    mlp: dict[str, Any] = {"intermediate_size": 24}
    torch.manual_seed(0)
    match family:
        case "dinov2_with_registers":
            config = transformers.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **sizes)
            model = transformers.Dinov2WithRegistersModel(config)
        case "siglip":
            vision = {**sizes, **mlp}
            text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
            text |= {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
            model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        case "vit_mae":
            mlp |= {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
            config = transformers.ViTMAEConfig(**sizes, **mlp)
            model = transformers.ViTMAEForPreTraining(config)
        case _:
            raise AssertionError(f"no tiny model of family {family}: add it here")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(float("norm" in key and key.endswith("weight")), 0.3)
    return model


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncoderSpec]:
    """Every registered encoder, with a tiny random checkpoint in place of the one on the Hub."""
    specs, saved = {}, {}
    for name, spec in REGISTRY.items():
        if (spec.family, spec.patch_size) not in saved:
            folder = tmp_path_factory.mktemp(spec.family)
            tiny_model(spec.family, spec.patch_size).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
            saved[spec.family, spec.patch_size] = folder
        folder = str(saved[spec.family, spec.patch_size])
        specs[name] = replace(spec, width=16, image_size=NATIVE * spec.patch_size, hub_id=folder)
    return specs


@pytest.fixture
def registry(hub: dict[str, EncoderSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, spec in hub.items():
        monkeypatch.setitem(REGISTRY, name, spec)


@pytest.mark.parametrize(
    ("name", "width", "patch", "size", "prefix", "colours"),
    [
        ("dinov2-s", 384, 14, 224, 5, IMAGENET),
        ("dinov2-b", 768, 14, 224, 5, IMAGENET),
        ("dinov2-l", 1024, 14, 224, 5, IMAGENET),
        ("siglip2-b", 768, 16, 256, 0, HALF),
        ("mae-b", 768, 16, 256, 1, IMAGENET),
    ],
)
def test_published_encoders(name: str, width: int, patch: int, size: int, prefix: int, colours):
    spec = REGISTRY[name]
    assert (spec.width, spec.patch_size, spec.image_size, spec.prefix_tokens) == (width, patch, size, prefix)
    assert (list(spec.mean), list(spec.std)) == colours
    assert spec.image_size // spec.patch_size == 16


@NAMES
def test_contract(name: str, registry: None):
    encoder = load_encoder(name)
    side = encoder.spec.image_size
    images = torch.rand(2, 3, side, side, requires_grad=True)
    tokens = encoder(images)
    assert encoder.name == name
    assert encoder.grid == (NATIVE, NATIVE)
    assert tokens.shape == (2, NATIVE**2, 16)
    assert tokens.dtype == torch.float32
    assert torch.allclose(tokens.mean(-1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(tokens.var(-1, correction=0), torch.ones(()), atol=1e-3)
    assert tokens.std(dim=1).mean() > 0.01  # which constant tokens would be as well
    assert not tokens.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder.train()(images), tokens)
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder.eval()(images), tokens)


@NAMES
def test_outputs_of_blocks(name: str, registry: None):
    encoder = load_encoder(name)
    assert (encoder.depth, encoder.width) == (2, 16)
    side = encoder.spec.image_size
    images = torch.rand(2, 3, side, side, requires_grad=True)
    last, first = encoder.block_outputs(images, (1, 0))
    assert last.shape == first.shape == (2, NATIVE**2, 16)
    assert not torch.allclose(first, last, atol=1e-2)
    # The tokens are the last block's output, standardised; and the first block sees the images as well.
    centred = last - last.mean(-1, keepdim=True)
    assert torch.allclose(centred / centred.square().mean(-1, keepdim=True).sqrt(), encoder(images), atol=1e-3)
    assert torch.autograd.grad(first.sum(), images, retain_graph=True)[0].abs().max() > 0
    assert torch.autograd.grad(last.sum(), images)[0].abs().max() > 0


@NAMES
def test_tokens_are_those_of_transformers_without_the_affine_part(
    name: str, hub: dict[str, EncoderSpec], registry: None
):
    spec = hub[name]
    images = torch.rand(2, 3, spec.image_size, spec.image_size)
    mean, std = (
        np.array(v, dtype=np.float32)[:, None, None] for v in (HALF if name.startswith("siglip") else IMAGENET)
    )
    pixels = torch.from_numpy((images.numpy() - mean) / std)
    expected = without_affine(spec, pixels)
    assert torch.allclose(load_encoder(name)(images).double(), expected, atol=1e-5)


def without_affine(spec: EncoderSpec, pixels: torch.Tensor) -> torch.Tensor:
    """Patch tokens before the final norm of the model as transformers loads it, standardised in float64."""
    import transformers

    vision = {"siglip": "SiglipModel", "vit_mae": "ViTMAEForPreTraining"}.get(spec.family, "Dinov2WithRegistersModel")
    model = getattr(transformers, vision).from_pretrained(spec.hub_id).eval()
    model = {"siglip": lambda m: m.vision_model, "vit_mae": lambda m: m.vit}.get(spec.family, lambda m: m)(model)
    options: dict[str, Any] = {} if spec.family == "dinov2_with_registers" else {"interpolate_pos_encoding": True}
    if spec.family == "vit_mae":
        model.config.mask_ratio = 0.0
        options["noise"] = torch.linspace(0, 1, (pixels.shape[-1] // spec.patch_size) ** 2).repeat(len(pixels), 1)
    inputs = []
    norm = model.post_layernorm if spec.family == "siglip" else model.layernorm
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(pixels, **options)
    tokens = inputs[0][:, {"siglip": 0, "vit_mae": 1}.get(spec.family, 5) :].double()
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()


@NAMES
def test_another_input_size_interpolates_the_positions(name: str, hub: dict[str, EncoderSpec], registry: None):
    spec = hub[name]
    size = 5 * spec.patch_size
    encoder = load_encoder(name, input_size=size)
    images = torch.rand(1, 3, size, size)
    tokens = encoder(images)
    assert encoder.grid == (5, 5)
    assert tokens.shape == (1, 25, 16)
    pixels = (images - encoder.mean) / encoder.std
    assert torch.allclose(tokens.double(), without_affine(spec, pixels), atol=1e-5)


@NAMES
def test_images_of_another_size_are_resized(name: str, registry: None):
    encoder = load_encoder(name)
    images = torch.rand(1, 3, 40, 40)
    resized = nn.functional.interpolate(images, encoder.input_size, mode="bicubic", align_corners=False)
    assert torch.equal(encoder(images), encoder(resized))


@NAMES
def test_input_size_must_be_whole_patches(name: str, registry: None):
    with pytest.raises(UserError, match=f"encoder_size: 25 is no multiple of {name}'s patch size"):
        load_encoder(name, input_size=25)


def spoil(folder: Path, fault: str) -> None:
    weights = folder / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return
    if fault == "absent":
        weights.unlink()
        return
    state = load_file(weights)
    key = "encoder.layer.0.norm1.weight"
    state = {k: v for k, v in state.items() if k != key} | ({key: torch.ones(3)} if fault == "misshapen" else {})
    save_file(state, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("fault", ["truncated", "absent", "misshapen", "incomplete"])
def test_bad_checkpoint_is_refused(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_model("dinov2_with_registers", 14).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    spoil(tmp_path, fault)
    monkeypatch.setitem(REGISTRY, "bad", replace(REGISTRY["dinov2-s"], hub_id=str(tmp_path)))
    message = "lacks encoder.layer.0.norm1.weight" if fault == "incomplete" else "could not be loaded"
    with pytest.raises(UserError, match=f"encoder bad: {tmp_path} {message}"):
        load_encoder("bad")


def test_weights_are_read_into_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_model("dinov2_with_registers", 14).half().save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    spec = replace(REGISTRY["dinov2-s"], hub_id=str(tmp_path), width=16, image_size=42)
    monkeypatch.setitem(REGISTRY, "half", spec)
    assert {p.dtype for p in load_encoder("half").parameters()} == {torch.float32}


def test_unknown_name_lists_the_known():
    with pytest.raises(UserError, match=r"encoder dinov9: no such folder .* Registered: dinov2-b, dinov2-l, dinov2-s"):
        load_encoder("dinov9")


def test_registering_takes_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoders, "REGISTRY", {})
    encoders.register("mine", REGISTRY["mae-b"])
    assert list(encoders.REGISTRY.values()) == [REGISTRY["mae-b"]]


def test_every_registered_family_has_an_adapter():
    assert {spec.family for spec in REGISTRY.values()} <= FAMILIES.keys()


# Our own ViT.

CONFIG = ViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 2.0))


def test_own_encoder_keeps_the_contract():
    encoder = Encoder("own", CONFIG.spec, ViT(CONFIG))
    images = torch.rand(2, 3, 16, 16)
    tokens = encoder(images)
    assert tokens.shape == (2, 16, 16)
    assert torch.allclose(tokens.mean(-1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(tokens.var(-1, correction=0), torch.ones(()), atol=1e-3)
    assert not tokens.requires_grad
    colours = (images - torch.tensor(CONFIG.mean)[:, None, None]) / torch.tensor(CONFIG.std)[:, None, None]
    assert torch.allclose(tokens, encoder.model(colours), atol=1e-6)


def test_outputs_of_the_blocks_of_an_own_encoder():
    encoder = Encoder("own", CONFIG.spec, ViT(CONFIG))
    images = torch.rand(2, 3, 20, 20, requires_grad=True)
    outputs = encoder.block_outputs(images, range(encoder.depth))
    assert torch.allclose(encoder.model.norm(outputs[-1]), encoder(images), atol=1e-6)  # type: ignore[operator]
    for block, before, after in zip(list(encoder.model.blocks)[1:], outputs, outputs[1:], strict=False):  # type: ignore
        assert torch.allclose(block(before), after, atol=1e-6)
    assert torch.autograd.grad(outputs[0].sum(), images)[0].abs().max() > 0


def test_own_encoder_takes_another_input_size():
    encoder = Encoder("own", CONFIG.spec, ViT(CONFIG), input_size=24)
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, 36, 16)


def test_masking_sees_the_kept_patches_alone():
    model = ViT(CONFIG)
    pixels = torch.randn(2, 3, 16, 16)
    keep = torch.tensor([[0, 5, 9], [15, 2, 7]])
    tokens = model(pixels, keep)
    assert tokens.shape == (2, 3, 16)
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, keep, False)
    changed = pixels.clone()
    mask = hidden.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    changed[mask] = 7.0
    assert torch.equal(patchify(changed, 4)[0, 5], patchify(pixels, 4)[0, 5])
    assert torch.equal(model(changed, keep), tokens)


def test_keeping_all_patches_in_order_changes_nothing():
    model = ViT(CONFIG)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.allclose(model(pixels, torch.arange(16).expand(2, -1)), model(pixels), atol=1e-6)


def test_own_encoder_is_loaded_from_its_folder(tmp_path: Path):
    model = ViT(CONFIG)
    (tmp_path / "config.json").write_text(to_json({"kind": "encoder", **to_dict(CONFIG)}))
    save_file({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    encoder = load_encoder(str(tmp_path), input_size=20)
    assert encoder.grid == (5, 5)
    assert torch.allclose(encoder(torch.full((1, 3, 20, 20), 0.5)).std(-1, correction=0), torch.ones(()), atol=1e-3)
    state = load_file(tmp_path / "model.safetensors")
    del state["blocks.1.norm2.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"do not fit ViT: missing blocks.1.norm2.bias"):
        load_encoder(str(tmp_path))


def test_impossible_width_is_named():
    with pytest.raises(UserError, match=r"vit\.width: 18 must be a multiple of 4 and of vit\.heads = 3"):
        ViTConfig(image_size=16, patch_size=4, width=18, depth=1, heads=3)
