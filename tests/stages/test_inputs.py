import shutil
from pathlib import Path

import pytest

from raekit.data.loader import DataConfig
from raekit.data.sources import listing, stamp
from raekit.distributed import World
from raekit.inference.cache import cache_latents
from raekit.inference.cached_loader import LatentLoader
from raekit.models.autoencoder import Autoencoder
from raekit.stages.inputs import describe_images


def test_a_listing_tells_names_and_sizes_and_not_places(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder / "red").mkdir(parents=True)
        for name, size in (("1.png", 10), ("2.png", 20)):
            (tmp_path / folder / "red" / name).write_bytes(bytes(size))
    place, first = tmp_path / "b" / "red", listing(f"folder:{tmp_path / 'a'}")
    assert first
    assert listing(f"folder:{tmp_path / 'b'}") == first
    assert listing(f"flat:{tmp_path / 'b'}") != first
    (place / "2.png").write_bytes(bytes(21))
    names, sizes = listing(f"folder:{tmp_path / 'b'}") or ("", "")
    assert (names == first[0], sizes == first[1]) == (True, False)
    (place / "2.png").rename(place / "3.png")
    (place / "3.png").write_bytes(bytes(20))
    names, sizes = listing(f"folder:{tmp_path / 'b'}") or ("", "")
    assert (names == first[0], sizes == first[1]) == (False, True)
    archive = tmp_path / "images.zip"
    assert listing(f"zip:{archive}") is None
    archive.write_bytes(bytes(10))
    before = listing(f"zip:{archive}")
    assert listing(f"zip:{archive.rename(tmp_path / 'other.zip')}") == before
    assert listing("emoji") == listing("emoji")


def test_the_built_in_images_have_nothing_to_do_with_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = stamp("emoji"), listing("emoji")
    (tmp_path / "loop").symlink_to("loop")  # an error for whoever reads it
    (tmp_path / "image.png").write_bytes(b"")
    assert (stamp("emoji"), listing("emoji")) == before


def test_images_that_changed_since_their_latents_were_cached_cause_a_warning(images, tiny_model, tmp_path, caplog):
    shutil.copytree(images.removeprefix("folder:"), tmp_path / "images")
    data = DataConfig(source=f"folder:{tmp_path / 'images'}", image_size=16)
    autoencoder = Autoencoder.load(str(tiny_model))
    cache_latents(autoencoder, str(tiny_model), data, tmp_path / "cache", world=World())
    loader = LatentLoader(tmp_path / "cache", data, 0, autoencoder)
    before = describe_images(data, loader)
    assert "have changed" not in caplog.text
    shutil.copytree(tmp_path / "images" / "train" / "red", tmp_path / "images" / "train" / "red" / "more")
    assert describe_images(data, loader).names != before.names
    assert f"the files of {data.source} have changed since its latents were cached" in caplog.text
