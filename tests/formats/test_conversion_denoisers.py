"""Test the reading of published denoisers: files, names and YAML. A folder stands in for the Hub."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raekit import randomness
from raekit.config import to_json
from raekit.errors import UserError
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling, sample_latents
from raekit.formats import releases as releases
from raekit.formats.conversion import FileOptions, convert, read
from raekit.formats.decoder_keys import published_decoder_config
from raekit.formats.denoiser_keys import denoiser_config, denoiser_v2_config
from raekit.formats.parts import DenoiserParts
from raekit.formats.releases import DENOISERS, RELEASES
from raekit.formats.yaml_files import read_published
from raekit.inference.model import load, load_published
from raekit.models.denoiser import Denoiser
from raekit.models.registry import REGISTRY, LayersConfig
from tests.formats.conftest import SIZES, Hub, save
from tests.formats.test_keys import (
    decoder_shapes,
    denoiser_shapes,
    denoiser_v2_shapes,
    published_denoiser,
    published_denoiser_v2,
)
from tests.reference import state_dict

pytestmark = pytest.mark.usefixtures("tiny")

# All denoisers here are for the latents of the small encoder: 64 channels, 2 x 2 tokens.
WIDE: dict[str, Any] = {
    "input_size": 2,
    "patch_size": 1,
    "in_channels": 64,
    "hidden_size": [24, 64],
    "depth": [2, 1],
    "num_heads": [2, 4],
    "num_classes": 4,
}
PLAIN = WIDE | {"hidden_size": 64, "depth": 2, "num_heads": 4}
SECOND = {
    "input_size": 2,
    "patch_size": [1, 1],
    "in_channels": 64,
    "hidden_size": [24, 64],
    "depth": [9, 1],
    "num_heads": [2, 4],
    "num_classes": 4,
    "base_model_depth": 8,
    "num_t_tokens": 2,
    "num_c_tokens": 3,
}
X, T, Y = torch.randn(3, 64, 2, 2), torch.tensor([0.1, 0.5, 0.95]), torch.tensor([0, 2, 1])


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    if "num_t_tokens" in values:
        return state_dict(denoiser_v2_shapes(values), context=values["num_t_tokens"] + values["num_c_tokens"])
    return state_dict(denoiser_shapes(values))


def denoiser_of(path: Path, options: FileOptions | None = None) -> DenoiserParts:
    found = read(str(path), options).denoiser
    assert found
    return found


# Files.


@pytest.mark.parametrize(
    "values",
    [
        WIDE,
        PLAIN,
        WIDE | {"use_qknorm": True, "wo_shift": True},
        PLAIN | {"patch_size": 2, "hidden_size": 256},
        PLAIN | {"use_rmsnorm": False, "use_swiglu": False, "use_pos_embed": False},
        PLAIN | {"use_rope": False, "hidden_size": 384, "num_heads": 6},  # of a published width
    ],
)
def test_shapes_give_the_configuration(values, tmp_path):
    parts = denoiser_of(save(tmp_path / "stage2_model.pt", weights(values)))
    assert parts.config == denoiser_config(values)
    expected = published_denoiser(weights(values), values, X, T, Y)
    with torch.no_grad():
        assert (parts.build()(X, T, Y) - expected).norm() < 1e-5 * expected.norm()


def test_shapes_give_the_configuration_of_v2(tmp_path):
    path = save(tmp_path / "checkpoint.pt", weights(SECOND))
    parts = denoiser_of(path)
    assert parts.config == denoiser_v2_config(SECOND)
    with torch.no_grad():
        ours = parts.build()(X, T, Y, with_base=True)
    for mine, theirs in zip(ours, published_denoiser_v2(weights(SECOND), SECOND, X, T, Y), strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    assert denoiser_of(path, FileOptions(prediction="velocity")).config.prediction == "velocity"


@pytest.mark.parametrize("values", [WIDE, PLAIN], ids=["DiT-DH", "DiT"])
def test_learned_positions_become_weights_of_the_model(values, tmp_path):
    state = weights(values)
    state["pos_embed"] += 0.1 * torch.randn_like(state["pos_embed"])
    path = save(tmp_path / "stage2_model.pt", {"ema": state})
    config = denoiser_of(path).config
    assert config == replace(denoiser_config(values), positions="learned")
    expected = published_denoiser(state, values, X, T, Y)
    place = str(path)
    for folder in ("out", "copy"):
        convert(place, tmp_path / folder)
        model = Denoiser.load(str(tmp_path / folder))
        assert torch.equal(model.state_dict()["positions"], state["pos_embed"][0])
        assert (model(X, T, Y) - expected).norm() < 1e-5 * expected.norm()
        place = str(tmp_path / folder)


@pytest.mark.parametrize("values", [WIDE, SECOND], ids=["v1", "v2"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["bare", "ema", "model"])
def test_checkpoints(values, prefix, kind, tmp_path):
    state = {prefix + key: value for key, value in weights(values).items()}
    others = {key: torch.zeros_like(value) for key, value in state.items()}
    checkpoints = {
        "bare": state,
        "ema": {"ema": state, "model": others, "step": 3, "optimizer": {"state": {}}},
        "model": {"model": state, "ema": None, "epoch": 7},
    }
    parts = denoiser_of(save(tmp_path / "ep-last.pt", checkpoints[kind]))
    assert torch.equal(parts.state["final.out.weight"], weights(values)["final_layer.linear.weight"])


def test_a_denoiser_becomes_a_model(hub, tmp_path):
    publish(hub, "rae-dinov2-b")
    path = save(tmp_path / "stage2_model.pt", weights(WIDE))
    parts = convert(str(path), tmp_path / "out", options=FileOptions(autoencoder="rae-dinov2-b"))
    model = load(str(tmp_path / "out"))
    assert parts.denoiser
    assert model.denoiser.config == parts.denoiser.config
    convert(str(tmp_path / "out"), tmp_path / "copy")
    assert torch.equal(load(str(tmp_path / "copy")).denoiser(X, T, Y), model.denoiser(X, T, Y))
    convert(str(tmp_path / "out"), tmp_path / "v1", "v1")
    convert(str(path), tmp_path / "alone")
    assert Denoiser.load(str(tmp_path / "alone")).config == model.denoiser.config
    with pytest.raises(UserError, match="alone: holds no autoencoder"):
        load(str(tmp_path / "alone"))
    with pytest.raises(UserError, match="alone: holds no autoencoder"):
        convert(str(tmp_path / "alone"), tmp_path / "x", "v1")


def test_yaml_of_a_denoiser_overrides_its_shapes(tmp_path):
    values = WIDE | {"mlp_ratio": 3.0}
    path = save(tmp_path / "stage2_model.pt", weights(values))
    with pytest.raises(
        UserError,
        match=r"stage2_model.pt: does not fit the denoiser that its shapes describe: .*w_in.* this looks like a "
        r"DiT\^DH \(2 x 24, head 1 x 64\) for latents 64x2x2 of 4 classes",
    ):
        read(str(path))
    described = sampling_yaml(tmp_path, stage_2=stage_2(values, None), misc={"time_dist_shift_dim": 1024})
    assert denoiser_of(path, FileOptions(denoiser_config=described)).config == replace(
        denoiser_config(values), shift=0.5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t_embedder.W": None}, "missing time.frequencies; this looks like a DiT"),
        ({"blocks.2.attn.qkv.bias": None}, "missing head_blocks.0.attention.qkv.bias"),
        ({"extra.weight": torch.ones(1)}, "unexpected extra.weight"),
        ({"pos_embed": torch.ones(1, 4, 25)}, "pos_embed: is .*; this looks like a DiT"),
        ({"enc_feat_rope.freqs_sin": torch.ones(4, 12)}, "enc_feat_rope.freqs_sin: not the fixed .*; this looks like"),
        ({"enc_feat_rope.freqs_cos": torch.ones(9, 12)}, "enc_feat_rope.freqs_cos: is .*; this looks like"),
        ({"y_embedder.embedding_table.weight": None}, "holds no published denoiser; this looks like a denoiser \\(st"),
        ({"pos_embed": None, "dec_feat_rope.freqs_cos": None}, "no position table, .*--denoiser-config FILE.yaml"),
        ({"enc_feat_rope.freqs_cos": None}, "no published size has width 24"),
    ],
)
def test_a_denoiser_is_read_strictly(changes: dict[str, torch.Tensor | None], message: str, tmp_path):
    state = {key: value for key, value in (weights(WIDE) | changes).items() if value is not None}
    path = save(tmp_path / "changed.pt", state)
    with pytest.raises(UserError, match=f"changed.pt: .*{message}"):
        read(str(path))


@pytest.mark.parametrize("name", ["t_embedder.learnable_tokens", "ctx_embedder.learnable_tokens"])
def test_tokens_that_a_file_lacks_are_named(name, tmp_path):
    state = {key: value for key, value in weights(SECOND).items() if key != name}
    with pytest.raises(UserError, match=f"changed.pt: .*missing {name}"):
        read(str(save(tmp_path / "changed.pt", state)))


def test_a_folder_may_have_the_suffix_of_a_file(tmp_path):
    convert(str(save(tmp_path / "stage2_model.pt", weights(WIDE))), tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "model.pt")
    (tmp_path / "copy.yaml").mkdir()
    convert(str(tmp_path / "model.pt"), tmp_path / "copy.yaml")
    assert Denoiser.load(str(tmp_path / "copy.yaml")).config == denoiser_config(WIDE)


def test_a_head_as_wide_as_the_backbone_needs_a_yaml(tmp_path):
    values = WIDE | {"hidden_size": [64, 64], "num_heads": [2, 4]}
    path = save(tmp_path / "stage2_model.pt", weights(values))
    with pytest.raises(UserError, match=r"equally wide.*; give its YAML with --denoiser-config"):
        read(str(path))
    described = sampling_yaml(tmp_path, stage_2=stage_2(values, None))
    found = denoiser_of(path, FileOptions(denoiser_config=described)).config
    assert found == replace(denoiser_config(values), shift=2.0)


def test_options_without_effect_are_rejected(tmp_path):
    path = save(tmp_path / "stage2_model.pt", weights(WIDE))
    with pytest.raises(UserError, match="holds a denoiser; leave out --encoder, --output, which"):
        read(str(path), FileOptions(encoder="dinov2-b", output="pixels"))
    with pytest.raises(UserError, match="holds a denoiser, where an autoencoder is needed"):
        convert(str(path), tmp_path / "v1", "v1")
    decoder = save(tmp_path / "model.pt", state_dict(decoder_shapes(token_dim=64, tokens=4)))
    with pytest.raises(UserError, match="holds a decoder; leave out --autoencoder, which"):
        read(str(decoder), FileOptions(encoder="dinov2-b", autoencoder="rae-dinov2-b"))


def test_denoiser_for_other_latents_is_rejected(hub, tmp_path):
    publish(hub, "rae-dinov2-b")
    path = save(tmp_path / "stage2_model.pt", weights(WIDE | {"input_size": 3}))
    with pytest.raises(UserError, match=r"for latents \(64, 3, 3\), the autoencoder has \(64, 2, 2\)"):
        convert(str(path), tmp_path / "out", options=FileOptions(autoencoder="rae-dinov2-b"))


# Names.


def publish(hub: Hub, name: str) -> None:
    """Put small files for the published model `name` on the Hub."""
    if name in DENOISERS:
        values = SECOND if name.startswith("raev2") else WIDE
        release = DENOISERS[name]
        save(hub.root / release.repository / release.denoiser, {"ema": weights(values), "model": None})
        return
    release = RELEASES[name]
    save(hub.root / release.repository / release.decoder, state_dict(decoder_shapes(token_dim=64, tokens=4)))
    if release.statistics:
        save(hub.root / release.repository / release.statistics, {"mean": None, "var": torch.ones(64, 2, 2)})


@pytest.fixture
def small_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the releases describe the small denoisers that `publish` puts on the Hub."""
    for name, release in list(DENOISERS.items()):
        config = denoiser_v2_config(SECOND) if name.startswith("raev2") else denoiser_config(WIDE)
        autoencoder = release.autoencoder.removesuffix("-512")
        monkeypatch.setitem(DENOISERS, name, replace(release, config=config, autoencoder=autoencoder))
    layers = "raev2-dinov3-l-k7"
    fields = {key: value for key, value in RELEASES[layers].fields.items() if key != "layers"}
    monkeypatch.setitem(RELEASES, layers, replace(RELEASES[layers], fields=fields))


