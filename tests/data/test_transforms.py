import io
import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from raekit.data.transforms import center_crop, center_window, pad, random_window, to_rgb


def noise(width, height, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def pixel(image):
    return np.asarray(to_rgb(image))[0, 0].tolist()


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def halved(pixels):
    """Halve an image of even sides by a box filter. Like Pillow, round half up."""
    height, width, channels = pixels.shape
    blocks = pixels.reshape(height // 2, 2, width // 2, 2, channels).astype(int)
    return (blocks.sum((1, 3)) + 2) // 4


@pytest.mark.parametrize(
    "size", [(64, 64), (33, 47), (32, 37), (37, 32), (101, 67), (257, 131), (40, 300), (20, 31), (31, 20)]
)
def test_center_crop_matches_adm(size):
    image, target = noise(*size), 32
    # Closed forms of the loop in ADM: the number of halvings, the side lengths, and the corner of the crop.
    short = min(size)
    halvings = max(0, math.floor(math.log2(short / target)))
    expected = image
    for k in range(1, halvings + 1):
        expected = expected.resize((size[0] >> k, size[1] >> k), Image.Resampling.BOX)
    sides = [round(side * (target / min(expected.size))) for side in expected.size]
    pixels = np.asarray(expected.resize((sides[0], sides[1]), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - target) // 2, (pixels.shape[1] - target) // 2
    result = center_crop(image, target)
    assert result.size == (target, target)
    np.testing.assert_array_equal(np.asarray(result), pixels[top : top + target, left : left + target])


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (101, 67), (257, 131), (40, 300), (20, 31)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_fast_pixels_are_within_a_level_of_the_exact_ones(size, crop):
    # The two libraries clip overshoots after different passes, so the pixels stay away from black and white.
    image = noise(*size).point([64 + level // 2 for level in range(256)] * 3)
    window = center_window(image, 32) if crop == "center" else random_window(image, 32, np.random.default_rng(1))
    exact, fast = np.asarray(window.exact()).astype(int).transpose(2, 0, 1), window.fast()
    assert fast.shape == exact.shape == (3, 32, 32)
    assert np.abs(fast - exact).max() <= 1
    assert np.mean(fast != exact) < (0.5 if window.image.size != window.sides else 1e-9)


def test_an_rgb_image_is_not_copied():
    image = noise(6, 5)
    assert to_rgb(image) is image


def test_center_crop_halves_by_a_box_filter():
    image = noise(32, 40)
    expected = halved(np.asarray(image))[2:18]
    assert np.abs(np.asarray(center_crop(image, 16)).astype(int) - expected).max() <= 1  # Pillow rounds after each pass


def test_pad_keeps_the_whole_image_in_the_middle_of_white():
    image = noise(64, 20)
    result = np.asarray(pad(image, 32))
    assert result.shape == (32, 32, 3)
    assert (result[:11] == 255).all()
    assert (result[21:] == 255).all()
    assert np.abs(result[11:21].astype(int) - halved(np.asarray(image))).max() <= 1
    turned = np.asarray(pad(image.transpose(Image.Transpose.TRANSPOSE), 32)).swapaxes(0, 1)
    assert np.abs(turned.astype(int) - result).max() <= 1  # exactly equal with Pillow 13, not with 12
    assert pad(noise(24, 24), 24).tobytes() == noise(24, 24).tobytes()
    assert pixel(pad(Image.new("RGB", (1, 1), (1, 2, 3)), 8)) == [1, 2, 3]


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_strip_is_cut_before_it_is_scaled(size, monkeypatch):
    scaled = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *a: scaled.append(a[0]) or resize(image, *a))
    strip = Image.new("RGB", size)
    for image in (center_crop(strip, 64), random_window(strip, 64, np.random.default_rng(0)).exact(), pad(strip, 64)):
        assert image.size == (64, 64)
    assert max(width * height for width, height in scaled) < 10**6


def test_center_crop_leaves_a_square_of_the_right_size_alone():
    image = noise(24, 24)
    assert center_crop(image, 24).tobytes() == image.tobytes()


def test_random_crop_is_a_window_of_the_scaled_image_and_reaches_every_place():
    image, size = noise(50, 37), 8
    scaled = np.asarray(image.resize((50 * 12 // 37, 12), Image.Resampling.BICUBIC))
    windows = {
        scaled[top : top + size, left : left + size].tobytes(): (left, top)
        for top in range(scaled.shape[0] - size + 1)
        for left in range(scaled.shape[1] - size + 1)
    }
    generator = np.random.default_rng(0)
    found = {windows[random_window(image, size, generator).exact().tobytes()] for _ in range(1000)}
    assert found == set(windows.values())


def test_random_crop_rounds_the_long_side_down_as_torchvision_does():
    sides = [random_window(noise(*size), 16, np.random.default_rng(0)).sides for size in ((148, 100), (100, 148))]
    assert sides == [(35, 24), (24, 35)]  # 148 * 24 / 100 is 35.52


def test_random_crop_follows_its_generator():
    crops = [random_window(noise(50, 37), 16, np.random.default_rng(5)).exact().tobytes() for _ in range(2)]
    assert crops[0] == crops[1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(orientation):
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = saved(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(turned)
    assert expected.size == ((6, 4) if orientation < 5 else (4, 6))
    np.testing.assert_array_equal(np.asarray(to_rgb(turned)), np.asarray(expected))


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (2, 2), (255, 0, 0, 128)),
        saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "WEBP", lossless=True),
    ],
)
def test_alpha_is_put_on_white(image):
    assert pixel(image) == pytest.approx([255, 127, 127], abs=1)


def test_transparency_of_grey_palette_and_rgb_is_white():
    assert pixel(Image.new("LA", (2, 2), (10, 0))) == [255, 255, 255]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert pixel(palette) == [9, 9, 9]
    assert pixel(saved(palette, "PNG", transparency=1)) == [255, 255, 255]
    assert pixel(saved(palette, "PNG", transparency=bytes([255, 0]))) == [255, 255, 255]
    assert pixel(saved(palette, "GIF", transparency=1)) == [255, 255, 255]
    assert pixel(saved(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == [255, 255, 255]
    assert pixel(saved(Image.new("L", (2, 2), 7), "PNG", transparency=7)) == [255, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8(kind):
    values = np.array([[0, 128, 129, 32896, 65406, 65407, 65535]], np.uint16)
    image = saved(Image.fromarray(values), kind)
    assert image.mode.startswith("I")
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 1], [0, 0, 1, 128, 254, 255, 255])


def test_a_transparent_level_of_16_bit_grey_is_white_and_its_neighbours_are_not():
    image = Image.fromarray(np.array([[5140, 5141]], np.uint16))
    image.info["transparency"] = 5140
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [255, 20]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (2, 2), 77), [77, 77, 77]),
        (Image.new("1", (2, 2), 1), [255, 255, 255]),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), [255, 0, 0]),
        (saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), [255, 0, 0]),
    ],
)
def test_other_modes_become_rgb(image, expected):
    assert to_rgb(image).mode == "RGB"
    assert pixel(image) == pytest.approx(expected, abs=2)


def test_an_animation_gives_its_first_frame():
    first, second = Image.new("RGB", (4, 4), (0, 0, 255)), Image.new("RGB", (4, 4), (0, 255, 0))
    assert pixel(saved(first, "GIF", save_all=True, append_images=[second])) == [0, 0, 255]


@pytest.mark.parametrize(
    "image", [Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 70000), Image.new("I", (2, 2), -1)]
)
def test_pixels_without_a_known_range_are_rejected(image):
    with pytest.raises(ValueError, match="no known range"):
        to_rgb(image)
