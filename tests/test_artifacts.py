import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import raekit
from raekit import artifacts
from raekit.distributed import World
from raekit.errors import UserError
from raekit.formats.conversion import convert
from raekit.hub import ASSETS
from raekit.inference.pipeline import Pipeline
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser import Denoiser
from raekit.models.encoders import load_encoder
from raekit.stages.inspection import describe_folder

LOADERS = {"encoder": load_encoder, "autoencoder": Autoencoder.load, "denoiser": Denoiser.load}
KINDS = pytest.mark.parametrize("kind", LOADERS)


@pytest.fixture
def copy(tiny_model, tmp_path) -> Path:
    """A copy of a model folder, for tests that damage it."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


def same(a: nn.Module, b: nn.Module) -> bool:
    a_weights, b_weights = weights(a), weights(b)
    return a_weights.keys() == b_weights.keys() and all(torch.equal(a_weights[k], b_weights[k]) for k in a_weights)


@KINDS
def test_a_saved_artifact_can_be_loaded(tiny_model, tmp_path, kind):
    model = LOADERS[kind](str(tiny_model))
    model.save(tmp_path)
    again = LOADERS[kind](str(tmp_path))
    assert same(model, again)
    assert not again.training
    assert json.loads((tmp_path / kind / "config.json").read_text())["kind"] == kind
    expected = {"config.json", "model.safetensors"} | ({"statistics.safetensors"} if kind == "autoencoder" else set())
    assert {path.name for path in (tmp_path / kind).iterdir()} == expected


@KINDS
def test_an_artifact_is_found_in_a_model_in_a_run_and_by_itself(tiny_model, tmp_path, kind):
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "artifact")
    (run / "config.json").write_text('{"stage": "generation"}')
    (run / "checkpoints").mkdir()
    for name in (tiny_model, tiny_model / kind, run):
        assert same(LOADERS[kind](str(name)), LOADERS[kind](str(tiny_model)))
    assert artifacts.find(str(run), kind)[0] == run / "artifact" / kind


@KINDS
def test_a_missing_artifact_is_named_with_its_place(tmp_path, kind):
    with pytest.raises(
        UserError, match=rf"{tmp_path}: holds no {kind} \(looked for {kind}/config\.json .* in {tmp_path}\)"
    ):
        LOADERS[kind](str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="this run has not saved one yet"):
        LOADERS[kind](str(tmp_path))


def test_a_damaged_artifact_is_an_error_and_not_left_out(copy, tmp_path):
    (copy / "denoiser" / "config.json").write_text("{")
    for use in (lambda: convert(str(copy), tmp_path / "out"), lambda: describe_folder(str(copy))):
        with pytest.raises(UserError, match=r"denoiser/config\.json: not valid JSON"):
            use()


def test_an_artifact_of_another_kind_is_not_loaded(tiny_model):
    with pytest.raises(UserError, match=r"holds no denoiser"):
        Denoiser.load(str(tiny_model / "encoder"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.float64, "float16"])
def test_weights_are_not_stored_in_a_type_that_ruins_them(tiny_model, tmp_path, dtype):
    pipe = Pipeline.from_pretrained(tiny_model)
    for save in (pipe.save_pretrained, pipe.autoencoder.save, Denoiser.load(str(tiny_model)).save):
        with pytest.raises(UserError, match=r"dtype: .* is none of torch\.f"):
            save(tmp_path, dtype=dtype)
    assert not any(tmp_path.iterdir())


def test_a_value_of_a_wrong_type_is_one_clear_error(tiny_model):
    array: Any = np.zeros(3)
    numbers: list[Any] = [[0.5], {}, "0.5", array]
    for wrong in numbers:
        with pytest.raises(UserError, match=r"^ema: .* must be a number$"):
            raekit.load(tiny_model, ema=wrong)
    with pytest.raises(UserError, match=r"^dtype: .* is none of torch\.float32, torch\.bfloat16$"):
        raekit.load(tiny_model, dtype=array)
    with pytest.raises(UserError, match=r"^solver: array\(.* is none of euler"):
        raekit.Sampling(solver=array)
    lists: list[Any] = [raekit.list_models, raekit.list_encoders]
    for listed in lists:
        with pytest.raises(UserError, match=r"^pattern: 3 must be a text$"):
            listed(3)


def test_half_precision_is_for_the_weights_and_not_for_the_statistics(tiny_model, tmp_path):
    model = Autoencoder.load(str(tiny_model))
    var = model.var.clone()
    var[0, 0, 0] = 1e-9  # zero in float16
    model.set_statistics(None, var)
    model.save(tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "autoencoder" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again = Autoencoder.load(str(tmp_path))
    assert torch.equal(again.var, var)
    assert again.mean is None  # scale-only whitening is still scale-only
    for old, new in zip(model.decoder.parameters(), again.decoder.parameters(), strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(new, old.half().float())


@KINDS
def test_saving_again_replaces_the_complete_artifact(copy, kind):
    (copy / kind / "stray").touch()
    partial = copy / f"{kind}.raekit-partial"
    partial.mkdir()
    (partial / "torn").touch()
    model = LOADERS[kind](str(copy))
    for parameter in model.parameters():
        parameter.data.add_(1)
    model.save(copy)
    assert same(LOADERS[kind](str(copy)), model)
    assert not (copy / kind / "stray").exists()
    assert not partial.exists()


def test_only_the_first_process_writes(tiny_model, tmp_path, monkeypatch):
    Denoiser.load(str(tiny_model)).save(tmp_path, World(rank=1, size=2))
    assert not list(tmp_path.iterdir())


@KINDS
@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_weights_that_do_not_fit_are_listed(copy, kind, damage):
    path = copy / kind / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in sorted(tensors) if "blocks" in key)
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        name = "surplus"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(tensors[name].numel() + 1)
    save_file(tensors, path)
    with pytest.raises(UserError) as error:
        LOADERS[kind](str(copy))
    message = str(error.value)
    assert message.startswith(f"{copy / kind}: the weights do not fit")
    assert name in message
    assert damage == "misshapen" or f"{damage} {name}" in message


@KINDS
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(copy, kind, share):
    path = copy / kind / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"^{path}: damaged"):
        LOADERS[kind](str(copy))


@KINDS
def test_a_missing_file_is_named(copy, kind):
    (copy / kind / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"^{copy / kind / 'model.safetensors'}: no such file"):
        LOADERS[kind](str(copy))


@KINDS
def test_a_config_is_read_strictly(copy, kind):
    path = copy / kind / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"surplus": 1}))
    with pytest.raises(UserError, match=rf"{path}: surplus: "):
        LOADERS[kind](str(copy))
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match=rf"{path}: not valid JSON"):
        LOADERS[kind](str(copy))
    path.write_text("[]")
    with pytest.raises(UserError, match=f"holds no {kind}"):
        LOADERS[kind](str(copy))


def test_statistics_are_read_as_written(tmp_path):
    path, var, mean = tmp_path / "new" / "x.safetensors", torch.rand(3, 2, 2), torch.randn(3, 2, 2)
    artifacts.write_statistics(path, var.double())
    assert artifacts.read_statistics(path, (3, 2, 2))[0] is None
    artifacts.write_statistics(path, var, mean)
    read = artifacts.read_statistics(path, (3, 2, 2))
    assert read[0] is not None
    assert torch.equal(read[0], mean)
    assert torch.equal(read[1], var)


def test_statistics_of_another_shape_or_without_a_variance_are_rejected(copy):
    path = copy / "autoencoder" / "statistics.safetensors"
    for tensors in ({"var": torch.ones(16, 2, 2)}, {"mean": torch.ones(16, 4, 4)}, {}):
        save_file(tensors, path)
        with pytest.raises(UserError, match=rf"^{path}: needs `var` \(and `mean`\) of shape \(16, 4, 4\), holds "):
            Autoencoder.load(str(copy))
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: no such file"):
        Autoencoder.load(str(copy))


def test_a_model_folder_can_be_moved(tiny_model, copy):
    """Loading uses the encoder in the moved folder, not the encoder's original folder."""
    config = json.loads((copy / "autoencoder" / "config.json").read_text())
    (copy / "autoencoder" / "config.json").write_text(json.dumps(config | {"encoder": "/gone"}))
    moved = Autoencoder.load(str(copy))
    assert same(moved, Autoencoder.load(str(tiny_model)))
    moved.save(copy.parent / "again")
    assert same(Autoencoder.load(str(copy.parent / "again")), moved)


