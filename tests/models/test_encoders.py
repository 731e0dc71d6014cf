import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from raekit.config import from_dict, to_dict, to_json
from raekit.errors import UserError
from raekit.evaluation.probe import probe
from raekit.inference.catalogue import list_encoders
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.layers import patchify, sincos_positions
from raekit.models.registry import (
    FAMILIES,
    LAYERS,
    REGISTRY,
    EncoderSpec,
    Family,
    LayersConfig,
    absolute,
    grid_of,
    register,
    sides,
)
from raekit.models.vit import ViT, ViTConfig

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
COLOURS = {"siglip": HALF, "clip": CLIP, "tipsv2": ([0.0] * 3, [1.0] * 3)}
PREFIXES = {"siglip": 0, "ijepa": 0, "tipsv2": 2, "dinov2_with_registers": 5, "dinov3_vit": 5}
NAMES = pytest.mark.parametrize("name", sorted(REGISTRY))
BY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))
CONFIG = ViTConfig(image_size=16, patch_size=4, width=16, depth=3, heads=2, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 2.0))
NATIVE = 3  # side of the tiny models' position tables, in patches
DEPTH = 3
WIDTH = 16


def tiny_model(family: str, patch_size: int) -> nn.Module:
    """A random `transformers` model of a family, as its checkpoints on the Hub hold it, affine parts included."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "patch_size": patch_size,
        "image_size": NATIVE * patch_size,
    }
    mlp: dict[str, Any] = {"intermediate_size": 24}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    match family:
        case "dinov2":
            model = transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **sizes))
        case "dinov2_with_registers":
            config = transformers.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **sizes)
            model = transformers.Dinov2WithRegistersModel(config)
        case "dinov3_vit":
            model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(num_register_tokens=4, **sizes, **mlp))
        case "siglip":
            config = transformers.SiglipConfig(text_config=text, vision_config={**sizes, **mlp})
            model = transformers.SiglipModel(config)
        case "vit_mae":
            mlp |= {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
            model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **mlp))
        case "clip":
            config = transformers.CLIPConfig(text_config=text, vision_config={**sizes, **mlp})
            model = transformers.CLIPModel(config)
        case "tipsv2":
            config = transformers.Tipsv2Config(
                text_config=text | {"hidden_size": WIDTH}, vision_config={**sizes, "mlp_ratio": 2}
            )
            model = transformers.Tipsv2Model(config)
        case "ijepa":
            model = transformers.IJepaModel(transformers.IJepaConfig(**sizes, **mlp))
        case "vit":
            model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **mlp))
        case _:
            raise AssertionError(f"no tiny model of family {family}: add it here")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(float("norm" in key and key.endswith("weight")), 0.3)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(family, patch_size)`: a folder with a tiny random model as its repository on the Hub would be."""
    saved: dict[tuple[str, int], Path] = {}

    def find(family: str, patch_size: int = 14) -> Path:
        if (family, patch_size) not in saved:
            folder = saved[family, patch_size] = tmp_path_factory.mktemp(family)
            tiny_model(family, patch_size).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        return saved[family, patch_size]

    return find


