"""Folders and archives of generated pictures, and their completion after a kill."""

import copy
import json
import math
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from raekit.data.archives import Npz
from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow.sampling import Sampling
from raekit.inference.generation import generate
from raekit.inference.model import Model, load
from raekit.inference.sample_folders import generate_folder, generate_npz
from raekit.pictures import quantize, read_origin

FEW = Sampling(steps=2)
ONE = World()


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return load(str(tiny_model))


def pixels(image: Path) -> np.ndarray:
    with Image.open(image) as opened:
        return np.asarray(opened)


def exact(model: Model, labels: list[int], **options: Any) -> np.ndarray:
    """Return the samples as 8-bit pixels (N, H, W, 3)."""
    images: Tensor = torch.cat([b.images for b in generate(model, labels, sampling=FEW, **options)])
    return (quantize(images) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_webp_files_hold_the_same_pixels_and_are_completed(model, tmp_path):
    for form in ("png", "webp"):
        generate_folder(model, tmp_path / form, [0, 2], total=5, sampling=FEW, batch_size=2, world=ONE, form=form)
    for i in range(5):
        webp, png = (tmp_path / form / f"{i:06d}.{form}" for form in ("webp", "png"))
        assert np.array_equal(pixels(webp), pixels(png))
        assert read_origin(webp) == read_origin(png)
        with Image.open(webp) as opened:
            assert opened.format == "WEBP"
    before = contents(tmp_path / "webp")
    (tmp_path / "webp" / "000003.webp").write_bytes(b"")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "webp").iterdir()}
    generate_folder(model, tmp_path / "webp", [0, 2], total=5, sampling=FEW, batch_size=2, world=ONE, form="webp")
    assert contents(tmp_path / "webp") == before
    changed = {path.name for path in (tmp_path / "webp").iterdir() if times[path.name] != path.stat().st_mtime_ns}
    assert changed == {"000003.webp"}


@pytest.mark.parametrize("content", [b"notes of a user", b"\x89PNG\r\n\x1a\n torn"])
def test_a_file_that_raekit_did_not_write_is_kept(model, tmp_path, content):
    foreign = tmp_path / "000001.png"
    foreign.write_bytes(content)
    with pytest.raises(UserError, match=r"holds other pictures, such as 000001\.png, .* damaged, or not by raekit"):
        generate_folder(model, tmp_path, [0], total=2, sampling=FEW, world=ONE)
    assert contents(tmp_path) == {"000001.png": content}


def test_a_strangers_webp_has_no_origin(tmp_path):
    path = tmp_path / "other.webp"
    Image.new("RGB", (4, 4)).save(path)
    assert read_origin(path) is None
    exif = Image.Exif()
    exif[0x010E] = "a holiday"
    Image.new("RGB", (4, 4)).save(path, exif=exif)
    assert read_origin(path) is None


def test_an_archive_as_adm_writes_it(model, tmp_path):
    out = tmp_path / "samples.npz"
    passes = generate_npz(model, out, [0, 2, 1], total=7, seed=4, sampling=FEW, batch_size=3, world=ONE)
    assert passes == {"model": 2}
    labels = [0, 2, 1, 0, 2, 1, 0]
    with np.load(out) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], exact(model, labels, seed=4, batch_size=3))
        assert arrays["arr_1"].tolist() == labels
    assert Npz(out).arrays.keys() == {"arr_0", "arr_1"}
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    # The same call has nothing to do; a call for other samples replaces the file.
    before = out.stat().st_mtime_ns
    assert not generate_npz(model, out, [0, 2, 1], total=7, seed=4, sampling=FEW, batch_size=3, world=ONE)
    assert out.stat().st_mtime_ns == before
    for changes in ({"seed": 5}, {"total": 6}, {"labels": [0, 1, 2]}):
        settings: dict[str, Any] = {"labels": [0, 2, 1], "total": 7, "seed": 4} | changes
        assert generate_npz(model, out, sampling=FEW, batch_size=3, world=ONE, **settings)


def test_an_archive_without_classes(model, tmp_path):
    generate_npz(model, tmp_path / "x.npz", total=2, sampling=FEW, world=ONE)
    with np.load(tmp_path / "x.npz") as arrays:
        assert list(arrays) == ["arr_0"]


def test_an_interrupted_archive_is_completed_to_the_bit(model, tmp_path, monkeypatch):
    settings: dict[str, Any] = {"total": 7, "sampling": FEW, "batch_size": 3, "world": ONE}
    generate_npz(model, tmp_path / "whole.npz", [0, 1], **settings)

    def interrupt(what: str, done: int, total: int, text: str = "") -> None:
        if (what, done, text) == (*stop, ""):
            raise KeyboardInterrupt

    for stop in (("generate", 3), ("pack", 2)):
        with pytest.raises(KeyboardInterrupt):
            generate_npz(model, tmp_path / "cut.npz", [0, 1], progress=interrupt, **settings)  # type: ignore[arg-type]
        assert not (tmp_path / "cut.npz").exists()
        assert len(list((tmp_path / "cut.npz.raekit-parts").iterdir())) == {"generate": 3, "pack": 7}[stop[0]]
    generate_npz(model, tmp_path / "cut.npz", [0, 1], **settings)
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with ZipFile(tmp_path / "cut.npz") as archive:
        assert json.loads(archive.comment)["total"] == 7


