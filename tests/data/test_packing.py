"""Packing a dataset into shards: the images, labels and splits stay, and a stopped packing resumes."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raekit.data import packing
from raekit.data.packing import pack
from raekit.data.sources import open_source
from raekit.data.sources.folders import Files
from raekit.data.transforms import center_crop
from raekit.distributed import World
from raekit.errors import UserError

ONE = World()


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Seven training and three held-out images in the classes b and a, of several sizes."""
    for part, count in (("train", 7), ("val", 3)):
        for i in range(count):
            path = tmp_path / "images" / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([i, count]).integers(0, 256, (20 + i, 33 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return f"folder:{tmp_path / 'images'}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_a_packed_dataset_has_the_same_images_labels_and_splits(tmp_path: Path, source: str, format: str):
    done = pack(source, 16, tmp_path / "out", format=format, shard_size=3, world=ONE)  # type: ignore[arg-type]
    assert (done.images, done.shards, done.left_out) == ({"train": 7, "heldout": 3}, 4, 0)
    for split in ("train", "heldout"):
        ours, theirs = open_source(f"tar:{tmp_path / 'out'}", split), open_source(source, split)
        assert ours.classes == theirs.classes == ("a", "b")
        assert list(ours.labels) == list(theirs.labels)
        for i in range(len(theirs)):
            image = ours[i][0]
            assert min(image.size) == 16
            difference = np.abs(np.asarray(center_crop(theirs[i][0], 16)).astype(int) - center_crop(image, 16))
            assert difference.max() == 0 if format == "png" else 0 < difference.mean() < 12
    sums = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert sums == [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in shards]


def test_small_images_keep_their_size_and_larger_ones_their_shape(tmp_path: Path):
    for i, size in enumerate(((8, 30), (40, 20))):
        path = tmp_path / "images" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    pack(f"flat:{tmp_path / 'images'}", 10, tmp_path / "out", world=ONE)
    packed = open_source(f"tar:{tmp_path / 'out'}", "all")
    assert (sorted(packed[i][0].size for i in range(2)), packed.classes) == ([(8, 30), (20, 10)], ())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_shards_do_not_depend_on_interruptions_and_processes(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
):
    pack(source, 16, tmp_path / "whole", shard_size=2, world=ONE)
    expected = contents(tmp_path / "whole")
    write, written = packing._Writer.__getitem__, []

    def stop_at_the_third(self: packing._Writer, numbers: range) -> dict[str, str]:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(numbers)
        return write(self, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(packing._Writer, "__getitem__", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            pack(source, 16, tmp_path / "stopped", shard_size=2, world=ONE)
    kept = sorted((tmp_path / "stopped").glob("*.tar"))
    times = [path.stat().st_mtime_ns for path in kept]
    pack(source, 16, tmp_path / "stopped", shard_size=2, workers=2, world=ONE)
    assert contents(tmp_path / "stopped") == expected
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert len(kept) == 2


def test_another_dataset_or_folder_is_rejected(tmp_path: Path, source: str):
    pack(source, 16, tmp_path / "out", world=ONE)
    with pytest.raises(UserError, match=r"holds another dataset:\n  size: 16 -> 12\n"):
        pack(source, 12, tmp_path / "out", world=ONE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        pack(source, 12, tmp_path / "other", world=ONE)
    with pytest.raises(UserError, match="quality: 101 must be at most 100"):
        pack(source, 12, tmp_path / "new", quality=101, world=ONE)


def test_unreadable_images_are_left_out_up_to_a_limit(tmp_path: Path, source: str):
    broken = tmp_path / "images" / "train" / "a" / "2.png"
    broken.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"1 of 10 images are unreadable, such as .*2\.png; this is more than"):
        pack(source, 16, tmp_path / "strict", world=ONE)
    for _ in range(2):  # shards that are there already do not hide it
        done = pack(source, 16, tmp_path / "out", max_unreadable=0.2, world=ONE)
        assert (done.images, done.left_out) == ({"train": 6, "heldout": 3}, 1)
    (tmp_path / "out" / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"1 of 10 images are unreadable; this is more than max_unreadable=0.05 allows"):
        pack(source, 16, tmp_path / "out", max_unreadable=0.05, world=ONE)
    assert not (tmp_path / "out" / "SHA256SUMS").exists()


def test_images_without_a_class_are_rejected_before_the_work(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
):
    read = Files.__init__

    def some(self: Files, *args: Any) -> None:
        read(self, *args)
        self.labels[0] = -1  # as for a row of a Hugging Face dataset without a label

    monkeypatch.setattr(Files, "__init__", some)
    with pytest.raises(UserError, match="1 images of the split train have no class"):
        pack(source, 16, tmp_path / "out", world=ONE)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_has_changed_is_named_and_made_again(tmp_path: Path, source: str):
    pack(source, 16, tmp_path / "out", shard_size=3, world=ONE)
    expected = contents(tmp_path / "out")
    shard = tmp_path / "out" / "train-000001.tar"
    for damaged in (b"", expected[shard.name].replace(b"0", b"1", 1)):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-000001\.tar: does not have its checksum in SHA256SUMS; remove it"):
            pack(source, 16, tmp_path / "out", shard_size=3, world=ONE)
        assert contents(tmp_path / "out") == expected | {shard.name: damaged}
    shard.unlink()
    pack(source, 16, tmp_path / "out", shard_size=3, world=ONE)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("name", [b"x\ny", b"x\r", "x\u2028y".encode(), b"\xff"])
def test_classes_whose_names_are_no_lines_of_text_are_rejected_before_the_work(
    tmp_path: Path, source: str, name: bytes
):
    for folder in list((tmp_path / "images").glob("*/b")):
        folder.rename(folder.with_name(os.fsdecode(name)))
    with pytest.raises(
        UserError, match=r"has a line break or is not UTF-8, so classes\.txt cannot hold its name; rename"
    ):
        pack(source, 16, tmp_path / "out", world=ONE)
    assert not (tmp_path / "out").exists()


def test_a_wrong_list_of_class_names_is_rejected(tmp_path: Path, source: str):
    pack(source, 16, tmp_path / "out", world=ONE)
    for text in ("a\n", "a\na\n", "\n\n\n"):
        (tmp_path / "out" / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=r"classes\.txt: must have a line with a different name for each of the 2"):
            open_source(f"tar:{tmp_path / 'out'}")


def test_the_progress_of_packing_counts_images(tmp_path: Path, source: str):
    shown: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        shown.append((done, total))

    pack(source, 16, tmp_path / "out", shard_size=3, world=ONE, progress=progress)
    assert shown == [(3, 10), (6, 10), (7, 10), (10, 10)]
