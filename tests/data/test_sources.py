import gzip
import hashlib
import io
import itertools
import os
import pickle
import shutil
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from raekit.data.images import UnreadableImage
from raekit.data.sources import in_words, is_address, open_source, stamp
from raekit.data.sources.emoji import Emoji, code_points
from raekit.errors import UserError

ASSETS = Path(str(resources.files("raekit").joinpath("assets")))


def write_image(path: Path, value: int, mode: str = "RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 5), (value,) * len(mode)).save(path)


def values(source):
    """Return the red value of the first pixel of every image, in order."""
    return [source[i][0].getpixel((0, 0))[0] for i in range(len(source))]


def labels(source):
    return [source[i][1] for i in range(len(source))]


@pytest.fixture
def classed(tmp_path):
    """Forty images in the classes cat and dog. Image i has value i and is a dog if i is odd."""
    for i in range(40):
        write_image(tmp_path / ("cat", "dog")[i % 2] / f"deep/{i:02}.png", i)
    return tmp_path


# Emoji


def test_emoji_are_labelled_rgb_images_of_nine_sorted_classes():
    source = open_source("emoji", "all")
    assert (source.name, len(source)) == ("emoji", 3760)
    assert len(source.classes) == 9
    assert list(source.classes) == sorted(source.classes)
    counts = Counter(labels(source))
    assert counts[source.classes.index("people-body")] == 747
    assert counts[source.classes.index("flags")] == 523
    image, _ = source[17]
    assert (image.mode, image.size) == ("RGB", (64, 64))


def test_no_emoji_is_in_both_splits():
    train, heldout = open_source("emoji"), open_source("emoji", "heldout")
    assert isinstance(train, Emoji)
    assert isinstance(heldout, Emoji)
    assert not set(map(code_points, train.files)) & set(map(code_points, heldout.files))
    assert len(train) + len(heldout) == 3760
    assert 0.08 < len(heldout) / 3760 < 0.12
    assert set(labels(heldout)) == set(labels(train)) == set(range(9))


def test_two_drawings_of_one_emoji_have_equal_code_points():
    assert code_points("symbols/noto-0023-fe0f-20e3.webp") == code_points("symbols/fluent3d-0023-20e3.webp")
    assert code_points("flags/noto-1f1e6-1f1e8.webp") == "1f1e6-1f1e8"


def test_changing_a_returned_emoji_does_not_change_the_source():
    source = open_source("emoji")
    before = source[3][0].tobytes()
    source[3][0].paste((1, 2, 3), (0, 0, 64, 64))
    assert source[3][0].tobytes() == before


def test_the_packed_emoji_are_small_and_have_their_licences():
    assert sum(file.stat().st_size for file in (ASSETS / "emoji/data").iterdir()) <= 15e6
    notice = (ASSETS / "NOTICE").read_text()
    assert "Apache License, Version 2.0" in notice
    assert "Copyright (c) Microsoft Corporation" in notice


# Folders


def test_a_folder_has_a_class_for_each_sub_folder(classed):
    source = open_source(f"folder:{classed}", "all")
    assert source.classes == ("cat", "dog")
    assert values(source) == [*range(0, 40, 2), *range(1, 40, 2)]
    assert labels(source) == [0] * 20 + [1] * 20


@pytest.mark.parametrize("scheme", ["folder", "flat"])
def test_a_tenth_is_held_out_by_a_hash_of_the_path_within(classed, scheme):
    train, heldout = (open_source(f"{scheme}:{classed}", split) for split in ("train", "heldout"))

    def is_held_out(i):
        path = f"{('cat', 'dog')[i % 2]}/deep/{i:02}.png"
        return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest()) % 10 == 0

    assert sorted(values(heldout)) == [i for i in range(40) if is_held_out(i)] != []
    assert sorted(values(train)) == [i for i in range(40) if not is_held_out(i)]
    if scheme == "folder":
        assert train.classes == heldout.classes == ("cat", "dog")


def test_folders_train_and_val_are_the_splits(tmp_path):
    for i, path in enumerate(["train/b/0.png", "train/a/1.png", "val/a/2.png", "val/b/3.png", "test/d/4.png"]):
        write_image(tmp_path / path, i)
    uri = f"folder:{tmp_path}"
    train, heldout, both = open_source(uri), open_source(uri, "heldout"), open_source(uri, "all")
    assert train.classes == heldout.classes == both.classes == ("a", "b")
    assert (values(train), labels(train)) == ([1, 0], [0, 1])
    assert (values(heldout), labels(heldout)) == ([2, 3], [0, 1])
    assert values(both) == [1, 0, 2, 3]


