import pytest
import torch
from torch import Tensor

from raekit import randomness
from raekit.errors import UserError
from raekit.models.augment import AugmentConfig, augment

DOWN, RIGHT, BRIGHTNESS, SATURATION, CONTRAST, CUT_DOWN, CUT_RIGHT = range(7)
HALF = 0.5  # a draw that leaves the colours unchanged


def run(images: Tensor, config: AugmentConfig | None = None, step: int = 0, stream: str = "real", first: int = 0):
    positions = torch.arange(first, first + len(images))
    return augment(images, config or AugmentConfig(), seed=3, stream=stream, step=step, positions=positions)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Return a list for the seven draws of each image, which replace the random draws; every policy is applied."""
    rows: list[list[float]] = []

    def uniform(seed, stream, positions, shape):
        return torch.zeros(1, *shape) if "policies" in stream else torch.tensor(rows)

    monkeypatch.setattr(randomness, "uniform", uniform)
    return rows


def row(**values: float) -> list[float]:
    return [values.get(name, HALF) for name in ("down", "right", "brightness", "saturation", "contrast", "cd", "cr")]


def test_an_image_is_augmented_alike_in_any_batch():
    images = torch.rand(6, 3, 16, 16)
    config = AugmentConfig(cutout=0.3)
    whole = run(images, config)
    assert torch.equal(torch.cat([run(images[:2], config), run(images[2:], config, first=2)]), whole)
    assert not torch.equal(run(images[2:], config), whole[2:])
    assert torch.equal(run(images, config), whole)


def test_real_and_generated_images_are_augmented_independently():
    images = torch.rand(2, 3, 16, 16)
    assert not torch.allclose(run(images, stream="real"), run(images, stream="fake"))


def test_policies_fire_with_their_probability_for_whole_batches():
    images, config = torch.rand(2, 3, 8, 8), AugmentConfig(prob=0.3, translation=0)
    changed = torch.stack([(run(images, config, step) - images).abs().amax((1, 2, 3)) > 1e-6 for step in range(400)])
    assert (changed[:, 0] == changed[:, 1]).all()
    assert abs(changed[:, 0].float().mean() - 0.3) < 0.08
    assert torch.allclose(run(images, AugmentConfig(prob=0)), images, atol=1e-6)


def test_policies_fire_independently(monkeypatch: pytest.MonkeyPatch):
    uniform = randomness.uniform
    fixed = torch.tensor([row(down=0.999, brightness=0.9)])
    monkeypatch.setattr(randomness, "uniform", lambda *args: uniform(*args) if "policies" in args[1] else fixed)
    images, config = torch.rand(1, 3, 16, 16), AugmentConfig(prob=0.5, cutout=0.25)
    assert len({tuple(run(images, config, step).flatten().tolist()) for step in range(60)}) == 8


@pytest.mark.parametrize(("down", "right", "rows", "columns"), [(0.0, 0.999, 2, -2), (0.999, 0.5, -2, 0)])
def test_translation(down: float, right: float, rows: int, columns: int, draws: list[list[float]]):
    images = torch.rand(1, 3, 16, 20)
    draws.append(row(down=down, right=right))
    moved = run(images, AugmentConfig())
    expected = torch.full((3, 16, 20), 0.5)
    for i in range(16):
        for j in range(20):
            if 0 <= i - rows < 16 and 0 <= j - columns < 20:
                expected[:, i, j] = images[0, :, i - rows, j - columns]
    assert torch.allclose(moved[0], expected, atol=1e-6)


def test_translations_are_even_and_bounded():
    # A single bright pixel in the middle shows the shift.
    images = torch.full((600, 3, 16, 16), 0.5)
    images[:, :, 8, 8] = 1.0
    moved = run(images)
    deviation = (moved - moved[:, :, :1, :1]).abs().sum(1).flatten(1).argmax(1)
    down, right = deviation // 16 - 8, deviation % 16 - 8
    for shift in (down, right):
        counts = torch.bincount(shift + 2, minlength=5)
        assert len(counts) == 5
        assert (counts > 80).all()
    assert abs(torch.corrcoef(torch.stack([down, right]).float())[0, 1]) < 0.15


def test_colours(draws: list[list[float]]):
    images = torch.rand(3, 3, 4, 4)
    draws.extend([row(brightness=0.9), row(saturation=0.1), row(contrast=0.2)])
    x = 2 * images.double() - 1
    bright = x[0] + 0.4
    grey = x[1].mean(0)
    dull = grey + 0.2 * (x[1] - grey)
    flat = x[2].mean() + 0.7 * (x[2] - x[2].mean())
    expected = (torch.stack([bright, dull, flat]) + 1) / 2
    assert torch.allclose(run(images).double(), expected, atol=1e-6)


def test_colours_come_in_their_order(draws: list[list[float]]):
    draws.append(row(brightness=1.0, saturation=0.0, contrast=0.0))
    x = 2 * torch.rand(1, 3, 4, 4) - 1
    grey = (x + 0.5).mean(1, keepdim=True).expand_as(x)
    expected = grey.mean() + 0.5 * (grey - grey.mean())
    assert torch.allclose(run((x + 1) / 2), (expected + 1) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("down", "right", "rows", "columns"), [(0.0, 0.5, (0, 2), (6, 10)), (0.99, 0.26, (14, 16), (2, 6))]
)
def test_cutout(down, right, rows, columns, draws: list[list[float]]):
    draws.append(row(cd=down, cr=right))
    images = torch.rand(1, 3, 16, 16)
    expected = images.clone()
    expected[:, :, rows[0] : rows[1], columns[0] : columns[1]] = 0.5
    assert torch.allclose(run(images, AugmentConfig(cutout=0.25)), expected, atol=1e-6)


def test_gradients():
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    config = AugmentConfig(translation=0.4, cutout=0.4)
    assert torch.autograd.gradcheck(lambda x: run(x, config), images)


def test_shapes_and_types_are_kept():
    for dtype in (torch.float32, torch.float64):
        assert run(torch.rand(2, 3, 9, 14, dtype=dtype), AugmentConfig(cutout=0.5)).dtype == dtype
    assert run(torch.rand(2, 3, 9, 14)).shape == (2, 3, 9, 14)


@pytest.mark.parametrize("field", ["prob", "translation", "cutout"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_impossible_settings_are_named(field: str, value: float):
    with pytest.raises(UserError, match=rf"augment\.{field}: .* must be between 0 and 1"):
        AugmentConfig(**{field: value})
