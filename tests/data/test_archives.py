"""Images in zip, tar and npz files, including malicious files."""

import io
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raekit.data import archives
from raekit.data.archives import Npz
from raekit.data.images import UnreadableImage
from raekit.data.sources import open_source
from raekit.data.sources.base import Source
from raekit.errors import UserError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def values(source: Source) -> list[int]:
    return [np.asarray(source[i][0])[0, 0, 0] for i in range(len(source))]


FILES = {"b/2.png": png(2), "a.PNG": png(1), ".hidden.png": png(9), "__MACOSX/x.png": png(9), "note.txt": b"text"}


def write_zip(path: Path, method: int) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("b")
        for name, content in FILES.items():
            archive.writestr(name, content)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"./{name}" if name[0] != "_" else name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["stored zip", "deflated zip", "tar"])
def test_images_of_an_archive(tmp_path: Path, kind: str):
    path = tmp_path / "images"
    if kind == "tar":
        write_tar(path)
    else:
        write_zip(path, zipfile.ZIP_STORED if kind == "stored zip" else zipfile.ZIP_DEFLATED)
    source = open_source(f"{kind.split()[-1]}:{path}", "all")
    assert (source.name, source.classes, len(source)) == (f"{kind.split()[-1]}:{path}", (), 2)
    assert values(source) == values(pickle.loads(pickle.dumps(source))) == [1, 2]
    assert source[1][1] == -1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_npz(tmp_path: Path, save: Callable):
    path = tmp_path / "samples.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 6, 3), dtype=np.uint8)
    labels = np.arange(40) % 3
    save(path, images, labels)
    source = open_source(f"npz:{path}", "all")
    assert source.classes == ("0", "1", "2")
    order = [0, 1, 39, 7, 7, 2]
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert all(np.array_equal(np.asarray(copy[i][0]), images[i]) for i in order)
        assert [copy[i][1] for i in order] == labels[order].tolist()
    train, heldout = (open_source(f"npz:{path}", split) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 40
    assert 0 < len(heldout) < 12
    save(path, images)
    unlabelled = open_source(f"npz:{path}", "all")
    assert (unlabelled.classes, unlabelled[3][1]) == ((), -1)


class Code:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.array([Code()], dtype=object)}, "arr_0 holds Python objects"),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.float32)},
            r"uint8 \(N, H, W, 3\); the file holds arr_0 float32 \(2, 4, 4, 3\)",
        ),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"the file holds arr_0 uint8 \(2, 3, 4, 4\)"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"the file holds arr_0"),
        ({"mu": np.zeros(4)}, r"the file holds mu float64 \(4,\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.array([0, -1])}, "labels in arr_1"),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu": np.zeros(2), "label": np.arange(2)},
            "no labels in arr_1, but label has a number for each image",
        ),
        ({"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "arr_0 is in Fortran order"),
    ],
)
def test_other_npz_files_are_rejected(tmp_path: Path, arrays: dict, message: str, capsys: pytest.CaptureFixture[str]):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=rf"x\.npz.*{message}"):
        open_source(f"npz:{tmp_path / 'x.npz'}", "all")
    assert "code was run" not in capsys.readouterr().out


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((10**9, 999, 999, 3)), "its size does not fit shape"),
        (header((2, 4, 4, 3)) + bytes(95), "its size does not fit shape"),
        (header((-2, 4, 4, 3)), "its size does not fit shape|damaged"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 100, "arr_0 is damaged or not an array"),
        (b"\x93NUMPY\x03\x00", "arr_0 is damaged or not an array"),
        (b"", "arr_0 is damaged or not an array"),
    ],
)
def test_npz_files_with_false_sizes_are_rejected(tmp_path: Path, content: bytes, message: str):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", content)
    with pytest.raises(UserError, match=message):
        Npz(tmp_path / "x.npz")


