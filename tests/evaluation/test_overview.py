"""Near-duplicates of a dataset. tests/test_cli.py tests the rest of `raekit data`."""

from pathlib import Path

import pytest
import torch

from raekit.data.sources import open_source
from raekit.evaluation import overview
from raekit.evaluation.overview import look_at, near_duplicates


@pytest.mark.parametrize("tile", [3, 4096])
def test_near_duplicates_are_found_in_any_block(monkeypatch, tile):
    monkeypatch.setattr(overview, "TILE", tile)
    features = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    features[7] = features[1] + 0.01
    features[9] = features[8] = features[4]
    found = near_duplicates(features, [str(i) for i in range(10)])
    assert [(each.image, each.original) for each in found] == [("8", "4"), ("9", "4"), ("7", "1")]
    assert found[0].distance == 0 < found[2].distance < 0.02


def test_few_images_have_duplicates_only_if_they_are_equal():
    one, other = torch.zeros(1, 4), torch.ones(1, 4)
    assert near_duplicates(one, ["a"]) == []
    assert near_duplicates(torch.cat([one, other]), ["a", "b"]) == []
    assert len(near_duplicates(torch.cat([one, one, one]), ["a", "b", "c"])) == 2


def test_a_scaled_and_compressed_copy_is_a_duplicate(tmp_path: Path):
    source = open_source("emoji", "heldout")
    for number in range(0, 200, 10):
        source[number][0].save(tmp_path / f"{number:03}.png")
    source[50][0].resize((150, 150)).save(tmp_path / "copy.jpg", quality=90)
    found = look_at(f"flat:{tmp_path}", encoder="builtin:vit-tiny")
    assert [(Path(each.image).name, Path(each.original).name) for each in found.duplicates] == [("copy.jpg", "050.png")]
    assert look_at(f"flat:{tmp_path}").duplicates == []
