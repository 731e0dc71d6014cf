import math
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raekit.config import Mark, from_dict, replaced, to_dict
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.metrics import NearestNeighbours
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.registry import LayersConfig
from raekit.models.vit import ViT, ViTConfig
from raekit.stages.representation import Pixels, RepresentationConfig, TeacherConfig, build, class_accuracy
from raekit.training.optim import OptimConfig, by_muon
from raekit.training.trainer import TrainConfig, Trainer

ONE = World()
VIT = ViTConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2)


@pytest.fixture
def config(images) -> RepresentationConfig:
    return RepresentationConfig(
        data=DataConfig(source=images, image_size=16),
        encoder=VIT,
        decoder_width=16,
        decoder_depth=1,
        train=TrainConfig(steps=3, batch_size=6, precision="fp32"),
        optim=OptimConfig(lr=1e-3),
        ema=(0.5,),
    )


def stage(config: RepresentationConfig, tmp_path):
    torch.manual_seed(0)
    return build(config, tmp_path, ONE)


def first_batch(config: RepresentationConfig) -> Batch:
    return next(Loader(config.data, config.train.seed).stream(0, config.train.batch_size, ONE))


def patches(images: Tensor) -> Tensor:
    """Cut images in [0, 1] into normalised patches (B, 16, 48) with plain loops.

    The patches are in row order, and each patch consists of rows of RGB pixels.
    """
    pixels = (images - 0.5) / 0.5
    return torch.stack(
        [
            pixels[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(0, 2, 3, 1).flatten(1)
            for y in range(4)
            for x in range(4)
        ],
        dim=1,
    )


@pytest.mark.parametrize("visible_weight", [0.0, 0.5])
def test_the_loss_compares_patches_each_standardised(config, tmp_path, visible_weight):
    objective = stage(replace(config, visible_weight=visible_weight), tmp_path).objectives[0]
    batch = first_batch(config)
    seen: dict[str, Tensor] = {}

    def watch(module, arguments, output):
        seen.update(pixels=arguments[0], keep=arguments[1], predicted=output[0])

    objective.module.register_forward_hook(watch)
    loss, metrics = objective.loss(batch, 0)
    assert torch.allclose(seen["pixels"], batch.pixels() * 2 - 1, atol=1e-6)
    assert seen["keep"].shape == (6, 4)  # a quarter of 16
    errors: dict[bool, list[float]] = {True: [], False: []}
    for image, keep, predicted in zip(batch.pixels(), seen["keep"], seen["predicted"], strict=True):
        assert len(set(keep.tolist())) == 4
        for i, patch in enumerate(patches(image[None])[0]):
            target = (patch - patch.mean()) / math.sqrt(patch.var(correction=0) + 1e-2)
            errors[i in keep.tolist()].append((predicted[i] - target).square().mean().item())
    visible, hidden = (sum(errors[key]) / len(errors[key]) for key in (True, False))
    assert (len(errors[True]), len(errors[False])) == (6 * 4, 6 * 12)
    assert loss.item() == pytest.approx(hidden + visible_weight * visible, rel=1e-5)
    assert metrics["hidden"].item() == pytest.approx(hidden, rel=1e-5)
    assert metrics["visible"].item() == pytest.approx(visible, rel=1e-5)


def test_what_is_hidden_does_not_reach_the_encoder(config, tmp_path):
    model = stage(config, tmp_path).objectives[0].module
    pixels = torch.rand(1, 3, 16, 16)
    other = pixels.clone()
    other[:, :, 4:, :] = 0  # rows 4 to 15: all patches but the first four
    keep = torch.tensor([[2, 0, 3]])
    assert torch.equal(model(pixels, keep)[0], model(other, keep)[0])
    other[:, :, :4, :] = 0
    assert not torch.allclose(model(pixels, keep)[0], model(other, keep)[0])


def test_raw_patches_keep_their_colours(config, tmp_path):
    objective = stage(replace(config, normalize_patches=False), tmp_path).objectives[0]
    batch = first_batch(config)
    seen: dict[str, Tensor] = {}
    objective.module.register_forward_hook(lambda module, args, output: seen.update(keep=args[1], predicted=output[0]))
    _, metrics = objective.loss(batch, 0)
    error = (seen["predicted"] - patches(batch.pixels())).square().mean(-1)
    assert metrics["visible"].item() == pytest.approx(error.gather(1, seen["keep"]).mean().item(), rel=1e-5)


@pytest.fixture
def teacher(tmp_path) -> str:
    """The folder of an encoder with 24 channels and patches of 8 pixels, trained on images of 16 pixels."""
    vit = ViT(ViTConfig(image_size=16, patch_size=8, width=24, depth=2, heads=2))
    Encoder("teacher", vit.config.spec, vit).save(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_a_teacher_is_predicted_at_every_patch(config, tmp_path, teacher, mask_ratio):
    chosen = TeacherConfig(encoder=teacher, layers=LayersConfig(blocks=(0,)), weight=2.0)
    config = replace(config, teacher=chosen, mask_ratio=mask_ratio, visible_weight=0.5)
    objective = stage(config, tmp_path).objectives[0]
    batch = first_batch(config)
    seen: dict[str, Tensor] = {}
    objective.module.register_forward_hook(lambda module, args, output: seen.update(tokens=output[1]))
    loss, metrics = objective.loss(batch, 0)
    # The student has 4 x 4 patches, so the teacher, with patches of 8 pixels, sees images of 32 pixels.
    target = load_encoder(teacher, 32, chosen.layers)(batch.pixels())
    assert target.shape == (6, 16, 24)
    assert metrics["teacher"].item() == pytest.approx((seen["tokens"] - target).square().mean().item(), rel=1e-5)
    hidden = metrics["hidden"].item() if mask_ratio else 0.0
    expected = hidden + 0.5 * metrics["visible"].item() + 2.0 * metrics["teacher"].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert ("hidden" in metrics) == (mask_ratio > 0)


def test_distillation_approaches_the_teacher(config, tmp_path, teacher):
    config = replace(
        config,
        teacher=TeacherConfig(encoder=teacher),
        mask_ratio=0.0,
        train=replace(config.train, steps=60),
        optim=OptimConfig(lr=5e-3),
    )
    made = stage(config, tmp_path)
    batch = first_batch(config)
    before = made.objectives[0].loss(batch, 0)[1]["teacher"].item()
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    assert made.objectives[0].loss(batch, 0)[1]["teacher"].item() < 0.5 * before
    made.export(tmp_path / "artifact")
    assert load_encoder(str(tmp_path)).width == VIT.width  # the teacher and the decoder are not part of the artifact


def test_a_teacher_needs_a_weight(teacher):
    for weight in (0.0, -1.0):
        with pytest.raises(UserError, match=rf"^teacher\.weight: {weight} "):
            TeacherConfig(encoder=teacher, weight=weight)


def test_a_teacher_in_a_folder_is_found_from_any_working_folder(config):
    distilled = replace(config, teacher=TeacherConfig(encoder="teachers/large"))
    assert replaced(distilled, Mark.PLACE, lambda place: f"/{place}").teacher.encoder == "/teachers/large"


def test_data_without_held_out_images_is_rejected_before_the_training(config, tmp_path):
    images, folder = Path(config.data.source.removeprefix("folder:")), tmp_path / "images" / "red"
    folder.mkdir(parents=True)
    shutil.copy(images / "train" / "red" / "02.png", folder)  # the hash of this name does not hold it out
    source = f"folder:{folder.parent}"
    with pytest.raises(UserError, match="has no images in the split 'heldout'"):
        build(replace(config, data=replace(config.data, source=source)), tmp_path, ONE)


def test_the_nearest_training_images_predict_the_classes(config, few_images, tmp_path):
    """Also if there are fewer than 10 of them."""
    config = replace(config, ema=())
    (periodic,) = stage(config, tmp_path).periodics
    scores = periodic.call(1)
    assert sorted(scores) == ["knn_accuracy_pixels", "knn_accuracy_random", "knn_accuracy_trained"]
    assert scores["knn_accuracy_pixels"] == 1.0  # the classes are colours
    few = stage(replace(config, data=replace(config.data, source=few_images)), tmp_path)
    assert few.periodics[0].call(1)["knn_accuracy_pixels"] == 1.0


def test_ten_neighbours_predict_a_class_and_pixels_are_around_zero(config, monkeypatch):
    voters: list[int] = []

    def neighbours(network: Any, bank: Tensor, labels: Tensor, count: int) -> NearestNeighbours:
        voters.append(count)
        return NearestNeighbours(network, bank, labels, count)

    monkeypatch.setattr("raekit.stages.representation.NearestNeighbours", neighbours)
    assert class_accuracy(Pixels(), config.data, ONE) == {"knn_accuracy_pixels": 1.0}
    assert voters == [10]
    monkeypatch.setattr("raekit.stages.representation.MOST", 3)
    class_accuracy(Pixels(), config.data, ONE)
    assert voters == [10, 3]  # a neighbour for each image that is read
    assert torch.equal(Pixels()(torch.full((2, 3, 32, 32), 0.5)), torch.zeros(2, 3 * 16**2))


def test_muon_does_not_train_the_patch_embedding(config, tmp_path):
    (objective,) = stage(config, tmp_path).objectives
    embedding = objective.module.get_parameter("encoder.embed.weight")
    matrices = by_muon(OptimConfig(lr=1e-3, method="muon"), objective.module, objective.convolutions)
    assert all(matrix is not embedding for matrix in matrices)


def test_masks_belong_to_positions(config, tmp_path):
    objective = stage(config, tmp_path).objectives[0]
    batch = first_batch(config)
    parts = [objective.loss(part, step)[0] for step, part in enumerate(batch.split(2))]
    assert torch.stack(parts).mean().item() == pytest.approx(objective.loss(batch, 7)[0].item(), rel=1e-5)
    moved = replace(batch, positions=batch.positions + 6)
    assert objective.loss(moved, 0)[0].item() != pytest.approx(objective.loss(batch, 0)[0].item(), rel=1e-4)
    reseeded = stage(replace(config, train=replace(config.train, seed=1)), tmp_path).objectives[0]
    assert reseeded.loss(batch, 0)[0].item() != pytest.approx(objective.loss(batch, 0)[0].item(), rel=1e-4)


@pytest.mark.parametrize("ema", [(0.5, 0.9), ()])
def test_the_artifact_is_the_averaged_encoder(config, tmp_path, ema):
    config = replace(config, ema=ema)
    made = stage(config, tmp_path)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    encoder = load_encoder(str(tmp_path))
    averaged = made.objectives[0].averaged.get_submodule("encoder")
    images = torch.rand(2, 3, 16, 16)
    tokens = encoder(images)
    assert torch.equal(tokens, averaged.eval()(images * 2 - 1).detach())
    assert encoder.spec == VIT.spec
    assert tokens.shape == (2, 16, 16)
    assert tokens.mean(-1).abs().max() < 1e-5
    assert [path.name for path in (tmp_path / "artifact").iterdir()] == ["encoder"]


def test_batches_start_where_they_are_told(config, tmp_path):
    made = stage(config, tmp_path)
    straight = list(islice(made.batches(0), 8))  # more than an epoch of 30
    assert torch.equal(straight[7].images, next(made.batches(42)).images)
    assert straight[7].positions.tolist() == list(range(42, 48))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 0.01, 0.99, float("nan")])