@pytest.mark.usefixtures("small_releases")
@pytest.mark.parametrize("name", ["dit-dh-xl-512", "raev2-k7-256"])
def test_name_of_a_denoiser_gives_the_complete_model(name, hub, tmp_path, monkeypatch):
    release = DENOISERS[name]
    publish(hub, name)
    publish(hub, release.autoencoder)
    model = load(name)
    assert f"{release.repository}/{release.denoiser}" in hub.asked
    assert model.denoiser.config == release.config
    assert (tmp_path / "cache" / name / "denoiser" / "config.json").is_file()
    assert not (tmp_path / "cache" / name / "autoencoder").exists()  # cached once for all its denoisers
    hub.down = True
    monkeypatch.setattr(releases, "cache_lock", None)  # a complete cache need not be writable
    asked = len(hub.asked)
    assert torch.equal(load(name).denoiser(X, T, Y), model.denoiser(X, T, Y))
    assert len(hub.asked) == asked
    convert(name, tmp_path / "copy")
    assert torch.equal(load(str(tmp_path / "copy")).denoiser(X, T, Y), model.denoiser(X, T, Y))
    convert(name, tmp_path / "v1", "v1")


@pytest.mark.usefixtures("small_releases")
def test_loading_only_a_denoiser_does_not_download_its_autoencoder(hub):
    publish(hub, "dit-dh-s-256-ep14")
    Denoiser.load("dit-dh-s-256-ep14")
    assert hub.asked == ["nyu-visionx/RAE-collections/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt"]


