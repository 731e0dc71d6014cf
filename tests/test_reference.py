import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import reference

Golden = Callable[[str], Path]


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("ditdh_small", ["v", "v_cfg", "ode_sample"]),
        ("dit_small", ["v"]),
        ("timegrid_196608", ["t"]),
        ("decoder_small", ["img"]),
        ("rae_dinov2", ["z", "rec"]),
        ("encoder_dinov3_layers", ["z_last", "z_layers"]),
    ],
)
def test_shared_cases(name: str, outputs: list[str], golden: Golden):
    results = list(reference.check(golden(f"{name}.npz")))
    assert [(status, what) for status, what, _ in results] == [("ok", output) for output in outputs]


def test_every_shared_case_is_checked_or_skipped_by_name(golden: Golden, capsys: pytest.CaptureFixture[str]):
    paths = sorted(golden("dit_small.npz").parent.glob("*.npz"))
    assert reference.main([str(path) for path in paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines[:-1]} == {path.stem for path in paths}
    assert any(line.split() == ["skip", "lpips_vgg", "(kind", "lpips,", "not", "built", "yet)"] for line in lines)


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
        ("dit_small", lambda c: c.update(use_swiglu=False), {}, "use_swiglu"),
        ("dit_small", lambda c: c.update(novel=1), {}, "novel"),
        ("dit_small", lambda c: c["shapes"].pop("t_embedder.W"), {}, "missing time.frequencies"),
        ("dit_small", lambda c: c.update(kind="dit3"), {}, "kind 'dit3' is not known"),
        ("dit_small", lambda c: c.pop("kind"), {}, "kind None is not known"),
        ("dit_small", None, {"v2": np.ones(3)}, "not understood: v2"),
        ("dit_small", None, {"v": None}, "no output to compare|not understood"),
        ("dit_small", None, {"v": np.ones((3, 24, 4, 5))}, "shape"),
        ("dit_small", None, {"v": np.full((3, 24, 4, 4), np.nan)}, "nan"),
        ("dit_small", None, {"t": None}, "no array t"),
        ("ditdh_small", lambda c: c["state_dict_keys"].append("other"), {}, "state_dict_keys"),
        ("ditdh_small", None, {"shift": np.float64(2.0)}, "shift is 2.0"),
        ("rae_dinov2", lambda c: c.update(encoder="ConvNeXt"), {}, "encoder ConvNeXt is none of"),
        ("rae_dinov2", lambda c: c.update(mean=1.0), {"mean": None}, "mean stands in config"),
        ("rae_dinov2", lambda c: c["encoder_shapes"].pop("layernorm.bias"), {}, "missing layernorm.bias"),
        (
            "encoder_dinov3_layers",
            lambda c: c["config"].update(model_type="resnet"),
            {},
            "model_type resnet is none of",
        ),
        ("encoder_dinov3_layers", lambda c: c["shapes"].pop("norm.bias"), {}, "missing norm.bias"),
        ("encoder_dinov3_layers", lambda c: c.update(layers=[4]), {}, "layers.blocks: 4"),
        ("encoder_dinov3_layers", lambda c: c.update(combine="sum"), {}, "not understood: combine"),
        ("encoder_dinov3_layers", lambda c: c.pop("layers"), {}, "not understood: z_layers"),
    ],
)
def test_what_is_not_understood_fails_with_a_reason(
    name: str, config, arrays: dict[str, Any], message: str, golden: Golden, tmp_path: Path
):
    path = rewrite(golden(f"{name}.npz"), tmp_path / "case.npz", config, **arrays)
    assert "FAIL" in statuses(path).values()
    assert any(part in reason(path) for part in message.split("|"))


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
    model.load_state_dict(reference.state_dict(shapes_of(model)))
    return model.eval()


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
    for name, shape in {"embed": [16, 24], "pred": [192, 16], "norm": [16]}.items():
        shapes_of_decoder |= {f"decoder_{name}.weight": shape, f"decoder_{name}.bias": shape[:1]}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 0, "decoder_num_attention_heads": 2}
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


def test_exit_status_is_the_number_of_failures(tmp_path: Path):
    paths = [str(tmp_path / f"absent{i}.npz") for i in range(3)]
    command = [sys.executable, "-m", "tests.reference", *paths]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("FAIL ") == 3
    assert "3 failed" in done.stdout


def test_filled_values():
    # As the weights of the shared cases were computed.
    weight = reference.fill_array("layer.weight", (3, 4))
    assert weight.dtype == np.float32
    assert abs(np.std(reference.fill_array("a.weight", (400, 100))) * 10 - 1) < 0.02
    assert abs(reference.fill_array("norm.weight", (5000,)).mean() - 1) < 0.01
    assert abs(reference.fill_array("norm.bias", (5000,)).mean()) < 0.01
    assert abs(reference.fill_array("norm.bias", (5000,)).std() - 0.1) < 0.01
