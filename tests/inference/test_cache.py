import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.inference.cache import DTYPES, CacheInfo, cache_latents, pack, relative_error, unpack
from raekit.inference.cached_loader import LatentLoader
from raekit.inference.latents import read_latents
from raekit.inference.shards import encoder_fingerprint, read_info
from raekit.models.autoencoder import Autoencoder

ONE = World()
KILLS = int(os.environ.get("RAEKIT_KILLS", "3"))
"""Number of kills in the test of resuming; RAEKIT_KILLS=20 runs as many as the documentation states."""


def write(model: Path, data: DataConfig, out: Path, world: World = ONE, **options: Any) -> list[CacheInfo]:
    settings: dict[str, Any] = {"dtype": "fp32", "batch_size": 4, "shard_size": 7} | options
    return cache_latents(Autoencoder.load(str(model)), str(model), data, out, world=world, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def data(images) -> DataConfig:
    return DataConfig(source=images, image_size=16, flip=True)


@pytest.fixture(scope="module")
def cache(data, tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "latents"
    write(tiny_model, data, out)
    return out


@pytest.fixture
def autoencoder(tiny_model) -> Autoencoder:
    return Autoencoder.load(str(tiny_model))


def test_a_cache_holds_the_latents_of_both_orientations(cache, data, autoencoder):
    (batch,) = Loader(data, 0).read([range(30)], ONE, data.resize)
    shards = [load_file(path) for path in sorted(cache.iterdir())]
    assert [len(shard["labels"]) for shard in shards] == [7, 7, 7, 7, 2]
    found = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    assert torch.equal(found["labels"], batch.labels)
    assert found["positions"].tolist() == list(range(30))
    for variant, pixels in enumerate((batch.pixels(), batch.pixels().flip(-1))):
        assert torch.allclose(found["latents"][:, variant], autoencoder.encode(pixels), atol=1e-5)
    info = read_info(min(cache.iterdir()), CacheInfo)
    assert (info.classes, info.items, info.flipped) == (("blue", "green", "red"), 30, True)
    assert (info.precision, info.dtype, info.error) == ("fp32", "fp32", 0.0)
    assert info.rms == pytest.approx(found["latents"][:7].square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "least", "most"), [("bf16", 1e-3, 3e-3), ("int8", 2e-3, 1e-2)])
def test_the_error_of_storing_is_measured(cache, data, tiny_model, tmp_path, dtype, least, most):
    infos = write(tiny_model, data, tmp_path / "out", dtype=dtype)
    exact, stored = (
        torch.cat([unpack(shard["latents"], shard["scale"]) for shard in map(load_file, sorted(folder.iterdir()))])
        for folder in (cache, tmp_path / "out")
    )
    error = relative_error(infos)
    assert error == pytest.approx(((stored - exact).norm() / exact.norm()).item(), rel=1e-4)
    assert least < error < most
    assert load_file(min((tmp_path / "out").iterdir()))["latents"].dtype == DTYPES[dtype]


def test_eight_bits_have_a_scale_for_each_token():
    latents = torch.randn(3, 64, 2, 2) * torch.tensor([[1.0, 10.0], [0.0, 1e-3]])
    stored, scale = pack(latents, "int8")
    assert stored.abs().amax(1).tolist() == [[[127, 127], [0, 127]]] * 3
    assert ((unpack(stored, scale) - latents).abs() <= scale / 2 * 1.001).all()


def in_two(world: World, model: Path, data: DataConfig, out: Path) -> list[CacheInfo]:
    return write(model, data, out, world)


def test_two_processes_write_the_same(cache, data, tiny_model, tmp_path, run_ranks):
    ranks = run_ranks(in_two, 2, tiny_model, data, tmp_path / "out")
    assert ranks[0] == ranks[1]
    assert [info.images for info in ranks[0]] == [7, 7, 7, 7, 2]
    assert contents(tmp_path / "out") == contents(cache)


def test_shards_that_are_there_are_kept(cache, data, tiny_model, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(cache, out)
    before = {path: path.stat().st_ino for path in out.iterdir()}
    gone = sorted(out.iterdir())[2]
    gone.unlink()
    gone.with_name(gone.name + ".raekit-partial").write_bytes(b"torn")
    write(tiny_model, data, out)
    assert contents(out) == contents(cache)
    assert all(path.stat().st_ino == number for path, number in before.items() if path != gone)


def command(model: Path, source: str, out: Path) -> None:
    """Run `raekit latents cache`; the target of a separate process."""
    torch.set_num_threads(1)
    os.dup2(os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = ["raekit", "latents", "cache", str(model), "--source", source, "--flip", "--out", str(out)]
    sys.argv += ["--dtype", "fp32", "--batch-size", "1", "--shard-size", "1", "--device", "cpu", "--precision", "fp32"]
    from raekit.cli import main

    main()


def test_killed_at_random_moments_it_ends_the_same_to_the_bit(tiny_model, images, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raekit.cli", "raekit.inference.cache"])
    out, randomly = tmp_path / "out", random.Random(7)
    alone = context.Process(target=command, args=(tiny_model, images, tmp_path / "alone"))
    alone.start()
    alone.join()
    assert alone.exitcode == 0, (tmp_path / "alone.log").read_text()
    kept: dict[str, int] = {}
    for target in sorted(randomly.uniform(0, 28) for _ in range(KILLS)):
        process = context.Process(target=command, args=(tiny_model, images, out))
        process.start()
        while len(list(out.glob("*.safetensors"))) < target and process.is_alive():
            time.sleep(0.0005)
        time.sleep(randomly.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -9, (tmp_path / "out.log").read_text()
        there = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
        assert kept.items() <= there.items()
        assert len(there) < 30
        kept = there
    assert kept
    last = context.Process(target=command, args=(tiny_model, images, out))
    last.start()
    last.join()
    assert last.exitcode == 0, (tmp_path / "out.log").read_text()
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.parametrize("change", [{"image_size": 20}, {"flip": False}, {"split": "heldout"}])
def test_a_folder_of_other_latents_is_not_written_to(cache, data, tiny_model, change):
    before = contents(cache)
    with pytest.raises(UserError, match=r"holds (other latents|latents-.*the shard size is another)"):
        write(tiny_model, replace(data, **change), cache)
    with pytest.raises(UserError, match=r"holds other latents:\n  dtype: \"fp32\" -> \"int8\"\nGive another folder"):
        write(tiny_model, data, cache, dtype="int8")
    assert contents(cache) == before


def test_damaged_shards_are_found_and_made_anew(cache, data, tiny_model, autoencoder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(cache, out)
    path = sorted(out.iterdir())[1]
    content = bytearray(path.read_bytes())
    for place in (-3000, -3000 + 1024):  # one byte in each orientation of one image
        content[place] ^= 1
    path.write_bytes(content)
    batches = LatentLoader(out, replace(data, flip=False), 3, autoencoder).stream(0, 30, ONE)
    with pytest.raises(UserError, match=rf"{path}: damaged; .* again with --verify"):
        next(batches)
    write(tiny_model, data, out)
    assert contents(out) != contents(cache)
    write(tiny_model, data, out, verify=True)
    assert contents(out) == contents(cache)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match=rf"{path}: damaged"):
        write(tiny_model, data, out)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_the_images(cache, data, autoencoder, workers):
    """Read three epochs from the middle of a batch, as the only process and as one of two."""
    data = replace(data, workers=workers)
    for world in (ONE, World(rank=1, size=2)):
        expected = Loader(replace(data, workers=0), 3).stream(5, 24, world)
        loader = LatentLoader(cache, data, 3, autoencoder)
        assert (loader.classes, len(loader)) == (("blue", "green", "red"), 30)
        found = loader.stream(5, 24, world)
        for _ in range(4):
            a, b = next(expected), next(found)
            assert torch.equal(a.positions, b.positions)
            assert torch.equal(a.labels, b.labels)
            assert torch.allclose(autoencoder.encode(a.pixels()), b.latents, atol=1e-5)
            parts = b.split(5)
            assert torch.equal(torch.cat([part.latents for part in parts]), b.latents)


def test_without_flips_the_images_are_as_they_are(cache, data, autoencoder):
    data = replace(data, flip=False)
    a, b = next(Loader(data, 3).stream(0, 30, ONE)), next(LatentLoader(cache, data, 3, autoencoder).stream(0, 30, ONE))
    assert torch.allclose(autoencoder.encode(a.pixels()), b.latents, atol=1e-5)


def test_unreadable_images_are_replaced_by_the_same_as_on_the_fly(images, tiny_model, autoencoder, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(images.removeprefix("folder:"), root)
    files = sorted((root / "train").rglob("*.png"))
    for number in (0, 1, 2, 17, 29):  # a complete shard; the last, whose place the first readable image takes
        files[number].write_text("bad")
    data = DataConfig(source=f"folder:{root}", image_size=16, flip=True, max_unreadable=0.2)
    infos = write(tiny_model, data, tmp_path / "out", shard_size=3)
    assert sum(info.images for info in infos) == 25
    assert infos[0].images == 0
    expected = Loader(data, 3).stream(0, 30, ONE)
    found = LatentLoader(tmp_path / "out", data, 3, autoencoder).stream(0, 30, ONE)
    for _ in range(2):
        a, b = next(expected), next(found)
        assert torch.equal(a.labels, b.labels)
        assert torch.allclose(autoencoder.encode(a.pixels()), b.latents, atol=1e-5)
    with pytest.raises(UserError, match=r"5 of 30 images were unreadable, more than data\.max_unreadable=0\.1 "):
        LatentLoader(tmp_path / "out", replace(data, max_unreadable=0.1), 3, autoencoder)
    with pytest.raises(UserError, match=r"\d of 30 images are unreadable"):
        write(tiny_model, replace(data, max_unreadable=0.1), tmp_path / "other")
    shutil.copy(files[3], files[2])  # repaired: the shards that are there lack it
    with pytest.raises(UserError, match=r"holds other latents:\n  sizes: "):
        write(tiny_model, data, tmp_path / "out", shard_size=3)


def test_a_cache_of_something_else_is_refused(cache, data, autoencoder, tmp_path):
    def refused(message: str, data: DataConfig = data, folder: Path = cache) -> None:
        with pytest.raises(UserError, match=message):
            LatentLoader(folder, data, 0, autoencoder)

    refused(r"made with data\.image_size 16, but the config has 20", replace(data, image_size=20))
    refused(r"made with data\.split train, but the config has all", replace(data, split="all"))
    refused(r"made with data\.resize fast, but the config has exact", replace(data, resize="exact"))
    refused(r"made with data\.source folder:.*, but the config has emoji", replace(data, source="emoji"))
    refused(r"data\.crop: random does not work with cached latents", replace(data, crop="random"))
    refused(r"holds no latents; give a folder that `raekit latents cache` wrote", folder=tmp_path)
    refused(r"no such file", folder=tmp_path / "none")
    moved = shutil.copytree(data.source.removeprefix("folder:"), tmp_path / "moved")
    LatentLoader(cache, replace(data, source=f"folder:{moved}"), 0, autoencoder)  # the same images at another place
    next(moved.rglob("*.png")).unlink()
    refused(
        r"made with data\.source folder:.*, but the config has folder:.*moved", replace(data, source=f"folder:{moved}")
    )
    part = tmp_path / "part"
    shutil.copytree(cache, part)
    sorted(part.iterdir())[3].unlink()
    refused(r"holds 4 of 5 shards of latents; run the same `raekit latents cache` command again", folder=part)
    with pytest.raises(UserError, match=r"holds latents of kind 'source', but kind 'images' is needed"):
        list(read_latents(cache))
    mean, var = autoencoder.mean, autoencoder.var
    autoencoder.set_statistics(mean, 2 * var)
    refused(r"its latents were made with different latent statistics: ")
    autoencoder.set_statistics(mean, var)
    next(autoencoder.encoder.parameters()).data += 0.1
    refused(r"its latents were made with a different encoder: ")


def test_a_cache_without_flips_is_refused_where_they_are_needed(data, tiny_model, autoencoder, tmp_path):
    write(tiny_model, replace(data, flip=False), tmp_path / "out", shard_size=30)
    (shard,) = map(load_file, (tmp_path / "out").iterdir())
    assert shard["latents"].shape == (30, 1, 16, 4, 4)
    with pytest.raises(UserError, match=r"holds no flipped latents, which data\.flip needs; cache them with --flip"):
        LatentLoader(tmp_path / "out", data, 0, autoencoder)


def test_shards_that_do_not_hold_what_they_say_are_refused(cache, data, autoencoder, tmp_path):
    from safetensors import safe_open

    out = tmp_path / "out"
    shutil.copytree(cache, out)
    path = sorted(out.iterdir())[1]
    good = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    for change, message in (
        ({"labels": good["labels"] + 9}, r"its labels do not fit its 3 classes"),
        ({"positions": good["positions"] + 1}, r"positions of its shards are out of order"),
        ({"positions": -good["positions"]}, r"positions of its shards are out of order"),
        ({"latents": good["latents"][..., :2].contiguous()}, r"`latents` must have .*, not "),
        ({"scale": good["scale"].half()}, r"`scale` must have "),
    ):
        save_file(good | change, path, metadata)
        with pytest.raises(UserError, match=message):
            LatentLoader(out, data, 0, autoencoder)
    save_file(good, path, metadata)
    shutil.copy(sorted(out.iterdir())[0], path)
    with pytest.raises(UserError, match=r"holds 5 of 5 shards"):
        LatentLoader(out, data, 0, autoencoder)


def test_latents_that_are_not_finite_are_not_cached(data, tiny_model, tmp_path):
    autoencoder = Autoencoder.load(str(tiny_model))
    autoencoder.var[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"some of its latents are not finite; encode with --precision fp32"):
        cache_latents(autoencoder, "broken", data, tmp_path / "out", world=ONE)


def test_an_encoder_is_the_same_in_any_precision(tiny_model, autoencoder):
    other = Autoencoder.load(str(tiny_model), torch.bfloat16)
    assert encoder_fingerprint(other) == encoder_fingerprint(autoencoder)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_cache_needs_the_space_of_its_latents(data, tiny_model, tmp_path, monkeypatch, dtype):
    needed: list[int] = []
    monkeypatch.setattr("raekit.inference.cache.check_space", lambda path, size, remedy: needed.append(size))
    infos = write(tiny_model, data, tmp_path, dtype=dtype)
    shards = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert needed == [sum(shard["latents"].nbytes + shard["scale"].nbytes for shard in shards)]
    assert infos == write(tiny_model, data, tmp_path, dtype=dtype)
    assert needed[1:] == [0]