def test_a_flat_folder_is_read_recursively_in_order_and_has_no_labels(tmp_path):
    write_image(tmp_path / "b.PNG", 1)
    write_image(tmp_path / "a/z.jpeg", 2)
    write_image(tmp_path / "ä ö.webp", 3)
    for hidden in (".hidden.png", "._b.PNG", ".cache/c.png"):
        write_image(tmp_path / hidden, 9)
    (tmp_path / "readme.txt").write_text("no image")
    source = open_source(f"flat:{tmp_path}", "all")
    assert source.classes == ()
    assert labels(source) == [-1, -1, -1]
    assert values(source) == pytest.approx([2, 1, 3], abs=1)


@pytest.mark.parametrize(("folder", "splits"), [("train", ""), ("mine", "?train=mine")])
def test_only_the_folder_of_the_training_images_is_split(tmp_path, folder, splits):
    for number in range(40):
        write_image(tmp_path / folder / f"{number}.png", 1)
        write_image(tmp_path / f"{number}.png", 9)
    train, heldout = (open_source(f"flat:{tmp_path}{splits}", split) for split in ("train", "heldout"))
    assert {*values(train)} == {*values(heldout)} == {1}
    assert len(train) + len(heldout) == 40


def test_links_to_folders_are_followed(tmp_path, classed):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "animals").symlink_to(classed / "cat")
    assert len(open_source(f"flat:{tmp_path / 'other'}", "all")) == 20


def test_images_of_files_are_converted_to_rgb(tmp_path):
    write_image(tmp_path / "a.png", 0, "LA")
    assert values(open_source(f"flat:{tmp_path}", "all")) == [255]


@pytest.mark.parametrize("damage", ["empty", "text", "truncated png", "truncated jpeg", "gone", "bits"])
def test_a_damaged_image_is_named_with_the_reason(tmp_path, damage):
    path = tmp_path / ("a.jpg" if damage == "truncated jpeg" else "a.png")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image.save(path)
    content = path.read_bytes()
    source = open_source(f"flat:{tmp_path}", "all")
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        damaged = {
            "empty": b"",
            "text": b"<html>",
            "bits": content[:middle] + b"x" * 99 + content[middle + 99 :],
        }
        path.write_bytes(damaged.get(damage, content[:middle]))
    with pytest.raises(UnreadableImage) as error:
        source[0]
    assert error.value.path == str(path)
    assert error.value.reason


@pytest.mark.parametrize("scheme", ["folder", "flat"])
def test_a_folder_without_images_is_rejected_with_the_extensions(tmp_path, scheme):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.txt").write_text("no image")
    with pytest.raises(UserError, match=rf"{tmp_path}.*no image.*\.jpg.*\.png.*\.webp"):
        open_source(f"{scheme}:{tmp_path}")


def test_a_folder_without_classes_is_rejected_with_what_to_use(tmp_path):
    write_image(tmp_path / "a.png", 1)
    with pytest.raises(UserError, match=f"flat:{tmp_path}"):
        open_source(f"folder:{tmp_path}")


def test_an_empty_split_is_rejected(tmp_path):
    write_image(tmp_path / "val/a/0.png", 1)
    assert len(open_source(f"folder:{tmp_path}", "heldout")) == 1
    with pytest.raises(UserError, match="no images in the split 'train'"):
        open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("folders", "train", "heldout"),
    [
        (("train", "test"), [0], [1]),
        (("training", "valid"), [0], [1]),
        (("Train", "Validation"), [0], [1]),
        (("train", "test", "valid"), [0], [2]),
        (("train", "dev", "notes"), [0], [1]),
        (("train", "val", "test", "validation"), [0], [3]),
    ],
)
@pytest.mark.parametrize("scheme", ["folder", "flat"])
def test_folders_with_usual_names_are_the_splits(tmp_path, scheme, folders, train, heldout):
    for i, folder in enumerate(folders):
        write_image(tmp_path / folder / "a" / f"{i}.png", i)
    assert values(open_source(f"{scheme}:{tmp_path}")) == train
    assert values(open_source(f"{scheme}:{tmp_path}", "heldout")) == heldout
    everything = open_source(f"{scheme}:{tmp_path}", "all")
    assert sorted(values(everything)) == (sorted(train + heldout) if scheme == "folder" else [*range(len(folders))])
    if scheme == "folder":
        assert everything.classes == ("a",)