@pytest.fixture
def registry(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every registered name, with a tiny checkpoint in place of the one on the Hub."""
    for name, spec in list(REGISTRY.items()):
        folder = str(checkpoint(spec.family, spec.patch_size))
        tiny = replace(spec, width=WIDTH, image_size=NATIVE * spec.patch_size, hub_id=folder, file="")
        monkeypatch.setitem(REGISTRY, name, tiny)


def hidden_states(encoder: Encoder, images: Tensor) -> tuple[list[Tensor], float]:
    """The patch tokens after each block, run by transformers from pixels to hidden states, and the norms' epsilon.

    `images` are of the encoder's input size.
    """
    import transformers

    spec = encoder.spec
    colours = COLOURS.get(spec.family, IMAGENET)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in colours)
    whole = {"siglip": "SiglipModel", "vit_mae": "ViTMAEForPreTraining", "clip": "CLIPModel", "tipsv2": "Tipsv2Model"}
    model = getattr(transformers, whole.get(spec.family, FAMILIES[spec.family].model_class))
    model = model.from_pretrained(spec.hub_id, dtype=torch.float32).eval()
    towers = {"siglip": "vision_model", "clip": "vision_model", "vit_mae": "vit", "tipsv2": "vision_model"}
    if tower := towers.get(spec.family):
        model = getattr(model, tower)
    options: dict[str, Any] = {"interpolate_pos_encoding": True}
    if spec.family.startswith(("dino", "tips")):
        options = {}
    if spec.family == "vit_mae":
        model.config.mask_ratio = 0.0
        options["noise"] = torch.linspace(0, 1, encoder.grid[0] * encoder.grid[1]).repeat(len(images), 1)
    with torch.no_grad():
        states = model((images - mean) / std, output_hidden_states=True, **options).hidden_states
    prefix = PREFIXES.get(spec.family, 1)
    return [state[:, prefix:] for state in states[1:]], model.config.layer_norm_eps


def standardised(tokens: Tensor, eps: float) -> Tensor:
    centred = tokens.double() - tokens.double().mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


# As the models' cards and configurations on the Hub tell it: family, width, patch size, prefix tokens, repository.
PUBLISHED = {
    "dinov2-s": ("dinov2_with_registers", 384, 14, 5, "facebook/dinov2-with-registers-small"),
    "dinov2-b": ("dinov2_with_registers", 768, 14, 5, "facebook/dinov2-with-registers-base"),
    "dinov2-l": ("dinov2_with_registers", 1024, 14, 5, "facebook/dinov2-with-registers-large"),
    "dinov2-g": ("dinov2_with_registers", 1536, 14, 5, "facebook/dinov2-with-registers-giant"),
    "dinov2-noreg-s": ("dinov2", 384, 14, 1, "facebook/dinov2-small"),
    "dinov2-noreg-b": ("dinov2", 768, 14, 1, "facebook/dinov2-base"),
    "dinov2-noreg-l": ("dinov2", 1024, 14, 1, "facebook/dinov2-large"),
    "dinov2-noreg-g": ("dinov2", 1536, 14, 1, "facebook/dinov2-giant"),
    "dinov3-s": ("dinov3_vit", 384, 16, 5, "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "dinov3-s-plus": ("dinov3_vit", 384, 16, 5, "facebook/dinov3-vits16plus-pretrain-lvd1689m"),
    "dinov3-b": ("dinov3_vit", 768, 16, 5, "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    "dinov3-l": ("dinov3_vit", 1024, 16, 5, "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    "dinov3-h-plus": ("dinov3_vit", 1280, 16, 5, "facebook/dinov3-vith16plus-pretrain-lvd1689m"),
    "eupe-t": ("dinov3_vit", 192, 16, 5, "facebook/EUPE-ViT-T"),
    "eupe-s": ("dinov3_vit", 384, 16, 5, "facebook/EUPE-ViT-S"),
    "eupe-b": ("dinov3_vit", 768, 16, 5, "facebook/EUPE-ViT-B"),
    "siglip-b": ("siglip", 768, 16, 0, "google/siglip-base-patch16-256"),
    "siglip-l": ("siglip", 1024, 16, 0, "google/siglip-large-patch16-256"),
    "siglip-so400m": ("siglip", 1152, 14, 0, "google/siglip-so400m-patch14-224"),
    "siglip2-b": ("siglip", 768, 16, 0, "google/siglip2-base-patch16-256"),
    "siglip2-l": ("siglip", 1024, 16, 0, "google/siglip2-large-patch16-256"),
    "siglip2-so400m": ("siglip", 1152, 16, 0, "google/siglip2-so400m-patch16-256"),
    "siglip2-so400m-p14": ("siglip", 1152, 14, 0, "google/siglip2-so400m-patch14-224"),
    "webssl-300m": ("dinov2", 1024, 14, 1, "facebook/webssl-dino300m-full2b-224"),
    "mae-b": ("vit_mae", 768, 16, 1, "facebook/vit-mae-base"),
    "mae-l": ("vit_mae", 1024, 16, 1, "facebook/vit-mae-large"),
    "mae-h": ("vit_mae", 1280, 14, 1, "facebook/vit-mae-huge"),
    "clip-b": ("clip", 768, 16, 1, "openai/clip-vit-base-patch16"),
    "clip-l": ("clip", 1024, 14, 1, "openai/clip-vit-large-patch14"),
}


@NAMES
def test_published_encoders(name: str):
    family, width, patch, prefix, hub_id = PUBLISHED[name]
    spec = REGISTRY[name]
    assert (spec.family, spec.width, spec.patch_size, spec.prefix_tokens) == (family, width, patch, prefix)
    assert spec.hub_id == hub_id
    assert spec.image_size == 16 * patch
    assert (list(spec.mean), list(spec.std)) == COLOURS.get(family, IMAGENET)


def test_the_published_encoders_are_registered():
    assert PUBLISHED.keys() <= REGISTRY.keys()


def test_colours_are_those_of_the_preprocessors_at_hand():
    compared = 0
    for spec in REGISTRY.values():
        path = huggingface_hub.try_to_load_from_cache(spec.hub_id, "preprocessor_config.json")
        if isinstance(path, str):
            values = json.loads(Path(path).read_text())
            assert (list(spec.mean), list(spec.std)) == (values["image_mean"], values["image_std"]), spec.hub_id
            compared += 1
    if not compared:
        pytest.skip("no registered encoder's preprocessor_config.json in the Hub's cache")


@NAMES
def test_contract(name: str, registry: None):
    encoder = load_encoder(name)
    images = torch.rand(2, 3, *encoder.input_size, requires_grad=True)
    tokens = encoder(images)
    assert encoder.name == name
    assert encoder.grid == (NATIVE, NATIVE)
    assert tokens.shape == (2, NATIVE**2, WIDTH)
    assert tokens.dtype == torch.float32
    assert torch.allclose(tokens.mean(-1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(tokens.var(-1, correction=0), torch.ones(()), atol=1e-3)
    assert tokens.std(dim=1).mean() > 0.01  # which constant tokens would be as well
    assert not tokens.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder.train()(images), tokens)
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder.eval()(images), tokens)
    states, eps = hidden_states(encoder, images)  # with the prefix dropped, and the family's own mean and std
    assert torch.allclose(tokens.double(), standardised(states[-1], eps), atol=1e-5)


@pytest.mark.parametrize("grid", [(NATIVE, NATIVE), (5, 5), (2, 4)], ids=str)
@BY_FAMILY
def test_features_are_the_hidden_states_of_transformers(
    family: str, grid: tuple[int, int], checkpoint: Callable[..., Path]
):
    # Sizes other than the checkpoint's interpolate its positions.
    encoder = load_encoder(f"{family}:{checkpoint(family)}", input_size=(14 * grid[0], 14 * grid[1]))
    assert encoder.grid == grid
    images = torch.rand(2, 3, *encoder.input_size)
    states, _ = hidden_states(encoder, images)
    features = encoder.features(images, [2, 0])
    assert len(features) == 2
    for feature, block in zip(features, [2, 0], strict=True):
        assert feature.shape == (2, grid[0] * grid[1], WIDTH)
        assert torch.allclose(feature, states[block], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "layers",
    [
        LayersConfig(),
        LayersConfig(blocks=(1,)),
        LayersConfig(blocks=(0, -1)),
        LayersConfig(blocks=(2, 0, 1), combine="sum"),
        LayersConfig(blocks=(0, 1), token_mean=True),
        LayersConfig(blocks=(1, 2), combine="sum", token_mean=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["dinov2", "dinov3_vit"])
def test_layers(family: str, layers: LayersConfig, checkpoint: Callable[..., Path]):
    encoder = load_encoder(f"{family}:{checkpoint(family)}", input_size=(28, 42), layers=layers)
    images = torch.rand(2, 3, 28, 42)
    states, eps = hidden_states(encoder, images)
    chosen = torch.stack([standardised(states[block], eps) for block in layers.blocks])
    expected = chosen.mean(0) if layers.combine == "mean" else chosen.sum(0)
    if layers.token_mean:
        expected = expected + standardised(states[-1], eps).mean(1, keepdim=True)
    tokens = encoder(images)
    assert tokens.dtype == torch.float32
    assert torch.allclose(tokens.double(), expected, atol=1e-5)


def test_published_choices_of_layers():
    assert {name: layers.blocks for name, layers in LAYERS.items()} == {
        "k1": (-1,),
        "k7": (11, 13, 15, 17, 19, 21, 23),
        "k23": tuple(range(1, 24)),
    }
    assert {layers.combine for layers in LAYERS.values()} == {"mean"}
    assert [LAYERS[name].token_mean for name in ("k1", "k7", "k23")] == [False, True, True]


def test_layers_are_read_back_as_written():
    for layers in LAYERS.values():
        assert from_dict(LayersConfig, to_dict(layers), "test") == layers


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((3,), "layers.blocks: 3, but own has blocks 0 to 2"),
        ((0, -4), "layers.blocks: -4, but own has blocks 0 to 2"),
        ((2, -1), r"layers.blocks: \(2, -1\) names a block of own twice"),
        ((), "layers.blocks: no blocks are given"),
    ],
)
def test_impossible_layers_are_named(blocks: tuple[int, ...], message: str):
    with pytest.raises(UserError, match=message):
        Encoder("own", CONFIG.spec, ViT(CONFIG), layers=LayersConfig(blocks=blocks))


def test_features_of_absent_blocks_are_refused():
    with pytest.raises(UserError, match=r"layers\.blocks: 5, but own has blocks 0 to 2"):
        Encoder("own", CONFIG.spec, ViT(CONFIG)).features(torch.rand(1, 3, 16, 16), [5])


def test_blocks_beyond_the_last_chosen_do_not_run():
    ran = []

    def blocks_run(layers: LayersConfig) -> int:
        encoder = Encoder("own", CONFIG.spec, ViT(CONFIG), layers=layers)
        for block in encoder.blocks:
            block.register_forward_hook(lambda *_: ran.append(1))
        ran.clear()
        encoder(torch.rand(1, 3, 16, 16))
        return len(ran)

    assert blocks_run(LayersConfig(blocks=(0,))) == 1
    assert blocks_run(LayersConfig(blocks=(1, 0))) == 2
    assert blocks_run(LayersConfig()) == 3
    assert blocks_run(LayersConfig(blocks=(0,), token_mean=True)) == 3
    encoder = Encoder("own", CONFIG.spec, ViT(CONFIG))
    encoder.blocks[2].register_forward_hook(lambda *_: pytest.fail("not asked for"))
    encoder.features(torch.rand(1, 3, 16, 16), [1])


def test_features_pass_gradients_to_the_images_alone():
    encoder = Encoder("own", CONFIG.spec, ViT(CONFIG))
    images = torch.rand(1, 3, 24, 24, requires_grad=True)
    encoder.features(images, [1])[0].square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())
    with torch.no_grad():
        assert not encoder.features(images, [1])[0].requires_grad


@BY_FAMILY
def test_bfloat16(family: str, checkpoint: Callable[..., Path]):
    name = f"{family}:{checkpoint(family)}"
    exact, encoder = load_encoder(name, 28), load_encoder(name, 28, dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    images = torch.rand(2, 3, 28, 28)
    tokens = encoder(images)
    assert tokens.dtype == torch.float32
    assert encoder.features(images, [1])[0].dtype == torch.bfloat16
    expected = exact(images)
    assert 1e-4 < (tokens - expected).norm() / expected.norm() < 0.05
    assert torch.allclose(tokens.mean(-1), torch.zeros(()), atol=1e-5)  # standardised in float32


def test_the_surrounding_autocast_changes_nothing():
    encoder = Encoder("own", CONFIG.spec, ViT(CONFIG))
    images = torch.rand(2, 3, 16, 16)
    tokens, (feature,) = encoder(images), encoder.features(images, [1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(images), tokens)
        assert torch.equal(encoder.features(images, [1])[0], feature)


def test_compiled_blocks_give_the_same(checkpoint: Callable[..., Path]):
    encoder = load_encoder(f"dinov3_vit:{checkpoint('dinov3_vit')}", (28, 42))
    images = torch.rand(2, 3, 28, 42)
    expected = encoder(images)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    encoder.compile(backend=backend, fullgraph=True)
    assert torch.allclose(encoder(images), expected, atol=1e-5)
    assert torch.allclose(encoder(images), expected, atol=1e-5)
    assert len(graphs) == 1  # for all blocks


@pytest.mark.parametrize("shape", [(40, 40), (60, 20)])
def test_images_of_another_size_are_resized(shape: tuple[int, int], checkpoint: Callable[..., Path]):
    encoder = load_encoder(f"vit:{checkpoint('vit')}", (28, 42))
    images = torch.rand(1, 3, *shape)
    resized = interpolate(images, (28, 42), mode="bicubic", align_corners=False)
    assert torch.equal(encoder(images), encoder(resized))
    assert torch.equal(encoder.features(images, [0])[0], encoder.features(resized, [0])[0])


@pytest.mark.parametrize("size", [25, (28, 25), (25, 28), 0, (-14, 14)], ids=str)
def test_input_size_must_be_whole_patches(size: Any, checkpoint: Callable[..., Path]):
    message = f"encoder_size: {size} is not a multiple of vit:.*'s patch size 14"
    with pytest.raises(UserError, match=re.sub(r"([()])", r"\\\1", message)):
        load_encoder(f"vit:{checkpoint('vit')}", input_size=size)


# Any checkpoint of a family.


def variant(source: Path, target: Path, preprocessor: Any = None, **fields: Any) -> Path:
    """A copy of a checkpoint with other fields in its config.json, and a preprocessor_config.json if it is given."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | fields))
    if preprocessor is not None:
        (target / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return target


@BY_FAMILY
def test_a_folder_tells_what_it_is(family: str, checkpoint: Callable[..., Path], tmp_path: Path):
    name = f"{family}:{checkpoint(family, 16)}"
    spec = load_encoder(name).spec
    assert (spec.family, spec.width, spec.patch_size, spec.image_size) == (family, WIDTH, 16, 48)
    assert spec.prefix_tokens == PREFIXES.get(family, 1)
    assert (list(spec.mean), list(spec.std)) == COLOURS.get(family, IMAGENET)
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_resize": True}
    folder = variant(checkpoint(family, 16), tmp_path / "own", colours)
    encoder = load_encoder(f"{family}:{folder}")
    assert (encoder.spec.mean, encoder.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = torch.rand(1, 3, 48, 48)
    shifted = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    plain = load_encoder(name)
    ours, theirs = (e.features(x, (-1,))[0] for e, x in ((encoder, images), (plain, shifted * plain.std + plain.mean)))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_size_that_the_patch_does_not_divide_is_rounded_down(checkpoint: Callable[..., Path], tmp_path: Path):
    folder = variant(checkpoint("dinov2"), tmp_path / "odd", image_size=NATIVE * 14 + 5)
    encoder = load_encoder(f"dinov2:{folder}")
    assert encoder.spec.image_size == 42
    assert encoder.grid == (NATIVE, NATIVE)


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, "mean.2: Field required|mean: "),
        ({"image_std": [1, 1, "wide"]}, "std.2"),
        ({"image_std": [1, 1, 0]}, "std: .* must be positive"),
        ([1], "holds no mean and std"),
    ],
)
def test_impossible_colours_are_named(preprocessor: Any, message: str, checkpoint: Callable[..., Path], tmp_path: Path):
    folder = variant(checkpoint("dinov2"), tmp_path / "bad", preprocessor)
    with pytest.raises(UserError, match=message):
        load_encoder(f"dinov2:{folder}")


