"""Test conversion between raekit and RAE v1 and v2: autoencoder files, YAML and published names.

A folder stands in for the Hub.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import raekit
from raekit import artifacts
from raekit.config import read_json, to_json
from raekit.errors import UserError
from raekit.formats import conversion as conversion
from raekit.formats import decoder_files as autoencoders
from raekit.formats import releases as releases
from raekit.formats.conversion import FileOptions, convert
from raekit.formats.decoder_keys import decoder_config, decoder_state, published_decoder_config, published_decoder_state
from raekit.formats.parts import AutoencoderParts
from raekit.formats.releases import RELEASES, REPLACED, Release
from raekit.models.autoencoder import Autoencoder
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.layers import to_grid
from raekit.models.registry import LAYERS, REGISTRY, LayersConfig
from raekit.weights import load_strict
from tests.formats.conftest import SIZES, Hub, save
from tests.formats.test_keys import decoder_shapes, published_decoder
from tests.reference import state_dict

pytestmark = pytest.mark.usefixtures("tiny")

State = dict[str, torch.Tensor]
ORIGINAL = dict(REGISTRY)  # tests put small encoders in its place
LATENT = (64, 2, 2)
TINY = state_dict(decoder_shapes(token_dim=64, tokens=4))
STATISTICS = {"mean": torch.linspace(-1, 1, 256).view(LATENT), "var": torch.linspace(0.01, 3, 256).view(LATENT)}
X = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1))
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def read(source: str, options: FileOptions | None = None) -> AutoencoderParts:
    """Return the autoencoder of a source."""
    found = conversion.read(source, options).autoencoder
    assert found
    return found


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, FileOptions]:
    """A decoder file, and the options that it needs."""
    options = FileOptions(encoder="dinov2-b", statistics=save(tmp_path / "in" / "stat.pt", STATISTICS))
    return save(tmp_path / "in" / "model.pt", TINY), options


def decoded(decoder: State, latents: torch.Tensor) -> torch.Tensor:
    """Decode un-whitened tokens with a published decoder."""
    config = decoder_config(published_decoder_config(tiny_config()), 64, (2, 2), 4)
    model = Decoder(config).eval()
    load_strict(model, decoder_state(decoder, config), "test")
    with torch.no_grad():
        return model(latents)


def tiny_config() -> DecoderConfig:
    return DecoderConfig(token_dim=64, grid=(2, 2), patch_size=4, **SIZES)


def assert_is_tiny(parts: AutoencoderParts, mean: torch.Tensor | None = STATISTICS["mean"]) -> None:
    back = published_decoder_state(parts.decoder, parts.config.decoder)
    assert back.keys() == TINY.keys()
    assert all(torch.equal(back[key], TINY[key]) for key in TINY if key != "decoder_pos_embed")
    assert torch.equal(parts.var, STATISTICS["var"])
    assert parts.mean is mean or (mean is not None and parts.mean is not None and torch.equal(parts.mean, mean))


# Decoders and checkpoints.


def test_decoder_file_becomes_a_model(files, tmp_path):
    path, options = files
    convert(str(path), tmp_path / "out", options=options)
    model = Autoencoder.load(str(tmp_path / "out"))
    assert_is_tiny(read(str(tmp_path / "out")))
    tokens = model.tokens(IMAGES)
    latents = (tokens - STATISTICS["mean"]) / (STATISTICS["var"] + 1e-5).sqrt()
    assert torch.allclose(model.encode(IMAGES), latents, rtol=1e-5, atol=1e-6)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (decoded(TINY, tokens) * std + mean).clamp(0, 1)
    assert torch.allclose(model.decode(latents), expected, atol=1e-5)


def test_decoder_that_gives_pixels(files, tmp_path):
    path, _ = files
    convert(str(path), tmp_path / "out", options=FileOptions(encoder="dinov2-b", output="pixels"))
    model = Autoencoder.load(str(tmp_path / "out"))
    tokens = model.tokens(IMAGES)
    assert torch.allclose(model.encode(IMAGES), tokens, atol=1e-6)  # no statistics
    assert torch.allclose(model.decode(tokens), decoded(TINY, tokens).clamp(0, 1), atol=1e-5)
    # v1 has no decoder that produces pixels, so the written decoder produces normalised colours.
    convert(str(tmp_path / "out"), tmp_path / "v1", "v1")
    convert(str(tmp_path / "v1"), tmp_path / "back")
    back = Autoencoder.load(str(tmp_path / "back"))
    assert back.config.output == "encoder-colours"
    assert torch.allclose(back.decode(tokens), model.decode(tokens), atol=1e-5)


def test_learned_positions_of_a_decoder_are_kept_in_every_format(files, tmp_path):
    state = TINY | {"decoder_pos_embed": TINY["decoder_pos_embed"] + 0.1 * torch.randn(1, 5, 24)}
    save(files[0], state)
    convert(str(files[0]), tmp_path / "ours", options=files[1])
    convert(str(tmp_path / "ours"), tmp_path / "v1", "v1")
    written = torch.load(tmp_path / "v1" / "model.pt")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    convert(str(tmp_path / "v1"), tmp_path / "back")
    ours, back = (Autoencoder.load(str(tmp_path / name)) for name in ("ours", "back"))
    assert ours.config.decoder.positions == back.config.decoder.positions == "learned"
    assert torch.equal(ours.decoder(X), back.decoder(X))
    expected = published_decoder(state, X, side=2).float()
    assert (ours.decoder(X) - expected).norm() < 1e-5 * expected.norm()
    with pytest.raises(UserError, match="diffusers: cannot hold the learned positions"):
        convert(str(tmp_path / "ours"), tmp_path / "theirs", "diffusers")


@pytest.mark.parametrize("whole", [False, True], ids=["decoder", "complete autoencoder"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_training_checkpoint(whole, prefix, files, tmp_path):
    def states(decoder: State) -> State:
        named = {f"decoder.{key}": value for key, value in decoder.items()} if whole else decoder
        frozen = {"encoder.encoder.layernorm.weight": torch.ones(64)} if whole else {}
        return {prefix + key: value for key, value in (named | frozen).items()}

    zeros = {key: value if key == "decoder_pos_embed" else torch.zeros_like(value) for key, value in TINY.items()}
    checkpoint = {"step": 7, "epoch": 1, "model": states(zeros), "ema": states(TINY), "optimizer": {"state": {}}}
    path = save(tmp_path / "ep-last.pt", checkpoint)
    assert_is_tiny(read(str(path), files[1]))


def test_statistics_without_a_mean_keep_no_mean(files, tmp_path):
    path, options = files
    assert options.statistics
    save(options.statistics, STATISTICS | {"mean": None})
    convert(str(path), tmp_path / "raekit", options=options)
    convert(str(tmp_path / "raekit"), tmp_path / "v1", "v1")
    for name in ("raekit", "v1"):
        assert_is_tiny(read(str(tmp_path / name)), mean=None)
    assert torch.load(tmp_path / "v1" / "stat.pt", weights_only=True)["mean"] is None
    assert Autoencoder.load(str(tmp_path / "raekit")).mean is None


def test_exact_statistics_in_float64(files):
    path, options = files
    assert options.statistics
    save(options.statistics, {key: value.double() for key, value in STATISTICS.items()})
    assert_is_tiny(read(str(path), options))


def test_decoder_of_another_size_needs_its_configuration(files, tmp_path, monkeypatch):
    path, options = files
    monkeypatch.setattr(autoencoders, "DECODERS", {"ViT-B": SIZES | {"width": 768}})
    with pytest.raises(UserError, match=r"model.pt: no published decoder has width 24 \(published: ViT-B 768\)"):
        read(str(path), options)
    (tmp_path / "config.json").write_text(to_json(published_decoder_config(tiny_config())))
    for config in (tmp_path, tmp_path / "config.json"):
        given = FileOptions(encoder="dinov2-b", statistics=options.statistics, decoder_config=config)
        assert_is_tiny(read(str(path), given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_norm.bias": None}, "missing decoder_norm.bias; this looks like a ViT-tiny decoder for 64 channels"),
        ({"decoder_layers.1.attention.attention.key.bias": None}, "missing .*key.bias"),
        ({"mask_token": torch.ones(1)}, "unexpected mask_token"),
        ({"decoder_layers.2.layernorm_before.bias": torch.ones(24)}, "unexpected .*; this looks like a width-24, 3-l"),
        (
            {"decoder_embed.weight": torch.ones(24, 80)},
            r"decoder_embed.weight is \(24, 80\), expected \(24, 64\); .* for 80 channels, 4 tokens, patches of 4",
        ),
        ({"decoder_pos_embed": torch.ones(1, 10, 24)}, r"is \(1, 10, 24\), expected \(1, 5, 24\); .* 9 tokens"),
        ({"trainable_cls_token": torch.ones(1, 1, 20)}, "trainable_cls_token is"),
        ({"decoder_pred.weight": torch.ones(50, 24)}, "decoder_pred.weight is"),
    ],
)
def test_decoder_is_read_strictly(changes: dict[str, torch.Tensor | None], message: str, files, tmp_path):
    state = {key: value for key, value in (TINY | changes).items() if value is not None}
    path = save(tmp_path / "changed.pt", state)
    with pytest.raises(UserError, match=f"changed.pt: does not fit dinov2-b: .*{message}"):
        read(str(path), files[1])


def test_position_table_may_be_absent(files, tmp_path):
    rest = {key: value for key, value in TINY.items() if key != "decoder_pos_embed"}
    assert_is_tiny(read(str(save(tmp_path / "rest.pt", rest)), files[1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"x_embedder.proj.weight": torch.ones(1)},
            "holds a denoiser; leave out --encoder, --statistics, which",
        ),
        (STATISTICS, "no published decoder; this looks like latent statistics"),
        (
            {
                "decoder.decoder_embed.bias": torch.ones(1),
                "decoder.decoder_layers.0.attention.to_q.weight": torch.ones(1),
            },
            "no published decoder; .* AutoencoderRAE: give their folder",
        ),
        ({"strange": torch.ones(1)}, "holds no published decoder$"),
        ({"decoder_embed.weight": torch.ones(1), "decoder_pred.weight": torch.ones(1)}, "no published decoder$"),
        ({"step": 3}, "checkpoint: not a state dict, because these are not tensors: step"),
        (torch.ones(3), "not a state dict; expected a dictionary of tensors"),
    ],
)
def test_file_without_a_decoder_is_described(content: Any, message: str, files, tmp_path):
    path = save(tmp_path / "what.pt", content)
    with pytest.raises(UserError, match=f"what.pt: .*{message}"):
        read(str(path), files[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"var": torch.ones(64, 3, 3)}, r"have shape \(64, 3, 3\), but the encoder's latents have shape \(64, 2, 2\)"),
        ({"var": torch.ones(4)}, "statistics: var must be"),
        ({"var": torch.ones(LATENT), "std": 1}, "statistics: unknown std"),
        ([torch.ones(LATENT)], "not a state dict; expected a dictionary of tensors"),
    ],
)
def test_unsuitable_statistics_are_rejected(content: Any, message: str, files):
    path, options = files
    save(options.statistics, content)
    with pytest.raises(UserError, match=f"stat.pt: .*{message}"):
        read(str(path), options)


def test_the_last_block_may_be_given_by_its_number(files, encoder_folder, tmp_path):
    path, options = files
    encoder = f"dinov2_with_registers:{encoder_folder}"
    own = replace(options, encoder=encoder, encoder_size=28, layers=LayersConfig(blocks=(0,)))  # its only block
    convert(str(path), tmp_path / "model", options=own)
    convert(str(tmp_path / "model"), tmp_path / "v1", "v1")
    assert (tmp_path / "v1" / "model.pt").is_file()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_converted(files, tmp_path, value):
    path, options = files
    save(path, TINY | {"decoder_norm.weight": TINY["decoder_norm.weight"] * value})
    with pytest.raises(UserError, match=r"model\.pt: .*norm.* has values that are not finite"):
        convert(str(path), tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_layers_that_the_encoder_lacks_are_rejected(files, encoder_folder):
    path, options = files
    own = replace(options, encoder=f"dinov2_with_registers:{encoder_folder}", encoder_size=28)
    assert_is_tiny(read(str(path), own))
    with pytest.raises(UserError, match=r"layers\.blocks: 11, but dinov2_with_registers:.* has blocks 0 to 0"):
        read(str(path), replace(own, layers=LAYERS["k7"]))


def test_unsuitable_options_are_named(files, tmp_path):
    path, options = files
    with pytest.raises(UserError, match=r"model.pt: .* does not name its encoder; add it, for example --encoder"):
        read(str(path))
    with pytest.raises(UserError, match="encoder_size: 30 is not a multiple of dinov2-b's patch size 14"):
        read(str(path), FileOptions(encoder="dinov2-b", encoder_size=30))
    with pytest.raises(UserError, match=r"does not fit dinov2-b: decoder_pos_embed is \(1, 5, 24\)"):
        read(str(path), FileOptions(encoder="dinov2-b", encoder_size=42))
    convert(str(path), tmp_path / "out", options=options)
    with pytest.raises(UserError, match="out: describes itself; leave out --encoder, --statistics"):
        read(str(tmp_path / "out"), options)
    with pytest.raises(UserError, match="out: already exists and is not empty"):
        convert(str(path), tmp_path / "out", options=options)
    form: Any = "diffuser"
    with pytest.raises(UserError, match="to: 'diffuser' is none of raekit, v1, diffusers"):
        convert(str(path), tmp_path / "new", form, options)
    with pytest.raises(UserError, match=r"none.pt: no such file"):
        read(str(tmp_path / "none.pt"), options)
    with pytest.raises(
        UserError, match=r"nothing: no such folder or model; give .* a name that `raekit models` lists$"
    ):
        read("nothing")
    with pytest.raises(UserError, match=r"rae-dinov2b: no such folder or model; did you mean rae-dinov2-b") as info:
        read("rae-dinov2b")
    assert str(info.value).count("rae-") <= 4  # itself, and at most three close names


# YAML.


def test_v1_folder_round_trip(files, tmp_path):
    path, options = files
    convert(str(path), tmp_path / "v1", "v1", options)
    assert sorted(p.name for p in (tmp_path / "v1").iterdir()) == ["config.json", "config.yaml", "model.pt", "stat.pt"]
    state = torch.load(tmp_path / "v1" / "model.pt", weights_only=True)
    assert state.keys() == TINY.keys()
    assert all(torch.allclose(state[key], TINY[key], rtol=0, atol=1e-6) for key in TINY)
    for source in (tmp_path / "v1", tmp_path / "v1" / "config.yaml"):
        parts = read(str(source))
        assert_is_tiny(parts)
        assert parts.config.encoder_size == 28
    assert read_json(tmp_path / "v1" / "config.json")["decoder_num_attention_heads"] == 3


PARAMS = {
    "encoder_cls": "Dinov2withNorm",
    "encoder_config_path": "other/path",
    "encoder_input_size": 28,
    "decoder_config_path": "configs/decoder/tiny",
    "decoder_patch_size": 4,
    "pretrained_decoder_path": "models/model.pt",
    "noise_tau": 0.8,
    "reshape_to_2d": True,
    "normalization_stat_path": "models/stat.pt",
    "eps": "1e-3",  # YAML parses 1e-3 as a string
}


def repository(root: Path, encoder: str, params: dict[str, Any] | None = None, **sections: Any) -> Path:
    """Write a repository in the published layout: the YAML is some folders down, its paths start at the root."""
    save(root / "models" / "model.pt", TINY)
    save(root / "models" / "stat.pt", STATISTICS)
    for folder, text in (("configs/decoder/tiny", to_json(published_decoder_config(tiny_config()))),):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "config.json").write_text(text)
    path = root / "configs" / "stage1" / "tiny.yaml"
    path.parent.mkdir(exist_ok=True)
    values = PARAMS | {"encoder_params": {"dinov2_path": encoder, "normalize": True}} | (params or {})
    values = {key: value for key, value in values.items() if value != "absent"}
    content = {"stage_1": {"target": "stage1.RAE", "params": values}, "training": {"epochs": 16}} | sections
    path.write_text(yaml.safe_dump(content))
    return path


def test_published_yaml(encoder_folder, tmp_path):
    parts = read(str(repository(tmp_path, encoder_folder)))
    assert parts.config.encoder in REGISTRY
    assert parts.config.encoder_size == 28
    assert parts.config.decoder == tiny_config()
    assert torch.allclose(parts.var + 1e-5, STATISTICS["var"] + 1e-3)  # the YAML's own eps
    assert parts.mean is not None


def test_unregistered_encoder_of_a_yaml(tmp_path):
    for params in (
        {"encoder_params": {"dinov2_path": "nothing"}},
        {"encoder_params": {}, "encoder_config_path": "nothing"},
    ):
        with pytest.raises(UserError, match=r"encoder dinov2_with_registers:.*nothing"):
            read(str(repository(tmp_path, "", params)))


def test_complete_checkpoint_of_a_yaml_overrides_the_decoder(encoder_folder, tmp_path):
    stage = {"target": "stage1.RAE", "ckpt": "models/whole.pt"}
    zeros = TINY | {"decoder_norm.bias": torch.full((24,), 5.0)}
    save(tmp_path / "models" / "whole.pt", {"model": {f"decoder.{key}": value for key, value in zeros.items()}})
    values = yaml.safe_load(repository(tmp_path, encoder_folder).read_text())
    path = repository(tmp_path, encoder_folder, stage_1=stage | {"params": values["stage_1"]["params"]})
    assert (read(str(path)).decoder["norm.bias"] == 5).all()


@pytest.mark.parametrize(
    ("params", "sections", "message"),
    [
        ({"noise_tua": 0.8}, {}, "stage_1: params.noise_tua: Unexpected"),
        ({}, {"stage2": {}}, "unknown section stage2; expected stage_1, stage_2"),
        ({"encoder_params": {"dinov2_path": "x", "normalise": True}}, {}, "params.encoder_params.normalise"),
        ({"encoder_params": {"dinov2_path": "x", "normalize": False}}, {}, "params.encoder_params.normalize"),
        ({"reshape_to_2d": False}, {}, "params.reshape_to_2d"),
        ({"encoder_cls": "Swin"}, {}, "params.encoder_cls"),
        ({"encoder_params": {}, "encoder_config_path": "absent"}, {}, "names no encoder"),
        ({"decoder_config_path": "absent"}, {}, "params.decoder_config_path: .*required"),
        ({"decoder_config_path": "configs/none"}, {}, "configs/none is neither in the working folder nor"),
        ({"pretrained_decoder_path": "absent"}, {}, "names no decoder"),
        ({"normalization_stat_path": "models/none.pt"}, {}, "models/none.pt is neither"),
        ({}, {"stage_1": {"target": "stage1.VAE", "params": PARAMS}}, "stage_1.target = stage1.VAE is not supported"),
        ({}, {"stage_1": None}, "not a published YAML, because it has no section stage_1"),
    ],
)
def test_error_names_the_fault_in_a_yaml(params, sections, message, encoder_folder, tmp_path):
    path = repository(tmp_path, encoder_folder, params, **sections)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        read(str(path))


@pytest.mark.parametrize(
    "text",
    ["stage_1: [", "!!python/object/apply:os.mkdir [sprung]", "stage_1: 2024-99-99", "[" * 1000, "\x00", "- 3", ""],
)
def test_hostile_yaml(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad.yaml: (not valid YAML|not a published YAML)"):
        read("bad.yaml")
    assert not Path("sprung").exists()
    with pytest.raises(UserError, match=r"none.yaml: no such file"):
        read("none.yaml")


def test_encoder_without_a_v1_class_gets_no_yaml(files, tiny_model, tmp_path):
    convert(str(tiny_model), tmp_path / "v1", "v1")
    assert sorted(p.name for p in (tmp_path / "v1").iterdir()) == ["config.json", "model.pt", "stat.pt"]
    ours = load_file(tiny_model / "autoencoder" / "model.safetensors")
    state = torch.load(tmp_path / "v1" / "model.pt", weights_only=True)
    assert torch.equal(state["decoder_norm.weight"], ours["norm.weight"])
    convert(str(tiny_model), tmp_path / "copy")
    copy, model = Autoencoder.load(str(tmp_path / "copy")), Autoencoder.load(str(tiny_model))
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(copy.decode(copy.encode(images)), model.decode(model.encode(images)))


def test_damaged_raekit_model_is_rejected(files, tmp_path):
    path, options = files
    convert(str(path), tmp_path / "out", options=options)
    weights = tmp_path / "out" / "autoencoder" / "model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if key != "norm.bias"}, weights)
    with pytest.raises(UserError, match=r"missing norm.bias"):
        convert(str(tmp_path / "out"), tmp_path / "v1", "v1")


# Names.


def publish(hub: Hub, release: Release) -> None:
    """Put small files on the Hub, for a token grid of the release's size."""
    side = release.fields.get("encoder_size", 28) // 14
    save(hub.root / release.repository / release.decoder, state_dict(decoder_shapes(token_dim=64, tokens=side**2)))
    if release.config:
        (hub.root / release.repository / release.config).write_text("{}")
    if release.statistics:
        save(hub.root / release.repository / release.statistics, {"mean": None, "var": torch.ones(64, side, side)})


