"""Sizes of pictures are checked before the work that fills them."""

from pathlib import Path

import pytest
from PIL import Image

from raekit.errors import UserError
from raekit.pictures import check_grid, save_grid


@pytest.mark.parametrize(
    ("name", "count", "shape", "columns"),
    [
        ("row.webp", 250, (64, 64), 250),
        ("column.webp", 250, (64, 64), 1),
        ("one.webp", 1, (16_380, 64), None),
        ("classes.webp", 1000 * 16, (256, 256), 16),
        ("classes.png", 1000 * 16, (256, 256), 16),
    ],
)
def test_a_picture_that_cannot_be_written_is_rejected(
    name: str, count: int, shape: tuple[int, int], columns: int | None
):
    with pytest.raises(UserError, match=f"{name}: {count:,} images make a picture of .* pixels"):
        check_grid(Path(name), count, shape, columns)


def test_the_largest_webp_is_written(tmp_path: Path):
    path = tmp_path / "row.webp"
    check_grid(path, 1, (8, 16_379))
    save_grid([Image.new("RGB", (16_379, 8), "red")], path)
    with Image.open(path) as sheet:
        assert (sheet.format, sheet.size) == ("WEBP", (16_383, 12))
        assert sheet.getpixel((2, 2)) == (255, 0, 0)
    with pytest.raises(UserError, match=r"at most 16,383; give a .png file"):
        check_grid(path, 1, (8, 16_380))
    check_grid(path.with_suffix(".png"), 1, (8, 16_380))