def test_a_full_disk_leaves_the_artifact_that_was_there(tiny_model, full_disk):
    model = Denoiser.load(str(tiny_model))
    model.save(full_disk)
    before = weights(Denoiser.load(str(full_disk)))
    (full_disk / "filler").write_bytes(bytes(4 * 2**20 - sum(p.stat().st_size for p in full_disk.rglob("*")) - 2**16))
    with pytest.raises(UserError, match=rf"^{full_disk / 'denoiser'}: could not be written \(.*No space left"):
        model.save(full_disk)
    after = weights(Denoiser.load(str(full_disk)))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert sorted(path.name for path in full_disk.iterdir()) == ["denoiser", "filler"]


def test_a_model_without_the_wanted_part_says_what_it_holds(tiny_model: Path, tmp_path: Path):
    for kind in ("autoencoder", "encoder"):  # as in a run of stage 1
        shutil.copytree(tiny_model / kind, tmp_path / "run" / "artifact" / kind)
    with pytest.raises(
        artifacts.MissingArtifact,
        match=r"holds no denoiser .*; it holds an encoder and an autoencoder: give a model or a run of stage 2",
    ):
        artifacts.find(str(tmp_path / "run"), "denoiser")
    shutil.copytree(tiny_model / "denoiser", tmp_path / "other" / "denoiser")
    with pytest.raises(artifacts.MissingArtifact, match=r"holds no autoencoder .*; it holds a denoiser: give a"):
        artifacts.find(str(tmp_path / "other"), "autoencoder")


def test_a_milestone_of_a_run_is_a_model(tiny_model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "milestones" / "step-00000200")
    shutil.copytree(tiny_model, run / "milestones" / "step-00000300.raekit-partial")
    assert artifacts.find(f"{run}@200", "denoiser").path == run / "milestones" / "step-00000200" / "denoiser"
    with pytest.raises(UserError, match=r"run@300: no such milestone; .*run has the steps 200 \(train\.milestones"):
        artifacts.find(f"{run}@300", "denoiser")
    with pytest.raises(UserError, match=r"@1: no such milestone; .* has none"):
        artifacts.find(f"{tiny_model}@1", "denoiser")


def test_a_classifier_is_an_artifact_like_the_others(tiny_model: Path, tmp_path: Path):
    with pytest.raises(
        artifacts.MissingArtifact, match=r"holds no classifier .*; it holds .*: give a run that trained a classifier"
    ):
        artifacts.find(str(tiny_model), "classifier")
    shutil.copytree(ASSETS / "emoji" / "classifier", tmp_path / "classifier")
    assert "classifier: " in describe_folder(str(tmp_path))
    with pytest.raises(artifacts.MissingArtifact, match=r"; it holds a classifier: give a model or a run of stage 2"):
        artifacts.find(str(tmp_path), "denoiser")