def test_focus_asset(shared: Callable[[str], Path]):
    folder = shared("assets/vit-s14-focus")
    encoder = load_encoder(f"dinov2:{folder}", 56, LayersConfig(blocks=(9,)))
    values = json.loads((folder / "preprocessor_config.json").read_text())
    assert (list(encoder.spec.mean), list(encoder.spec.std)) == (values["image_mean"], values["image_std"])
    assert (encoder.spec.width, encoder.spec.image_size, encoder.spec.prefix_tokens) == (384, 518, 1)
    images = torch.rand(1, 3, 56, 56)
    states, eps = hidden_states(encoder, images)
    assert torch.allclose(encoder(images).double(), standardised(states[9], eps), atol=1e-4)


# Missing, damaged and hostile checkpoints.


def spoil(folder: Path, fault: str) -> None:
    weights = folder / "model.safetensors"
    state = load_file(weights)
    key = "encoder.layer.0.norm1.weight"
    match fault:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty":
            weights.write_bytes(b"")
        case "absent":
            weights.unlink()
        case "pickle":
            weights.unlink()
            torch.save({key: RunsCode()}, folder / "pytorch_model.bin")
        case "no config":
            (folder / "config.json").unlink()
        case "half a config":
            (folder / "config.json").write_text('{"model_type": ')
        case "a list for a config":
            (folder / "config.json").write_text("[1]")
        case "incomplete":
            save_file({k: v for k, v in state.items() if k != key}, weights, metadata={"format": "pt"})
        case "misshapen":
            save_file(state | {key: torch.ones(3)}, weights, metadata={"format": "pt"})


