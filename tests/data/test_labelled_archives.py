"""Labelled archives in the layouts in which datasets are distributed, and their index."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raekit.data.archives import expand_braces, list_tar
from raekit.data.images import UnreadableImage
from raekit.data.loader import DataConfig, Loader
from raekit.data.sources import absolute, archive_index, open_source, stamp
from raekit.data.sources.archive_index import open_index
from raekit.data.sources.base import Source
from raekit.distributed import World
from raekit.errors import UserError

Files = Sequence[tuple[str, bytes]]


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: Files, form: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_zip(path: Path, files: Files) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)


def samples(source: Source) -> list[tuple[int, int]]:
    """Return (red value of the first pixel, label) of every image, and check `labels`."""
    found = []
    for i in range(len(source)):
        image, label = source[i]
        assert source.labels[i] == label
        found.append((int(np.asarray(image)[0, 0, 0]), label))
    return found


def webdataset(numbers: Sequence[int], labels: str = "cls") -> list[tuple[str, bytes]]:
    """Return the files of a shard. Image n has class n % 3."""
    files = []
    for n in numbers:
        files.append((f"{n:04}.png", png(n)))
        label = str(n % 3).encode() if labels == "cls" else json.dumps({labels: n % 3, "width": 6}).encode()
        files += [(f"{n:04}.{'cls' if labels == 'cls' else 'json'}", label), (f"{n:04}.txt", f"caption {n}".encode())]
    return files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three training shards and one validation shard, as WebDataset writes them."""
    for shard in range(3):
        write_tar(tmp_path / f"imagenet-train-{shard:04}.tar", webdataset(range(10 * shard, 10 * shard + 10)))
    write_tar(tmp_path / "imagenet-validation-00.tar", webdataset(range(50, 54)))
    return tmp_path