def test_classes_of_held_out_images_only_are_rejected(tmp_path):
    for i, name in enumerate(("train/a", "train/caf\u00e9", "val/cafe\u0301")):  # the last as a Mac writes it
        write_image(tmp_path / name / f"{i}.png", i)
    heldout = open_source(f"folder:{tmp_path}", "heldout")
    assert (heldout.classes, labels(heldout)) == (("a", "caf\u00e9"), [1])
    write_image(tmp_path / "val/A/3.png", 3)
    with pytest.raises(UserError, match="held-out images have classes that no training image has: A; rename"):
        open_source(f"folder:{tmp_path}")


def test_a_folder_of_only_training_images_holds_a_tenth_out(tmp_path):
    for i in range(40):
        write_image(tmp_path / "train" / "ab"[i % 2] / f"{i:02}.png", i)
    train, heldout = (open_source(f"folder:{tmp_path}", split) for split in ("train", "heldout"))
    assert train.classes == ("a", "b")
    assert sorted(values(train) + values(heldout)) == [*range(40)]
    assert len(heldout) > 0


def test_classes_with_usual_names_are_classes(tmp_path):
    for i, name in enumerate(("bus", "car", "train")):
        write_image(tmp_path / name / f"{i}.png", i)
    assert open_source(f"folder:{tmp_path}", "all").classes == ("bus", "car", "train")


def test_the_address_names_other_splits(tmp_path):
    for i, name in enumerate(("first", "second", "test")):
        write_image(tmp_path / name / "a" / f"{i}.png", i)
    uri = f"folder:{tmp_path}?train=second,heldout=test"
    assert (values(open_source(uri)), values(open_source(uri, "heldout"))) == ([1], [2])
    assert values(open_source(f"folder:{tmp_path}?train=first,heldout=second", "all")) == [0, 1]
    with pytest.raises(UserError, match="has no part 'third' to use as a split; its parts are first, second, test"):
        open_source(f"folder:{tmp_path}?train=third")
    with pytest.raises(UserError, match="must be two different parts"):
        open_source(f"folder:{tmp_path}?train=first,heldout=first")