class RunsCode:
    def __reduce__(self):
        return pytest.fail, ("code of a checkpoint was run",)


def published_dinov3(model: Any) -> dict[str, Tensor]:
    """Return the weights of a DINOv3ViTModel as the published code saves them, with EUPE's training leftovers."""
    own = model.state_dict()
    width = own["norm.weight"].shape[0]
    embed = "embeddings"
    state = {
        "cls_token": own[f"{embed}.cls_token"],
        "storage_tokens": own[f"{embed}.register_tokens"],
        "mask_token": own[f"{embed}.mask_token"][0],
        "rope_embed.periods": 100 ** (torch.arange(16) / 16),
        **{f"patch_embed.proj.{part}": own[f"{embed}.patch_embeddings.{part}"] for part in ("weight", "bias")},
        **{f"norm.{part}": own[f"norm.{part}"] for part in ("weight", "bias")},
        "projectors.dinov3.0.weight": torch.ones(3, 3),
    }
    mlp = {"fc1": "up_proj", "fc2": "down_proj"}
    if model.config.use_gated_mlp:
        mlp = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
    names = {"attn.proj": "attention.o_proj", "norm1": "norm1", "norm2": "norm2"}
    names |= {f"mlp.{theirs}": f"mlp.{ours}" for theirs, ours in mlp.items()}
    for i in range(model.config.num_hidden_layers):
        block, layer = f"blocks.{i}", f"model.layer.{i}"
        for theirs, ours in names.items():
            state |= {f"{block}.{theirs}.{part}": own[f"{layer}.{ours}.{part}"] for part in ("weight", "bias")}
        q, k, v = (own[f"{layer}.attention.{part}_proj.weight"] for part in "qkv")
        # The keys' biases are masked, whatever they are.
        biases = [own[f"{layer}.attention.q_proj.bias"], torch.ones(width), own[f"{layer}.attention.v_proj.bias"]]
        state[f"{block}.attn.qkv.weight"], state[f"{block}.attn.qkv.bias"] = torch.cat([q, k, v]), torch.cat(biases)
        mask = torch.ones(3, width)
        mask[1] = 0
        state[f"{block}.attn.qkv.bias_mask"] = mask.flatten()
        state |= {f"{block}.ls{n}.gamma": own[f"{layer}.layer_scale{n}.lambda1"] for n in (1, 2)}
    return state


