import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import UserError
from raekit.inference.shards import statistics_fingerprint
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import ContextConfig, DenoiserConfig, TransformerConfig
from raekit.models.registry import LayersConfig
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.stages.initial import initialise_denoiser
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig
from raekit.stages.run import StageConfig, build, train
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

ONE = World()


@pytest.fixture
def config(images, tiny_model) -> Callable[[str], StageConfig]:
    """Return a function that makes a config of either stage, with the sizes of the tiny model."""
    data, optim = DataConfig(source=images, image_size=16), OptimConfig(lr=1e-3)
    settings = TrainConfig(steps=2, batch_size=6, precision="fp32", seed=5)
    part = TransformerConfig(width=16, depth=1, heads=2)
    size = DecoderSize(width=16, depth=1, heads=2, hidden=32, patch_size=4)
    shared = {"data": data, "train": settings, "optim": optim, "ema": (0.5,)}
    configs: dict[str, StageConfig] = {
        "decoder": ReconstructionConfig(encoder=str(tiny_model), decoder=size, **shared),
        "denoiser": GenerationConfig(
            autoencoder=str(tiny_model), denoiser=DenoiserSize(backbone=part, head=part), **shared
        ),
    }
    return configs.__getitem__


def initial(config: StageConfig, folder: Path) -> dict[str, torch.Tensor]:
    return build(config, folder, ONE).objectives[0].module.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if torch.equal(one[key], other[key])]


def test_fine_tuning_starts_from_the_decoder(config, tiny_model, tmp_path):
    published = Autoencoder.load(str(tiny_model)).decoder.state_dict()
    tuned = replace(config("decoder"), init_from=str(tiny_model))
    assert same(initial(tuned, tmp_path), published) == list(published)
    assert same(initial(config("decoder"), tmp_path), published) != list(published)


def test_a_fine_tuned_decoder_keeps_the_statistics_of_the_same_encoder(config, tiny_model, tmp_path):
    tuned = replace(config("decoder"), init_from=str(tiny_model))
    layers = replace(tuned, layers=LayersConfig(token_mean=True))
    plain = Autoencoder.load(str(tiny_model))
    plain.set_statistics(None, torch.full(plain.latent_shape, 0.99999))  # no statistics are published
    plain.save(tmp_path / "plain")
    unmeasured = replace(tuned, init_from=str(tmp_path / "plain"))
    for name, each in {"new": config("decoder"), "same": tuned, "other": layers, "first": unmeasured}.items():
        train(each, tmp_path / name, ONE)
    folders = tiny_model, *(tmp_path / name for name in ("new", "same", "other", "first"))
    published, new, same, other, first = (statistics_fingerprint(Autoencoder.load(str(folder))) for folder in folders)
    assert same == published
    assert first == new
    assert published not in (new, other)


def test_fine_tuning_starts_from_the_denoiser(config, tiny_model, tmp_path):
    published = Denoiser.load(str(tiny_model)).state_dict()
    tuned = replace(config("denoiser"), init_from=str(tiny_model))
    # The classes have the same names. The time shift of the fixture does not follow from its latents.
    with pytest.raises(UserError, match=r"init_from: .* differs from this config's:\n  shift: 1.0 -> 0.25\nName "):
        initial(tuned, tmp_path)
    tuned = replace(tuned, shift_base=256, denoiser=replace(tuned.denoiser, label_std=1.0))
    assert same(initial(tuned, tmp_path), published) == list(published)


@pytest.mark.parametrize("name", ["decoder", "denoiser"])
def test_learned_positions_are_trained_from_the_fixed_table(config, tmp_path, name):
    fixed = config(name)
    part = {name: replace(getattr(fixed, name), positions="learned")}
    learned = replace(fixed, **part, init_from=str(tmp_path / "fixed"))
    train(fixed, tmp_path / "fixed", ONE)
    began = initial(learned, tmp_path / "learned")
    module: Any = build(fixed, tmp_path / "other", ONE).objectives[0].module
    assert torch.equal(began["positions"], module.positions)
    train(learned, tmp_path / "learned", ONE)
    kinds = {"decoder": Autoencoder, "denoiser": Denoiser}
    trained: Any = kinds[name].load(str(tmp_path / "learned"))
    trained = trained.decoder if name == "decoder" else trained
    assert isinstance(trained.positions, torch.nn.Parameter)
    assert not torch.equal(trained.positions, began["positions"])
    with pytest.raises(UserError, match='positions: "learned" -> "sincos"'):
        initial(replace(fixed, init_from=str(tmp_path / "learned")), tmp_path / "back")


