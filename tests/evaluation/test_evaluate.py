"""Evaluation against the model's own dataset, another dataset or a reference, with and without baselines."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import raekit
from raekit import artifacts
from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.evaluate import evaluate
from raekit.evaluation.features import load_networks
from raekit.evaluation.references import measure_reference
from raekit.flow.sampling import Sampling
from raekit.inference.model import load
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser_config import TransformerConfig
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.stages.run import train
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

ALONE = World()
QUICK: dict[str, Any] = {"sampling": Sampling(steps=1), "world": ALONE}


@pytest.fixture(scope="module")
def plants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of nine classes, like the built-in images."""
    root = tmp_path_factory.mktemp("plants")
    for label in range(9):
        for i in range(12):
            path = root / ("train" if i < 8 else "val") / f"plant-{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([label, i]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def trained(plants: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 2 on the plants."""
    run = tmp_path_factory.mktemp("run")
    part = TransformerConfig(width=16, depth=1, heads=2)
    config = GenerationConfig(
        data=DataConfig(source=f"folder:{plants}", image_size=16),
        autoencoder=str(tiny_model),
        denoiser=DenoiserSize(backbone=part, head=part),
        train=TrainConfig(steps=2, batch_size=4, precision="fp32"),
        optim=OptimConfig(),
    )
    train(config, run, ALONE)
    return run


def test_a_trained_model_is_compared_with_the_held_out_images_of_its_own_dataset(trained, plants, tiny_model, tmp_path):
    features = [str(tiny_model)]
    report, folder = evaluate(str(trained), features=features, count=18, out=tmp_path / "own", **QUICK)
    assert folder == tmp_path / "own"
    assert report.names["reference"] == [f"folder:{plants} (held out)"]
    assert f"36 held-out images of folder:{plants}, the dataset that the model was trained on" in report.notes[0]
    assert str(plants) in (folder / "report.md").read_text()
    assert report.settings["labels"] == "reference"

    networks = load_networks(str(tiny_model), ALONE.device)
    data = DataConfig(source=f"folder:{plants}", split="heldout", image_size=16)
    file = tmp_path / "reference.safetensors"
    measure_reference(data, networks, ALONE).write(file)
    again, _ = raekit.evaluate(
        str(trained), reference=file, features=features, count=18, labels="reference", out=tmp_path / "file", **QUICK
    )
    assert again.results == report.results
    assert again.hash == report.hash
    assert again.names["reference"] == [str(file)]


def test_baselines_give_a_meaning_to_the_scores(trained, tiny_model, tmp_path):
    options: dict[str, Any] = {"features": [str(tiny_model)], "count": 18, "out": tmp_path, "baselines": True, **QUICK}
    report, folder = evaluate(str(trained), **options)
    (name,) = load_networks(str(tiny_model), ALONE.device)
    distance, accuracy, near = f"fd_{name}", f"knn_accuracy_{name}", f"nearest_distance_{name}"
    assert report.results.keys() >= {distance, accuracy, near}
    rows = report.baselines
    assert rows["held-out images"].keys() == {accuracy, near}  # no distance: these images are the reference
    assert rows["training images"].keys() == {distance}
    assert rows["reconstructions"].keys() == {distance, accuracy, near, "psnr", "ssim"}
    assert rows["decoded noise"].keys() == {distance, near}
    assert rows["training images"][distance] < report.results[distance]
    for file in ("report.md", "report.html"):
        text = (folder / file).read_text()
        assert all(row in text for row in ("training images", "decoded noise", "reconstructions"))
    assert sorted(path.name for path in (folder / "baselines").iterdir()) == [
        "decoded-noise.png",
        "held-out-images.png",
        "reconstructions.png",
        "training-images.png",
    ]
    assert not (folder / "features").exists()
    assert evaluate(str(trained), **options)[0] == report  # the second call only reads the report