@pytest.mark.parametrize("gated", [False, True], ids=["EUPE", "SwiGLU"])
def test_files_of_dinov3_in_the_layout_of_its_code(gated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import transformers

    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    model = transformers.DINOv3ViTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    torch.save(published_dinov3(model), tmp_path / "EUPE-ViT-T.pt")
    monkeypatch.setitem(REGISTRY, "eupe-t", replace(REGISTRY["eupe-t"], width=128, hub_id=str(tmp_path)))
    images = torch.rand(2, 3, 48, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    with torch.no_grad():
        states = model((images - mean) / std, output_hidden_states=True).hidden_states
    for name in "eupe-t", f"dinov3_vit:{tmp_path / 'EUPE-ViT-T.pt'}":
        encoder = load_encoder(name, (48, 32))
        assert (encoder.spec.width, encoder.spec.patch_size, encoder.spec.prefix_tokens) == (128, 16, 5)
        assert sides(encoder.spec.image_size) == (256, 256)
        for found, state in zip(encoder.features(images, [0, 1]), states[1:], strict=True):
            torch.testing.assert_close(found, state[:, 5:], atol=1e-4, rtol=1e-4)
    tokens = load_encoder("eupe-t", (48, 32))(images)
    assert torch.allclose(tokens.double(), standardised(states[-1][:, 5:], 1e-5), atol=1e-4)


def test_a_bad_file_of_dinov3_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "x.pth"
    for state, message in (
        ({"a": torch.ones(2)}, "not a DINOv3 vision transformer in the layout of its published code"),
        (
            {"patch_embed.proj.weight": torch.ones(64, 3, 8, 8), "blocks.0.a": torch.ones(1)},
            "do not fit DINOv3ViT.*mis",
        ),
        ({"patch_embed.proj.weight": torch.ones(65, 3, 8, 8), "blocks.0.a": torch.ones(1)}, "a width of 65"),
        ({"patch_embed.proj.weight": torch.ones(64, 3, 8, 8), "blocks.0.a": "text"}, "not a DINOv3"),
        ({"patch_embed.proj.weight": torch.ones(64, 3, 8, 8), "blocks.0.attn.qkv.bias": torch.ones(())}, "do not fit"),
        (
            {
                "patch_embed.proj.weight": torch.ones(64, 3, 8, 8),
                "blocks.0.a": torch.ones(1),
                "storage_tokens": torch.ones(1),
            },
            "not fit",
        ),
    ):
        torch.save(state, file)
        with pytest.raises(UserError, match=rf"^encoder dinov3_vit:{file}: {file}: .*{message}"):
            load_encoder(f"dinov3_vit:{file}")
    file.write_bytes(b"x")
    with pytest.raises(UserError, match=rf"^encoder dinov3_vit:{file}: {file}"):
        load_encoder(f"dinov3_vit:{file}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^encoder eupe-b: facebook/EUPE-ViT-B: .*run `hf download facebook/EUPE-ViT-B EUPE"
    ):
        load_encoder("eupe-b")


FAULTS = {
    "truncated": r"could not be loaded \(SafetensorError",
    "empty": r"could not be loaded \(SafetensorError",
    "absent": "could not be loaded .*no file named model.safetensors",
    "pickle": "its weights file is damaged or holds more than tensors",
    "no config": "no config.json, or an empty one",
    "half a config": "could not be loaded .*JSONDecodeError",
    "a list for a config": "no config.json, or an empty one",
    "incomplete": "lacks encoder.layer.0.norm1.weight",
    "misshapen": "its tensors do not have the shapes of its config.json",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_checkpoint_is_refused(fault: str, checkpoint: Callable[..., Path], tmp_path: Path):
    folder = variant(checkpoint("dinov2"), tmp_path / "bad")
    spoil(folder, fault)
    with pytest.raises(UserError, match=f"^encoder dinov2:{folder}: {folder} {FAULTS[fault]}|{FAULTS[fault]}") as info:
        load_encoder(f"dinov2:{folder}")
    message = str(info.value)
    assert "\n" not in message
    assert f"`hf download ID --local-dir {folder}`" in message
    assert "FAMILY:WHERE" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 10**6}, "config.json describes .* parameters, but the weights files have .* bytes"),
        ({"image_size": 10**7}, "config.json describes .* parameters, but the weights files have"),
        ({"hidden_size": 16384, "num_hidden_layers": 900}, "config.json describes .* parameters"),
        ({"patch_size": 7}, "do not have the shapes"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
        ({"num_hidden_layers": DEPTH + 1}, f"lacks encoder.layer.{DEPTH}"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "magic"}, "magic"),
        ({"patch_size": [14, 28]}, "do not have the shapes|only square patches"),
        ({"model_type": "clip"}, "holds a model of type 'clip', not 'dinov2'"),
    ],
    ids=str,
)
def test_hostile_configurations_are_refused(
    fields: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path
):
    folder = variant(checkpoint("dinov2"), tmp_path / "bad", **fields)
    with pytest.raises(UserError, match=message):
        load_encoder(f"dinov2:{folder}")


