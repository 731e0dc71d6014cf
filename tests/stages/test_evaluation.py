"""Scores of samples during training."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raekit import artifacts
from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import Images, load_networks
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.references import measure_reference
from raekit.evaluation.streaming import score_stream
from raekit.evaluation.streams import Samples
from raekit.flow.guidance import parse_guidance
from raekit.flow.sampling import Sampling
from raekit.inference.model import load
from raekit.models.denoiser_config import TransformerConfig
from raekit.stages import evaluation
from raekit.stages.evaluation import EvaluationConfig, evaluator
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.stages.inspection import describe_folder
from raekit.stages.run import train
from raekit.training.optim import OptimConfig
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig

ONE = World()
PART = TransformerConfig(width=16, depth=1, heads=2)


def configuration(images: str, tiny_model: Path, **options: Any) -> GenerationConfig:
    settings = EvaluationConfig(every=2, count=25, features=(str(tiny_model),), steps=2, batch_size=4, **options)
    return GenerationConfig(
        data=DataConfig(source=images, image_size=16, crop="random", flip=True),
        autoencoder=str(tiny_model),
        denoiser=DenoiserSize(backbone=PART, head=PART),
        train=TrainConfig(steps=3, batch_size=6, precision="fp32", log_every=1),
        optim=OptimConfig(lr=0.01),
        ema=(0.5, 0.9),
        evaluation=settings,
    )


def reference(images: str, tiny_model: Path, split: Any = "heldout"):
    networks = load_networks(str(tiny_model), ONE.device)
    return measure_reference(DataConfig(source=images, split=split, image_size=16), networks, ONE, keep=20), networks


def logged(run: Path) -> dict[int, dict[str, float]]:
    """Return the scores by step."""
    found = {}
    for record in read_metrics(run):
        if values := {name: value for name, value in record.items() if name.startswith("evaluation/")}:
            found[int(record["step"])] = values
    return found


def test_the_exported_average_is_scored_against_held_out_images(images, tiny_model, tmp_path):
    config = configuration(images, tiny_model)
    train(config, tmp_path, ONE)
    found = logged(tmp_path)
    against, networks = reference(images, tiny_model)
    (name,) = networks
    assert {step: sorted(values) for step, values in found.items()} == {
        step: [f"evaluation/fd_{name}", "evaluation/seconds"] for step in (2, 3)
    }
    stream = Samples(load(str(tmp_path)), 25, Sampling(steps=2), batch_size=9)
    distance = FrechetDistance(networks[name], against.gaussian(networks[name]))
    expected = score_stream(stream.share(ONE), [distance], ONE)[f"fd_{name}"]
    assert found[3][f"evaluation/fd_{name}"] == pytest.approx(expected, rel=1e-9)
    decays = [artifacts.find(str(name), "denoiser").ema for name in (tmp_path, tiny_model)]
    assert decays == [0.5, None]
    early = found[2][f"evaluation/fd_{name}"]
    assert early != pytest.approx(expected, rel=1e-6)
    higher = max(early, expected)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace(images, "folder:/not/here/any/more"))  # as after caching the latents
    steps = 2 if early <= expected else 3
    told = f"evaluation/fd_{name} reached {higher + 1:g} after 0.4 epochs of 30 images (2 steps)"
    assert told in describe_folder(str(tmp_path), (f"evaluation/fd_{name}", higher + 1))
    lowest = min(early, expected)
    assert f"({steps} steps)" in describe_folder(str(tmp_path), (f"evaluation/fd_{name}", lowest * (1 + 1e-6)))
    told = f"has not reached 0; its lowest is {lowest:g}"
    assert told in describe_folder(str(tmp_path), (f"evaluation/fd_{name}", 0))


def test_chosen_averages_against_a_file(images, tiny_model, tmp_path):
    against, networks = reference(images, tiny_model, "all")
    (name,) = networks
    against.write(tmp_path / "all.safetensors")
    options: dict[str, Any] = {"reference": str(tmp_path / "all.safetensors"), "labels": "reference"}
    config = configuration(images, tiny_model, ema=(0.9, 0.5), guidance="cfg:2.0", **options)
    train(config, tmp_path / "run", ONE)
    found = logged(tmp_path / "run")[3]
    metrics = (f"fd_{name}", f"precision_{name}", f"recall_{name}")
    assert found.keys() - {"evaluation/seconds"} == {
        f"evaluation/ema_{decay}/{metric}" for decay in (0.5, 0.9) for metric in metrics
    }
    assert found[f"evaluation/ema_0.5/fd_{name}"] != found[f"evaluation/ema_0.9/fd_{name}"]


def test_samples_that_are_not_finite_have_a_score_of_nan(images, tiny_model, caplog):
    model, config = load(str(tiny_model)), configuration(images, tiny_model, guidance="cfg:1e30")
    assert config.evaluation
    score = evaluator(config.evaluation, config.data, model.denoiser, lambda: {"": model}, ONE)
    assert [math.isnan(value) for value in score(7).values()] == [True]
    assert "step 7: samples have values that are not finite, so their scores are NaN" in caplog.text


def lost_in_one(world: World, images: str, tiny_model: Path) -> tuple[list[bool], int]:
    """Return which scores are NaN if the samples of the second process are, and the number of warnings."""
    model, config, warnings = load(str(tiny_model)), configuration(images, tiny_model), []
    if not world.is_main:
        torch.nn.init.constant_(model.denoiser.final.out.weight, math.nan)
    evaluation._log.addFilter(lambda record: warnings.append(record) or False)
    assert config.evaluation
    scores = evaluator(config.evaluation, config.data, model.denoiser, lambda: {"": model}, world)(7)
    return [math.isnan(value) for value in scores.values()], len(warnings)


def test_samples_that_one_process_lost_have_a_score_of_nan_in_all(images, tiny_model, run_ranks):
    assert run_ranks(lost_in_one, 2, images, tiny_model) == [([True], 1), ([True], 0)]


def test_scores_have_intervals_if_asked(images, tiny_model):
    model, config = load(str(tiny_model)), configuration(images, tiny_model)
    assert config.evaluation
    settings = replace(config.evaluation, count=40, intervals=True)
    scores = evaluator(settings, config.data, model.denoiser, lambda: {"": model}, ONE)(1)
    name = f"fd_{load_networks(str(tiny_model), ONE.device).popitem()[0]}"
    assert {name, f"{name}_low", f"{name}_high"} <= scores.keys()


@pytest.mark.parametrize("changed", [{}, {"labels": "random"}, {"seed": 3}, {"guidance": "cfg:3.0"}, {"steps": 3}])
def test_every_setting_of_the_samples_counts(images, tiny_model, changed):
    against, networks = reference(images, tiny_model)
    (name,) = networks
    options: dict[str, Any] = {"labels": "balanced", "seed": 0, "guidance": "cfg:2.0", "steps": 2} | changed
    config = EvaluationConfig(every=1, count=25, features=(str(tiny_model),), **options)
    model = load(str(tiny_model))
    call = evaluator(
        config, DataConfig(source=images, image_size=16, flip=True), model.denoiser, lambda: {"x/": model}, ONE
    )
    sampling = Sampling(steps=options.pop("steps"), guidance=parse_guidance(options.pop("guidance")))
    stream = Samples(model, 25, sampling, **options)
    distance = FrechetDistance(networks[name], against.gaussian(networks[name]))
    expected = score_stream(stream.share(ONE), [distance], ONE)[f"fd_{name}"]
    assert call(1) == {f"x/fd_{name}": pytest.approx(expected, rel=1e-9)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_samples_alone_are_made_in_the_precision_and_in_batches(images, tiny_model, monkeypatch, precision):
    model, config = load(str(tiny_model)), configuration(images, tiny_model, precision=precision)
    making: set[bool] = set()
    scoring: set[tuple[bool, int]] = set()

    def score(stream: Iterator[Images], metrics: object, world: World) -> dict[str, float]:
        scoring.update((torch.is_autocast_enabled("cpu"), len(batch.images)) for batch in stream)
        return {}

    monkeypatch.setattr("raekit.stages.evaluation.score_stream", score)
    model.denoiser.register_forward_hook(lambda *_: making.add(torch.is_autocast_enabled("cpu")))
    assert config.evaluation
    evaluator(config.evaluation, config.data, model.denoiser, lambda: {"": model}, ONE)(1)
    assert making == {precision == "bf16"}
    assert scoring == {(False, 4), (False, 1)}  # 25 samples in batches of 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"guidance": "auto:2.0"}, "evaluation.guidance: auto:2.0 needs a weaker model, and a training has none"),
        ({"guidance": "internal:2.0"}, "evaluation.guidance: internal needs a base output"),
        ({"guidance": "cfg:2.0@0.6-0.7"}, "evaluation.guidance: cfg would have no effect"),
        ({"reference": "unlabelled.safetensors", "labels": "reference"}, "labels: the reference has 0 labelled images"),
        ({"reference": "animals.safetensors", "labels": "reference"}, "(ant, bee, cat) are not the classes of"),
    ],
)
def test_an_invalid_evaluation_is_rejected_before_training(images, tiny_model, tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    measured, _ = reference(images, tiny_model)
    replace(measured, about=replace(measured.about, classes=None)).write(Path("unlabelled.safetensors"))
    animals = replace(measured.about, class_names=("ant", "bee", "cat"))
    replace(measured, about=animals).write(Path("animals.safetensors"))
    with pytest.raises(UserError, match=re.escape(message)):
        train(configuration(images, tiny_model, **changed), tmp_path / "run", ONE)
    assert not (tmp_path / "run").exists()


def test_guidance_by_classes_is_rejected_without_classes(images, tiny_model, tmp_path):
    config = replace(configuration(images, tiny_model, guidance="cfg:2.0"), conditional=False)
    with pytest.raises(UserError, match=r"evaluation\.guidance: cfg needs labels"):
        train(config, tmp_path / "run", ONE)


def trained(world: World, images: str, tiny_model: Path, run: Path) -> dict[str, float]:
    train(configuration(images, tiny_model), run, world)
    world.barrier()
    return {name: value for name, value in logged(run)[3].items() if not name.endswith("seconds")}


def test_two_processes_score_as_one(run_ranks, images, tiny_model, tmp_path):
    one = trained(ONE, images, tiny_model, tmp_path / "one")
    for found in run_ranks(trained, 2, images, tiny_model, tmp_path / "two"):
        assert found == pytest.approx(one, rel=1e-3)  # the two trainings differ in their last digits


def test_a_single_held_out_image_is_rejected_before_training(few_images, tiny_model, tmp_path):
    with pytest.raises(UserError, match="a Frechet distance needs at least two images, and the split 'heldout' has 1"):
        train(configuration(few_images, tiny_model), tmp_path / "run", ONE)


def test_invalid_settings_are_rejected_before_training(images, tiny_model, tmp_path):
    config = configuration(images, tiny_model)
    assert config.evaluation
    with pytest.raises(UserError, match=r"evaluation\.ema: 0\.7 is not one of the averages \(0\.5, 0\.9\)"):
        replace(config, evaluation=replace(config.evaluation, ema=(0.5, 0.7)))
    for name in ("every", "batch_size"):
        with pytest.raises(UserError, match=rf"evaluation\.{name}: 0 must be at least 1"):
            replace(config.evaluation, **{name: 0})
    with pytest.raises(UserError, match=r"evaluation\.count: distances need at least 2 images, and there is 1"):
        replace(config.evaluation, count=1)
    with pytest.raises(UserError, match=r"evaluation\.intervals: they need at least 40 images, and there are 25"):
        replace(config.evaluation, intervals=True)
    against, _ = reference(images, tiny_model)
    replace(against, about=replace(against.about, image_size=32)).write(tmp_path / "large.safetensors")
    for place, message in (("none.npz", "none.npz: no such file"), ("large.safetensors", "images of 32 pixels")):
        wrong = replace(config, evaluation=replace(config.evaluation, reference=str(tmp_path / place)))
        with pytest.raises(UserError, match=message):
            train(wrong, tmp_path / "run", ONE)
    assert not (tmp_path / "run" / "config.json").exists()
