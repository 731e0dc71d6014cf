import numpy as np
import pytest

from raekit.experiments.studies.engine import waves


@pytest.mark.parametrize("side", [8, 32])
def test_images_hold_their_numbers_and_true_images_are_near_the_true_distribution(side):
    numbers = waves.draw_numbers(512, seed=3)
    pixels = waves.images(numbers, side) / 255
    assert 0 < pixels.min() < pixels.max() < 1  # nothing is clipped
    basis = waves.waves(side)
    assert basis @ basis.T == pytest.approx(np.eye(waves.WAVES), abs=1e-12)
    far, rest = waves.distance(pixels, side)
    assert far < 0.05
    assert rest < 1e-3  # rounding to 8 bits


def test_the_distance_sees_wrong_numbers_and_noise():
    numbers = waves.draw_numbers(512, seed=3)
    assert waves.distance(waves.images(numbers * 0.5, 8) / 255, 8)[0] == pytest.approx(0.25, abs=0.05)
    noise = np.random.default_rng(0).standard_normal((512, 8, 8, 3))
    # Noise of variance 0.01 in all dimensions but the six waves', relative to the images' variance.
    wanted = 0.01 * (192 - waves.WAVES) / (192 * waves.DEVIATION**2)
    assert waves.distance(waves.images(numbers, 8) / 255 + 0.05 * noise, 8)[1] == pytest.approx(wanted, rel=0.05)