@pytest.fixture(params=[2**40, 0], ids=["scanned", "kept"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """Run a test with and without a file of the index."""
    monkeypatch.setattr(archive_index, "KEPT_FROM", request.param)
    monkeypatch.setenv("RAEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


# WebDataset


def test_shards_have_labels_splits_and_a_fixed_order(shards: Path, kept: None):
    train, heldout, both = (open_source(f"tar:{shards}", split) for split in ("train", "heldout", "all"))
    assert train.classes == heldout.classes == both.classes == ("0", "1", "2")
    assert samples(train) == [(n, n % 3) for n in range(30)]
    assert samples(heldout) == [(n, n % 3) for n in range(50, 54)]
    assert samples(both) == samples(train) + samples(heldout)
    copy = pickle.loads(pickle.dumps(train))
    assert samples(copy) == samples(train)


def test_a_pattern_names_some_shards(shards: Path, kept: None):
    some = open_source(f"tar:{shards}/imagenet-train-{{0000..0001}}.tar", "all")
    assert samples(some) == [(n, n % 3) for n in range(20)]
    assert samples(open_source(f"tar:{shards}/*train*.tar", "all")) == [(n, n % 3) for n in range(30)]
    train, heldout = (open_source(f"tar:{shards}/*train*.tar", split) for split in ("train", "heldout"))
    assert sorted(samples(train) + samples(heldout)) == [(n, n % 3) for n in range(30)]
    assert 0 < len(heldout) < 10


def test_the_address_names_other_splits(shards: Path):
    train = open_source(f"tar:{shards}?train=*0002.tar,heldout=*0001.tar")
    assert [value for value, _ in samples(train)] == [*range(20, 30)]
    data = DataConfig(source=f"tar:{shards}", splits="train=*0002.tar,heldout=*0001.tar", split="heldout", image_size=4)
    assert len(Loader(data, seed=0)) == 10
    with pytest.raises(UserError, match=r"has no part '\*9\.tar' to use as a split"):
        open_source(f"tar:{shards}?train=*9.tar")
    for wrong in ("test=a", "train=", "train=a,train=b"):
        with pytest.raises(UserError, match="must be train=NAME, heldout=NAME"):
            DataConfig(source="tar:x", splits=wrong, image_size=4)
    with pytest.raises(UserError, match="emoji has no named parts"):
        open_source("emoji?train=a")


def test_folders_of_shards_are_splits(tmp_path: Path):
    for part, numbers in (("train", range(4)), ("test", range(4, 6)), ("extra", range(6, 9))):
        write_tar(tmp_path / part / "0.tar", webdataset(numbers))
    assert [value for value, _ in samples(open_source(f"tar:{tmp_path}"))] == [*range(4)]
    assert [value for value, _ in samples(open_source(f"tar:{tmp_path}", "heldout"))] == [4, 5]


@pytest.mark.parametrize("field", ["label", "cls"])
def test_labels_of_json_files(tmp_path: Path, field: str):
    write_tar(tmp_path / "a.tar", webdataset(range(5), field))
    assert samples(open_source(f"tar:{tmp_path / 'a.tar'}", "all")) == [(n, n % 3) for n in range(5)]
    named = [("a.png", png(1)), ("a.json", b'{"label": "cat"}'), ("b.png", png(2)), ("b.json", b'{"cls": "ant"}')]
    write_tar(tmp_path / "b.tar", named)
    source = open_source(f"tar:{tmp_path / 'b.tar'}", "all")
    assert (source.classes, samples(source)) == (("ant", "cat"), [(1, 1), (2, 0)])


def test_captions_are_no_labels_and_are_kept(tmp_path: Path, kept: None):
    write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("a.txt", b"a cat"), ("b.png", png(2))])
    source = open_source(f"tar:{tmp_path / 'a.tar'}", "all")
    assert (source.classes, samples(source)) == ((), [(1, -1), (2, -1)])
    index = open_index("tar", tmp_path / "a.tar", {})
    captions = [index.caption(number) for number in range(2)]
    assert captions[0] is not None
    assert captions[0].size == len("a cat")
    assert captions[1] is None


def test_other_pictures_of_a_sample_are_no_images_of_the_dataset(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("a.seg.png", png(9)), ("a.cls", b"0"), ("dir.v2/b.jpg", png(2))])
    with pytest.raises(UserError, match=r"dir\.v2/b\.jpg: has no \.cls file, and neither have 0 others of 2 images"):
        open_source(f"tar:{tmp_path / 'a.tar'}", "all")


# dataset.json and folders


@pytest.mark.parametrize("scheme", ["zip", "tar"])
def test_labels_of_edm2(tmp_path: Path, scheme: str, kept: None):
    write: Callable[[Path, Files], None] = write_zip if scheme == "zip" else write_tar
    images = [(f"{n // 2:05}/img{n:08}.png", png(n)) for n in range(4)]
    table = {"labels": [[name, 7 * n] for n, (name, _) in enumerate(images)]}
    path = tmp_path / f"a.{scheme}"
    write(path, [*images, ("dataset.json", json.dumps(table).encode())])
    source = open_source(f"{scheme}:{path}", "all")
    assert samples(source) == [(n, 7 * n) for n in range(4)]
    assert len(source.classes) == 22
    write(path, [*images, ("dataset.json", b'{"labels": null}')])
    assert open_source(f"{scheme}:{path}", "all").classes == ()


@pytest.mark.parametrize("scheme", ["zip", "tar"])
def test_folders_in_an_archive_are_classes_and_splits(tmp_path: Path, scheme: str, kept: None):
    write: Callable[[Path, Files], None] = write_zip if scheme == "zip" else write_tar
    path = tmp_path / f"a.{scheme}"
    write(path, [("data/dog/1.png", png(1)), ("data/cat/2.png", png(2)), ("data/cat/deep/3.png", png(3))])
    source = open_source(f"{scheme}:{path}", "all")
    assert (source.classes, samples(source)) == (("cat", "dog"), [(2, 0), (3, 0), (1, 1)])
    parts = [
        ("train/dog/1.png", png(1)),
        ("train/cat/2.png", png(2)),
        ("val/cat/3.png", png(3)),
        ("test/4.png", png(4)),
    ]
    write(path, parts)
    train, heldout = (open_source(f"{scheme}:{path}", split) for split in ("train", "heldout"))
    assert train.classes == heldout.classes == ("cat", "dog")
    assert (samples(train), samples(heldout)) == ([(2, 0), (1, 1)], [(3, 0)])
    write(path, [*parts, ("val/Dog/5.png", png(5))])
    with pytest.raises(UserError, match="held-out images have classes that no training image has: Dog; rename"):
        open_source(f"{scheme}:{path}")


