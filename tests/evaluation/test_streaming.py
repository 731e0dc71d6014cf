import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import Images, PairScore
from raekit.evaluation.metrics import Accumulator, FrechetDistance, NearestNeighbours
from raekit.evaluation.pairs import PairMean, psnr, ssim
from raekit.evaluation.streaming import feature_bank, reference_moments, score_stream
from raekit.evaluation.streams import DecodedNoise, RealImages, Samples, StoredImages
from raekit.flow.sampling import Sampling
from raekit.inference.model import load
from raekit.moments import Moments
from raekit.pictures import to_pil

ALONE = World()


class Thumbnail:
    """Features: the image, resized to 3 x 3 pixels."""

    name, width = "thumbnail", 27

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        return F.adaptive_avg_pool2d(images, 3).flatten(1)


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise around one colour for each of 5 classes, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    colours = torch.rand(5, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = colours[labels] + 0.2 * torch.randn(count, 3, 16, 16, generator=generator)
    return images.clamp(0, 1), labels


def stream(count: int, size: int, seed: int, world: World = ALONE) -> Iterator[Images]:
    """Yield noisy copies with their originals. Every process has its own share."""
    images, labels = (x[world.rank :: world.size] for x in pictures(count, seed))
    indices = torch.arange(count)[world.rank :: world.size]
    noisy = (images + 0.05 * images.flip(3)).clamp(0, 1)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        yield Images(noisy[part], labels[part], indices[part], images[part])


def metrics(world: World, size: int, network: Thumbnail) -> Sequence[Accumulator]:
    bank, labels = feature_bank(stream(120, size, 1, world), network, world)
    reference = reference_moments(stream(120, size, 1, world), network, world)
    return (
        FrechetDistance(network, reference),
        NearestNeighbours(network, bank, labels),
        PairMean(PairScore("psnr", psnr)),
    )


def scores(world: World, size: int) -> list[dict[str, float]]:
    """Return the scores of images shared by all processes, and the scores of images in the first process only."""
    network = Thumbnail()
    alone = stream(61, size, 2) if world.is_main else ()
    return [
        score_stream(stream(61, size, 2, world), metrics(world, size, network), world),
        score_stream(alone, metrics(world, size, network), world),
    ]


def test_one_pass_gives_every_metric_and_computes_features_once():
    network, done = Thumbnail(), []
    accumulators = [*metrics(ALONE, 40, network), PairMean(PairScore("ssim", ssim))]
    network.calls = 0
    results = score_stream(stream(61, 8, 2), accumulators, ALONE, done.append)
    assert list(results) == [
        "fd_thumbnail",
        "knn_accuracy_thumbnail",
        "nearest_distance_thumbnail",
        "psnr",
        "ssim",
    ]
    assert network.calls == 8
    assert done == [8, 16, 24, 32, 40, 48, 56, 61]
    assert results["knn_accuracy_thumbnail"] > 0.9
    assert 0 < results["nearest_distance_thumbnail"] < 0.5
    assert 20 < results["psnr"] < 40
    assert 0.9 < results["ssim"] < 1


def test_scores_depend_neither_on_batch_size_nor_on_processes(run_ranks):
    one = scores(ALONE, 61)
    for others in (scores(ALONE, 7), *run_ranks(scores, 2, 8)):
        for values, expected in zip(others, one, strict=True):
            assert values == pytest.approx(expected, rel=1e-9)


def test_the_bank_holds_the_moments():
    network = Thumbnail()
    bank, labels = feature_bank(stream(50, 8, 1), network, ALONE)
    reference = reference_moments(stream(50, 8, 1), network, ALONE)
    moments = Moments(network.width)
    moments.update(bank)
    assert (bank.shape, bank.dtype) == ((50, 27), torch.float32)
    assert torch.equal(labels, pictures(50, 1)[1])
    torch.testing.assert_close(moments.covariance, reference.covariance, rtol=1e-10, atol=1e-14)


def test_an_empty_stream_is_rejected():
    network = Thumbnail()
    for action in (
        lambda: score_stream((), [PairMean(PairScore("psnr", psnr))], ALONE),
        lambda: reference_moments((), network, ALONE),
        lambda: feature_bank((), network, ALONE),
    ):
        with pytest.raises(UserError, match="no images"):
            action()


def test_two_metrics_of_one_name_are_rejected():
    with pytest.raises(ValueError, match="two metrics report psnr"):
        score_stream(stream(8, 8, 1), [PairMean(PairScore("psnr", psnr)), PairMean(PairScore("psnr", psnr))], ALONE)


@pytest.mark.parametrize("kind", ["flat", "npz", "zip", "tar"])
def test_saved_images_score_as_when_they_were_generated(tmp_path, kind):
    network, world = Thumbnail(), ALONE
    reference = reference_moments(stream(60, 8, 1), network, world)
    expected = score_stream(stream(70, 8, 2), [FrechetDistance(network, reference)], world)
    pictures = [to_pil(image) for batch in stream(70, 8, 2) for image in batch.images]
    (tmp_path / "flat").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "flat" / f"{number:03}.png")
    np.savez(tmp_path / "npz", np.stack([np.asarray(picture) for picture in pictures]))
    (tmp_path / "npz.npz").rename(tmp_path / "npz")
    for archive in "zip", "tar":
        Path(shutil.make_archive(str(tmp_path / "x"), archive, tmp_path / "flat")).rename(tmp_path / archive)
    stored = StoredImages(f"{kind}:{tmp_path / kind}", batch_size=16)
    assert (stored.count, stored.image_size) == (70, 16)
    batches = list(stored.batches([range(20), range(20, 70)], world))
    assert [len(batch) for batch in batches] == [16, 4, 16, 16, 16, 2]
    result = score_stream(batches, [FrechetDistance(network, reference)], world)
    assert result == {"fd_thumbnail": pytest.approx(expected["fd_thumbnail"], rel=1e-9)}