def test_an_npz_of_too_many_images_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.savez(tmp_path / "x.npz", np.zeros((2, 40, 50, 3), np.uint8))
    monkeypatch.setattr("raekit.data.sources.npz.MAX_FILE", 5_999)
    with pytest.raises(UserError, match="2 images of 40 x 50 pixels are too many or too large"):
        open_source(f"npz:{tmp_path / 'x.npz'}", "all")


def test_a_file_that_unpacks_to_more_than_it_says_is_unreadable(tmp_path: Path):
    """A zip bomb: four megabytes of zeros in a few kilobytes, declared as a small image."""
    path = tmp_path / "bomb.zip"
    packed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = packed.compress(bytes(2**22)) + packed.flush()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.png", stream)
        archive.writestr("b.png", png(2))
    content = path.read_bytes()
    central = content.index(b"PK\x01\x02")
    fields = bytearray(content)
    struct.pack_into("<H", fields, central + 10, zipfile.ZIP_DEFLATED)
    struct.pack_into("<I", fields, central + 24, 100)  # the declared size
    path.write_bytes(fields)
    source = open_source(f"zip:{path}", "all")
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=r"bomb\.zip/a\.png: damaged: its size is not the 100 bytes"):
        source[0]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert np.asarray(source[1][0])[0, 0, 0] == 2


def test_too_large_files_of_an_archive_are_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_zip(tmp_path / "x.zip", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "x.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.png", bytes(10_000))
    monkeypatch.setattr(archives, "MAX_FILE", 5_000)
    source = open_source(f"zip:{tmp_path / 'x.zip'}", "all")
    with pytest.raises(UnreadableImage, match="10,000 bytes, more than the limit of 5,000"):
        source[2]
    assert values_without(source, 2) == [1, 2]


def values_without(source: Source, left_out: int) -> list[int]:
    return [int(np.asarray(source[i][0])[0, 0, 0]) for i in range(len(source)) if i != left_out]


def test_an_image_of_too_many_pixels_is_unreadable(tmp_path: Path):
    """A PNG of a few bytes whose header declares 60,000 x 60,000 pixels."""
    content = png(1)
    ihdr = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    bomb = content[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + content[33:]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", bomb)
    with pytest.raises(UnreadableImage, match=r"a\.png"):
        open_source(f"zip:{tmp_path / 'x.zip'}", "all")[0]


@pytest.mark.parametrize("kind", ["zip", "tar", "npz"])
def test_damaged_archives_are_rejected(tmp_path: Path, kind: str):
    path = tmp_path / "x"
    with pytest.raises(UserError, match=f"'{kind}:.*there is no file"):
        open_source(f"{kind}:{path}", "all")
    path.write_bytes(b"not an archive")
    with pytest.raises(UserError, match=rf"{path}: damaged or not a"):
        open_source(f"{kind}:{path}", "all")


def test_archives_without_images_are_rejected(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("note.txt", "text")
    with pytest.raises(UserError, match=r"x\.zip: no images found"):
        open_source(f"zip:{tmp_path / 'x.zip'}", "all")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"not an uncompressed tar file .*decompress it first"):
        open_source(f"tar:{tmp_path / 'x.tar.gz'}", "all")


def test_an_archive_cut_short_names_its_file(tmp_path: Path):
    write_tar(tmp_path / "x.tar")
    source = open_source(f"tar:{tmp_path / 'x.tar'}", "all")
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:600])
    with pytest.raises(UnreadableImage, match=r"x\.tar/\./.*"):
        source[0]


def test_rarely_packed_images_are_rejected_with_their_number_and_the_reason(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", png(1), zipfile.ZIP_BZIP2)
        archive.writestr("b.png", png(2))
        archive.writestr("c.png", png(3), zipfile.ZIP_LZMA)
        archive.writestr("d.txt", "not needed", zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match=r"x\.zip: 2 of its files.*\(3 images in all\), such as a\.png .*bzip2"):
        open_source(f"zip:{tmp_path / 'x.zip'}", "all")
