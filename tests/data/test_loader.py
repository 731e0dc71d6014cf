import itertools
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from raekit.config import from_dict, to_dict
from raekit.data.images import log_once, reduced
from raekit.data.loader import Batch, DataConfig, Loader, augmentation, item_at
from raekit.data.transforms import center_crop, center_window, random_window
from raekit.distributed import World
from raekit.errors import UserError

ONE = World()
N = 11

# Python 3.12 warns when a process with threads forks. Torch starts threads, but the workers do not use them.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """N images of noise in three classes, none of them square. Image i has index i in the source."""
    root = tmp_path_factory.mktemp("images")
    for i in range(N):
        path = root / "abc"[i * 3 // N] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9 + i % 3, 13, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def loader(folder, seed=0, **options):
    settings = {"split": "all", "image_size": 8, "crop": "random", "flip": True, "resize": "exact"} | options
    return Loader(DataConfig(source=f"folder:{folder}", **settings), seed)


def damage(root, *numbers):
    for path in sorted(root.rglob("*.png")):
        if int(path.stem) in numbers:
            path.write_bytes(b"damaged")


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of `folder` in which images 3, 4 and 10 (the last) are unreadable."""
    for path in folder.rglob("*.png"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    damage(tmp_path, 3, 4, 10)
    return tmp_path


def join(batches):
    """Return the samples as {position: (label, bytes)}. Every position must occur only once."""
    samples = {}
    for batch in batches:
        for image, label, position in zip(batch.images, batch.labels, batch.positions, strict=True):
            assert int(position) not in samples
            samples[int(position)] = (int(label), image.numpy().tobytes())
    return samples


def take(data, count, start=0, batch_size=1, size=1):
    """Return the stream's samples from `start` on: `count` batches from each of `size` ranks."""
    worlds = [World(rank=rank, size=size) for rank in range(size)]
    return join(b for w in worlds for b in itertools.islice(data.stream(start, batch_size, w), count))


# The stream


@pytest.fixture(scope="module")
def reference(folder):
    return take(loader(folder), 5 * N)


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 3 * N), share=st.integers(1, N + 3), size=st.integers(1, 3), count=st.integers(1, 2))
def test_samples_depend_on_nothing_but_seed_and_position(folder, reference, start, share, size, count):
    samples = take(loader(folder), count, start, share * size, size)
    assert sorted(samples) == [*range(start, start + count * share * size)]
    known = {position: sample for position, sample in samples.items() if position in reference}
    assert known
    assert known == {position: reference[position] for position in known}


@forks
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, reference, workers):
    samples = take(loader(folder, workers=workers), 4, start=5, batch_size=6)
    assert samples == {position: reference[position] for position in range(5, 29)}


def test_a_rank_has_its_contiguous_share_of_each_batch(folder):
    stream = loader(folder).stream(3, 6, World(rank=1, size=3))
    assert [next(stream).positions.tolist() for _ in range(2)] == [[5, 6], [11, 12]]


def test_each_epoch_has_every_image_once_in_a_different_order(folder):
    data = loader(folder, crop="center", flip=False)
    everything = [image for _, image in join(data.once(N, ONE)).values()]
    stream = [image for _, image in take(data, 3 * N).values()]
    epochs = [stream[:N], stream[N : 2 * N], stream[2 * N :]]
    assert all(sorted(epoch) == sorted(everything) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, everything]}) == 4


def test_another_seed_gives_another_order_and_other_crops(folder, reference):
    other = take(loader(folder, seed=1), 5 * N)
    orders = [[label for label, _ in samples.values()] for samples in (reference, other)]
    assert orders[0] != orders[1]
    assert sum(other[position] == reference[position] for position in reference) < N / 2


def test_an_image_is_cropped_differently_in_each_epoch(reference):
    assert len({image for _, image in reference.values()}) > 4 * N


