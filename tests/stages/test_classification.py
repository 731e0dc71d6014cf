import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raekit import artifacts
from raekit.data.loader import DataConfig
from raekit.data.sources.folders import Files
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.against import Against
from raekit.evaluation.features import Images, load_networks
from raekit.evaluation.references import measure_reference
from raekit.evaluation.streaming import score_stream
from raekit.models.augment import AugmentConfig, augment
from raekit.models.classifier import ClassifierConfig, load_classifier
from raekit.stages.classification import ClassificationConfig, build
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig, Trainer

ONE = World()


@pytest.fixture
def config(images) -> ClassificationConfig:
    return ClassificationConfig(
        data=DataConfig(source=images, image_size=16),
        widths=(8, 16),
        augment=AugmentConfig(prob=0.0),
        train=TrainConfig(steps=40, batch_size=8, precision="fp32"),
        optim=OptimConfig(lr=1e-2),
        ema=(0.5,),
        score_every=40,
    )


def trained(config: ClassificationConfig, folder) -> str:
    torch.manual_seed(0)
    made = build(config, folder, ONE)
    Trainer(folder, config.train, made.objectives, made.batches, ONE, made.periodics).fit()
    made.export(folder / "artifact")
    return str(folder)


def heldout(config: ClassificationConfig) -> DataConfig:
    return replace(config.data, split="heldout")


def test_a_trained_classifier_names_the_colours_and_judges_images(config, tmp_path):
    name = trained(config, tmp_path)
    model = load_classifier(name)
    assert model.config.class_names == ("blue", "green", "red")
    assert not any(parameter.requires_grad for parameter in model.parameters())

    # As a network of an evaluation: Frechet distance before the last layer, and the accuracy of its guesses.
    networks = load_networks(f"classifier:{name}", ONE.device)
    [(key, network)] = networks.items()
    assert key == network.name == f"{tmp_path.name}_classifier"
    compared = Against([measure_reference(heldout(config), networks, ONE)], networks, ONE.device)
    images = torch.zeros(60, 3, 16, 16)
    for colour in range(3):
        images[colour::3, 2 - colour] = 0.7
    labels = torch.arange(60) % 3
    batch = Images(images, labels, torch.arange(60))
    scores = score_stream([batch], compared.accumulators(60, intervals=True), ONE)
    assert scores[f"class_accuracy_{key}"] == 1.0
    assert scores[f"class_accuracy_{key}_low"] == pytest.approx(60 / (60 + 1.96**2), abs=1e-4)  # Wilson, 60 of 60
    assert scores[f"fd_{key}"] > 0
    torch.testing.assert_close(batch.features(network), model.features(batch.images))
    wrong = Images(images, (labels + 1) % 3, torch.arange(60))
    assert score_stream([wrong], compared.accumulators(60), ONE)[f"class_accuracy_{key}"] == 0.0
    for classes, judged in ((("blue", "green", "red"), 1), (("0", "1", "2"), 1), (("green", "red"), 0)):
        assert len(compared.judges_of(classes)) == judged
    assert f"class_accuracy_{key}" not in score_stream([batch], compared.accumulators(60, classes=("a", "b")), ONE)
    unknown = Images(images, torch.full_like(labels, -1), torch.arange(60))
    assert f"class_accuracy_{key}" not in score_stream([unknown], compared.accumulators(60), ONE)


def test_a_classifier_records_its_data_with_the_names_of_the_splits(config, tmp_path):
    swapped = replace(config.data, splits="train=val,heldout=train")
    name = trained(replace(config, data=swapped, train=replace(config.train, steps=1)), tmp_path)
    assert artifacts.find(name, "classifier").trained_on == f"{config.data.source}?train=val,heldout=train"


def test_the_accuracy_on_held_out_images_is_measured(config, tmp_path):
    torch.manual_seed(0)
    made = build(config, tmp_path, ONE)
    [periodic] = made.periodics
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    assert periodic.call(40)["heldout_accuracy"] == 1.0
    torch.nn.init.zeros_(made.objectives[0].averaged.get_parameter("head.weight"))  # every image gets one class
    assert periodic.call(40)["heldout_accuracy"] == pytest.approx(1 / 3)


