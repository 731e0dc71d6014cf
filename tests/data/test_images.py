import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raekit.data import images
from raekit.data.images import EXTENSIONS, UnreadableImage, decode, find_images, image_files, reduced
from raekit.errors import UserError


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_of_a_folder_are_sorted_and_hidden_ones_left_out(tmp_path):
    write(*(tmp_path / name for name in ("b.png", "a/c.JPG", "a/.d.png", ".e/f.png", "g.txt", "h.jp2")))
    assert image_files(tmp_path) == (["a/c.JPG", "b.png", "h.jp2"], {})


def test_a_link_to_a_folder_is_followed_unless_it_is_a_loop(tmp_path):
    write(tmp_path / "in/a/b.png", tmp_path / "other/c.png")
    (tmp_path / "in/a/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/self").symlink_to(tmp_path / "in/self")
    (tmp_path / "in/other").symlink_to(tmp_path / "other")
    assert image_files(tmp_path / "in")[0] == ["a/b.png", "other/c.png"]


def test_folders_linked_to_each_other_are_listed_once(tmp_path):
    write(*(tmp_path / f"in/{name}/{name}.png" for name in "abc"), tmp_path / "out/x/y.png")
    for name in "abc":
        for other in {*"abc"} - {name}:
            (tmp_path / f"in/{name}/to-{other}").symlink_to(tmp_path / "in" / other)
    (tmp_path / "in/0").symlink_to(tmp_path / "in/c")
    (tmp_path / "in/d").symlink_to(tmp_path / "out/x")
    (tmp_path / "in/e").symlink_to(tmp_path / "out")
    assert image_files(tmp_path / "in")[0] == ["a/a.png", "b/b.png", "c/c.png", "d/y.png"]


def test_paths_stand_for_files_and_for_all_images_in_folders(tmp_path):
    write(*(tmp_path / name for name in ("in/a/b.png", "in/c.webp", "in/out/d.png", "e.txt")))
    found = find_images([tmp_path / "e.txt", tmp_path / "in", tmp_path / "none.png"], besides=tmp_path / "in/out")
    assert found == {
        tmp_path / "e.txt": "e.txt",
        tmp_path / "in/a/b.png": "a/b.png",
        tmp_path / "in/c.webp": "c.webp",
        tmp_path / "none.png": "none.png",
    }
    with pytest.raises(UserError, match="no images found"):
        find_images([tmp_path / "in/out"], besides=tmp_path / "in/out")


def test_every_extension_belongs_to_a_supported_format():
    formats = Image.registered_extensions()
    assert {formats[extension] for extension in EXTENSIONS} <= {*images.FORMATS}


def test_too_large_images_are_rejected_before_they_are_decoded(monkeypatch, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    assert decode(tmp_path / "a.png", "a").size == (30, 20)
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("was decoded"))
    with pytest.raises(UnreadableImage, match=r"^a: 30 x 20 pixels, more than the limit of 599"):
        decode(tmp_path / "a.png", "a")


def test_pillow_warnings_are_ignored():
    file = io.BytesIO()
    Image.new("P", (4, 4)).save(file, "PNG", transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(file, "a").mode == "RGB"


@pytest.mark.parametrize("extension", ["heic", "HEIF", "jxl", "dng"])
def test_images_of_other_formats_are_skipped_with_one_warning(tmp_path: Path, caplog, extension):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / f"b.{extension}").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("no image")
    assert image_files(tmp_path) == (["a.png"], {f".{extension.lower()}": 1})
    for _ in range(2):
        assert list(find_images([tmp_path])) == [tmp_path / "a.png"]
    (record,) = caplog.records
    said = f"{tmp_path}: 1 skipped (formats that are not read: .{extension.lower()}); convert"
    assert record.getMessage().startswith(said)


def test_16_bit_grey_of_both_byte_orders(tmp_path: Path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        Image.frombytes(mode, (8, 8), values.astype(order).tobytes()).save(tmp_path / f"{mode}.tif")
    little, big = (np.asarray(decode(tmp_path / f"{mode}.tif", mode)) for mode in ("I;16", "I;16B"))
    assert np.array_equal(little, big)
    assert np.array_equal(little[..., 0], (values.astype(int) + 128) // 257)


@pytest.mark.parametrize(
    ("short_side", "size"), [(0, (401, 300)), (151, (401, 300)), (150, (201, 150)), (30, (51, 38))]
)
def test_jpegs_are_decoded_at_a_reduced_size_no_smaller_than_asked(tmp_path, short_side, size):
    rows, columns = np.mgrid[:300, :401]
    pixels = np.stack([rows * 255 // 300, columns * 255 // 401, (rows + columns) * 255 // 701], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with reduced(short_side):
        image = decode(tmp_path / "a.jpg", "a")
        assert decode(tmp_path / "a.png", "a").size == (401, 300)
    assert image.size == size
    expected = Image.fromarray(pixels).resize(size, Image.Resampling.BOX)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 3
    assert decode(tmp_path / "a.jpg", "a").size == (401, 300)