V1 = [name for name in RELEASES if name.startswith("rae-")]


@pytest.mark.parametrize("name", V1)
def test_published_name_is_converted_once(name, hub, tmp_path):
    publish(hub, RELEASES[name])
    model = Autoencoder.load(name)
    assert hub.asked == [f"nyu-visionx/RAE-collections/{file}" for file in RELEASES[name].files]
    assert model.latent_shape[1] == (32 if name.endswith("512") else 2)
    assert model.mean is None
    assert (tmp_path / "cache" / name / "autoencoder" / "config.json").is_file()
    hub.down = True
    again = Autoencoder.load(name)
    assert len(hub.asked) == len(RELEASES[name].files)
    assert torch.equal(again.decoder.norm.bias, model.decoder.norm.bias)


def test_release_that_produces_pixels(hub, monkeypatch):
    release = Release(
        repository="r/v2", decoder="decoder.pt", statistics="stats.pt", fields={"encoder": "mae-b", "output": "pixels"}
    )
    monkeypatch.setitem(RELEASES, "rae-mae-b", release)
    publish(hub, release)
    model = Autoencoder.load("rae-mae-b")
    decoded = torch.rand(1, 3, 8, 8)
    assert torch.equal(model.to_pixels(decoded), decoded)


def test_decoders_of_general_images(hub):
    release = RELEASES["scale-rae-webssl-300m"]
    publish(hub, release)
    with pytest.raises(UserError, match=r"config.json: .*decoder_hidden_size, .* missing"):
        Autoencoder.load("scale-rae-webssl-300m")
    config = published_decoder_config(DecoderConfig(token_dim=64, grid=(2, 2), patch_size=4, **SIZES))
    (hub.root / release.repository / "config.json").write_text(to_json(config))
    model = Autoencoder.load("scale-rae-webssl-300m")
    assert hub.asked[-2:] == [f"nyu-visionx/webssl300m_decoder/{file}" for file in ("model.pt", "config.json")]
    assert (model.config.encoder, model.mean) == ("webssl-300m", None)
    images = torch.rand(1, 3, 28, 28)
    assert torch.allclose(model.encode(images), to_grid(model.encoder(images), (2, 2)), atol=1e-6)  # not whitened


