import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from raekit.data.loader import Batch, DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow.guidance import Guidance
from raekit.inference import Model, Sampling, generate, load, measure_latents, read_image, reconstruct
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser import Denoiser, DenoiserConfig, TransformerConfig
from raekit.pictures import from_pil, to_pil

ONE = World()
FEW = Sampling(steps=3)
LABELS = [0, 2, 1, 1, 0, 2, 2]


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return load(str(tiny_model))


@pytest.fixture
def unconditional(model) -> Model:
    part = TransformerConfig(width=16, depth=1, heads=2)
    return Model(model.autoencoder, Denoiser(DenoiserConfig(channels=16, grid=(4, 4), backbone=part, num_classes=0)))


def images_of(model: Model, labels: Sequence[int] | None = LABELS, sampling: Sampling = FEW, **options) -> Tensor:
    """All samples, in the order of their numbers."""
    batches = list(generate(model, labels, sampling=sampling, **options))
    order = torch.cat([batch.indices for batch in batches]).argsort()
    return torch.cat([batch.images for batch in batches])[order]


def test_loading_a_model_by_its_folder(model):
    assert model.classes == ("blue", "green", "red")
    assert model.device == torch.device("cpu")
    assert not model.denoiser.training
    assert not model.autoencoder.training


def test_samples_are_images_with_their_labels_and_numbers(model):
    batches = list(generate(model, LABELS, sampling=FEW, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.labels for batch in batches]).tolist() == LABELS
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))
    for batch in batches:
        assert batch.images.shape == (len(batch), 3, 16, 16)
        assert batch.images.dtype == torch.float32
        assert batch.images.min() >= 0
        assert batch.images.max() <= 1
        assert not batch.images.requires_grad


@pytest.mark.parametrize("guidance", [None, Guidance(scale=2.0, start=0.2, end=0.8)])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_sample_is_the_same_in_any_batch(model, guidance, solver):
    sampling = Sampling(steps=3, solver=solver, guidance=guidance)
    whole = images_of(model, sampling=sampling, batch_size=7)
    for batch_size in (1, 2, 64):
        assert torch.allclose(images_of(model, sampling=sampling, batch_size=batch_size), whole, atol=1e-5)


def test_two_processes_share_the_samples_of_one(model):
    alone = images_of(model, batch_size=2)
    shares = [list(generate(model, LABELS, sampling=FEW, batch_size=2, world=World(rank=r, size=2))) for r in (0, 1)]
    numbers = [[batch.indices.tolist() for batch in share] for share in shares]
    assert numbers == [[[0, 1], [4, 5]], [[2, 3], [6]]]
    for share in shares:
        for batch in share:
            assert torch.equal(batch.images, alone[batch.indices])
            assert batch.labels.tolist() == [LABELS[i] for i in batch.indices]


def test_indices_are_the_samples_that_are_made(model):
    whole = images_of(model, batch_size=2)
    assert torch.allclose(images_of(model, batch_size=2, indices=[1, 4, 5]), whole[[1, 4, 5]], atol=1e-5)
    made = [list(generate(model, LABELS, indices=[1, 4, 5], batch_size=2, world=World(rank=r, size=2))) for r in (0, 1)]
    assert [[batch.indices.tolist() for batch in share] for share in made] == [[[1, 4]], [[5]]]
    assert [batch.labels.tolist() for share in made for batch in share] == [[2, 0], [2]]
    assert not list(generate(model, LABELS, indices=[]))


def test_seeds_and_classes_make_different_samples(model):
    whole = images_of(model)
    assert torch.equal(images_of(model), whole)
    assert not torch.allclose(images_of(model, seed=1), whole, atol=1e-3)
    other = images_of(model, [1] * 7)
    same = torch.tensor([label == 1 for label in LABELS])
    assert torch.allclose(other[same], whole[same], atol=1e-5)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(other[~same], whole[~same], strict=True))
    assert all(not torch.allclose(whole[0], image, atol=1e-3) for image in whole[1:])