@pytest.mark.usefixtures("small_releases")
def test_file_that_is_not_the_release_is_described(hub):
    save(hub.root / DENOISERS["dit-dh-xl-256"].repository / DENOISERS["dit-dh-xl-256"].denoiser, weights(PLAIN))
    with pytest.raises(UserError, match=r"stage2_model.pt: pos_embed: is .*; this looks like a DiT \(2 x 64\)"):
        load_denoiser()
    hub.down = True
    with pytest.raises(UserError, match=r"dit-dh-xl-256: .*: the Hub did not deliver ") as info:
        load_denoiser()
    needed = [DENOISERS["dit-dh-xl-256"].files, RELEASES["rae-dinov2-b"].files, [REGISTRY["dinov2-b"].hub_id]]
    assert all(f" {' '.join(files)}`" in str(info.value) for files in needed)


def load_denoiser() -> Denoiser:
    return Denoiser.load("dit-dh-xl-256")


@pytest.mark.parametrize("name", DENOISERS)
def test_releases_match_the_specification(name):
    config = DENOISERS[name].config
    assert config.num_classes == 1000
    shifts = {"raev2-k7-256": 8.0, "dit-dh-xl-512": 13.8564, "dit-dh-s-512-ep20": 13.8564}
    assert config.shift == pytest.approx(shifts.get(name, 6.9282), rel=1e-4)
    assert config.backbone.width == (1440 if name.startswith("raev2") else 384 if "-s-" in name else 1152)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Denoiser(config).parameters())
    if name in ("dit-dh-xl-256", "dit-dh-s-256-ep14"):
        assert parameters == pytest.approx(838.7e6 if "xl" in name else 196.5e6, rel=2e-3)