def test_decoders_of_fusereg(hub, tmp_path, monkeypatch):
    """A decoder of v1's layout in safetensors, for RAE v2's latents of 23 blocks, with v1's output."""
    import transformers

    config = transformers.DINOv3ViTConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=24, num_attention_heads=1, num_register_tokens=4
    )
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / "encoder")
    spec = replace(ORIGINAL["dinov3-l"], width=64, image_size=32, hub_id=str(tmp_path / "encoder"))
    monkeypatch.setitem(REGISTRY, "dinov3-l", spec)
    file = hub.root / "Hongyang-Du/FuseReg/dinov3-vitl/decoder_k23/p0.95.safetensors"
    file.parent.mkdir(parents=True)
    save_file(TINY, file)
    model = Autoencoder.load("fusereg-dinov3-l-k23-p95")
    assert hub.asked == ["Hongyang-Du/FuseReg/dinov3-vitl/decoder_k23/p0.95.safetensors"]
    tokens = model.encode(torch.rand(2, 3, 32, 32))  # not whitened
    assert model.encoder.layers == LAYERS["k23"]
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(model.decode(tokens), (decoded(TINY, tokens) * std + mean).clamp(0, 1), atol=1e-5)


def test_a_repository_that_needs_its_own_code_is_rejected(tmp_path):
    cached = tmp_path / "models--someone--their-rae" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    for folder, name in (tmp_path, f"{tmp_path}/config.json"), (cached, "someone/their-rae"):
        (folder / "config.json").write_text(to_json({"auto_map": {"AutoModel": "modeling.Mine"}}))
        for load in (lambda place: convert(place, tmp_path / "out")), Autoencoder.load:
            with pytest.raises(UserError, match=rf"^{name}: names code of its repository .*choose a published model"):
                load(str(folder))
    for repository, name in REPLACED.items():
        with pytest.raises(UserError, match=rf"^{repository}@main: needs code of its repository.* use {name}, "):
            Autoencoder.load(f"{repository}@main")
        assert name in RELEASES