def test_flip_mirrors_about_half_of_the_images(folder):
    data = loader(folder, crop="center")
    plain = [data.source[i][0] for i in range(N)]
    upright = {center_crop(image, 8).tobytes() for image in plain}
    mirrored = {ImageOps.mirror(center_crop(image, 8)).tobytes() for image in plain}
    batch = next(data.stream(0, 20 * N, ONE))
    images = [image.permute(1, 2, 0).numpy().tobytes() for image in batch.images]
    assert set(images) == upright | mirrored
    assert 0.35 < sum(image in mirrored for image in images) / len(images) < 0.65


def test_flips_do_not_repeat(folder):
    config = loader(folder).config
    flips = [augmentation(config, 0, position)[0] for position in range(1000)]
    assert all(flips[:100] != flips[first : first + 100] for first in range(1, 901))


def test_labels_match_their_images(folder):
    data = loader(folder, crop="center", flip=False)
    label = {image: label for label, image in join(data.once(4, ONE)).values()}
    assert all(label[image] == number for number, image in take(data, 2 * N).values())
    assert data.classes == ("a", "b", "c")


def test_the_global_generator_is_left_alone(folder):
    state = torch.get_rng_state()
    take(loader(folder), 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", ["exact", "fast"])
def test_the_training_stream_scales_fast_or_exactly_and_a_single_pass_exactly(folder, how):
    data = loader(folder, image_size=7, resize=how, crop="center", flip=False)
    exact = {i: np.asarray(center_crop(data.source[i][0], 7)).transpose(2, 0, 1) for i in range(N)}
    (batch,) = data.once(N, ONE)
    assert all(np.array_equal(image, exact[i]) for i, image in enumerate(batch.images.numpy()))
    batch = next(data.stream(0, N, ONE))
    for position, image in zip(batch.positions.tolist(), batch.images.numpy(), strict=True):
        window = center_window(data.source[item_at(0, position, N)][0], 7)
        assert np.array_equal(image, window.fast() if how == "fast" else exact[item_at(0, position, N)])


@pytest.mark.parametrize(("crop", "needed", "width"), [("center", 16, 20), ("random", 24, 40)])
def test_the_fast_training_stream_reads_large_jpegs_at_a_reduced_size(tmp_path, crop, needed, width):
    Image.effect_noise((160, 128), 50).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    data = Loader(DataConfig(source=f"flat:{tmp_path}", split="all", image_size=16, crop=crop, resize="fast"), 0)
    with reduced(needed):
        small = data.source[0][0]
    assert small.width == width
    generator = augmentation(data.config, 0, 0)[1]
    window = center_window(small, 16) if crop == "center" else random_window(small, 16, generator)
    assert np.array_equal(next(data.stream(0, 1, ONE)).images[0].numpy(), window.fast())
    exact = np.asarray(center_crop(data.source[0][0], 16)).transpose(2, 0, 1)  # of the image in its full size
    assert np.array_equal(next(data.once(1, ONE)).images[0].numpy(), exact)


# One pass


@settings(max_examples=20, deadline=None)
@given(share=st.integers(1, N + 3), size=st.integers(1, 3))
def test_one_pass_has_every_image_exactly_once_over_all_ranks(folder, share, size):
    data = loader(folder)
    samples = join(b for rank in range(size) for b in data.once(share, World(rank=rank, size=size)))
    assert sorted(samples) == [*range(N)]
    for i, (label, pixels) in samples.items():
        image, expected = data.source[i]
        assert label == expected
        assert pixels == np.asarray(center_crop(image, 8)).transpose(2, 0, 1).tobytes()


@given(most=st.integers(1, N + 3), size=st.integers(1, 3))
def test_one_pass_may_read_images_spread_evenly(folder, most, size):
    data = loader(folder)
    batches = (b for rank in range(size) for b in data.once(2, World(rank=rank, size=size), most))
    read = [i for b in batches for i in b.positions.tolist()]
    assert len({*read}) == len(read) == min(most, N)
    gaps = np.diff([*sorted(read), N])  # the last: from the last image to the end
    assert min(read) == 0
    assert gaps.max() - gaps.min() <= 1


@forks
def test_one_pass_is_in_order_with_a_short_last_batch_and_the_same_with_workers(folder):
    expected = list(loader(folder).once(4, ONE))
    assert [batch.positions.tolist() for batch in expected] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for batch, other in zip(expected, loader(folder, workers=2).once(4, ONE), strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)


# Unreadable images


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_has_the_next_readable_image_in_place_of_an_unreadable_one(folder, damaged, workers, caplog):
    intact = loader(folder, crop="center", flip=False)
    data = loader(damaged, crop="center", flip=False, workers=workers, max_unreadable=0.3)
    item = {image: i for i, (_, image) in join(intact.once(N, ONE)).items()}
    wanted = {p: item[image] for p, (_, image) in take(intact, 8, batch_size=N).items()}
    with caplog.at_level(logging.WARNING):
        samples = take(data, 8, batch_size=N)
    replaced = {3: 5, 4: 5, 10: 0}
    assert {p: item[image] for p, (_, image) in samples.items()} == {p: replaced.get(i, i) for p, i in wanted.items()}
    names = [str(damaged / name) for name in ("a/03.png", "b/04.png", "c/10.png")]
    assert data.unreadable == dict.fromkeys(names, "not a known image format")
    other = loader(damaged, crop="center", flip=False, workers=workers, max_unreadable=0.3)
    with caplog.at_level(logging.WARNING):
        take(other, 8, batch_size=N)
    assert sorted(record.args[0] for record in caplog.records if record.args) == names  # each once, by both loaders


def two_processes() -> list[World]:
    """Return the worlds of two processes that both run in this one."""
    first: dict[str, int] = {}
    seen: dict[str, set[str]] = {}

    def watch(rank: int) -> Any:
        def count_distinct(what: str, names: Iterable[str]) -> int:
            seen.setdefault(what, set()).update(names)
            return len(seen[what])

        return SimpleNamespace(
            is_first=lambda what: first.setdefault(what, rank) == rank, count_distinct=count_distinct
        )

    return [World(rank, 2, watch=watch(rank)) for rank in range(2)]


def test_an_unreadable_image_is_named_once_by_all_processes(damaged, caplog):
    """In three epochs, each of two processes meets every unreadable image."""
    for world in two_processes():
        log_once.cache_clear()  # each process has its own
        data = loader(damaged, max_unreadable=0.3)
        with caplog.at_level(logging.WARNING):
            list(itertools.islice(data.stream(0, 2, world), 3 * N))
        assert len(data.unreadable) == 3
    assert sorted(Path(record.args[0]).name for record in caplog.records) == ["03.png", "04.png", "10.png"]


def test_one_pass_leaves_unreadable_images_out(damaged):
    data = loader(damaged, max_unreadable=0.3)
    assert sorted(join(data.once(2, ONE))) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert all(len(batch) for batch in data.once(1, ONE))


@forks
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("way", ["stream", "once"])
def test_too_many_unreadable_images_are_an_error_that_names_them(damaged, way, workers):
    data = loader(damaged, workers=workers, max_unreadable=0.2)
    batches = data.stream(0, 4, ONE) if way == "stream" else data.once(4, ONE)
    with pytest.raises(UserError, match=r"3 of 11 images are unreadable.*max_unreadable=0\.2.*03\.png") as error:
        join(batches)
    assert str(damaged) in str(error.value)


def test_unreadable_images_of_all_processes_count(damaged):
    one, other = two_processes()
    assert len(join(loader(damaged, max_unreadable=0.2).once(1, one))) == 4  # 0, 2, 6 and 8
    with pytest.raises(UserError, match=r"3 of 11 images are unreadable.*max_unreadable=0\.2.*03\.png"):
        join(loader(damaged, max_unreadable=0.2).once(1, other))


def test_at_most_five_unreadable_images_are_named(damaged):
    damage(damaged, *range(8))
    with pytest.raises(UserError) as error:
        join(loader(damaged, max_unreadable=0.5).once(N, ONE))
    assert str(error.value).count(".png") == 5


@pytest.mark.parametrize("way", ["stream", "once"])
def test_a_source_of_only_unreadable_images_is_always_an_error(damaged, way):
    damage(damaged, *range(N))
    data = loader(damaged, max_unreadable=1.0)
    with pytest.raises(UserError, match="11 of 11"):
        join(data.stream(0, 4, ONE) if way == "stream" else data.once(4, ONE))


def test_a_tolerated_share_is_not_an_error(damaged):
    damage(damaged, *range(N - 1))
    (damaged / "c" / "10.png").write_bytes((damaged / "c" / "09.png").read_bytes())
    Image.new("RGB", (9, 9), (1, 2, 3)).save(damaged / "a" / "02.png")
    samples = take(loader(damaged, max_unreadable=0.95), 2, batch_size=N)
    assert {image for _, image in samples.values()} == {bytes([1] * 64 + [2] * 64 + [3] * 64)}


# Workers


@forks
def test_workers_outlive_the_signals_that_ask_the_run_to_stop_and_end_with_the_stream(folder):
    stream = loader(folder, workers=1).stream(0, 4, ONE)
    next(stream)
    (worker,) = multiprocessing.active_children()
    assert worker.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, number)
    for _ in range(5):
        next(stream)
    assert worker.is_alive()
    stream.close()  # type: ignore[attr-defined]
    worker.join(10)
    assert not worker.is_alive()