def test_held_out_images_without_class_folders_are_rejected(tmp_path: Path):
    write_zip(tmp_path / "a.zip", [("train/dog/1.png", png(1)), ("val/2.png", png(2))])
    assert len(open_source(f"zip:{tmp_path / 'a.zip'}")) == 1
    with pytest.raises(UserError, match=r"1 images of the split 'heldout' have no class, such as val/2\.png; unpack"):
        open_source(f"zip:{tmp_path / 'a.zip'}", "heldout")


# Damage


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.png", png(1)), ("a.cls", b"cat")], r"a\.tar/a\.cls: must be the number of a class, not b'cat'"),
        ([("a.png", png(1)), ("a.json", b"{")], r"a\.tar/a\.json: not valid JSON"),
        ([("a.png", png(1)), ("a.json", b'{"label": [1]}')], r"a\.json: a label must be the number or the name"),
        ([("a.png", png(1)), ("a.json", b"[" * 100_000)], r"a\.json: not valid JSON"),
        ([("a.png", png(1)), ("a.cls", b"1"), ("b.png", png(2))], r"b\.png: has no \.cls file, .* 0 others of 2"),
        ([("a.png", png(1)), ("a.cls", b"99999999")], "labels are from 99999999 to 99999999, and must be"),
        (
            [("a.png", png(1)), ("a.json", b'{"cls": 1}'), ("b.png", png(2)), ("b.json", b'{"cls": "x"}')],
            "some labels are numbers and others are names",
        ),
        ([("a.png", png(1)), ("dataset.json", b"[]")], r"dataset\.json: has no field `labels`"),
        ([("a.png", png(1)), ("dataset.json", b'{"labels": {}}')], "`labels` must be a list of"),
        (
            [("a.png", png(1)), ("b.png", png(2)), ("dataset.json", b'{"labels": [["b.png", 1]]}')],
            "has no label in dataset",
        ),
        (
            [("a.png", png(1)), ("dataset.json", b'{"labels": [["./a.png", 1], ["b.png", 1], ["c.png", 1]]}')],
            r"dataset\.json: lists 2 files that are not in the archive, such as b\.png",
        ),
        (
            [("a.png", png(1)), ("dataset.json", b'{"labels": [["a.png", 1], ["a.png", 1], ["a.png", 2]]}')],
            r"dataset\.json: gives a\.png the labels 1 and 2",
        ),
        ([("b.PNG", png(1)), ("b.CLS", b"x")], r"b\.CLS: must be the number of a class"),
        (
            [("a/1.png", png(1)), ("../a/2.png", png(2)), ("./../a/3.png", png(3))],
            r"2 of its files .*\(3 images in all\), such as \.\./a/2\.png \(its path leads out of the archive\)",
        ),
    ],
)
def test_damaged_labels_are_rejected_by_name(tmp_path: Path, files: Files, message: str):
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError, match=message):
        open_source(f"tar:{tmp_path / 'a.tar'}", "all")


