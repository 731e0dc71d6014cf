"""Interpolations between held-out images and similar training images, compared with a direct computation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raekit import randomness
from raekit.data.sources import open_source
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation import interpolations
from raekit.evaluation.evaluate import evaluate
from raekit.evaluation.interpolations import Interpolations
from raekit.models.autoencoder import load_autoencoder
from raekit.models.latent_space import LatentSpace

ALONE = World()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 30 training and 7 held-out images."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 30), ("val", 7)):
        for i in range(count):
            path = root / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([i, count]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return f"folder:{root}"


@pytest.fixture(scope="module")
def pixels() -> LatentSpace:
    return load_autoencoder("pixels@16")


def midpoints(latents: LatentSpace, images: str, seed: int) -> torch.Tensor:
    """Compute the interpolations of all held-out images one by one."""
    parts = []
    for split in ("train", "heldout"):
        source = open_source(images, split)  # type: ignore[arg-type]
        values = torch.stack([torch.from_numpy(np.array(source[i][0])).permute(2, 0, 1) for i in range(len(source))])
        parts.append(latents.encode(values.float() / 255).double())
    training, heldout = parts
    found = []
    for i, z in enumerate(heldout):
        cosine = torch.tensor([float((z * x).sum() / z.norm() / x.norm()) for x in training])
        near = training[cosine.topk(10).indices]
        chances = (-(near - z).square().flatten(1).mean(1)).softmax(0).cumsum(0)
        other = near[int((chances < randomness.uniform(seed, "interpolation", [i]).item()).sum())]
        angle = math.acos(float((z * other).sum() / z.norm() / other.norm()))
        found.append((z + other) * math.sin(angle / 2) / math.sin(angle))
    return latents.decode(torch.stack(found).float())


def batches(stream: Interpolations, *chunks: range) -> torch.Tensor:
    return torch.cat([batch.images for batch in stream.batches(chunks, ALONE)])


@pytest.mark.parametrize("held", [None, 2])
def test_interpolations_are_the_midpoints_with_drawn_neighbours(images, pixels, held, monkeypatch):
    if held:
        monkeypatch.setattr(interpolations, "QUERIES", held * 4 * 3 * 16 * 16)
    streams = [Interpolations(pixels, images, "heldout", training=images, seed=s, batch_size=3) for s in (0, 1)]
    found = [batches(stream, range(7)) for stream in streams]
    for seed in (0, 1):
        assert (found[seed] - midpoints(pixels, images, seed)).abs().max() <= 1 / 255
    assert not torch.equal(*found)
    assert torch.equal(batches(streams[0], range(4, 7)), found[0][4:])


def test_processes_that_share_the_search_find_the_same_neighbours(images, pixels):
    parts: list[object] = []

    class Share(World):
        """One of three processes, which come after each other."""

        def gather(self, value: object) -> list:
            parts.append(value)
            return parts

    queries = pixels.encode(torch.rand(3, 3, 16, 16)).flatten(1)
    stream = Interpolations(pixels, images, "heldout", training=images, batch_size=4)
    alone = stream._nearest(queries, 0, ALONE)
    shared = [stream._nearest(queries, 0, Share(rank=rank, size=3)) for rank in range(3)][-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_the_nearest_of_similar_images_is_drawn_most_often(images, pixels, monkeypatch):
    stream = Interpolations(pixels, images, "heldout", training=images)
    differences, numbers = torch.tensor([[90.0, 0.0, 90.0]]), torch.tensor([[3, 8, 5]])
    monkeypatch.setattr(
        stream, "_nearest", lambda queries, *_: [x.expand(len(queries), 3) for x in (differences, differences, numbers)]
    )
    assert stream._neighbours(ALONE) == [8] * 7


def test_of_equally_similar_images_the_first_is_kept():
    cosine = torch.full((1, 12), 0.5, dtype=torch.float64)
    _, _, number = interpolations._most_similar([(cosine, cosine, torch.arange(12).flip(0)[None])])
    assert number.tolist() == [[*range(10)]]


def test_ifid_of_an_autoencoder(images, tiny_model, tmp_path):
    options = {"source": images, "features": [str(tiny_model)], "interpolate": True, "world": ALONE}
    report, _ = evaluate(str(tiny_model), out=tmp_path / "a", **options)
    assert list(report.results) == ["ifd_" + next(iter(report.settings["networks"]))]
    assert report.settings["interpolations"] == {"training": images, "nearest": 10, "seed": 0}
    again, _ = evaluate(str(tiny_model), out=tmp_path / "b", batch_size=2, seed=1, **options)
    assert again.results != report.results


def test_the_images_must_be_held_out(images, pixels):
    for split in ("train", "all"):
        with pytest.raises(UserError, match="each image would be its own neighbour; give a reference of held-out"):
            Interpolations(pixels, images, split, training=images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolate": True, "reconstruct": True}, "interpolate: cannot be combined with reconstruct"),
        ({"interpolate": True, "count": 3}, "count: has no effect"),
        ({"interpolate": True, "relative_to": "x.npz"}, "relative_to: has no effect with interpolate"),
    ],
)
def test_settings_without_effect_are_errors(tiny_model: Path, tmp_path: Path, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(str(tiny_model), out=tmp_path, world=ALONE, **options)


def test_saved_images_have_no_latents(images, tmp_path):
    with pytest.raises(UserError, match="interpolate: has no effect on saved images"):
        evaluate(images, source=images, interpolate=True, out=tmp_path, world=ALONE)
