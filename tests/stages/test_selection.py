import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raekit.config import read_json
from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.autoencoder import Autoencoder
from raekit.stages import selection
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig
from raekit.stages.run import train
from raekit.stages.selection import SelectionConfig, selector
from raekit.training.optim import OptimConfig
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig

ONE = World()


@pytest.fixture
def generated(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "generated.safetensors"
    save_file({"unwhitened": torch.randn(20, 16, 4, 4)}, path)
    return path


@pytest.fixture
def config(images, tiny_model, generated) -> ReconstructionConfig:
    return ReconstructionConfig(
        data=DataConfig(source=images, image_size=16, crop="random", flip=True),
        encoder=str(tiny_model),
        decoder=DecoderSize(width=16, depth=1, heads=2, hidden=32, patch_size=4),
        selection=SelectionConfig(every=2, latents=str(generated), features=str(tiny_model)),
        train=TrainConfig(steps=6, batch_size=6, precision="fp32", log_every=1),
        optim=OptimConfig(lr=0.1, clip=0.0),  # so that the last decoder is not the best
        ema=(),
    )


@pytest.mark.parametrize("ema", [(), (0.1,)])
@pytest.mark.parametrize("by", ["generation", "reconstruction"])
def test_the_best_decoder_is_kept(config, tmp_path, by, ema):
    config = replace(config, ema=ema)
    if by == "reconstruction":
        config = replace(config, selection=replace(config.selection, latents=None))
    run = tmp_path / "run"
    train(config, run, ONE)
    scores = {int(r["step"]): r[f"evaluation/{by}_fd"] for r in read_metrics(run) if f"evaluation/{by}_fd" in r}
    assert list(scores) == [2, 4, 6]
    best = min(scores, key=scores.__getitem__)
    assert read_json(run / "selected.json") == {"step": best, "score": scores[best]}
    kept = Autoencoder.load(str(run))
    again = selector(config.selection, config.data, kept.latent_shape, tmp_path / "again", lambda: kept, ONE)(best)
    assert again[f"{by}_fd"] == pytest.approx(scores[best], rel=1e-9)
    assert ("generation_fd" in again) == (by == "generation")
    assert again["psnr"] > 0


def test_a_worse_decoder_does_not_replace_the_best(config, tmp_path, tiny_model):
    model = Autoencoder.load(str(tiny_model))
    call = selector(config.selection, config.data, model.latent_shape, tmp_path, lambda: model, ONE)
    first = call(2)
    kept = (tmp_path / "artifact" / "autoencoder" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.decoder.out.bias.add_(0.5)
    second = call(4)
    assert second["generation_fd"] > first["generation_fd"]
    assert read_json(tmp_path / "selected.json")["step"] == 2
    assert (tmp_path / "artifact" / "autoencoder" / "model.safetensors").read_bytes() == kept


def test_a_selection_that_was_off_in_between_starts_again(config, tmp_path):
    run = tmp_path / "run"

    def train_to(step: int, config: ReconstructionConfig) -> None:
        train(replace(config, train=replace(config.train, steps=step)), run, ONE, change=True)

    train_to(2, config)
    assert read_json(run / "selected.json")["step"] == 2
    train_to(3, replace(config, selection=None))
    assert not (run / "selected.json").exists()
    train_to(4, config)
    selected = read_json(run / "selected.json")
    kept = Autoencoder.load(str(run))
    again = selector(config.selection, config.data, kept.latent_shape, tmp_path / "again", lambda: kept, ONE)(4)
    assert selected == {"step": 4, "score": pytest.approx(again["generation_fd"], rel=1e-9)}


def test_latents_of_another_shape_are_rejected(config, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"unwhitened": torch.zeros(3, 16, 2, 2)}, path)
    wrong = replace(config, selection=replace(config.selection, latents=str(path)))
    message = re.escape(
        f"{path}: needs two generated latents or more of shape (16, 4, 4), all finite, has (3, 16, 2, 2); make "
    )
    with pytest.raises(UserError, match=message):
        train(wrong, tmp_path / "run", ONE)
    save_file({"latents": torch.zeros(3, 16, 4, 4)}, path)
    with pytest.raises(UserError, match="has none"):
        train(wrong, tmp_path / "run", ONE)


def test_a_selection_that_never_happens_is_rejected(config):
    with pytest.raises(UserError, match=r"selection\.every: 0 must be at least 1"):
        replace(config.selection, every=0)


def test_a_single_held_out_image_is_rejected_before_training(config, few_images, tmp_path):
    config = replace(config, data=replace(config.data, source=few_images))
    with pytest.raises(UserError, match="a Frechet distance needs at least two images, and the split 'heldout' has 1"):
        train(config, tmp_path / "run", ONE)


def test_generated_latents_are_decoded_as_they_are(config, tmp_path, tiny_model, generated):
    model, seen = Autoencoder.load(str(tiny_model)), []
    call = selector(config.selection, config.data, model.latent_shape, tmp_path, lambda: model, ONE)
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    call(2)
    assert torch.allclose(torch.cat(seen)[-20:], load_file(generated)["unwhitened"], atol=1e-4)


def in_any_world(world: World, config: ReconstructionConfig, model: Path, run: Path) -> dict[str, float]:
    """Score the decoder by latents in batches of 8."""
    selection.BATCH = 8
    decoder = Autoencoder.load(str(model))
    assert config.selection
    return selector(config.selection, config.data, decoder.latent_shape, run, lambda: decoder, world)(2)


def test_two_processes_share_the_latents_and_score_as_one(config, tmp_path, tiny_model, run_ranks, monkeypatch):
    monkeypatch.setattr(selection, "BATCH", 8)
    one = in_any_world(ONE, config, tiny_model, tmp_path / "one")
    for found in run_ranks(in_any_world, 2, config, tiny_model, tmp_path / "two"):
        assert found == pytest.approx(one, rel=1e-5)


def test_latents_that_are_not_finite_or_too_few_are_rejected(config, tmp_path):
    path = tmp_path / "other.safetensors"
    wrong = replace(config, selection=replace(config.selection, latents=str(path)))
    for latents in (torch.zeros(1, 16, 4, 4), torch.full((3, 16, 4, 4), torch.inf)):
        save_file({"unwhitened": latents}, path)
        with pytest.raises(UserError, match=r"needs two generated latents or more .* all finite"):
            train(wrong, tmp_path / "run", ONE)