def test_too_many_unreadable_training_images_end_the_evaluation_before_samples_are_made(
    trained, plants, tiny_model, tmp_path
):
    shutil.copytree(plants, tmp_path / "plants")
    damaged = tmp_path / "plants" / "train" / "plant-3" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    work = []
    with pytest.raises(
        UserError, match=r"1 of 72 images are unreadable, more than max_unreadable=0\.01 allows; repair"
    ):
        evaluate(
            str(trained),
            source=f"folder:{tmp_path / 'plants'}",
            features=[str(tiny_model)],
            baselines=True,
            out=tmp_path / "out",
            progress=lambda what, *given, **more: work.append(what),
            **QUICK,
        )
    assert "images" not in work


def test_a_folder_of_images_is_no_model(plants):
    with pytest.raises(UserError, match=r"holds no autoencoder.*saved images are given as flat:"):
        evaluate(str(plants), source=f"folder:{plants}")


def test_a_loaded_model_is_evaluated_on_its_own_device(trained, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("raekit.evaluation.evaluate.prepare_device", lambda: torch.device("meta"))  # nothing runs there
    options: dict[str, Any] = {"features": [str(tiny_model)], "count": 18, "sampling": Sampling(steps=1)}
    report, _ = evaluate(load(str(trained)), out=tmp_path / "out", **options)
    assert report.results


def test_a_stopped_evaluation_with_baselines_resumes_with_the_same_digits(trained, tiny_model, tmp_path):
    options: dict[str, Any] = {"features": [str(tiny_model)], "count": 18, "baselines": True, **QUICK}
    complete, _ = evaluate(str(trained), out=tmp_path / "complete", **options)

    def stop(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        if what == "reconstructions":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(str(trained), out=tmp_path / "stopped", progress=stop, **options)
    assert not (tmp_path / "stopped" / "report.json").exists()
    resumed, _ = evaluate(str(trained), out=tmp_path / "stopped", **options)
    assert (resumed.results, resumed.baselines) == (complete.results, complete.baselines)


def test_reconstructions_of_the_own_dataset_need_no_reference(plants, tiny_model, tmp_path):
    autoencoder = Autoencoder.load(str(tiny_model))
    autoencoder.trained_on = f"folder:{plants}"
    autoencoder.save(tmp_path / "model")
    features = [str(tiny_model)]
    report, _ = evaluate(
        str(tmp_path / "model"), reconstruct=True, features=features, out=tmp_path / "out", world=ALONE
    )
    (name,) = load_networks(str(tiny_model), ALONE.device)
    assert list(report.results) == [f"rfd_{name}", "psnr", "ssim"]
    assert f"folder:{plants}" in report.notes[0]


def test_a_model_in_memory_and_saved_images_are_evaluated_too(trained, plants, tiny_model, tmp_path):
    features = [str(tiny_model)]
    by_name, _ = evaluate(str(trained), features=features, count=18, out=tmp_path / "name", **QUICK)
    in_memory, _ = evaluate(load(str(trained)), features=features, count=18, out=tmp_path / "memory", **QUICK)
    assert in_memory.results == by_name.results
    saved, _ = evaluate(
        f"flat:{plants / 'train'}",
        source=f"folder:{plants}",
        features=features,
        baselines=True,
        out=tmp_path / "saved",
        world=ALONE,
    )
    (name,) = load_networks(str(tiny_model), ALONE.device)
    assert saved.results[f"fd_{name}"] == pytest.approx(saved.baselines["training images"][f"fd_{name}"], rel=1e-6)
    assert saved.results[f"nearest_distance_{name}"] == pytest.approx(0, abs=1e-6)
    others = tmp_path / "others"  # the same images under other names of classes: a label means another class
    for path in (plants / "val").iterdir():
        shutil.copytree(path, others / f"x{path.name}")
    scores = [
        evaluate(
            address,
            source=f"folder:{plants}",
            features=features,
            baselines=True,
            out=tmp_path / address[-5:],
            world=ALONE,
        )[0].results
        for address in (f"folder:{plants / 'val'}", f"folder:{others}")
    ]
    assert scores[0].keys() - scores[1].keys() == {f"knn_accuracy_{name}"}


def test_the_dataset_is_recorded_and_survives_loading_and_saving(trained, plants, tmp_path):
    address = f"folder:{plants}"
    assert artifacts.find(str(trained), "denoiser").trained_on == address
    model = load(str(trained))
    assert model.trained_on == address
    model.denoiser.save(tmp_path / "copy")
    assert artifacts.find(str(tmp_path / "copy"), "denoiser").trained_on == address
    model.autoencoder.save(tmp_path / "copy")
    raekit.convert(str(tmp_path / "copy"), tmp_path / "converted")
    assert artifacts.find(str(tmp_path / "converted"), "denoiser").trained_on == address
    shutil.rmtree(tmp_path / "copy")  # the converted model is complete, with its encoder
    assert load(str(tmp_path / "converted")).trained_on == address
    for kind in ("autoencoder", "denoiser"):
        assert artifacts.find("builtin:emoji", kind).trained_on == "emoji"


def refused(message: str, action: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=message):
        action()


def test_a_comparison_with_unexpected_images_is_an_error(trained, plants, images, tiny_model, tmp_path):
    features = [str(tiny_model)]
    refused(
        "does not record the dataset that it was trained on; give the dataset",
        lambda: evaluate(str(tiny_model), features=features, out=tmp_path / "x", **QUICK),
    )
    refused("have no default network; name the networks", lambda: evaluate(str(trained), out=tmp_path / "x", **QUICK))
    refused(
        r"its classes \(blue, green, red\) are not the classes of .* \(plant-0, .* and 1 more\)",
        lambda: evaluate(str(trained), source=images, features=features, out=tmp_path / "x", **QUICK),
    )
    file = tmp_path / "reference.safetensors"
    data = DataConfig(source=images, image_size=16)
    measure_reference(data, load_networks(str(tiny_model), ALONE.device), ALONE).write(file)
    refused(
        r"its classes \(blue, green, red\) are not the classes of the model \(plant-0, .* and 1 more\)",
        lambda: evaluate(
            str(trained), reference=file, labels="reference", features=features, out=tmp_path / "x", **QUICK
        ),
    )
    for name in "saved.npz", "saved.zip":
        (tmp_path / name).touch()
        refused(
            f"give saved images by their address, {name[-3:]}:.*{name}",
            lambda name=name: evaluate(tmp_path / name, source=images, out=tmp_path / "x", world=ALONE),
        )
    refused("saved images need real images", lambda: evaluate(f"flat:{plants}", out=tmp_path / "x", world=ALONE))
    moved = tmp_path / "moved"
    shutil.copytree(plants, moved / "plants")
    model = load(str(trained))
    model.denoiser.trained_on = f"folder:{moved / 'plants'}"
    shutil.rmtree(moved)
    refused(
        "was trained on folder:.*plants, which cannot be read: .*no folder.* Give its present address",
        lambda: evaluate(model, features=features, out=tmp_path / "x", **QUICK),
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruct": True, "count": 3}, "count: has no effect with reconstruct"),
        ({"reconstruct": True, "sampling": Sampling(steps=2)}, "sampling: has no effect with reconstruct"),
        ({"reconstruct": True, "intervals": True}, "intervals: has no effect with reconstruct"),
        ({"lpips": "auto"}, "lpips: has no effect without reconstruct"),
        ({"count": 0}, "count: 0 must be at least 1"),
        ({"reference": "x.npz", "source": "emoji"}, "source: has no effect with reference"),
    ],
)
def test_arguments_without_effect_are_errors(tiny_model, tmp_path, options, message):
    refused(message, lambda: evaluate(str(tiny_model), out=tmp_path, world=ALONE, **options))


def test_a_report_among_the_evaluated_images_is_refused(trained, plants, tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "plants"
    shutil.copytree(plants, folder)
    data = DataConfig(source=f"flat:{folder}", image_size=16)
    reference = tmp_path / "reference.safetensors"
    measure_reference(data, load_networks(str(tiny_model), ALONE.device), ALONE).write(reference)
    options: dict[str, Any] = {"features": [str(tiny_model)], "world": ALONE}
    refused(
        r"plants/report: lies in the folder of flat:.*give a place elsewhere \(out\)",
        lambda: evaluate(f"flat:{folder}", source=f"folder:{plants}", out=folder / "report", **options),
    )
    refused(
        "lies in the folder of folder:",
        lambda: evaluate(str(trained), source=f"folder:{folder}", out=folder / "report", **options),
    )
    options |= {"reconstruct": True, "reference": reference}
    refused("lies in the folder of flat:", lambda: evaluate(str(tiny_model), out=folder / "report", **options))
    monkeypatch.chdir(folder)
    refused("reports: lies in the folder of flat:", lambda: evaluate(str(tiny_model), **options))
    assert {path.name for path in folder.iterdir()} == {"train", "val"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"batch_size": None}, "batch_size: None must be a whole number"),
        ({"workers": "1"}, "workers: '1' must be a whole number"),
        ({"reference": None}, "reference: None must be a file, or several"),
        ({"relative_to": [3]}, r"relative_to: \[3\] must be a file, or several"),
        ({"source": Path("plants")}, "data source 'plants' is unknown: use one of emoji"),
        ({"sampling": {"steps": 5}}, "sampling: .* is no `Sampling`"),
        ({"batch_size": "8"}, "batch_size: '8' must be a whole number"),
        ({"workers": 1.5}, "workers: 1.5 must be a whole number"),
        ({"relative_to": "nope.safetensors"}, r"nope\.safetensors: no such file"),
        ({"reconstruct": True, "lpips": "nope", "sampling": None}, "nope: no such file"),
        ({"intervals": True, "count": 39}, "intervals: they need at least 40 images, and there are 39; evaluate more"),
        ({"count": 1}, "count: distances need at least 2 images, and there is 1; evaluate more"),
        ({"sampling": Sampling(guidance="auto:2.0")}, "guidance: auto needs a weaker model"),  # type: ignore[arg-type]
    ],
)
def test_settings_are_checked_before_the_reference_is_measured(
    trained, tiny_model, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr("raekit.evaluation.evaluate.measure_reference", None)  # a call would be a TypeError
    settings: dict[str, Any] = {"features": [str(tiny_model)], **QUICK, **options}
    refused(message, lambda: evaluate(str(trained), out=tmp_path, **settings))


def test_one_name_of_features_and_numbers_of_numpy_are_settings(trained, tiny_model, tmp_path):
    numbers: dict[str, Any] = {"count": np.int64(3), "seed": np.int64(0), "batch_size": np.int64(10), **QUICK}
    report, folder = evaluate(str(trained), features=str(tiny_model), out=tmp_path / "report", **numbers)
    assert len(report.results) == 1
    assert (folder / "report.json").is_file()
    pipe: Any = raekit.Pipeline.from_pretrained(str(trained))
    loaded = load(str(trained))
    refused("ema: has no effect on a loaded model", lambda: evaluate(loaded, ema=0.5, **QUICK))
    assert report.names["ema"] == loaded.denoiser.ema is not None
    refused("model: a Pipeline is neither a name nor a `Model`", lambda: evaluate(pipe, **QUICK))


@pytest.mark.parametrize("name", ["features/mine.txt", "samples.png", "report.json"])
def test_files_of_something_else_are_not_replaced(trained, tiny_model, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    options: dict[str, Any] = {"features": [str(tiny_model)], "count": 3, **QUICK}
    refused("holds .* of something else than an evaluation", lambda: evaluate(str(trained), out=tmp_path, **options))
    assert (tmp_path / name).read_text() == "mine"


def test_large_batches_are_cut_and_do_not_change_the_settings(trained, tiny_model, tmp_path):
    options: dict[str, Any] = {"features": [str(tiny_model)], "count": 18, **QUICK}
    reports = [evaluate(str(trained), batch_size=size, out=tmp_path / str(size), **options)[0] for size in (250, 1000)]
    assert reports[0].hash == reports[1].hash
    refused("batch_size: 0", lambda: evaluate(str(trained), batch_size=0, out=tmp_path / "0", **options))