def test_names_are_unique():
    assert not RELEASES.keys() & DENOISERS.keys()
    assert {release.autoencoder for release in DENOISERS.values()} <= RELEASES.keys()
    assert releases.cached.__name__ == "cached"


# YAML.

RAE = {
    "encoder_cls": "Dinov2withNorm",
    "encoder_input_size": 28,
    "decoder_config_path": "configs/decoder/tiny",
    "decoder_patch_size": 4,
    "pretrained_decoder_path": "models/model.pt",
    "normalization_stat_path": "models/stat.pt",
}
SAMPLER = {
    "mode": "ODE",
    "params": {"sampling_method": "euler", "num_steps": 5, "atol": 1e-6, "rtol": 1e-3, "reverse": False},
}
TRANSPORT = {
    "params": {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "time_dist_type": "uniform"}
}


def stage_2(values: dict[str, Any], ckpt: str | None) -> dict[str, Any]:
    name = "DDT.DiTwDDTHead" if isinstance(values["hidden_size"], list) else "lightningDiT.LightningDiT"
    return {"target": f"stage2.models.{name}", "params": values} | ({"ckpt": ckpt} if ckpt else {})


def sampling_yaml(root: Path, encoder: str = "dinov2-b", **sections: Any) -> Path:
    """Write a YAML in the published layout, and the files that it names."""
    save(root / "models" / "model.pt", state_dict(decoder_shapes(token_dim=64, tokens=4)))
    save(root / "models" / "stat.pt", {"mean": None, "var": torch.full((64, 2, 2), 0.5)})
    save(root / "models" / "main.pt", {"ema": weights(WIDE)})
    save(root / "models" / "weak.pt", weights(WIDE | {"hidden_size": [16, 64], "num_heads": [2, 4]}))
    config = published_decoder_config(
        releases.read_decoder({"encoder": "dinov2-b"}, root / "models" / "model.pt", None).config.decoder
    )
    (root / "configs" / "decoder" / "tiny").mkdir(parents=True, exist_ok=True)
    (root / "configs" / "decoder" / "tiny" / "config.json").write_text(to_json(config))
    stage_1 = {"target": "stage1.RAE", "params": RAE | {"encoder_params": {"dinov2_path": encoder}}}
    values = {
        "stage_1": stage_1,
        "stage_2": stage_2(WIDE, "models/main.pt"),
        "transport": TRANSPORT,
        "sampler": SAMPLER,
        "guidance": {"method": "cfg", "scale": 1.0, "t_min": 0.0, "t_max": 1.0},
        "misc": {"latent_size": [64, 2, 2], "num_classes": 4, "time_dist_shift_dim": 256, "time_dist_shift_base": 64},
        "training": {"epochs": 80},
    }
    path = root / "configs" / "sampling" / "tiny.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in (values | sections).items() if value is not None}))
    return path