# ImageNet's own val


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet as Kaggle distributes it, with three classes and four held-out images in one folder."""
    data = tmp_path / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC"
    for i, name in enumerate(("n03", "n01", "n02")):
        write_image(data / "train" / name / f"{name}_{i}.JPEG", i)
    for i in range(4):
        write_image(data / "val" / f"ILSVRC2012_val_0000000{i + 1}.JPEG", 100 + i)
        write_image(data / "test" / f"ILSVRC2012_test_0000000{i + 1}.JPEG", 200)
    return data


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (
            "../../../LOC_val_solution.csv",
            "ImageId,PredictionString\nILSVRC2012_val_00000003,n03 85 1 499 272 \nILSVRC2012_val_00000001,n02 1 2 3 4\n"
            "ILSVRC2012_val_00000004,n01 1 2 3 4 n01 5 6 7 8\nILSVRC2012_val_00000002,n01 1 2 3 4\n",
        ),
        ("imagenet_2012_validation_synset_labels.txt", "n02\nn01\nn03\nn01\n"),
        ("val.txt", "".join(f"ILSVRC2012_val_0000000{i + 1}.JPEG {c}\n" for i, c in enumerate((1, 0, 2, 0)))),
        ("val/labels.csv", "".join(f"ILSVRC2012_val_0000000{i + 1}.JPEG,{c}\n" for i, c in enumerate((1, 0, 2, 0)))),
    ],
)
def test_held_out_images_get_their_classes_from_a_list(imagenet, place, text):
    uri = f"folder:{imagenet}"
    (imagenet / place).write_text(text)
    train, heldout, both = (open_source(uri, split) for split in ("train", "heldout", "all"))
    assert train.classes == heldout.classes == ("n01", "n02", "n03")
    assert labels(train) == [0, 1, 2]
    assert labels(heldout) == [1, 0, 2, 0]
    assert values(heldout) == pytest.approx([100, 101, 102, 103], abs=1)
    assert labels(both) == [0, 1, 2, 1, 0, 2, 0]


def test_a_number_in_a_list_is_the_name_of_a_class_if_classes_are_named_by_numbers(tmp_path):
    for name in range(11):
        write_image(tmp_path / "train" / str(name) / "0.png", name)
    for name in "ab":
        write_image(tmp_path / "val" / f"{name}.png", 99)
    (tmp_path / "val.txt").write_text("a.png 2\nb.png 10\n")
    heldout = open_source(f"folder:{tmp_path}", "heldout")
    assert [heldout.classes[label] for label in labels(heldout)] == ["2", "10"]
    (tmp_path / "val.txt").write_text("a.png 2\nb.png 11\n")
    with pytest.raises(UserError, match="the class '11' is none of the 11 classes"):
        open_source(f"folder:{tmp_path}", "heldout")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", r"4 images without class folders or a label list; .*LOC_val_solution\.csv.*val\.txt"),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG n01\n", "no class for 3 of 4 images, such as val/.*2.JPEG"),
        ("val.txt", "n01\nn02\n", "has 2 classes, but .*val has 4 images"),
        ("val.txt", "490\n361\n171\n822\n", "the class '490' is none of the 3 classes of the training images"),
        ("val.txt", "\xff\xfe", "cannot be read as text"),
    ],
)
def test_a_missing_or_damaged_label_list_is_an_error(imagenet, name, text, message):
    if name:
        (imagenet / name).write_bytes(text.encode("latin1"))
    assert len(open_source(f"folder:{imagenet}")) == 3  # the training images do not need the list
    with pytest.raises(UserError, match=message):
        open_source(f"folder:{imagenet}", "heldout")


@pytest.mark.parametrize("scheme", ["folder", "flat", "idx", "hf"])
def test_a_missing_folder_is_rejected(tmp_path, scheme):
    with pytest.raises(UserError, match=rf"'{scheme}:.*there is no folder .*/nowhere"):
        open_source(f"{scheme}:{tmp_path}/nowhere")


@pytest.mark.parametrize("uri", ["emojis", "folder", "folder:", "emoji:x", "s3:bucket", ""])
def test_an_unknown_source_is_rejected_with_the_known_ones(uri):
    with pytest.raises(UserError, match=f"'{uri}'.*emoji, folder:DIR, flat:DIR, idx:DIR, hf:DIR"):
        open_source(uri)


# IDX


def idx(array) -> bytes:
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder, packed=False):
    """Write images of 2 rows and 3 columns: values 0 to 2 for training, 3 and 4 held out. The label is 9 - value."""
    for part, numbers in (("train", [0, 1, 2]), ("t10k", [3, 4])):
        images = np.array(numbers)[:, None, None] * np.ones((1, 2, 3))
        files = {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": 9 - np.array(numbers)}
        for name, array in files.items():
            content = idx(array)
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("split", "expected"), [("train", [0, 1, 2]), ("heldout", [3, 4]), ("all", [*range(5)])])
def test_idx_files_are_grey_images_with_labels(tmp_path, packed, split, expected):
    write_idx(tmp_path, packed)
    source = open_source(f"idx:{tmp_path}", split)
    assert source.classes == tuple("0123456789")
    assert values(source) == expected
    assert labels(source) == [9 - value for value in expected]
    assert (source[0][0].mode, source[0][0].size) == ("RGB", (3, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((3, 2, 3)))[:-1], "has 17 bytes of data, but its header says 18"),
        (idx(np.zeros((3, 2, 3))) + b"x", "has 19 bytes of data, but its header says 18"),
        (idx(np.zeros((3, 2, 3)))[:9], "not an IDX file"),
        (b"", "not an IDX file"),
        (idx(np.zeros(18)), "not an IDX file of bytes with 3"),
        (b"\0\0\x0d\3" + idx(np.zeros((3, 2, 3)))[4:], "not an IDX file of bytes"),
        (idx(np.zeros((2, 2, 3))), "2 images but 3 labels"),
        (None, "no such file"),
    ],
)
def test_a_faulty_idx_file_is_rejected_by_name(tmp_path, content, message):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=f"train.*{message}"):
        open_source(f"idx:{tmp_path}")


@pytest.mark.parametrize("damage", ["cut", "text", "bits"])
def test_a_damaged_gzip_file_is_rejected_by_name(tmp_path, damage):
    write_idx(tmp_path, packed=True)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-9], "text": b"<html>", "bits": content[:-8] + bytes(8)}[damage])
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz: cannot be read"):
        open_source(f"idx:{tmp_path}", "heldout")


# Hugging Face datasets


def rows(numbers):
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    images = [Image.new("L", (4, 3), number) for number in numbers]
    columns = {"id": [str(n) for n in numbers], "picture": images, "kind": [n % 2 for n in numbers]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_saved_dataset_is_read_and_a_tenth_held_out_by_row(tmp_path):
    rows(range(50)).save_to_disk(tmp_path)
    train, heldout, everything = (open_source(f"hf:{tmp_path}", s) for s in ("train", "heldout", "all"))
    assert train.classes == heldout.classes == ("x", "y")
    assert values(everything) == [*range(50)]
    assert labels(everything) == [n % 2 for n in range(50)]
    assert sorted(values(train) + values(heldout)) == [*range(50)]
    assert 1 <= len(heldout) <= 12
    assert (everything[0][0].mode, everything[0][0].size) == ("RGB", (4, 3))


def test_splits_of_a_saved_dataset_dict_are_kept(tmp_path):
    parts = {"test": rows([7]), "train": rows([1, 2, 3]), "validation": rows([4, 5])}
    datasets.DatasetDict(**parts).save_to_disk(tmp_path)
    train, heldout, both = (open_source(f"hf:{tmp_path}", split) for split in ("train", "heldout", "all"))
    assert values(train) == [1, 2, 3]
    assert values(heldout) == [4, 5]
    assert values(both) == [1, 2, 3, 4, 5]
    assert labels(heldout) == [0, 1]


def test_a_dataset_dict_of_only_train_is_split_by_row(tmp_path):
    datasets.DatasetDict({"train": rows(range(30))}).save_to_disk(tmp_path)
    train, heldout = (open_source(f"hf:{tmp_path}", split) for split in ("train", "heldout"))
    assert sorted(values(train) + values(heldout)) == [*range(30)]


def test_a_dataset_without_labels_or_with_damage_is_read(tmp_path):
    good = io.BytesIO()
    Image.new("RGB", (2, 2), (5, 5, 5)).save(good, "PNG")
    column = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"broken", "path": None}, None]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": column}, features=features).save_to_disk(tmp_path)
    source = open_source(f"hf:{tmp_path}", "all")
    assert source.classes == ()
    assert (source[0][0].getpixel((0, 0)), source[0][1]) == ((5, 5, 5), -1)
    for row, reason in ((1, "not a known image format"), (2, "no image in this row")):
        with pytest.raises(UnreadableImage, match=f"row {row}: {reason}"):
            source[row]


def test_a_dataset_dict_without_train_or_without_images_is_rejected(tmp_path):
    datasets.DatasetDict({"other": rows([1])}).save_to_disk(tmp_path / "a")
    with pytest.raises(UserError, match="no split 'train', only other"):
        open_source(f"hf:{tmp_path / 'a'}")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "b")
    with pytest.raises(UserError, match="no image column, only text"):
        open_source(f"hf:{tmp_path / 'b'}")


def test_a_folder_that_is_no_saved_dataset_is_rejected(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: not a dataset"):
        open_source(f"hf:{tmp_path}")


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'raekit\[data\]'"):
        open_source(f"hf:{tmp_path}")


# All


def test_every_source_can_be_pickled(tmp_path, classed):
    for name in ("idx", "hf"):
        (tmp_path / name).mkdir()
    write_idx(tmp_path / "idx")
    rows(range(30)).save_to_disk(tmp_path / "hf")
    uris = [
        "emoji",
        f"folder:{classed}",
        f"flat:{classed}",
        f"idx:{tmp_path / 'idx'}",
        f"hf:{tmp_path / 'hf'}",
    ]
    for uri, split in itertools.product(uris, ("train", "all")):
        source = open_source(uri, split)
        copy = pickle.loads(pickle.dumps(source))
        assert (copy.name, copy.classes, len(copy)) == (source.name, source.classes, len(source))
        assert copy[1][0].tobytes() == source[1][0].tobytes()
        assert copy[1][1] == source[1][1]


# Labels and addresses


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_labels_are_known_without_decoding(classed, split, tmp_path):
    rows = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(40)]
    columns = {"image": rows, "label": [None if i == 7 else i % 3 for i in range(40)]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict(columns, kinds).save_to_disk(tmp_path / "hf")
    np.savez(tmp_path / "x.npz", np.zeros((40, 4, 4, 3), np.uint8), np.arange(40) % 5)
    for uri in (f"folder:{classed}", f"flat:{classed}", "emoji", f"hf:{tmp_path / 'hf'}", f"npz:{tmp_path / 'x.npz'}"):
        source = open_source(uri, split)
        assert source.labels.dtype == np.int64
        assert source.labels.shape == (len(source),)
        chosen = range(0, len(source), max(len(source) // 40, 1))
        assert [int(source.labels[i]) for i in chosen] == [source[i][1] for i in chosen]


def test_addresses_are_distinguished_from_models():
    assert all(map(is_address, ("emoji", "flat:x", "folder:a/b", "npz:x.npz", "hf:x")))
    assert not any(map(is_address, ("builtin:emoji", "owner/name", "runs/emoji", "flat", "npz:", "emoji:x")))


def test_a_stamp_changes_with_the_files(tmp_path, classed):
    uri = f"flat:{classed}"
    before = stamp(uri)
    assert stamp(uri) == before
    write_image(classed / "cat" / "deep" / "new.png", 1)
    assert stamp(uri) != before
    file = tmp_path / "x.npz"
    file.write_bytes(b"a")
    before = stamp(f"npz:{file}")
    file.write_bytes(b"ab")
    assert stamp(f"npz:{file}") != before
    assert stamp("emoji") == stamp("emoji")


def test_a_stamp_includes_linked_folders(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    before = stamp(f"flat:{tmp_path / 'images'}")
    Image.new("RGB", (5, 5)).save(tmp_path / "elsewhere" / "a.png")
    assert stamp(f"flat:{tmp_path / 'images'}") != before


def test_every_emoji_has_its_name():
    source = open_source("emoji", "all")
    assert isinstance(source, Emoji)
    captions = dict(zip(source.files, source.captions, strict=True))
    assert captions["smileys-emotion/noto-1f63b.webp"] == "smiling cat with heart-eyes"
    assert captions["flags/noto-1f1e9-1f1ef.webp"] == "Djibouti"
    assert captions["symbols/fluent3d-0023-fe0f-20e3.webp"] == "keycap #"
    assert all(captions.values())
    assert len({*captions.values()}) == len({code_points(file) for file in source.files})


def test_a_folder_without_a_scheme_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "plants").mkdir()
    monkeypatch.chdir(tmp_path)
    for place in ("plants", str(tmp_path / "plants")):
        with pytest.raises(UserError, match=f"for this folder, folder:{place} .*or flat:{place}"):
            open_source(place, "all")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_dataset_is_described_in_one_line(kind: str, images: str, tmp_path: Path):
    folder = tmp_path / "images"
    shutil.copytree(images.removeprefix("folder:"), folder)
    (folder / "train" / "red" / "a.HEIC").write_bytes(b"x")
    (folder / "train" / "red" / ".hidden.svg").write_bytes(b"x")
    uri = f"folder:{folder}" if kind == "folder" else "zip:" + shutil.make_archive(str(tmp_path / "x"), "zip", folder)
    lines = [in_words(open_source(uri, split), uri, split) for split in ("train", "heldout", "all")]
    skipped = "1 skipped (formats that are not read: .heic)"
    assert lines[0] == f"{uri}: 30 training and 9 held-out images in 3 classes, {skipped}"
    assert lines[1] == f"{uri}: 9 held-out images in 3 classes, {skipped}"
    assert lines[2] == f"{uri}: 30 training and 9 held-out images in 3 classes, {skipped}"
    flat = f"flat:{folder}/train/blue"
    assert in_words(open_source(flat, "all"), flat, "all") == f"{flat}: 9 training and 1 held-out images"


def test_images_outside_of_the_class_folders_are_left_out_with_a_warning(images, tmp_path, caplog):
    root = tmp_path / "images"
    shutil.copytree(images.removeprefix("folder:"), root)
    shutil.copytree(root / "train", tmp_path / "plain")
    for place in (root / "train", root, tmp_path / "plain"):
        shutil.copyfile(root / "train" / "red" / "02.png", place / "loose.png")
    assert len(open_source(f"folder:{root}", "all")) == 39
    assert len(open_source(f"folder:{tmp_path / 'plain'}", "all")) == 30
    first, second = (record.getMessage() for record in caplog.records)
    assert f"{root}: leaves out the images in no class folder (1, such as train{os.sep}loose.png); " in first
    assert f"{tmp_path / 'plain'}: leaves out the images in no class folder (1, such as loose.png); " in second