def test_published_name_as_a_source(hub, tmp_path):
    publish(hub, RELEASES["rae-dinov2-b"])
    convert("rae-dinov2-b", tmp_path / "v1", "v1")
    assert (tmp_path / "v1" / "config.yaml").is_file()


def test_error_without_a_network_contains_the_command(hub, tmp_path):
    hub.down = True
    command = (
        "hf download nyu-visionx/RAE-collections decoders/dinov2/wReg_base/ViTXL_n08/model.pt "
        "stats/dinov2/wReg_base/imagenet1k/stat.pt"
    )
    with pytest.raises(UserError, match=f"rae-dinov2-b: .*: the Hub did not deliver .*; run `{re.escape(command)}`"):
        Autoencoder.load("rae-dinov2-b")
    hub.down = False
    publish(hub, RELEASES["rae-dinov2-b"])
    Autoencoder.load("rae-dinov2-b")  # the failure leaves nothing behind


def test_damaged_download_is_not_cached(hub, tmp_path):
    publish(hub, RELEASES["rae-dinov2-b"])
    path = hub.root / RELEASES["rae-dinov2-b"].repository / RELEASES["rae-dinov2-b"].decoder
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model.pt: damaged"):
        Autoencoder.load("rae-dinov2-b")
    path.write_bytes(content)
    Autoencoder.load("rae-dinov2-b")


def test_cache_is_in_the_hugging_face_home(monkeypatch, tmp_path):
    monkeypatch.delenv("RAEKIT_CACHE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert releases.cache_folder() == tmp_path / "raekit"
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAEKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set RAEKIT_CACHE to a writable folder"):
        Autoencoder.load("rae-dinov2-b")


def test_a_conversion_that_fails_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    write = artifacts.write

    def failing(folder: Path, kind: str, *given: Any, **more: Any) -> None:
        if kind == "denoiser":
            raise UserError("the disk is full")
        write(folder, kind, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write", failing)
        with pytest.raises(UserError, match="the disk is full"):
            convert(str(tiny_model), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    convert(str(tiny_model), tmp_path / "out")
    assert raekit.load(str(tmp_path / "out")).classes == raekit.load(str(tiny_model)).classes
