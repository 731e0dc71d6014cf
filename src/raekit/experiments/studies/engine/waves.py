"""Synthetic images whose distribution is known: a few numbers are the strengths of smooth waves in three colours.

The same numbers give images of any size, so that only the dimension grows and not the content.
"""

import math
from pathlib import Path

import numpy as np

from raekit.files import whole
from raekit.flow.sampling import Sampling
from raekit.inference.generation import generate
from raekit.inference.model import Model

WAVES = 6
"""Number of waves: two directions in three colours."""
DEVIATION = 0.35
"""Standard deviation of the pixels in [-1, 1]."""
SAMPLES = 1024
SPREAD = 0.15
"""Standard deviation of a number around -1 or +1."""


def waves(side: int) -> np.ndarray:
    """Return the waves as orthonormal rows (WAVES, side * side * 3)."""
    place = np.cos(np.pi * (np.arange(side) + 0.5) / side)
    rows, columns = np.meshgrid(place, place, indexing="ij")
    flat = np.stack([rows, columns])[:, None, :, :, None] * np.eye(3)[:, None, None]
    basis = flat.reshape(WAVES, -1)
    return basis / np.linalg.norm(basis, axis=1, keepdims=True)


def images(numbers: np.ndarray, side: int) -> np.ndarray:
    """Return the images, uint8 (N, side, side, 3), whose waves have the strengths `numbers` (N, WAVES)."""
    values = numbers @ waves(side) * _scale(side)
    return np.rint((values + 1) * 127.5).clip(0, 255).astype(np.uint8).reshape(-1, side, side, 3)


def _scale(side: int) -> float:
    """Return the length of an image in which each number is 1, over sqrt(WAVES)."""
    return DEVIATION * math.sqrt(3 * side * side / WAVES)


def draw_numbers(count: int, seed: int) -> np.ndarray:
    """Draw numbers (count, WAVES) of mean 0 and variance 1, each around -1 or +1."""
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0], (count, WAVES))
    spread = SPREAD * generator.standard_normal((count, WAVES))
    return (signs + spread) / math.sqrt(1 + SPREAD**2)


def write_images(path: Path, numbers: np.ndarray, side: int) -> None:
    """Write the images of `numbers`, as `npz:` reads them. A file is kept."""
    if not path.is_file():
        with whole(path) as partial, partial.open("wb") as file:
            np.savez(file, arr_0=images(numbers, side))


def measure(model: Model, seed: int, steps: int, side: int) -> dict[str, float]:
    """Return the distance of generated images from the true distribution, and its two parts (`distance`)."""
    stream = generate(model, count=SAMPLES, seed=seed, sampling=Sampling(steps=steps), batch_size=256)
    numbers, rest = distance(np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in stream]), side)
    return {"distance": numbers + rest, "numbers": numbers, "rest": rest}


def distance(pixels: np.ndarray, side: int) -> tuple[float, float]:
    """Return how far images in [0, 1] are from the true distribution, relative to its variance.

    Args:
        pixels: The images (N, side, side, 3).
        side: Their side.

    Returns:
        The mean squared Wasserstein distance of the numbers' distributions from the true one, and the energy that is
        no wave. The first is measured against 100,000 true numbers.
    """
    values = (2 * pixels.reshape(len(pixels), -1) - 1) / _scale(side)
    numbers = values @ waves(side).T
    rest = (values**2).sum(1) - (numbers**2).sum(1)
    true = np.sort(draw_numbers(100_000, seed=1).ravel())
    quantiles = true[((np.arange(len(numbers)) + 0.5) / len(numbers) * len(true)).astype(int)]
    return float(((np.sort(numbers, 0) - quantiles[:, None]) ** 2).mean()), float(rest.mean() / WAVES)
