"""Pictures and held-out losses during training."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from raekit.data.loader import Batch, DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow.path import shift_factor
from raekit.flow.sampling import Sampling
from raekit.inference.generation import generate
from raekit.inference.model import load, reconstruct
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser_config import TransformerConfig
from raekit.pictures import from_pil
from raekit.stages import watch
from raekit.stages.generation import DenoiserSize, GenerationConfig, flow_matching_loss
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig
from raekit.stages.run import train
from raekit.stages.watch import HeldoutConfig, PicturesConfig, SamplesConfig, heldout_loss
from raekit.training.optim import OptimConfig
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig

ONE = World()
PART = TransformerConfig(width=16, depth=1, heads=2)
Made = Callable[..., Any]


def stage_2(images: str, tiny_model: Path, **options: Any) -> GenerationConfig:
    return GenerationConfig(
        data=DataConfig(source=images, image_size=16, crop="random", flip=True),
        autoencoder=str(tiny_model),
        denoiser=DenoiserSize(backbone=PART, head=PART),
        train=TrainConfig(steps=3, batch_size=6, precision="fp32", log_every=1, seed=2),
        optim=OptimConfig(lr=0.01),
        ema=(0.5,),
        **options,
    )


def stage_1(images: str, tiny_model: Path, **options: Any) -> ReconstructionConfig:
    return ReconstructionConfig(
        data=DataConfig(source=images, image_size=16, crop="random", flip=True),
        encoder=str(tiny_model),
        decoder=DecoderSize(width=16, depth=1, heads=2, hidden=32, patch_size=4),
        train=TrainConfig(steps=3, batch_size=6, precision="fp32", log_every=1, seed=2),
        optim=OptimConfig(lr=0.01),
        ema=(0.5,),
        **options,
    )


def logged(run: Path, name: str) -> dict[int, float]:
    return {int(record["step"]): record[name] for record in read_metrics(run) if name in record}


def tiles(path: Path, columns: int) -> torch.Tensor:
    """Return the images (N, 3, 16, 16) of a picture."""
    sheet = from_pil(Image.open(path))
    rows = (sheet.shape[1] - 2) // 18
    corners = [(2 + 18 * row, 2 + 18 * column) for row in range(rows) for column in range(columns)]
    return torch.stack([sheet[:, y : y + 16, x : x + 16] for y, x in corners])


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "artifact").rglob("*.safetensors"))
    return {f"{file.relative_to(run)} {key}": value for file in files for key, value in load_file(file).items()}


WATCHED = {2: {"samples": SamplesConfig, "make": stage_2}, 1: {"samples": PicturesConfig, "make": stage_1}}


@pytest.mark.parametrize("stage", [1, 2])
def test_watching_a_training_does_not_change_it(images, tiny_model, tmp_path, stage):
    make, pictures = WATCHED[stage]["make"], WATCHED[stage]["samples"]
    train(make(images, tiny_model), tmp_path / "plain", ONE)
    watched = make(images, tiny_model, samples=pictures(every=1, count=4), heldout=HeldoutConfig(every=1, count=4))
    train(watched, tmp_path / "watched", ONE)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "watched")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    name = ("decoder/loss", "denoiser/loss")[stage - 1]
    assert logged(tmp_path / "plain", name) == logged(tmp_path / "watched", name)
    found = sorted(path.name for path in (tmp_path / "watched" / "samples").iterdir())
    assert found == [f"step-0000000{step}.png" for step in (1, 2, 3)]


def test_the_picture_of_stage_2_shows_samples_of_the_exported_average(images, tiny_model, tmp_path):
    config = stage_2(images, tiny_model, samples=SamplesConfig(every=2, count=4, guidance="cfg:2.0", seed=5, steps=3))
    train(config, tmp_path, ONE)
    sampling = Sampling(steps=3, solver="abm", guidance="cfg:2.0")  # type: ignore[arg-type]
    (batch,) = generate(load(str(tmp_path)), [0, 0, 1, 2], seed=5, sampling=sampling)
    assert torch.allclose(tiles(tmp_path / "samples" / "step-00000003.png", 2), batch.images, atol=0.5 / 255 + 1e-4)


def test_samples_that_are_not_finite_do_not_end_the_training(tiny_model, caplog):
    model, config = load(str(tiny_model)), SamplesConfig(every=1, count=3, steps=2, guidance="cfg:1e30")
    picture = watch.samples(config, model.denoiser, lambda: model, "fp32", ONE)
    assert picture.call(5) == {}
    assert "step 5: no picture of samples: sample 0: its values are not finite" in caplog.text


def test_the_picture_of_stage_1_shows_held_out_images_and_their_reconstructions(images, tiny_model, tmp_path):
    train(stage_1(images, tiny_model, samples=PicturesConfig(every=3, count=4)), tmp_path, ONE)
    shown = tiles(tmp_path / "samples" / "step-00000003.png", 8)
    heldout = Loader(DataConfig(source=images, split="heldout", image_size=16), 0)
    (batch,) = heldout.read([range(0, 8, 2)], ONE)
    assert torch.allclose(shown[0::2], batch.pixels(), atol=1e-6)
    expected = reconstruct(Autoencoder.load(str(tmp_path)), batch.pixels())
    assert torch.allclose(shown[1::2], expected, atol=0.5 / 255 + 1e-4)


def test_the_held_out_loss_of_stage_2_has_fixed_images_times_and_noise(images, tiny_model, tmp_path):
    config = stage_2(images, tiny_model, heldout=HeldoutConfig(every=2))
    train(config, tmp_path, ONE)
    found = logged(tmp_path, "heldout/ema_loss")
    assert found.keys() == logged(tmp_path, "heldout/loss").keys() == {2, 3}
    model = load(str(tmp_path))
    (batch,) = Loader(DataConfig(source=images, split="heldout", image_size=16), 0).once(9, ONE)
    latents, alpha = model.autoencoder.encode(batch.pixels()), shift_factor(model.autoencoder.latent_shape)
    with torch.no_grad():
        loss, _ = flow_matching_loss(
            model.denoiser, latents, batch.labels, batch.positions, seed=2, time_law="uniform", alpha=alpha
        )
    assert found[3] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("count", [3, 5, 8, 100])
def test_the_held_out_images_are_spread_over_the_classes(images, count):
    data, seen = DataConfig(source=images, image_size=16), Counter()

    def loss(batch: Batch, step: int) -> torch.Tensor:
        seen.update(batch.labels.tolist())
        return torch.zeros(())

    heldout_loss(HeldoutConfig(every=1, count=count), data, {"loss": loss}, "fp32", ONE).call(1)
    assert seen.total() == min(count, 9)
    assert len(seen) == 3
    assert max(seen.values()) - min(seen.values()) <= 1


def test_an_unreadable_image_does_not_make_the_held_out_loss_nan(images, tmp_path, monkeypatch):
    shutil.copytree(images.removeprefix("folder:"), tmp_path / "images")
    last = max((tmp_path / "images" / "val").rglob("*.png"))
    last.write_bytes(b"damaged")
    data = DataConfig(source=f"folder:{tmp_path / 'images'}", image_size=16, max_unreadable=0.5)
    monkeypatch.setattr(watch, "BATCH", 1)  # the batch of the damaged image is empty
    means = {"loss": lambda batch, step: batch.pixels().mean()}
    periodic = watch.heldout_loss(HeldoutConfig(every=1), data, means, "fp32", ONE)
    readable = Loader(replace(data, split="heldout"), 0).once(64, ONE)
    expected = torch.cat([batch.pixels() for batch in readable]).mean().item()
    assert periodic.call(1)["loss"] == pytest.approx(expected)
    monkeypatch.setattr(Loader, "read", lambda *arguments, **options: iter(()))  # no image is readable
    assert str(periodic.call(2)["loss"]) == "nan"


def in_two(world: World, images: str, tiny_model: Path, run: Path) -> None:
    watched: dict[str, Any] = {"heldout": HeldoutConfig(every=3, count=5)}
    train(stage_2(images, tiny_model, samples=SamplesConfig(every=3, count=2, steps=2), **watched), run / "2", world)
    train(stage_1(images, tiny_model, samples=PicturesConfig(every=3, count=2), **watched), run / "1", world)


def test_two_processes_see_the_same_as_one(images, tiny_model, tmp_path, run_ranks):
    in_two(ONE, images, tiny_model, tmp_path / "one")
    run_ranks(in_two, 2, images, tiny_model, tmp_path / "two")
    for stage in ("1", "2"):
        one, two = tmp_path / "one" / stage, tmp_path / "two" / stage
        for name in ("heldout/loss", "heldout/ema_loss"):
            assert logged(two, name) == {3: pytest.approx(logged(one, name)[3], rel=1e-4)}
        pictures = [np.asarray(Image.open(run / "samples" / "step-00000003.png"), int) for run in (one, two)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_without_heldout_images_the_part_that_needs_them_is_named(tmp_path):
    for name in ("0", "1"):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "train" / f"{name}.png")
    data = DataConfig(source=f"flat:{tmp_path / 'train'}", image_size=16)
    with pytest.raises(UserError, match=r"^heldout: .* no images in the split 'heldout'.* give --heldout None"):
        heldout_loss(HeldoutConfig(every=1), data, {}, "fp32", ONE)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: {"samples": SamplesConfig(every=0)}, "samples.every: 0 must be at least 1"),
        (lambda: {"heldout": HeldoutConfig(every=1, count=0)}, "heldout.count: 0 must be at least 1"),
        (lambda: {"samples": SamplesConfig(every=1, guidance="internal:2.0")}, "samples.guidance: internal needs"),
        (lambda: {"samples": SamplesConfig(every=1, guidance="auto:2.0")}, "samples.guidance: auto"),
    ],
)
def test_invalid_pictures_are_rejected_before_training(images, tiny_model, tmp_path, part, message):
    with pytest.raises(UserError, match=message):
        train(replace(stage_2(images, tiny_model), **part()), tmp_path / "run", ONE)
    assert not (tmp_path / "run" / "config.json").exists()
