import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raekit.models.discriminator import dino
from tests import reference

Golden = Callable[[str], Path]


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("ditdh_small", ["v", "v_cfg", "ode_sample"]),
        ("ditdh_v2_small", ["full", "base", "ode_sample"]),
        ("dit_small", ["v"]),
        ("timegrid_196608", ["t"]),
        ("decoder_small", ["img"]),
        ("rae_dinov2", ["z", "rec"]),
        ("lpips_vgg", ["value"]),
        ("disc_dino_s16", ["logits"]),
        ("gan_losses", ["hinge_d", "vanilla_d", "g"]),
        ("lr_schedules", ["stage1", "stage2"]),
        ("inception_fid", ["pool", "logits_unbiased", "spatial"]),
        ("metrics_on_features", ["fid_A_B", "precision", "recall", "isc"]),
        ("encoder_dinov3_layers", ["z_last", "z_layers"]),
    ],
)
def test_shared_cases(name: str, outputs: list[str], golden: Golden):
    results = list(reference.check(golden(f"{name}.npz")))
    found = [(status, what) for status, what, _ in results if status != "note"]
    assert found == [("ok", output) for output in outputs]


def test_every_shared_case_is_checked(golden: Golden, capsys: pytest.CaptureFixture[str]):
    paths = sorted(golden("dit_small.npz").parent.glob("*.npz"))
    assert reference.main([str(path) for path in paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines[:-1] if line.startswith("ok")} == {path.stem for path in paths}


DINO_BLOCK = {
    **{f"{name}.{kind}": [192] for name in ("norm1", "norm2") for kind in ("weight", "bias")},
    "attn.qkv.weight": [576, 192],
    "attn.qkv.bias": [576],
    "attn.proj.weight": [192, 192],
    "attn.proj.bias": [192],
    "mlp.fc1.weight": [768, 192],
    "mlp.fc1.bias": [768],
    "mlp.fc2.weight": [192, 768],
    "mlp.fc2.bias": [192],
}


def rewrite(source: Path, target: Path, config: Callable[[dict], Any] | None = None, **arrays: Any) -> Path:
    """A copy of a case with a changed configuration, and arrays changed or (None) left out."""
    with np.load(source) as data:
        content = {key: data[key] for key in data.files}
    values = json.loads(str(content["config"]))
    if config:
        config(values)
    content |= arrays | {"config": json.dumps(values)}
    np.savez(target, **{key: value for key, value in content.items() if value is not None})
    return target


def statuses(path: Path) -> dict[str, str]:
    return {what: status for status, what, _ in reference.check(path)}


LARGE_ERROR = "a relative error above 1e-3"


def says(text: str, message: str) -> bool:
    """Return whether a reason contains `message`. The digits of an error depend on the processor, its size does not."""
    if message != LARGE_ERROR:
        return message in text
    return any(float(number) > 1e-3 for number in re.findall(r"\d\.\d+e[-+]\d+", text))


def reason(path: Path) -> str:
    return next(detail for status, _, detail in reference.check(path) if status == "FAIL")


def test_one_wrong_weight_fails(golden: Golden, monkeypatch: pytest.MonkeyPatch):
    fill = reference.fill_array

    def spoiled(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = fill(name, shape).copy()
        if name == "blocks.1.attn.qkv.weight":
            values[7, 3] += 0.05
        return values

    monkeypatch.setattr(reference, "fill_array", spoiled)
    assert statuses(golden("ditdh_small.npz")) == {"v": "FAIL", "v_cfg": "FAIL", "ode_sample": "FAIL"}


@pytest.mark.parametrize(
    ("name", "array", "output"),
    [
        ("ditdh_small", "cfg_scale", "v_cfg"),
        ("ditdh_small", "t", "v"),
        ("decoder_small", "z", "img"),
        ("rae_dinov2", "var", "z"),
        ("rae_dinov2", "mean", "z"),
        ("lpips_vgg", "b", "value"),
        ("gan_losses", "real", "hinge_d"),
        ("gan_losses", "fake", "g"),
        ("encoder_dinov3_layers", "x", "z_last"),
        ("encoder_dinov3_layers", "x", "z_layers"),
    ],
)
def test_another_input_fails(name: str, array: str, output: str, golden: Golden, tmp_path: Path):
    with np.load(golden(f"{name}.npz")) as data:
        changed = data[array] * np.float32(0.99)
    path = rewrite(golden(f"{name}.npz"), tmp_path / "case.npz", **{array: changed})
    assert statuses(path)[output] == "FAIL"


def test_only_the_outputs_of_the_file_are_compared(golden: Golden, tmp_path: Path):
    ode = dict.fromkeys(("z", "shift", "shift_base", "ode_num_steps", "ode_sample"))
    cfg = dict.fromkeys(("cfg_scale", "cfg_interval", "v_cfg"))
    path = rewrite(golden("ditdh_small.npz"), tmp_path / "case.npz", **ode, **cfg)
    assert statuses(path) == {"v": "ok"}
    path = rewrite(golden("ditdh_small.npz"), tmp_path / "case.npz", **dict.fromkeys(("x", "t", "v")), **cfg)
    assert statuses(path) == {"ode_sample": "ok"}


@pytest.mark.parametrize(
    ("name", "config", "arrays", "message"),
    [
        ("dit_small", lambda c: c.update(use_swiglu=False), {}, "missing blocks.0.mlp.0.bias"),
        ("dit_small", lambda c: c.update(novel=1), {}, "novel"),
        ("dit_small", lambda c: c["shapes"].pop("t_embedder.W"), {}, "missing time.frequencies"),
        ("dit_small", lambda c: c.update(kind="dit3"), {}, "kind 'dit3' is unknown"),
        ("dit_small", lambda c: c.pop("kind"), {}, "kind None is unknown"),
        ("dit_small", None, {"v2": np.ones(3)}, "unused entries: v2"),
        ("dit_small", None, {"v": None}, "no output to compare|unused entries"),
        ("dit_small", None, {"v": np.ones((3, 24, 4, 5))}, "shape"),
        ("dit_small", None, {"v": np.full((3, 24, 4, 4), np.nan)}, "nan"),
        ("dit_small", None, {"t": None}, "no array t"),
        ("ditdh_small", lambda c: c["state_dict_keys"].append("other"), {}, "state_dict_keys"),
        ("ditdh_small", None, {"shift": np.float64(2.0)}, "shift is 2.0"),
        ("gan_losses", lambda c: c.update(loss="wasserstein"), {}, "unused entries: loss"),
        ("lr_schedules", lambda c: c.update(steps_per_epoch=26), {}, LARGE_ERROR),
        ("rae_dinov2", lambda c: c.update(encoder="ConvNeXt"), {}, "encoder ConvNeXt is not one of"),
        ("rae_dinov2", lambda c: c.update(mean=1.0), {"mean": None}, "mean is in config"),
        ("rae_dinov2", lambda c: c["encoder_shapes"].pop("layernorm.bias"), {}, "missing layernorm.bias"),
        (
            "encoder_dinov3_layers",
            lambda c: c["config"].update(model_type="resnet"),
            {},
            "model_type resnet is not one of",
        ),
        ("encoder_dinov3_layers", lambda c: c["shapes"].pop("norm.bias"), {}, "missing norm.bias"),
        ("encoder_dinov3_layers", lambda c: c.update(layers=[4]), {}, "layers.blocks: 4"),
        ("encoder_dinov3_layers", lambda c: c.update(combine="sum"), {}, "unused entries: combine"),
        ("encoder_dinov3_layers", lambda c: c.pop("layers"), {}, "unused entries: z_layers"),
    ],
)
def test_what_is_not_understood_fails_with_a_reason(
    name: str, config, arrays: dict[str, Any], message: str, golden: Golden, tmp_path: Path
):
    path = rewrite(golden(f"{name}.npz"), tmp_path / "case.npz", config, **arrays)
    assert "FAIL" in statuses(path).values()
    assert any(says(reason(path), part) for part in message.split("|"))


def test_a_scale_of_one_is_no_guidance(golden: Golden, tmp_path: Path):
    with np.load(golden("ditdh_small.npz")) as data:
        v = data["v"]
    path = rewrite(golden("ditdh_small.npz"), tmp_path / "case.npz", cfg_scale=np.array(1.0), v_cfg=v)
    assert statuses(path) == {"v": "ok", "v_cfg": "ok", "ode_sample": "ok"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("t_eps", 0.1, "t_eps is 0.1, but raekit has 0.05"),
        ("shift", 2.0, "shift is 2.0"),
        ("use_rope", True, "use_rope"),
    ],
)
def test_another_setting_of_rae_v2_fails(field: str, value: Any, message: str, golden: Golden, tmp_path: Path):
    path = rewrite(golden("ditdh_v2_small.npz"), tmp_path / "case.npz", lambda c: c.update({field: value}))
    assert message in reason(path)


def test_internal_guidance_matters(golden: Golden, tmp_path: Path):
    for change in ({"ig_scale": 1.7}, {"ig_interval": [0.5, 1.0]}, {"ig_scale": 1.0}, {"num_steps": 9}):
        path = rewrite(golden("ditdh_v2_small.npz"), tmp_path / "case.npz", lambda c, new=change: c.update(new))
        assert statuses(path) == {"full": "ok", "base": "ok", "ode_sample": "FAIL"}


def test_notes_are_printed(golden: Golden, tmp_path: Path):
    path = rewrite(golden("dit_small.npz"), tmp_path / "case.npz", lambda c: c.update(note="mind the gap"))
    assert [line[0] for line in reference.check(path)] == ["note", "ok"]


def test_unreadable_file_fails(tmp_path: Path):
    (tmp_path / "case.npz").write_bytes(b"nothing of the kind")
    assert statuses(tmp_path / "case.npz") == {"": "FAIL"}
    assert statuses(tmp_path / "absent.npz") == {"": "FAIL"}


@pytest.mark.parametrize(("dim", "base", "steps"), [(786432, 4096, 50), (262144, 4096, 11), (64 * 64, 4096, 2)])
def test_time_grids_of_other_settings(dim: int, base: int, steps: int, tmp_path: Path):
    alpha = (dim / base) ** 0.5
    raw = 1 - np.linspace(0, 0.999, steps)
    path, config = tmp_path / "case.npz", json.dumps({"dim": dim, "base": base, "num_steps": steps})
    np.savez(path, config=config, t=(alpha * raw / (1 + (alpha - 1) * raw)).astype(np.float32))
    assert statuses(path) == {"t": "ok"}


# Shapes of images, in patches of 8 pixels: as the models' own, larger, and no square.
GRIDS = pytest.mark.parametrize("grid", [(4, 4), (5, 5), (3, 6)], ids=str)


def tiny_model(family: str) -> Any:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}
    sizes |= {"patch_size": 8} | ({"mlp_ratio": 2} if family.startswith("dinov2") else {"intermediate_size": 36})
    match family:
        case "dinov2":
            model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
        case "dinov2_with_registers":
            model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes))
        case "siglip":
            model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
        case _:
            model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, mask_ratio=0.0))
    return fill(model.eval())