def test_yaml_gives_model_and_sampling(encoder_folder, tmp_path):
    path = sampling_yaml(tmp_path, encoder_folder)
    model, sampling = load_published(path)
    assert sampling == Sampling(steps=5, solver="euler", grid="published")
    assert model.denoiser.config == replace(denoiser_config(WIDE), shift=2.0)
    assert model.autoencoder.mean is None
    assert (model.autoencoder.var == 0.5).all()
    # The arithmetic of the published sampler (RAE v1).
    times = [2 * t / (1 + t) for t in (1 - 0.999 * i / 4 for i in range(5))]
    x = randomness.normal(0, "sample", [0, 1], (64, 2, 2)).double()
    for t, following in pairwise(times):
        v = published_denoiser(weights(WIDE), WIDE, x, torch.full((2,), t), torch.tensor([3, 1]))
        x = x + (following - t) * v
    ours = sample_latents(model.denoiser, torch.tensor([3, 1]), torch.arange(2), 0, sampling, "cpu")
    assert (ours - x).norm() < 1e-4 * x.norm()
    convert(str(path), tmp_path / "converted")
    assert load(str(tmp_path / "converted")).denoiser.config == model.denoiser.config


@pytest.mark.parametrize("spelling", ["_", "-"])
def test_guidance_of_a_yaml(spelling, encoder_folder, tmp_path):
    times = {f"t{spelling}min": 0.1, f"t{spelling}max": 0.9}
    path = sampling_yaml(tmp_path, encoder_folder, guidance={"method": "cfg", "scale": 2.5, **times})
    assert read_published(path)[1].guidance == (Guidance(scale=2.5, start=0.1, end=0.9),)
    weak = WIDE | {"hidden_size": [16, 64], "num_heads": [2, 4]}
    guidance = {"method": "autoguidance", "scale": 1.42, "guidance_model": stage_2(weak, "models/weak.pt")}
    path = sampling_yaml(tmp_path, encoder_folder, guidance=guidance)
    model, sampling = load_published(path)
    assert sampling.guidance == (Guidance(method="auto", scale=1.42),)
    assert sampling.weak
    assert sampling.weak.config == replace(denoiser_config(weak), shift=2.0)
    sample_latents(model.denoiser, torch.tensor([3]), torch.arange(1), 0, sampling, "cpu")
    path = sampling_yaml(tmp_path, encoder_folder, guidance=guidance | {"scale": 1.0})
    assert read_published(path)[1].weak is None


