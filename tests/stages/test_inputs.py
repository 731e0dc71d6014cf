from pathlib import Path

import pytest

from raekit.data.sources import listing
from raekit.stages.inputs import absolute


def test_names_of_things_on_disk_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("decoder", "runs/decoder", "emoji", "dinov2-b", "rae-dinov2-b"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, expected in (
        ("decoder", f"{tmp_path}/decoder"),
        ("runs/decoder", f"{tmp_path}/runs/decoder"),
        ("~/decoder", f"{tmp_path}/decoder"),
        ("folder:decoder", f"folder:{tmp_path}/decoder"),
        ("vae:runs/decoder@64", f"vae:{tmp_path}/runs/decoder@64"),
        ("dinov2:runs/decoder", f"dinov2:{tmp_path}/runs/decoder"),
        # Built-in, registered and published names come before folders, and other names are not on this disk.
        *(
            (name, name)
            for name in ("builtin:emoji", "dinov2-b", "rae-dinov2-b", "OWNER/NAME", "pixels@64", "flat:gone")
        ),
    ):
        assert absolute(name) == expected


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