def fill(model: Any, tower: str = "") -> Any:
    """Give `model` the weights of its names after `tower`. A ViT-MAE gets its fixed table of positions."""
    weights = reference.state_dict({tower + key: shape for key, shape in shapes_of(model).items()})
    if model.config.model_type == "vit_mae":
        for key in [key for key in weights if key.endswith("position_embeddings")]:
            weights[key] = torch.from_numpy(reference.fixed_table("pos_embed", tuple(weights[key].shape)))
    model.load_state_dict({key.removeprefix(tower): value for key, value in weights.items()})
    return model


def shapes_of(model: Any) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def latents(family: str, model: Any, x: torch.Tensor, grid: tuple[int, int], blocks: list[int]) -> torch.Tensor:
    """The mean of the standardised patch tokens of `blocks`, by transformers and in float64, (B, C, H, W)."""
    colours, prefix, options = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1, {}
    if family == "siglip":
        colours, prefix = ((0.5,) * 3, (0.5,) * 3), 0
    if family == "vit_mae":
        options["noise"] = torch.linspace(0, 1, grid[0] * grid[1]).repeat(len(x), 1)
    if not family.startswith("dinov2"):
        options["interpolate_pos_encoding"] = True
    mean, std = (torch.tensor(v)[:, None, None] for v in colours)
    with torch.no_grad():
        states = model((x - mean) / std, output_hidden_states=True, **options).hidden_states
    prefix += getattr(model.config, "num_register_tokens", 0)
    tokens = torch.stack([states[block + 1][:, prefix:] for block in blocks]).double()
    tokens = tokens - tokens.mean(-1, keepdim=True)
    tokens = tokens / (tokens.square().mean(-1, keepdim=True) + model.config.layer_norm_eps).sqrt()
    return tokens.mean(0).mT.unflatten(2, grid)