@pytest.mark.parametrize(
    ("published", "ours"),
    [("heun2", {"solver": "heun", "steps": 7}), ("dopri5", {"solver": "dopri5", "atol": 1e-5, "rtol": 1e-4})],
)
def test_solvers_of_a_yaml(published, ours, encoder_folder, tmp_path):
    params = {"sampling_method": published, "num_steps": 7, "atol": 1e-5, "rtol": "1e-4"}
    path = sampling_yaml(tmp_path, encoder_folder, sampler={"params": params})
    assert read_published(path)[1] == Sampling(grid="published", **ours)


def test_yaml_of_v2(encoder_folder, tmp_path):
    params = {key: value for key, value in SECOND.items() if key not in ("num_classes", "num_t_tokens", "num_c_tokens")}
    save(tmp_path / "models" / "second.pt", weights(SECOND))
    rae = {
        "encoder_name": "dinov3-vit-l16",
        "resolution": 28,
        "decoder_config_path": "configs/decoder/tiny",
        "decoder_patch_size": 4,
        "pretrained_decoder_path": "models/model.pt",
        "noise_tau": 0.0,
        "normalization_stat_path": "models/stat.pt",
    }
    sections: dict[str, Any] = {
        "stage_1": {"target": "stage1.RAE", "params": rae},
        "stage_2": {"target": "stage2.models.DDT.DiTwDDTHeadIG", "params": params, "ckpt": "models/second.pt"},
        "conditioning": {"type": "label", "cfg_dropout_prob": 0.1, "arch": {"num_t_tokens": 2, "num_c_tokens": 3}},
        "transport": {"prediction": "x", "time_dist_type": "logit-normal_0_1"},
        "sampler": {"num_steps": 6},
        "guidance": {
            "cfg": {"scale": 1.0, "t_min": 0.0, "t_max": 1.0},
            "ig": {"scale": 1.78, "t_min": 0.1, "t_max": 1},
        },
        "dataset": {"target": "imagenet"},
    }
    path = sampling_yaml(tmp_path, encoder_folder, **sections)
    model, sampling = load_published(path)
    rules = (Guidance(method="internal", scale=1.78, start=0.1),)
    assert sampling == Sampling(steps=6, guidance=rules)
    assert model.denoiser.config == replace(denoiser_v2_config(SECOND), shift=2.0)
    assert (model.autoencoder.config.encoder, model.autoencoder.config.output) == ("dinov3-l", "pixels")
    sample_latents(model.denoiser, torch.tensor([3]), torch.arange(1), 0, sampling, "cpu")
    sections["stage_1"]["params"] = rae | {"encoder_name": "dinov3mls-vit-l16[layers=0]"}
    model, _ = load_published(sampling_yaml(tmp_path, encoder_folder, **sections))
    assert model.autoencoder.config.layers == LayersConfig(blocks=(0,), token_mean=True)
    for name in ("clip-l", "dinov3mls-vit-l16", "dinov3-vit-l16[layers=1]"):
        sections["stage_1"]["params"] = rae | {"encoder_name": name}
        with pytest.raises(UserError, match=r"tiny.yaml: stage_1.params.encoder_name = .* is not supported"):
            load_published(sampling_yaml(tmp_path, encoder_folder, **sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"stage_2": None}, "names no denoiser; stage_2.ckpt is missing"),
        ({"stage_2": stage_2(WIDE, None)}, "names no denoiser; stage_2.ckpt is missing"),
        ({"stage_2": stage_2(WIDE, "models/none.pt")}, "models/none.pt is neither in the working folder"),
        ({"stage_2": stage_2(WIDE | {"depth": [3, 1]}, "models/main.pt")}, "main.pt: does not fit its configuration: "),
        ({"stage_2": stage_2(WIDE | {"use_rope": "x"}, "models/main.pt")}, "stage_2: published denoiser: use_rope"),
        ({"stage_2": stage_2(WIDE | {"roped": 1}, "models/main.pt")}, "stage_2: published denoiser: roped"),
        (
            {"stage_2": stage_2(WIDE, "x") | {"target": "a.Unet"}},
            "stage_2: target = a.Unet is not supported, only DiTw",
        ),
        ({"stage_2": stage_2(WIDE, "x") | {"weights": 1}}, "stage_2: weights"),
        ({"sampler": None}, "has no section sampler, so it does not say how to sample"),
        ({"sampler": {"mode": "SDE"}}, "sampler: mode: Input should be 'ODE'"),
        ({"sampler": {"params": {"sampling_method": "rk4"}}}, "sampler: params.sampling_method"),
        ({"sampler": {"params": {"reverse": True}}}, "sampler: params.reverse"),
        ({"transport": {"params": {"path_type": "VP"}}}, "transport: path_type"),
        ({"transport": {"params": {"prediction": "x"}}}, "DiTwDDTHead with transport.prediction = x is not supported"),
        ({"guidance": {"scale": 2.0, "t_start": 0}}, "guidance: t_start"),
        ({"guidance": {"scale": 2.0, "t_min": 0, "t-min": 0}}, "guidance: gives the same time in two spellings"),
        ({"guidance": {"scale": 2.0, "t_min": 0.9, "t_max": 0.1}}, "guidance: guidance: the interval 0.9-0.1"),
        ({"guidance": {"method": "autoguidance", "scale": 2.0}}, "guidance.guidance_model: missing"),
        (
            {"guidance": {"method": "autoguidance", "scale": 2.0, "guidance_model": stage_2(WIDE, None)}},
            "guidance.guidance_model.ckpt: missing",
        ),
        ({"misc": {"latent_size": [3, 2, 2], "num_classes": 4}}, r"misc.latent_size = \(3, 2, 2\), but the denoiser"),
        ({"misc": {"num_classes": 1000}}, "misc.num_classes = 1000, but the denoiser of .*stage_2 has 4"),
        ({"misc": {"num_classes": 4, "null_label": 0}}, "misc.null_label = 0 is not supported, only 4"),
        ({"misc": {"num_classes": 4, "time_dist_shift_base": 0}}, "time_dist_shift_base must be positive"),
    ],
)
def test_error_names_the_fault_in_a_sampling_yaml(sections, message, encoder_folder, tmp_path):
    path = sampling_yaml(tmp_path, encoder_folder, **sections)
    with pytest.raises(UserError, match=message) as caught:
        load_published(path)
    assert str(tmp_path) in str(caught.value)


def test_training_yaml_gives_only_the_autoencoder(encoder_folder, tmp_path):
    parts = read(str(sampling_yaml(tmp_path, encoder_folder, stage_2=stage_2(WIDE, None))))
    assert parts.autoencoder
    assert parts.denoiser is None
    assert SIZES["width"] == parts.autoencoder.config.decoder.width