def test_two_processes_make_one_archive(model, tmp_path, monkeypatch):
    """Two threads play the two processes and meet at the barrier."""
    meeting = threading.Barrier(2)
    monkeypatch.setattr(World, "barrier", lambda world: meeting.wait() if world.size > 1 else None)

    def archive(name: str, world: World) -> None:
        generate_npz(model, tmp_path / name, [0, 1], total=9, sampling=FEW, batch_size=2, world=world)

    archive("one.npz", ONE)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: archive("two.npz", World(rank=rank, size=2)), range(2)))
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert np.abs(a - b).max() <= 1
    assert not (tmp_path / "two.npz.raekit-parts").exists()


def test_wrong_settings_leave_nothing(model, tmp_path):
    with pytest.raises(UserError, match="steps: 0"):
        generate_npz(model, tmp_path / "x.npz", [0], total=1, sampling=Sampling(steps=0), world=ONE)
    assert not list(tmp_path.iterdir())


def test_finite_samples_are_kept_when_another_is_not_finite(model, tmp_path):
    broken = copy.deepcopy(model.denoiser)
    broken.label.weight.data[1] = math.nan
    with pytest.raises(UserError, match="sample 1: its values are not finite; load the model in float32"):
        generate_folder(Model(model.autoencoder, broken), tmp_path, [0, 1, 2], total=6, sampling=FEW, world=ONE)
    assert sorted(contents(tmp_path)) == ["000000.png", "000002.png", "000003.png", "000005.png"]


# Kills

TOTAL = 60
KILLS = int(os.environ.get("RAEKIT_KILLS", "6"))
"""Number of kills in the test of resuming; RAEKIT_KILLS=20 runs as many as the documentation states."""


def life(folder: str, out: Path) -> None:
    torch.set_num_threads(1)
    write = generate_npz if out.suffix else generate_folder
    write(load(folder), out, [0, 1, 2], total=TOTAL, sampling=Sampling(steps=4), batch_size=5, world=ONE)


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_kills_at_random_moments_change_no_bit(tiny_model, tmp_path, suffix):
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.test_folders"])

    def start(out: Path) -> Any:
        process = context.Process(target=life, args=(str(tiny_model), out))
        process.start()
        return process

    alone, out = tmp_path / f"alone{suffix}", tmp_path / f"killed{suffix}"
    pictures = out.with_name(out.name + ".raekit-parts") if suffix else out
    process = start(alone)
    process.join()
    assert process.exitcode == 0
    randomly = random.Random(0)
    kept = 0
    for target in sorted(randomly.uniform(0, 0.95 * TOTAL) for _ in range(KILLS)):
        process = start(out)
        while process.is_alive() and len(list(pictures.glob("*.png"))) < target:
            time.sleep(0.001)
        time.sleep(randomly.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -9
        finished = len(list(pictures.glob("*.png")))
        assert finished >= kept  # finished pictures are kept
        kept = finished
    times = {path.name: path.stat().st_mtime_ns for path in pictures.glob("*.png")}
    process = start(out)
    process.join()
    assert process.exitcode == 0
    if suffix:
        assert out.read_bytes() == alone.read_bytes()
        return
    assert contents(out) == contents(alone)
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}.items()


def bomb(path: Path) -> None:
    """Write a small PNG file whose text unpacks to 100 MB."""
    text = PngInfo()
    text.add_text("raekit", "0" * 10**8, zip=True)
    Image.new("RGB", (8, 8)).save(path, "PNG", pnginfo=text)


@pytest.mark.parametrize("kind", ["pipe", "bomb", "folder", "picture", "gif"])
def test_what_raekit_did_not_write_is_left_as_it_is(model, tmp_path, kind):
    path = tmp_path / "000001.png"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "bomb":
            bomb(path)
        case "folder":
            path.mkdir()
        case "picture":
            Image.new("RGB", (8, 8)).save(path, "PNG")
        case "gif":
            Image.new("RGB", (8, 8)).save(path, "GIF")

    def state():  # without the time of the last reading: a picture is read to see whether it is one of ours
        found = path.lstat()
        return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns

    before = state()
    with pytest.raises(UserError, match=r"holds other pictures, such as 000001\.png, made with another model"):
        generate_folder(model, tmp_path, [0, 2], total=5, sampling=FEW, batch_size=2, world=ONE)
    assert state() == before
    assert [p.name for p in tmp_path.iterdir()] == ["000001.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": []}, "labels: none are given"),
        ({"count": 0}, "count: 0 must be at least 1"),
        ({"labels": [], "count": 0}, "labels, count: give either labels, one for each sample, or count"),
    ],
)
def test_no_samples_at_all_are_rejected(model, options, message):
    with pytest.raises(UserError, match=message):
        next(generate(model, **options))