@GRIDS
@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "siglip", "vit_mae"])
def test_layers_of_other_encoders(family: str, grid: tuple[int, int], tmp_path: Path):
    model, x = tiny_model(family), torch.rand(2, 3, 8 * grid[0], 8 * grid[1])
    arrays = {"x": x, "z_last": latents(family, model, x, grid, [2]).float()}
    arrays["z_layers"] = latents(family, model, x, grid, [0, 2]).float()
    case = {"kind": "encoder_layers", "layers": [0, 2], "config": model.config.to_dict(), "shapes": shapes_of(model)}
    np.savez(tmp_path / "case.npz", config=json.dumps(case), **arrays)  # type: ignore[arg-type]
    assert statuses(tmp_path / "case.npz") == {"z_last": "ok", "z_layers": "ok"}


@pytest.mark.parametrize(("family", "tower"), [("siglip", "vision_model."), ("vit_mae", "vit.")])
def test_the_image_tower_of_a_whole_model(family: str, tower: str, tmp_path: Path):
    model, x = tiny_model(family), torch.rand(2, 3, 32, 32)
    shapes = {tower + key: shape for key, shape in shapes_of(model).items()}
    fill(model, tower)
    case = {"kind": "encoder_layers", "config": model.config.to_dict(), "shapes": shapes | {"decoder_norm.bias": [3]}}
    np.savez(tmp_path / "case.npz", config=json.dumps(case), x=x, z_last=latents(family, model, x, (4, 4), [2]).float())  # type: ignore[arg-type]
    assert statuses(tmp_path / "case.npz") == {"z_last": "ok"}