def test_without_workers_no_process_is_started(folder):
    next(loader(folder).stream(0, 4, ONE))
    assert not multiprocessing.active_children()


# Batches and settings


def test_a_batch_is_bytes_and_its_pixels_are_floats_up_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    batch = Batch(images, torch.arange(3), torch.arange(3)).to("cpu")
    assert len(batch) == 3
    assert batch.pixels().dtype == torch.float32
    assert batch.pixels()[:, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])


def test_types_and_shapes_of_a_batch(folder):
    batch = next(loader(folder).stream(0, 4, ONE))
    assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (4, 3, 8, 8))
    assert batch.images.is_contiguous()
    assert batch.labels.dtype == batch.positions.dtype == torch.int64


def test_a_batch_is_split_in_order(folder):
    batch = next(loader(folder).stream(0, 7, ONE))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    for name in ("images", "labels", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


@pytest.mark.parametrize("batch_size", [5, 0, -2])
def test_a_batch_that_the_ranks_cannot_share_is_rejected(folder, batch_size):
    with pytest.raises(UserError, match=f"batch size {batch_size} must be a positive multiple of 2"):
        loader(folder).stream(0, batch_size, World(rank=0, size=2))


@pytest.mark.parametrize("batch_size", [0, -2])
def test_a_pass_without_batches_is_rejected(folder, batch_size):
    with pytest.raises(UserError, match=f"batch_size: {batch_size} must be at least 1"):
        loader(folder).once(batch_size, ONE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_size", 0), ("image_size", 10**6), ("workers", -1), ("workers", 513), ("max_unreadable", float("nan"))],
)
def test_settings_out_of_range_are_rejected_by_name(field, value):
    with pytest.raises(UserError, match=rf"{field}.*{value}"):
        DataConfig(**{"image_size": 8, field: value})


def test_settings_survive_json():
    config = DataConfig(image_size=64, source="flat:x", crop="random", split="heldout")
    assert from_dict(DataConfig, to_dict(config), "test") == config


def test_the_built_in_images_load_in_their_own_size():
    data = Loader(DataConfig(image_size=64, split="heldout"), seed=0)
    batch = next(data.once(8, ONE))
    expected = [np.asarray(data.source[i][0]).transpose(2, 0, 1) for i in range(8)]
    np.testing.assert_array_equal(batch.images.numpy(), np.stack(expected))


@pytest.mark.parametrize("items", [0, 1, 10])
def test_the_tolerated_number_is_never_negative(items):
    config = DataConfig(source="emoji", image_size=8, max_unreadable=1.0)
    assert config.tolerated(items) == max(items - 1, 0)
