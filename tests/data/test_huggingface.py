"""Hugging Face datasets: parquet files, columns of several kinds, splits and their labels."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raekit.data.images import UnreadableImage
from raekit.data.sources import absolute, open_source, stamp
from raekit.data.sources.base import Source
from raekit.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the copies that datasets makes of parquet files out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def samples(source: Source) -> list[tuple[int, int]]:
    found = []
    for i in range(len(source)):
        image, label = source[i]
        assert source.labels[i] == label
        found.append((int(np.asarray(image)[0, 0, 0]), label))
    return found


def rows(numbers: Sequence[int], label: Any = None) -> datasets.Dataset:
    """Return images of these values. `label` is a feature or None; the labels are n % 3, or their names."""
    columns: dict[str, Any] = {"image": [{"bytes": png(n), "path": None} for n in numbers]}
    features: dict[str, Any] = {"image": datasets.Image()}
    if label is not None:
        named = isinstance(label, datasets.Value) and label.dtype == "string"
        columns["label"] = [("dog", "ant", "cat")[n % 3] if named else n % 3 for n in numbers]
        features["label"] = label
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


NAMES = datasets.ClassLabel(names=["a", "b", "c"])


def test_a_single_part_can_be_named(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    rows(range(20), NAMES).to_parquet(tmp_path / "mine" / "x.parquet")
    named, every = open_source(f"hf:{tmp_path}?train=mine", "all"), open_source(f"hf:{tmp_path}", "all")
    assert samples(named) == samples(every)
    assert len(named) == 20


@pytest.mark.parametrize("kind", ["features", "struct", "bytes"])
def test_a_folder_of_parquet_files(tmp_path: Path, kind: str):
    """As repositories on the Hub have them, with and without the description of the features."""
    (tmp_path / "data").mkdir()
    for part, numbers in (("train-00000-of-00002", [0, 1]), ("train-00001-of-00002", [2]), ("validation-00000", [7])):
        path = tmp_path / "data" / f"{part}.parquet"
        if kind == "features":
            rows(numbers, NAMES).to_parquet(path)
        else:
            images: Any = [png(n) if kind == "bytes" else {"bytes": png(n), "path": f"{n}.png"} for n in numbers]
            pq.write_table(pa.table({"id": numbers, "image": images, "label": [n % 3 for n in numbers]}), path)
    train, heldout, both = (open_source(f"hf:{tmp_path}", split) for split in ("train", "heldout", "all"))
    assert samples(train) == [(0, 0), (1, 1), (2, 2)]
    assert samples(heldout) == [(7, 1)]
    assert samples(both) == samples(train) + samples(heldout)
    assert train.classes == heldout.classes == (("a", "b", "c") if kind == "features" else ("0", "1", "2"))
    assert samples(pickle.loads(pickle.dumps(both))) == samples(both)


def test_damaged_parquet_files_are_one_error(tmp_path: Path):
    rows([1]).to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    for damaged in (b"", b"<html>", content[:100], content[:-4] + b"xxxx"):
        (tmp_path / "train.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match="nor a folder of parquet files") as error:
            open_source(f"hf:{tmp_path}")
        assert "\n" not in str(error.value)


def test_labels_of_numbers_and_names(tmp_path: Path):
    rows(range(5), datasets.Value("int64")).save_to_disk(tmp_path / "numbers")
    source = open_source(f"hf:{tmp_path / 'numbers'}", "all")
    assert (source.classes, list(source.labels)) == (("0", "1", "2"), [0, 1, 2, 0, 1])
    rows(range(5), datasets.Value("string")).save_to_disk(tmp_path / "names")
    source = open_source(f"hf:{tmp_path / 'names'}", "all")
    assert (source.classes, list(source.labels)) == (("ant", "cat", "dog"), [2, 0, 1, 2, 0])
    table = datasets.Dataset.from_dict({"img": [png(3), png(4)], "cls": [None, -1], "id": [1, 2]})
    table.save_to_disk(tmp_path / "missing")
    assert samples(open_source(f"hf:{tmp_path / 'missing'}", "all")) == [(3, -1), (4, -1)]


def test_images_as_paths_and_other_columns(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "5.png").write_bytes(png(5))
    table = {"path": ["pictures/5.png", "nowhere.png"], "label": ["x", "y"], "text": ["a", "b"]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path)
    source = open_source(f"hf:{tmp_path}", "all")
    assert source[0][0].getpixel((0, 0)) == (5, 5, 5)
    with pytest.raises(UnreadableImage, match="row 1: no such file"):
        source[1]
    datasets.Dataset.from_dict({"one": [png(1)], "two": [png(2)]}).save_to_disk(tmp_path / "b")
    with pytest.raises(UserError, match="which column has the images, one or two\\? Rename it to `image`"):
        open_source(f"hf:{tmp_path / 'b'}")


def test_an_unnamed_label_column_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    datasets.Dataset.from_dict({"image": [png(1)], "species": [3]}).save_to_disk(tmp_path)
    assert open_source(f"hf:{tmp_path}", "all").classes == ()
    assert "none of the columns species is named label" in caplog.text


def test_a_shuffled_selection_keeps_images_and_labels_together(tmp_path: Path):
    rows(range(20), NAMES).shuffle(seed=0).select(range(12)).save_to_disk(tmp_path)
    found = samples(open_source(f"hf:{tmp_path}", "all"))
    assert len(found) == 12
    assert all(label == value % 3 for value, label in found)


def save(folder: Path, **parts: Any) -> str:
    datasets.DatasetDict(**parts).save_to_disk(folder)
    return f"hf:{folder}"


def test_classes_in_another_order_are_mapped_by_name(tmp_path: Path):
    uri = save(tmp_path, train=rows(range(3), NAMES), test=rows(range(3), datasets.ClassLabel(names=["c", "b", "a"])))
    train, heldout, both = (open_source(uri, split) for split in ("train", "heldout", "all"))
    assert train.classes == heldout.classes == both.classes == ("a", "b", "c")
    assert list(train.labels) == [0, 1, 2]
    assert list(heldout.labels) == [2, 1, 0]
    assert list(both.labels) == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (datasets.ClassLabel(names=["a", "b", "x"]), "the split heldout has classes .* lacks, such as 'x'"),
        (
            datasets.Value("int64"),
            "which number is which class\\? train.label is a ClassLabel, heldout.label is a number",
        ),
        (None, "the split heldout has no labels, but another split has the column label"),
    ],
)
def test_splits_whose_labels_do_not_fit_are_rejected(tmp_path: Path, label: Any, message: str):
    uri = save(tmp_path, train=rows(range(3), NAMES), test=rows(range(3), label))
    with pytest.raises(UserError, match=message):
        open_source(uri)


def test_names_of_held_out_images_only_are_rejected(tmp_path: Path):
    text = datasets.Value("string")
    assert len(open_source(save(tmp_path / "fewer", train=rows(range(3), text), test=rows([1], text)))) == 3
    with pytest.raises(UserError, match="held-out images have classes that no training image has: ant, cat"):
        open_source(save(tmp_path / "other", train=rows([0], text), test=rows(range(3), text)))


def test_the_address_names_other_splits(tmp_path: Path):
    uri = save(tmp_path, first=rows([1], NAMES), second=rows([2], NAMES))
    with pytest.raises(UserError, match="has no split 'train', only first, second; name the splits"):
        open_source(uri)
    assert samples(open_source(f"{uri}?train=second,heldout=first")) == [(2, 2)]
    assert samples(open_source(f"{uri}?train=second,heldout=first", "heldout")) == [(1, 1)]


def test_a_dataset_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    parts: Any = {"train": rows([1, 2], NAMES), "validation": rows([4], NAMES)}

    def load(*arguments: object, **named: object) -> datasets.DatasetDict:
        asked.append((*arguments, named["revision"]))
        return datasets.DatasetDict(**parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    uri = "hf:owner/name:small@v1.0"
    assert samples(open_source(uri)) == [(1, 1), (2, 2)]
    assert samples(open_source("hf:owner/name", "heldout")) == [(4, 1)]
    assert asked == [("owner/name", "small", "v1.0"), ("owner/name", None, None)]
    assert absolute(uri) == uri
    assert stamp(uri) == stamp(uri)


def test_a_dataset_that_the_hub_does_not_deliver_is_one_error(monkeypatch: pytest.MonkeyPatch):
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r"there is no folder owner/name, .* did not deliver .*ConnectionError: no network"
    ):
        open_source("hf:owner/name")
    with pytest.raises(UserError, match=r"OWNER/NAME\[:CONFIG\]"):
        open_source("hf:one/two/three")


def test_labels_of_an_npz_in_a_column_and_of_a_wrong_length(tmp_path: Path):
    images = np.zeros((4, 5, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images, np.array([[1], [0], [2], [1]]))
    assert list(open_source(f"npz:{tmp_path / 'a.npz'}", "all").labels) == [1, 0, 2, 1]
    for wrong, message in ((np.arange(3), "one label for each of 4"), (np.zeros(4), "numbers of classes")):
        np.savez(tmp_path / "b.npz", images, wrong)
        with pytest.raises(UserError, match=rf"arr_1 has .*{message}"):
            open_source(f"npz:{tmp_path / 'b.npz'}", "all")