@GRIDS
@pytest.mark.parametrize("statistics", ["none", "var", "mean and var"])
@pytest.mark.parametrize("family", ["siglip", "vit_mae"])
def test_other_encoders(family: str, statistics: str, grid: tuple[int, int], tmp_path: Path):
    model, (height, width) = tiny_model(family), grid
    x = torch.rand(2, 3, 8 * height, 8 * width)
    z = latents(family, model, x, grid, [2])
    arrays: dict[str, Any] = {}
    if "mean" in statistics:
        arrays["mean"] = torch.randn(24, *grid)
    if "var" in statistics:
        arrays["var"] = torch.rand(24, *grid)
        z = (z - arrays.get("mean", 0)) / (arrays["var"] + 1e-3).sqrt()

    shapes_of_decoder = {"decoder_pos_embed": [1, height * width + 1, 16], "trainable_cls_token": [1, 1, 16]}
    layers = {f"attention.attention.{part}": [16, 16] for part in ("query", "key", "value")}
    layers |= {"attention.output.dense": [16, 16], "intermediate.dense": [24, 16], "output.dense": [16, 24]}
    layers |= {"layernorm_before": [16], "layernorm_after": [16]}
    names = {"embed": [16, 24], "pred": [192, 16], "norm": [16]} | {f"layers.0.{k}": v for k, v in layers.items()}
    for name, shape in names.items():
        shapes_of_decoder |= {f"decoder_{name}.weight": shape, f"decoder_{name}.bias": shape[:1]}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    decoder |= {"decoder_intermediate_size": 24, "layer_norm_eps": 1e-12}
    case = {
        "kind": "rae",
        "encoder": {"siglip": "SigLIP2wNorm", "vit_mae": "MAEwNorm"}[family],
        "encoder_config": model.config.to_dict() | ({"mask_ratio": 0.75} if family == "vit_mae" else {}),
        "encoder_shapes": shapes_of(model),
        "encoder_input_size": 8 * height if height == width else [8 * height, 8 * width],
        "decoder": decoder,
        "decoder_shapes": shapes_of_decoder,
        "decoder_patch_size": 8,
        "eps": 1e-3,
    } | ({} if "mean" in statistics else {"mean": None})
    np.savez(tmp_path / "case.npz", config=json.dumps(case), x=x, z=z.float(), **arrays)
    assert statuses(tmp_path / "case.npz") == {"z": "ok"}