@pytest.mark.parametrize("family", ["vit_mae", "siglip", "clip", "dinov3_vit"])
def test_a_configuration_of_any_size_takes_no_memory(family: str, checkpoint: Callable[..., Path], tmp_path: Path):
    folder = variant(checkpoint(family), tmp_path / "bad")
    values = json.loads((folder / "config.json").read_text())
    values.get("vision_config", values).update(hidden_size=32768, num_hidden_layers=999, image_size=10**6)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config.json describes .* parameters"):
        load_encoder(f"{family}:{folder}")


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModel": "modeling.Evil"}, "trust_remote_code": True},
        {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel"},
        {"attn_implementation": "eager", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"dtype": "float16", "torch_dtype": "float16", "use_kernels": True, "base_model_tp_plan": {"*": "colwise"}},
    ],
)
def test_fields_that_name_code_are_not_obeyed(fields: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path):
    plain = load_encoder(f"dinov2:{checkpoint('dinov2')}", 28)
    other = load_encoder(f"dinov2:{variant(checkpoint('dinov2'), tmp_path / 'other', **fields)}", 28)
    model: Any = other.model
    assert model.config._attn_implementation == "sdpa"
    assert not {"auto_map", "quantization_config"} & vars(model.config).keys()
    assert other.dtype == torch.float32
    images = torch.rand(1, 3, 28, 28)
    assert torch.equal(other(images), plain(images))


def test_images_that_the_preprocessor_does_not_normalise(checkpoint: Callable[..., Path], tmp_path: Path):
    folder = variant(checkpoint("vit"), tmp_path / "plain")
    values = {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    spec = load_encoder(f"vit:{folder}").spec
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_revision_of_a_repository(offline: Path, checkpoint: Callable[..., Path]):
    source = checkpoint("dinov2")
    root = cached(offline, "me/vit", source).parent.parent
    (root / "refs" / "main").rename(root / "refs" / "v2")
    assert load_encoder("dinov2:me/vit@v2").spec.hub_id == "me/vit@v2"
    with pytest.raises(UserError, match="run `hf download me/vit --revision v3` where there is a network"):
        load_encoder("dinov2:me/vit@v3")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, empty, as HF_HUB_OFFLINE=1 and HF_HUB_CACHE set it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def cached(cache: Path, hub_id: str, source: Path) -> Path:
    """Put a checkpoint into the Hub's cache, as `hf download` leaves it; gives the folder of its files."""
    root = cache / f"models--{hub_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots").mkdir()
    return variant(source, root / "snapshots" / ("0" * 40))