@pytest.mark.parametrize("scheme", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_images_of_one_name_are_mentioned(tmp_path: Path, scheme: str, caplog: pytest.LogCaptureFixture):
    write: Callable[[Path, Files], None] = write_zip if scheme == "zip" else write_tar
    write(tmp_path / "a", [("a.png", png(1)), ("a.cls", b"0"), ("a.png", png(2)), ("a.cls", b"1"), ("b/../c.png", b"")])
    with pytest.raises(UserError, match="has no"):
        open_source(f"{scheme}:{tmp_path / 'a'}", "all")
    assert "several files under one name for 1 of its images, such as a.png" in caplog.text


def test_backslashes_in_a_zip_are_slashes_if_it_has_no_others(tmp_path: Path):
    write_zip(tmp_path / "a.zip", [("d\\", b""), ("d\\dog\\1.png", png(1)), ("d\\cat\\2.png", png(2))])
    source = open_source(f"zip:{tmp_path / 'a.zip'}", "all")
    assert (source.classes, samples(source)) == (("cat", "dog"), [(2, 0), (1, 1)])
    write_zip(tmp_path / "a.zip", [("dog/a\\b.png", png(1)), ("dog/../cat/2.png", png(2))])
    source = open_source(f"zip:{tmp_path / 'a.zip'}", "all")
    assert (source.classes, samples(source)) == (("cat", "dog"), [(2, 0), (1, 1)])


def test_a_damaged_or_missing_shard_is_rejected_by_name(shards: Path):
    with pytest.raises(UserError, match=r"1 of its 4 files do not exist, such as .*train-0003\.tar"):
        open_source(f"tar:{shards}/imagenet-train-{{0000..0003}}.tar")
    path = shards / "imagenet-train-0001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:5000])
    with pytest.raises(UserError, match=r"train-0001\.tar: damaged .*\(it ends too early"):
        open_source(f"tar:{shards}")
    path.write_bytes(content[:2048] + b"x" + content[2049:])
    with pytest.raises(UserError, match=r"train-0001\.tar: damaged .*no file header at byte 2,048"):
        open_source(f"tar:{shards}")
    path.write_bytes(content[:520] + bytes(10) + content[530:])  # in an image
    with pytest.raises(UnreadableImage, match=r"train-0001\.tar/0010\.png"):
        samples(open_source(f"tar:{shards}"))


@pytest.mark.parametrize("pattern", ["nowhere", "*.tar", "{0..2}.tar"])
def test_a_pattern_without_files_is_rejected(tmp_path: Path, pattern: str):
    with pytest.raises(UserError, match="there is no file, folder or match of a pattern"):
        open_source(f"tar:{tmp_path / pattern}")
    with pytest.raises(UserError, match=r"contains no \.tar files"):
        open_source(f"tar:{tmp_path}")


def test_braces():
    assert expand_braces("a{08..10}-{x,y}.tar") == [f"a{n}-{s}.tar" for n in ("08", "09", "10") for s in "xy"]
    assert expand_braces("a{b}{}") == ["a{b}{}"]
    with pytest.raises(UserError, match="1,000,000 files, more than the limit"):
        expand_braces("{0..999}-{0..999}")


# Tar files


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_listed_as_by_tarfile(tmp_path: Path, form: int):
    names = ["a.png", "b/" + "c" * 95 + ".png", "d" * 60 + "/" + "e" * 90 + ".png", "ä.png"]
    if form != tarfile.USTAR_FORMAT:
        names.append("f" * 200 + "/" + "g" * 200 + ".png")
    write_tar(tmp_path / "a.tar", [(name, png(i) * (i + 1)) for i, name in enumerate(names)], form)
    with tarfile.open(tmp_path / "a.tar", "a", format=form) as archive:
        for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("other")
            info.type = kind
            archive.addfile(info)
    with tarfile.open(tmp_path / "a.tar") as archive:
        expected = {info.name: (info.offset_data, info.size) for info in archive if info.isreg()}
    found = list_tar(tmp_path / "a.tar")
    assert {name: (entry.offset, entry.size) for name, entry in found.entries.items()} == expected
    assert set(expected) == set(names)
    assert not found.others


def test_links_in_a_tar_are_followed_or_rejected(tmp_path: Path, shared: Callable[[str], Path]):
    source = open_source(f"tar:{shared('faults/links.tar')}", "all")
    images = [source[i][0].tobytes() for i in range(4)]
    assert images[2:] == images[:2]
    path = tmp_path / "a.tar"
    write_tar(path, [("x/a.png", png(1))])

    def link(name: str, target: str, kind: bytes) -> None:
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)

    link("y/b.png", "../x/a.png", tarfile.SYMTYPE)
    link("c.png", "y/b.png", tarfile.LNKTYPE)
    assert [value for value, _ in samples(open_source(f"tar:{path}", "all"))] == [1, 1, 1]
    link("passwd.png", "/etc/passwd", tarfile.SYMTYPE)
    link("loop.png", "loop.png", tarfile.SYMTYPE)
    with pytest.raises(UserError, match=r"2 of its .*\(5 images in all\), such as \w+\.png \(a link to a file"):
        open_source(f"tar:{path}", "all")