def discriminator_case(path: Path, norm: str, spectral: bool) -> Path:
    """A small discriminator of two key depths, its logits computed here by the definition."""
    width, patch, depth, kernel = 192, 8, 3, 3
    blocks = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in DINO_BLOCK.items()}
    dino_shapes = {"cls_token": [1, 1, width], "pos_embed": [1, 5, width], "patch_embed.proj.bias": [width]}
    dino_shapes |= {"patch_embed.proj.weight": [width, 3, patch, patch]} | blocks
    heads: dict[str, list[int]] = {}
    for head in range(3):
        for name, out, size in (("0.0", width, 1), ("1.fn.0", width, kernel), ("2", 1, 1)):
            layer, kind = f"heads.{head}.{name}", "weight_orig" if spectral else "weight"
            heads |= {f"{layer}.bias": [out], f"{layer}.{kind}": [out, width, size]}
            heads |= {f"{layer}.weight_u": [out], f"{layer}.weight_v": [width * size]} if spectral else {}
        heads |= {f"heads.{head}.{name}.{kind}": [width] for name in ("0.1", "1.fn.1") for kind in ("weight", "bias")}
    weights = {name: torch.from_numpy(reference.fill_array(name, tuple(shape))) for name, shape in heads.items()}
    backbone = dino({k: torch.from_numpy(reference.fill_array(k, tuple(v))) for k, v in dino_shapes.items()}, "here")

    def conv(x: torch.Tensor, layer: str) -> torch.Tensor:
        weight = weights[f"{layer}.weight_orig" if spectral else f"{layer}.weight"]
        if spectral:
            u, v = (F.normalize(weights[f"{layer}.weight_{name}"], dim=0) for name in "uv")
            weight = weight / (u @ weight.flatten(1) @ v)
        side = weight.shape[2] // 2
        return F.conv1d(F.pad(x, (side, side), mode="circular"), weight, weights[f"{layer}.bias"])

    def block(x: torch.Tensor, part: str) -> torch.Tensor:
        groups = conv(x, f"{part}.0").unflatten(1, (32 if norm == "gn" else width, -1))
        normal = (groups - groups.mean((2, 3), keepdim=True)) / (
            groups.var((2, 3), keepdim=True, correction=0) + 1e-6
        ).sqrt()
        scale, bias = (weights[f"{part}.1.{kind}"][:, None] for kind in ("weight", "bias"))
        return F.leaky_relu(normal.flatten(1, 2) * scale + bias, 0.2)

    x = torch.rand(2, 3, 20, 24) * 2 - 1
    logits = []
    for head, features in enumerate(backbone.features((x + 1) / 2, (2, 0, 1))):
        h = block(features.mT, f"heads.{head}.0")
        h = (h + block(h, f"heads.{head}.1.fn")) / 2**0.5
        logits.append(conv(h, f"heads.{head}.2").flatten(1))
    case = {"kind": "disc", "recipe": "T_8", "kernel_size": kernel, "norm_type": norm, "key_depths": [0, 1]}
    case |= {"using_spec_norm": spectral, "dino_shapes": dino_shapes, "head_shapes": heads}
    np.savez(path, config=json.dumps(case), x=x, logits=torch.cat(logits, 1))
    return path


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("spectral", [True, False])
def test_other_discriminators(norm: str, spectral: bool, tmp_path: Path):
    assert statuses(discriminator_case(tmp_path / "case.npz", norm, spectral)) == {"logits": "ok"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda c: c.update(recipe="S_8"), "recipe is S_8, but dino_shapes belong to T_8"),
        (lambda c: c.update(norm_type="sbn"), "norm_type sbn is not one of bn, gn"),
        (lambda c: c.update(norm_type="gn"), LARGE_ERROR),
        (lambda c: c.update(key_depths=[0, 2]), LARGE_ERROR),
        (lambda c: c.update(key_depths=[1]), "unexpected heads.2"),
        (lambda c: c.pop("key_depths"), "no block 11"),
        (lambda c: c.update(kernel_size=5), "expected (192, 192, 5)"),
        (lambda c: c.update(using_spec_norm=False), "contradicts head_shapes"),
        (lambda c: c.update(norm_eps=1e-6), "unused entries: norm_eps"),
        (lambda c: c["dino_shapes"].pop("blocks.1.mlp.fc1.bias"), "missing blocks.1.mlp.0.bias"),
        (lambda c: c["head_shapes"].pop("heads.1.2.weight_u"), "missing heads.1.out.u"),
    ],
)
def test_another_discriminator_than_that_of_the_logits_fails(config, message: str, tmp_path: Path):
    path = discriminator_case(tmp_path / "case.npz", "bn", True)
    assert says(reason(rewrite(path, tmp_path / "changed.npz", config)), message)