def test_a_mask_of_nothing_or_of_everything_is_refused(config, ratio):
    with pytest.raises(UserError, match=rf"mask_ratio: .*{ratio}"):
        replace(config, mask_ratio=ratio)


def test_images_of_another_size_than_the_encoders_are_refused(config):
    with pytest.raises(UserError, match=r"data\.image_size: 8 must equal encoder\.image_size = 16"):
        replace(config, data=replace(config.data, image_size=8))


def test_the_config_goes_through_json_strictly(config):
    values = to_dict(config)
    assert from_dict(RepresentationConfig, values, "config.json") == config
    values["encoder"]["widht"] = 3
    with pytest.raises(UserError, match=r"config\.json: encoder\.widht: "):
        from_dict(RepresentationConfig, values, "config.json")


def test_the_decoder_knows_the_place_of_each_patch(config, tmp_path):
    torch.manual_seed(0)
    made = build(config, tmp_path, ONE)
    model, seen = made.objectives[0].module, []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))  # type: ignore[index,union-attr]
    made.objectives[0].loss(next(made.batches(0)), 0)
    positions = model.get_buffer("positions")
    hidden = (seen[0] == positions).all(-1)  # the mask token is zero at the start
    patches = len(positions)
    assert hidden.sum(1).tolist() == [round(config.mask_ratio * patches)] * len(hidden)