def test_a_model_without_classes_generates_by_count(unconditional):
    images = images_of(unconditional, None, count=5, batch_size=2)
    assert images.shape == (5, 3, 16, 16)
    assert next(iter(generate(unconditional, count=1, sampling=FEW))).labels.tolist() == [-1]
    with pytest.raises(UserError, match="labels: 0 is not among the model's 0 classes"):
        images_of(unconditional, [0])
    with pytest.raises(UserError, match=r"guidance: .* needs labels"):
        images_of(unconditional, None, Sampling(guidance=Guidance(scale=2.0)), count=1)


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_outside_the_classes_is_refused(model, label):
    with pytest.raises(UserError, match=f"labels: {label} is not among the model's 3 classes"):
        images_of(model, [0, label])


def test_labels_or_a_count_but_not_both(model):
    for arguments in ({"labels": None}, {"labels": [0], "count": 1}):
        with pytest.raises(UserError, match="give either labels, one for each sample, or count"):
            images_of(model, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(model, batch_size):
    with pytest.raises(UserError, match=f"batch_size: {batch_size} must be at least 1"):
        images_of(model, batch_size=batch_size)


class Counted(nn.Module):
    """A denoiser that notes for each call its time, and whether it got classes."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.config = denoiser, denoiser.config
        self.calls: list[tuple[float, bool]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        assert (t == t[0]).all()
        self.calls.append((t[0].item(), labels is not None))
        return self.denoiser(x, t, labels)


def calls_of(model: Model, sampling: Sampling) -> list[tuple[float, bool]]:
    counted = Counted(model.denoiser)
    images_of(Model(model.autoencoder, counted), [0], sampling)  # type: ignore[arg-type]
    return counted.calls


@pytest.mark.parametrize(
    ("sampling", "evaluations"),
    [
        (Sampling(steps=10), 10),
        (Sampling(steps=10, grid="published"), 9),
        (Sampling(steps=10, solver="heun"), 20),
    ],
)
def test_evaluations_of_each_solver_and_grid(model, sampling, evaluations):
    calls = calls_of(model, sampling)
    assert len(calls) == evaluations
    assert calls[0][0] == 1.0
    assert all(given for _, given in calls)


def test_guidance_costs_a_second_evaluation_only_within_its_interval(model):
    calls = calls_of(model, Sampling(steps=10, guidance=Guidance(scale=2.0, start=0.2, end=0.6)))
    conditional = [t for t, given in calls if given]
    unconditional = [t for t, given in calls if not given]
    assert len(conditional) == 10
    assert unconditional == [t for t in conditional if 0.2 <= t <= 0.6]
    assert 0 < len(unconditional) < 10


def test_guidance_moves_samples_away_from_the_unconditional_ones(model):
    plain = images_of(model)
    guided = images_of(model, sampling=Sampling(steps=3, guidance=Guidance(scale=3.0)))
    assert not torch.allclose(plain, guided, atol=1e-3)
    barely = images_of(model, sampling=Sampling(steps=3, guidance=Guidance(scale=1.0001)))
    assert torch.allclose(plain, barely, atol=1e-2)


def test_models_that_do_not_fit_together_are_refused(model):
    part = TransformerConfig(width=16, depth=1, heads=2)
    other = Denoiser(DenoiserConfig(channels=16, grid=(2, 2), backbone=part, num_classes=3))
    with pytest.raises(UserError, match=r"the denoiser is for latents \(16, 2, 2\), the autoencoder has \(16, 4, 4\)"):
        Model(model.autoencoder, other)


def test_classes_by_name_or_number(model, unconditional):
    assert [model.class_id(name) for name in ("green", "0", "2")] == [1, 0, 2]
    for name in ("purple", "3", "-1", "", "²"):
        with pytest.raises(UserError, match=f"class '{name}': no such class; there are blue, green, red"):
            model.class_id(name)
    with pytest.raises(UserError, match="this model is unconditional"):
        unconditional.class_id("0")
    part = TransformerConfig(width=16, depth=1, heads=2)
    nameless = Denoiser(DenoiserConfig(channels=16, grid=(4, 4), backbone=part, num_classes=12))
    assert Model(model.autoencoder, nameless).class_id("11") == 11


# Statistics of latents


def batches(source: str, batch_size: int, world: World) -> list[Batch]:
    return list(Loader(DataConfig(source=source, split="all", image_size=16), 0).once(batch_size, world))


def measure(world: World, model: Path, source: str, batch_size: int, mirror: bool) -> tuple[Tensor, Tensor]:
    autoencoder = Autoencoder.load(str(model))
    return measure_latents(autoencoder.tokens, batches(source, batch_size, world), (16, 4, 4), world, mirror)


def measure_in_two(world: World, model: Path, source: str) -> list[tuple[Tensor, Tensor]]:
    return [measure(world, model, source, batch_size, mirror=False) for batch_size in (8, 64)]


@pytest.fixture(scope="module")
def tokens(model, images) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all 39 images in float64, and those of their mirror images."""
    pixels = torch.cat([batch.pixels() for batch in batches(images, 39, ONE)])
    return tuple(model.autoencoder.tokens(view).double().numpy() for view in (pixels, pixels.flip(-1)))


def assert_exact(measured: tuple[Tensor, Tensor], values: np.ndarray) -> None:
    mean, var = measured
    assert mean.dtype == var.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), values.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(var.numpy(), values.var(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_statistics_of_latents_are_those_of_the_whole_array(tiny_model, images, tokens, batch_size):
    assert_exact(measure(ONE, tiny_model, images, batch_size, mirror=False), tokens[0])


def test_mirrored_images_count_too(tiny_model, images, tokens):
    assert_exact(measure(ONE, tiny_model, images, 7, mirror=True), np.concatenate(tokens))


def test_two_processes_measure_as_one(tiny_model, images, tokens, run_ranks):
    for rank in run_ranks(measure_in_two, 2, tiny_model, images):
        for measured in rank:
            assert_exact(measured, tokens[0])


def test_statistics_far_from_zero_lose_no_digits(images):
    def far(pixels: Tensor) -> Tensor:
        return 3000 + pixels

    values = torch.cat([batch.pixels() for batch in batches(images, 39, ONE)]).add(3000).double().numpy()
    _, var = measure_latents(far, batches(images, 7, ONE), (3, 16, 16), ONE)
    np.testing.assert_allclose(var.numpy(), values.var(0), rtol=1e-6, atol=1e-6)


# Pictures


def test_reconstructing_is_encoding_and_decoding(model):
    images = torch.rand(3, 3, 16, 16)
    decoded = reconstruct(model.autoencoder, images)
    assert torch.equal(decoded, model.autoencoder.decode(model.autoencoder.encode(images)))
    assert decoded.shape == images.shape
    assert not decoded.requires_grad


def test_encoding_leaves_the_model_alone(model):
    before = copy.deepcopy(model.autoencoder.state_dict())
    reconstruct(model.autoencoder, torch.rand(1, 3, 16, 16))
    assert all(torch.equal(value, before[key]) for key, value in model.autoencoder.state_dict().items())


def test_a_picture_of_any_kind_is_read_and_cropped(tmp_path):
    for mode, suffix in (("RGB", "jpg"), ("RGBA", "png"), ("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "png")):
        path = tmp_path / f"{mode}.{suffix}"
        Image.new(mode, (40, 30), 1).save(path)
        read = read_image(path, 16)
        assert (read.mode, read.size) == ("RGB", (16, 16))


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path / 'none.png'}: no such file$"):
        read_image(tmp_path / "none.png", 16)
    text = tmp_path / "text.png"
    text.write_text("text")
    torn = tmp_path / "torn.png"
    Image.effect_noise((64, 64), 50).save(torn)
    torn.write_bytes(torn.read_bytes()[:1000])
    for path in (text, torn, tmp_path):
        with pytest.raises(UserError, match=rf"^{path}: not a readable image \(.+\)$") as error:
            read_image(path, 16)
        assert "\n" not in str(error.value)


def test_pictures_round_and_keep_every_level():
    levels = torch.arange(256).float().div(255).expand(3, 2, 256)
    assert torch.equal(from_pil(to_pil(levels)), levels)
    assert to_pil(torch.full((3, 1, 1), 0.999)).getpixel((0, 0)) == (255, 255, 255)
    assert to_pil(torch.full((3, 1, 1), 1.7)).getpixel((0, 0)) == (255, 255, 255)