def test_exit_status_is_the_number_of_failures(tmp_path: Path):
    paths = [str(tmp_path / f"absent{i}.npz") for i in range(3)]
    command = [sys.executable, "-m", "tests.reference", *paths]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("FAIL ") == 3
    assert "3 failed" in done.stdout


def test_a_masked_autoencoder_keeps_its_fixed_positions():
    from transformers.models.vit_mae import modeling_vit_mae

    values: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    values |= {"intermediate_size": 16, "image_size": 16, "patch_size": 4}
    model = modeling_vit_mae.ViTMAEModel(modeling_vit_mae.ViTMAEConfig(**values))
    fresh = model.state_dict()
    encoder = reference._encoder("mae", "vit_mae", values, {k: list(v.shape) for k, v in fresh.items()}, (16, 16))
    embeddings: Any = model.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False  # let transformers write its own table
    embeddings.initialize_weights()
    key = "embeddings.position_embeddings"
    assert torch.allclose(encoder.model.state_dict()[key], model.state_dict()[key], atol=1e-6)


def test_filled_values():
    # As the weights of the shared cases were computed.
    weight = reference.fill_array("layer.weight", (3, 4))
    assert weight.dtype == np.float32
    assert abs(np.std(reference.fill_array("a.weight", (400, 100))) * 10 - 1) < 0.02
    assert abs(reference.fill_array("norm.weight", (5000,)).mean() - 1) < 0.01
    assert abs(reference.fill_array("norm.bias", (5000,)).mean()) < 0.01
    assert abs(reference.fill_array("norm.bias", (5000,)).std() - 0.1) < 0.01