def test_features_of_other_sizes_are_resized(config, tmp_path):
    [network] = load_networks(f"classifier:{trained(config, tmp_path)}", ONE.device).values()
    large = torch.rand(1, 3, 48, 48)
    resized = torch.nn.functional.interpolate(large, 16, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(network(large), network(resized))


def test_images_without_classes_are_rejected(config, tmp_path, images):
    flat = images.replace("folder:", "flat:")
    with pytest.raises(UserError, match=r"^data\.source: flat:.* has no classes"):
        build(replace(config, data=replace(config.data, source=flat)), tmp_path, ONE)


def test_images_of_a_single_class_are_rejected(config, tmp_path):
    images = Path(config.data.source.removeprefix("folder:"))
    for split in ("train", "val"):
        shutil.copytree(images / split / "red", tmp_path / "one" / split / "red")
    one = replace(config.data, source=f"folder:{tmp_path / 'one'}")
    with pytest.raises(UserError, match=r"^data\.source: .* has one class, and a classifier needs at least two"):
        build(replace(config, data=one), tmp_path, ONE)


def test_images_that_cannot_be_judged_are_rejected_before_the_training(config, tmp_path, monkeypatch):
    images = Path(config.data.source.removeprefix("folder:"))
    shutil.copytree(images / "train", tmp_path / "all" / "train")
    only = replace(config.data, source=f"folder:{tmp_path / 'all'}", splits="train=train,heldout=test")
    (tmp_path / "all" / "test").mkdir()
    with pytest.raises(UserError, match=r"test"):
        build(replace(config, data=only), tmp_path, ONE)
    labels = Files.__init__

    def some(self: Files, *args: Any) -> None:
        labels(self, *args)
        self.labels[:2] = -1  # as for rows of a Hugging Face dataset without a label

    monkeypatch.setattr(Files, "__init__", some)
    with pytest.raises(UserError, match=r"^data\.source: 2 of 30 train images of .* have no class"):
        build(config, tmp_path, ONE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"widths": ()}, "widths"),
        ({"widths": (12,)}, r"widths: \(12,\) must be multiples of 8"),
        ({"widths": (8,) * 5}, "widths: 5 levels halve an image of 16 pixels"),
        ({"num_classes": 0}, "num_classes"),
        ({"class_names": ("a",)}, "class_names: 1 names for 3 classes"),
    ],
)
def test_wrong_sizes_are_rejected(changed, message):
    with pytest.raises(UserError, match=message):
        replace(ClassifierConfig(image_size=16, num_classes=3, widths=(8, 16)), **changed)


def test_the_accuracy_is_that_of_the_held_out_images_of_all_processes(config, tmp_path):
    class Two(World):
        """A process whose partner has nine images, all of them wrong."""

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + torch.tensor([0.0, 9.0])

    accuracies, images = [], []
    for world in (ONE, Two()):
        torch.manual_seed(0)
        made = build(replace(config, ema=()), tmp_path, world)
        made.objectives[0].module.register_forward_pre_hook(lambda module, inputs: images.append(len(inputs[0])))
        accuracies.append(made.periodics[0].call(1)["heldout_accuracy"])
    assert images == [9, 9]
    assert 0 < accuracies[0] == 2 * accuracies[1]


def test_the_classifier_sees_augmented_images(config, tmp_path):
    made = build(replace(config, augment=AugmentConfig()), tmp_path, ONE)
    seen, batch = [], next(made.batches(0))
    made.objectives[0].module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    made.objectives[0].loss(batch, 3)
    expected = augment(batch.pixels(), AugmentConfig(), seed=0, stream="classifier", step=3, positions=batch.positions)
    assert torch.equal(seen[0], expected)
    assert not torch.equal(seen[0], batch.pixels())