@pytest.mark.parametrize("name", ["decoder", "denoiser"])
def test_a_run_can_be_gone_on_from_by_another(config, tmp_path, name):
    first, second = config(name), replace(config(name), init_from=str(tmp_path / "first"))
    train(first, tmp_path / "first", ONE)
    began = initial(second, tmp_path / "second")
    assert same(began, initial(first, tmp_path / "other")) != list(began)
    train(second, tmp_path / "second", ONE)
    shutil.rmtree(tmp_path / "first")
    train(second, tmp_path / "second", ONE)  # resumes from its own checkpoint


def test_a_base_output_may_be_added_or_left_out(config, tmp_path):
    plain = config("denoiser")
    with_base = replace(plain, denoiser=replace(plain.denoiser, base_depth=1))
    for name, first, second in (("added", plain, with_base), ("left out", with_base, plain)):
        train(first, tmp_path / name, ONE)
        published = Denoiser.load(str(tmp_path / name)).state_dict()
        began = initial(replace(second, init_from=str(tmp_path / name)), tmp_path / "other")
        shared = [key for key in began if not key.startswith("base_final.")]
        assert [key for key in shared if torch.equal(began[key], published[key])] == shared
        assert {key for key in began.keys() ^ published.keys() if key.startswith("base_final.")}
    deeper = TransformerConfig(width=16, depth=2, heads=2)
    moved = replace(plain, denoiser=replace(plain.denoiser, backbone=deeper, base_depth=2))
    train(replace(moved, denoiser=replace(moved.denoiser, base_depth=1)), tmp_path / "deeper", ONE)
    with pytest.raises(UserError, match="base_depth: 1 -> 2"):
        initial(replace(moved, init_from=str(tmp_path / "deeper")), tmp_path / "moved")


def test_other_classes_start_anew(config, tiny_model, tmp_path):
    tuned = replace(config("denoiser"), init_from=str(tiny_model), shift_base=256)
    published = Denoiser.load(str(tiny_model)).state_dict()
    without = initial(replace(tuned, conditional=False), tmp_path)
    assert without.keys() == published.keys() - {"label.weight"}
    assert all(torch.equal(value, published[key]) for key, value in without.items())
    folder = tmp_path / "other"
    other = Denoiser.load(str(tiny_model))
    other.config = replace(other.config, class_names=("one", "two", "three"))
    other.save(folder)
    renamed = initial(replace(tuned, init_from=str(folder)), tmp_path)
    assert same(renamed, published) == [key for key in published if key != "label.weight"]


def test_imagenets_folders_are_the_classes_of_published_models(tmp_path):
    config = DenoiserConfig(
        channels=4, grid=(2, 2), backbone=TransformerConfig(width=8, depth=1, heads=1), num_classes=2
    )
    published = Denoiser(replace(config, class_names=("tench", "goldfish")))
    published.save(tmp_path)
    for names, kept in ((("n01440764", "n01443537"), True), (("cat", "dog"), False)):
        new = Denoiser(replace(config, class_names=names))
        initialise_denoiser(new, str(tmp_path))
        assert torch.equal(new.state_dict()["label.weight"], published.state_dict()["label.weight"]) == kept


@pytest.mark.parametrize("conditional", [True, False])
def test_tokens_of_the_class_come_and_go_with_the_classes(config, tmp_path, conditional: bool):
    given = config("denoiser")
    size = replace(given.denoiser, context=ContextConfig())
    first = replace(given, denoiser=size, conditional=conditional)
    module = build(first, tmp_path / "first", ONE).objectives[0].module
    assert isinstance(module, Denoiser)
    module.save(tmp_path / "first")
    tuned = replace(first, conditional=not conditional, init_from=str(tmp_path / "first"))
    began, before = initial(tuned, tmp_path / "second"), module.state_dict()
    assert began.keys() ^ before.keys() == {"label.weight", "label_tokens"}
    assert all(torch.equal(value, before[key]) for key, value in began.items() if key in before)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("decoder", "pixels@16", "init_from: pixels@16 has no decoder to train"),
        (
            "decoder",
            "builtin:emoji",
            r"init_from: the architecture of builtin:emoji differs from this config's:\n  token_dim: 192 -> 16",
        ),
        (
            "denoiser",
            "builtin:emoji",
            r"init_from: the architecture of builtin:emoji differs from this config's:\n  backbone\.width: 192",
        ),
        ("denoiser", "nowhere", "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(config, tmp_path, name, source, message):
    with pytest.raises(UserError, match=message):
        initial(replace(config(name), init_from=source), tmp_path)