def test_sparse_files_are_rejected(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("a.png", png(1))])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[156:157] = b"S"
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + sum(content[156:512]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"such as a\.png \(a sparse file\)"):
        open_source(f"tar:{tmp_path / 'a.tar'}", "all")


# The index


@pytest.fixture
def indexed(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that keep their index in a file."""
    monkeypatch.setattr(archive_index, "KEPT_FROM", 0)
    monkeypatch.setenv("RAEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    return shards


def test_an_index_is_read_and_made_again_when_an_archive_changes(indexed: Path, monkeypatch: pytest.MonkeyPatch):
    uri = f"tar:{indexed}"
    before = samples(open_source(uri))
    (file,) = indexed.glob(".raekit-index-*.safetensors")
    assert stamp(uri) == stamp(uri)

    def build(*_: object) -> None:
        raise AssertionError("the index was built again")

    with monkeypatch.context() as patched:
        patched.setattr(archive_index, "_build", build)
        assert samples(open_source(uri)) == before
        assert len(open_source(uri, "heldout")) == 4
    for damaged in (file.read_bytes()[:500], b"", file.read_bytes()[:-1000]):
        file.write_bytes(damaged)
        assert samples(open_source(uri)) == before
    write_tar(indexed / "imagenet-train-0002.tar", webdataset(range(40, 42)))
    assert [value for value, _ in samples(open_source(uri))] == [*range(20), 40, 41]
    write_tar(indexed / "imagenet-train-0003.tar", webdataset([60]))
    assert [value for value, _ in samples(open_source(uri))] == [*range(20), 40, 41, 60]


def test_an_index_with_impossible_labels_is_made_again(indexed: Path):
    index = open_index("tar", indexed, {})
    assert index.kept
    labels = index.labels.copy()
    labels[0] = 99
    archive_index._write(archive_index.ArchiveIndex(**{**vars(index), "labels": labels}), index.kept)
    assert open_index("tar", indexed, {}).labels[0] == 0


def test_the_index_of_a_read_only_folder_is_in_the_cache(indexed: Path, monkeypatch: pytest.MonkeyPatch):
    write = archive_index._write

    def refuse(index: archive_index.ArchiveIndex, path: Path) -> None:
        if path.parent == indexed:
            raise UserError("read-only")
        write(index, path)

    monkeypatch.setattr(archive_index, "_write", refuse)
    index = open_index("tar", indexed, {})
    assert index.kept
    assert index.kept.parent.name == "indexes"
    assert open_index("tar", indexed, {}).kept == index.kept


def test_the_training_stream_is_the_same_from_an_index_and_with_workers(indexed: Path):
    def first(workers: int) -> list[bytes]:
        data = DataConfig(source=f"tar:{indexed}", image_size=4, flip=True, crop="random", workers=workers)
        stream = Loader(data, seed=1).stream(8, 4, World())
        return [next(stream).images.numpy().tobytes() for _ in range(6)]

    expected = first(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(archive_index, "KEPT_FROM", 2**40)
        assert first(0) == expected


def test_relative_patterns_become_absolute(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shards)
    uri = absolute("tar:imagenet-*.tar?train=a*,heldout=b*")
    assert uri == f"tar:{shards}/imagenet-*.tar?train=a*,heldout=b*"
    assert stamp("tar:imagenet-*.tar") == stamp(absolute("tar:imagenet-*.tar"))
