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
        ("ditdh_v2_small", ["full", "base", "ode_sample"]),
        ("dit_small", ["v"]),
        ("timegrid_196608", ["t"]),
        ("decoder_small", ["img"]),
        ("rae_dinov2", ["z", "rec"]),
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
    ],
)
def test_what_is_not_understood_fails_with_a_reason(
    name: str, config, arrays: dict[str, Any], message: str, golden: Golden, tmp_path: Path
):
    path = rewrite(golden(f"{name}.npz"), tmp_path / "case.npz", config, **arrays)
    assert "FAIL" in statuses(path).values()
    assert any(part in reason(path) for part in message.split("|"))


def test_a_scale_of_one_is_no_guidance(golden: Golden, tmp_path: Path):
    with np.load(golden("ditdh_small.npz")) as data:
        v = data["v"]
    path = rewrite(golden("ditdh_small.npz"), tmp_path / "case.npz", cfg_scale=np.array(1.0), v_cfg=v)
    assert statuses(path) == {"v": "ok", "v_cfg": "ok", "ode_sample": "ok"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("t_eps", 0.1, "t_eps is 0.1, ours 0.05"), ("shift", 2.0, "shift is 2.0"), ("use_rope", True, "use_rope")],
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


def tiny_config(family: str) -> Any:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    sizes |= {"intermediate_size": 36, "patch_size": 8}
    return transformers.SiglipVisionConfig(**sizes) if family == "siglip" else transformers.ViTMAEConfig(**sizes)


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("statistics", ["none", "var", "mean and var"])
@pytest.mark.parametrize("family", ["siglip", "vit_mae"])
def test_other_encoders(family: str, statistics: str, side: int, tmp_path: Path):
    import transformers

    config = tiny_config(family)
    model = (transformers.SiglipVisionModel if family == "siglip" else transformers.ViTMAEModel)(config).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(reference.state_dict(shapes))
    x = torch.rand(2, 3, 8 * side, 8 * side)
    if family == "siglip":
        colours, prefix, options = (0.5, 0.5), 0, {}
        norm = model.get_submodule("post_layernorm")
    else:
        colours = tuple(torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        prefix, options = 1, {"noise": torch.linspace(0, 1, side**2).repeat(2, 1)}
        config.mask_ratio = 0.0
        norm = model.get_submodule("layernorm")
    inputs = []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model((x - colours[0]) / colours[1], interpolate_pos_encoding=True, **options)
    tokens = inputs[0][:, prefix:].double()
    tokens = tokens - tokens.mean(-1, keepdim=True)
    z = (tokens / (tokens.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()).mT.unflatten(2, (side, side))
    arrays: dict[str, Any] = {}
    if "mean" in statistics:
        arrays["mean"] = torch.randn(24, side, side)
    if "var" in statistics:
        arrays["var"] = torch.rand(24, side, side)
        z = (z - arrays.get("mean", 0)) / (arrays["var"] + 1e-3).sqrt()

    shapes_of_decoder = {"decoder_pos_embed": [1, side**2 + 1, 16], "trainable_cls_token": [1, 1, 16]}
    for name, shape in {"embed": [16, 24], "pred": [192, 16], "norm": [16]}.items():
        shapes_of_decoder |= {f"decoder_{name}.weight": shape, f"decoder_{name}.bias": shape[:1]}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 0, "decoder_num_attention_heads": 2}
    decoder |= {"decoder_intermediate_size": 24, "layer_norm_eps": 1e-12}
    case = {
        "kind": "rae",
        "encoder": {"siglip": "SigLIP2wNorm", "vit_mae": "MAEwNorm"}[family],
        "encoder_config": config.to_dict() | ({"mask_ratio": 0.75} if family == "vit_mae" else {}),
        "encoder_shapes": shapes,
        "encoder_input_size": 8 * side,
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