def test_processes_share_the_check_of_sizes_and_name_the_same_image(tmp_path, monkeypatch):
    for number, side in enumerate([8, 8, 8, 16, 16]):
        Image.new("RGB", (side, side)).save(tmp_path / f"{number}.png")
    found: list[int] = []
    for gathered in ([5, 5], [4, 3]):  # the first time the processes look, the second time both learn what they found
        monkeypatch.setattr(World, "gather", lambda self, value, told=gathered: found.append(value) or told)
        for rank in range(2):
            if gathered == [5, 5]:
                StoredImages(f"flat:{tmp_path}", world=World(rank, 2))
                continue
            with pytest.raises(UserError, match=r"3\.png is 16 x 16"):
                StoredImages(f"flat:{tmp_path}", world=World(rank, 2))
    assert found == [4, 3] * 2


def test_saved_images_that_would_be_changed_or_left_out_are_rejected(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="its images are 8 x 6; crop them to squares first"):
        StoredImages(f"flat:{tmp_path}")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"unreadable image .*a\.png"):
        StoredImages(f"flat:{tmp_path}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "c.png")
    for source in f"flat:{tmp_path}", "zip:" + shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path):
        with pytest.raises(UserError, match=r"c\.png is 16 x 16, and the first image is 8 x 8"):
            StoredImages(source)
    (tmp_path / "c.png").unlink()
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"unreadable image .*b\.png"):
        StoredImages(f"flat:{tmp_path}")


def test_the_next_image_takes_the_place_of_an_unreadable_one_where_that_is_allowed(tmp_path):
    for number in range(20):
        Image.new("L", (4, 4), 10 * number).save(tmp_path / f"{number:02}.png")
    for number in (7, 19):
        (tmp_path / f"{number:02}.png").write_bytes(b"")

    def values(max_unreadable: float) -> list[int]:
        images = RealImages(f"flat:{tmp_path}", "all", 4, batch_size=8, max_unreadable=max_unreadable)
        batches = list(images.batches([range(12), range(12, 20)], ALONE))
        assert torch.cat([batch.indices for batch in batches if batch.indices is not None]).tolist() == [*range(20)]
        return (torch.cat([batch.images[:, 0, 0, 0] for batch in batches]) * 255).round().int().tolist()

    expected = [10 * number for number in range(20)]
    expected[7], expected[19] = expected[8], expected[0]
    assert values(0.1) == expected
    with pytest.raises(UserError, match=r"2 of 20 images are unreadable, more than max_unreadable=0\.05 allows"):
        values(0.05)
    with pytest.raises(UserError, match="unreadable, and all must be readable"):
        values(0)


def test_processes_share_the_samples(tiny_model: Path):
    stream = Samples(load(str(tiny_model)), 7, Sampling(steps=1), batch_size=2)
    shares = [[batch.indices for batch in stream.share(World(rank=rank, size=2))] for rank in (0, 1)]
    assert [torch.cat(share).tolist() for share in shares] == [[0, 1, 4, 5], [2, 3, 6]]  # type: ignore[arg-type]


def test_decoded_noise_is_a_function_of_seed_and_number(tiny_model: Path):
    autoencoder = load(str(tiny_model)).autoencoder

    def images(seed: int, size: int, *chunks: range) -> Tensor:
        batches = [*DecodedNoise(autoencoder, 6, seed, size).batches(chunks, ALONE)]
        assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.arange(6))  # type: ignore[arg-type]
        return torch.cat([batch.images for batch in batches])

    found = images(1, 6, range(6))
    assert torch.allclose(images(1, 2, range(3), range(3, 6)), found, atol=1.01 / 255)
    assert (found[3:] - found[:3]).abs().mean() > 0.02
    assert (images(2, 6, range(6)) - found).abs().mean() > 0.02