def test_the_cache_serves_without_a_network(
    offline: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(REGISTRY, "dinov2-s", replace(REGISTRY["dinov2-s"], width=WIDTH))
    source = checkpoint("dinov2_with_registers")
    cached(offline, "facebook/dinov2-with-registers-small", source)
    images = torch.rand(1, 3, 28, 28)
    expected = load_encoder(f"dinov2_with_registers:{source}", 28)(images)
    assert torch.equal(load_encoder("dinov2-s", 28)(images), expected)
    by_id = load_encoder("dinov2_with_registers:facebook/dinov2-with-registers-small", 28)
    assert torch.equal(by_id(images), expected)
    assert by_id.spec.hub_id == "facebook/dinov2-with-registers-small"


@pytest.mark.parametrize("fault", [None, "absent", "truncated", "incomplete", "no config"])
def test_a_missing_or_partial_download_gives_the_command(
    fault: str | None, offline: Path, checkpoint: Callable[..., Path]
):
    if fault:
        spoil(cached(offline, "facebook/dinov2-small", checkpoint("dinov2")), fault)
    for name in ("dinov2-noreg-s", "dinov2:facebook/dinov2-small"):
        with pytest.raises(UserError, match="run `hf download facebook/dinov2-small` where there is a network") as info:
            load_encoder(name)
        assert re.match(f"encoder {name}: facebook/dinov2-small:? ", str(info.value))
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("where", ["/no/such", "./x", "a/b/c", "alone", ""])
def test_what_is_neither_folder_nor_repository_is_named(where: str):
    with pytest.raises(UserError, match=f"encoder vit:{where}: '{where}' is neither a folder nor OWNER/NAME"):
        load_encoder(f"vit:{where}")


def test_weights_are_read_into_float32(tmp_path: Path):
    tiny_model("dinov2", 14).half().save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    assert {p.dtype for p in load_encoder(f"dinov2:{tmp_path}").parameters()} == {torch.float32}


def test_unknown_name_suggests_an_encoder():
    with pytest.raises(UserError, match=r"encoder dinov2b: no such folder or model; did you mean dinov2-b or ") as info:
        load_encoder("dinov2b")
    assert "rae-" not in str(info.value)  # the name of an autoencoder
    with pytest.raises(UserError, match=r"encoder resnet: .* that `raekit models --encoders` lists\. Any "):
        load_encoder("resnet")
    with pytest.raises(UserError, match=r"no such built-in.* FAMILY one of dinov2, dinov2_with_registers,"):
        load_encoder("builtin:dinov9")


@pytest.mark.parametrize("content", ['{"kind": "encoder", "image_size": 16}', "{", "{}"])
def test_a_damaged_configuration_is_not_an_unknown_name(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as info:
        load_encoder(str(tmp_path))
    assert str(tmp_path) in str(info.value)
    assert "FAMILY:WHERE" not in str(info.value)


def test_registering_takes_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(REGISTRY, "mine", raising=False)  # afterwards too
    register("mine", REGISTRY["mae-b"])
    assert REGISTRY["mine"] == REGISTRY["mae-b"]


def test_every_registered_family_has_an_adapter():
    assert {spec.family for spec in REGISTRY.values()} <= FAMILIES.keys()


class Plain(nn.Module):
    """A network that no class of `transformers` describes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.norm = nn.LayerNorm(8)


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderSpec:
    """The spec of a family that loads its network from a file."""

    def read(where: str, dtype: torch.dtype) -> nn.Module:
        network = Plain()
        network.load_state_dict(load_file(where))
        return network.to(dtype)

    torch.manual_seed(0)
    save_file(Plain().state_dict(), weights := tmp_path / "plain.safetensors")
    family = Family(
        load=read, blocks="blocks", norm="norm", embed=lambda m, x: m.embed(patchify(x, 4).to(m.embed.weight))
    )
    monkeypatch.setitem(FAMILIES, "plain", family)
    monkeypatch.delitem(REGISTRY, "mine", raising=False)  # afterwards too
    grey = (0.5, 0.5, 0.5)
    return EncoderSpec(
        family="plain", width=8, patch_size=4, image_size=16, prefix_tokens=0, mean=grey, std=grey, hub_id=str(weights)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_may_load_any_network(dtype: torch.dtype, plain: EncoderSpec, tmp_path: Path):
    register("mine", plain)
    encoder = load_encoder("mine", layers=LayersConfig(blocks=(0, 1)), dtype=dtype)
    images = torch.rand(2, 3, 16, 16)
    assert encoder(images).shape == (2, 16, 8)
    decoder = DecoderConfig(token_dim=8, grid=(4, 4), width=8, depth=1, heads=2, hidden=8, patch_size=4)
    model = Autoencoder(AutoencoderConfig(encoder="mine", layers=encoder.layers, decoder=decoder), encoder)
    model.save(tmp_path)
    assert torch.equal(Autoencoder.load(tmp_path, encoder_dtype=dtype).encode(images), model.encode(images))
    assert [each.cached for each in list_encoders("mine")] == [True]
    del REGISTRY["mine"]
    with pytest.raises(UserError, match=r"encoder mine: .* is known after that code has run"):
        Autoencoder.load(tmp_path)
    with pytest.raises(UserError, match="encoder mine: raekit saves only encoders that it pretrained"):
        encoder.save(tmp_path)


def test_an_encoder_of_any_network_is_probed_without_random_weights(plain: EncoderSpec):
    register("mine", plain)
    assert list(probe("mine", "emoji", penalty=1.0)) == ["mine"]


@pytest.mark.parametrize("wrong", [{"width": 9}, {"prefix_tokens": 1}, {"patch_size": 8}])
def test_a_wrong_spec_is_an_error_before_any_block_runs(wrong: dict[str, int], plain: EncoderSpec):
    register("mine", replace(plain, **wrong))
    with pytest.raises(UserError, match=r"encoder mine: .* but its network makes \(1, 16, 8\) of an image"):
        load_encoder("mine")


def test_what_cannot_be_loaded_is_not_registered(plain: EncoderSpec):
    with pytest.raises(UserError, match=r"register mine: family: 'other' is none of dinov2, .*plain"):
        register("mine", replace(plain, family="other"))
    with pytest.raises(UserError, match="register mine: hub_id is empty"):
        register("mine", replace(plain, family="dinov2", hub_id=""))


# Our own ViT.


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


def test_own_encoder_takes_another_input_size():
    encoder = Encoder("own", CONFIG.spec, ViT(CONFIG), input_size=(24, 16))
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, 24, 16)
    images = torch.rand(1, 3, 24, 16)
    assert torch.allclose(encoder(images), encoder.model((images - encoder.mean) / encoder.std), atol=1e-6)


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
    images = torch.rand(1, 3, 20, 20)
    assert torch.allclose(encoder(images).std(-1, correction=0), torch.ones(()), atol=1e-3)
    encoder = load_encoder(str(tmp_path), 20, LayersConfig(blocks=(1,)), torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert encoder(images).dtype == torch.float32
    state = load_file(tmp_path / "model.safetensors")
    del state["blocks.1.norm2.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"do not fit ViT: missing blocks.1.norm2.bias") as info:
        load_encoder(str(tmp_path))
    assert "FAMILY:WHERE" not in str(info.value)


def test_too_many_tokens_are_rejected():
    several: Any = ({"image_size": 65536, "patch_size": 16}, {"image_size": 1024, "patch_size": 1})
    for sizes in several:
        with pytest.raises(UserError, match=r"vit\.tokens: [\d]+ must be from 1 to 65,536"):
            ViTConfig(**sizes, width=16, depth=1, heads=2)
    with pytest.raises(UserError, match=r"encoder\.tokens: \d+ must be from 1 to 65,536"):
        grid_of(REGISTRY["dinov2-b"], "dinov2-b", 14 * 10**6)


def test_impossible_width_is_named():
    with pytest.raises(UserError, match=r"vit\.mlp_ratio: 0\.0 must be positive"):
        replace(CONFIG, mlp_ratio=0.0)
    with pytest.raises(UserError, match=r"vit\.width: 18 must be a multiple of 4 and of vit\.heads = 3"):
        ViTConfig(image_size=16, patch_size=4, width=18, depth=1, heads=3)


def test_names_of_things_on_disk_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("decoder", "runs/decoder", "emoji", "dinov2-b", "rae-dinov2-b"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, expected in (
        ("decoder", f"{tmp_path}/decoder"),
        ("runs/decoder", f"{tmp_path}/runs/decoder"),
        ("~/decoder", f"{tmp_path}/decoder"),
        ("folder:decoder", f"folder:{tmp_path}/decoder"),
        ("vae:runs/decoder@64", f"vae:{tmp_path}/runs/decoder@64"),
        ("dinov2:runs/decoder", f"dinov2:{tmp_path}/runs/decoder"),
        # Built-in, registered and published names come before folders, and other names are not on this disk.
        *(
            (name, name)
            for name in ("builtin:emoji", "dinov2-b", "rae-dinov2-b", "OWNER/NAME", "pixels@64", "flat:gone")
        ),
    ):
        assert absolute(name) == expected


def test_a_model_names_its_encoder_by_an_absolute_path_and_knows_its_weights(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(checkpoint("dinov2"), tmp_path / "models" / "vit")
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder("dinov2:models/vit")
    sizes: dict[str, Any] = {"patch_size": 4, "width": 8, "depth": 1, "heads": 2, "hidden": 8}
    decoder = DecoderConfig(token_dim=encoder.width, grid=encoder.grid, **sizes)
    Autoencoder(AutoencoderConfig(encoder=encoder.name, decoder=decoder), encoder).save(tmp_path / "model")
    monkeypatch.setitem(REGISTRY, "mine", replace(encoder.spec, hub_id=str(tmp_path / "models" / "vit")))
    Autoencoder(AutoencoderConfig(encoder="mine", decoder=decoder), load_encoder("mine")).save(tmp_path / "named")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = Autoencoder.load(str(tmp_path / "model"))
    assert model.config.encoder == f"dinov2:{tmp_path}/models/vit"
    model.save(tmp_path / "again")  # also in another precision
    Autoencoder.load(str(tmp_path / "again"), torch.bfloat16)
    Autoencoder.load(str(tmp_path / "named"), torch.bfloat16)

    file = tmp_path / "models" / "vit" / "model.safetensors"
    state = load_file(file)
    key = max(state, key=lambda key: state[key].numel())
    save_file(state | {key: state[key] + 1}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"made with another encoder: the weights of dinov2:.*models/vit are not those"):
        Autoencoder.load(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"made with another encoder: the weights of mine are not those"):
        Autoencoder.load(str(tmp_path / "named"))
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(UserError, match="neither a folder nor OWNER/NAME on the Hub"):
        Autoencoder.load(str(tmp_path / "model"))


def test_our_own_encoder_places_each_patch():
    torch.manual_seed(0)
    network, size = ViT(CONFIG), CONFIG.patch_size
    for side in (CONFIG.image_size, 2 * CONFIG.image_size):
        pixels, grid = torch.randn(2, 3, side, side), (side // size, side // size)
        expected = network.embed(patchify(pixels, size)) + sincos_positions(CONFIG.width, grid)
        assert torch.equal(network.tokens(pixels), expected)


def test_our_own_encoder_keeps_patches_in_the_order_that_is_asked_for():
    torch.manual_seed(0)
    network, pixels = ViT(CONFIG), torch.randn(2, 3, CONFIG.image_size, CONFIG.image_size)
    keep = torch.tensor([[2, 0, 3], [1, 3, 0]])
    assert torch.allclose(network(pixels, keep.flip(1)), network(pixels, keep).flip(1), atol=1e-5)


def test_blocks_below_zero_count_from_the_end():
    encoder, images = Encoder("own", CONFIG.spec, ViT(CONFIG)), torch.rand(1, 3, 16, 16)
    for block in range(DEPTH):
        (expected,), (found,) = encoder.features(images, [block]), encoder.features(images, [block - DEPTH])
        assert torch.equal(found, expected)
