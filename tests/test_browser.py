"""The page of `raekit app`, used in a real browser, and the files of a hosted demo."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import raekit
from raekit.inference.pipeline import Pipeline

pytestmark = pytest.mark.browser
SECONDS = 120_000  # in milliseconds; for slow machines


@pytest.fixture(scope="module")
def pipe(tiny_model) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model)


@contextmanager
def served(model: object) -> Iterator[str]:
    """Serve the page of a model, and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "raekit", "app", str(model), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        line = next(line for line in process.stdout if line.startswith("page: "))
        try:
            yield line.split()[1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def address(tiny_model) -> Iterator[str]:
    """Serve the page of the small model, and return its address."""
    with served(tiny_model) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address) -> Iterator[Any]:
    page = opened(browser, address)
    yield page
    page.close()


def opened(browser: Any, address: str) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(SECONDS)
    page.goto(address)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    return page


def press(page: Any, tab: str, button: str) -> None:
    page.get_by_role("tab", name=tab).click()
    page.get_by_role("button", name=button, exact=True).click()


def shown(page: Any, place: str) -> list[np.ndarray]:
    """Return the pixels of the images in an element of the page."""
    images = []
    for image in page.locator(f"{place} img").all():
        content = page.request.get(image.get_attribute("src")).body()
        with Image.open(io.BytesIO(content)) as opened:
            images.append(np.asarray(opened.convert("RGB")).astype(int))
    return images


def close(page: Any, place: str, wanted: list[Image.Image]) -> bool:
    found = shown(page, place)
    pairs = zip(found, wanted, strict=True)
    return all(np.abs(image - np.asarray(other).astype(int)).max() <= 2 for image, other in pairs)


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).locator("visible=true").first.click()
    page.get_by_role("option", name=option, exact=True).locator("visible=true").first.click()


def test_images_are_generated_with_their_classes_and_seeds(page, pipe):
    choose(page, "Class", "red")
    page.get_by_label("Seed", exact=True).locator("visible=true").fill("5")
    press(page, "Generate", "Generate")
    page.get_by_text(re.compile(r"4 images in [\d.]+ s")).wait_for()
    assert close(page, "#generated", list(pipe(classes="red", count=4, seed=5, guidance=3.0)))
    assert page.get_by_text("red, seed 8").count() == 1


def test_a_model_with_a_base_output_has_internal_guidance(browser, page):
    assert page.get_by_label("number input for Internal guidance").locator("visible=true").count() == 0
    with served("builtin:emoji") as address:
        own = opened(browser, address)
        assert own.get_by_label("number input for Internal guidance").locator("visible=true").count() == 1
        choose(own, "Class", "flags")
        own.get_by_text("Solver", exact=True).locator("visible=true").first.click()
        own.get_by_label("number input for Steps").locator("visible=true").fill("4")
        own.keyboard.press("Tab")
        own.get_by_role("button", name="Generate", exact=True).click()
        own.get_by_text(re.compile("4 images in")).wait_for()
        made = Pipeline.from_pretrained("builtin:emoji")("flags", count=4, guidance="cfg:2+internal:1.5", steps=4)
        assert close(own, "#generated", list(made))
        own.close()


def test_a_row_is_interpolated(page, pipe):
    press(page, "Interpolate", "Interpolate")
    page.get_by_text(re.compile("8 images in")).wait_for()
    assert close(page, "#row", list(pipe.interpolate((0, 1), "blue", frames=8, guidance=3.0)))


def test_an_empty_field_is_one_clear_message(page):
    page.get_by_role("tab", name="Interpolate").click()
    page.get_by_label("First seed").locator("visible=true").fill("")
    press(page, "Interpolate", "Interpolate")
    page.get_by_text("seed: None must be a whole number").wait_for()
    page.get_by_label("First seed").locator("visible=true").fill("0")


def test_a_slider_shows_how_an_image_forms(page, pipe):
    page.get_by_role("tab", name="Trajectory").click()
    choose(page, "Class", "green")
    press(page, "Trajectory", "Show")
    page.get_by_text(re.compile("16 images in")).wait_for()
    frames = list(pipe.trajectory("green", frames=16, guidance=3.0))

    def large(image: Image.Image) -> Image.Image:
        return image.resize((256, 256), Image.Resampling.NEAREST)

    assert close(page, "#frame", [large(frames[-1])])
    slider = page.get_by_role("slider", name=re.compile("From noise to image")).locator("visible=true")
    slider.focus()
    slider.press("Home")
    deadline = time.monotonic() + 60
    while not close(page, "#frame", [large(frames[0])]) and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    assert close(page, "#frame", [large(frames[0])])


def test_an_uploaded_image_is_reconstructed_and_varied(page, pipe, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    page.get_by_role("tab", name="Reconstruct").click()
    page.locator("#original input[type=file]").set_input_files(tmp_path / "picture.png")
    page.locator("#original img").wait_for()
    press(page, "Reconstruct", "Reconstruct")
    page.get_by_text(re.compile(r"PSNR [\d.]+ dB, SSIM [\d.-]+")).wait_for()
    large = pipe.reconstruct(picture)[0].resize((256, 256), Image.Resampling.NEAREST)
    assert close(page, "#reconstruction", [large])
    page.get_by_role("tab", name="Variations").click()
    page.locator("#varied input[type=file]").set_input_files(tmp_path / "picture.png")
    page.locator("#varied img").wait_for()
    press(page, "Variations", "Vary")
    page.get_by_text(re.compile("4 images in")).wait_for()
    assert close(page, "#variations", list(pipe.variations(picture, 0.3)))


def test_a_bad_upload_is_one_clear_message(page, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"no picture")
    page.get_by_role("tab", name="Reconstruct").click()
    press(page, "Reconstruct", "Reconstruct")
    page.get_by_text("no image is given; upload one").wait_for()
    page.locator("#original input[type=file]").set_input_files(tmp_path / "picture.png")
    page.get_by_role("button", name=re.compile("Remove|Clear")).locator("visible=true").first.wait_for()
    press(page, "Reconstruct", "Reconstruct")
    page.get_by_text("picture.png: not a readable image (not a known image format)").wait_for()


def test_a_request_is_stopped(browser):
    with served("builtin:emoji") as address:  # the small model may finish before its first preview
        page = opened(browser, address)
        page.get_by_text("Solver").locator("visible=true").first.click()
        page.get_by_role("spinbutton", name=re.compile("Steps")).locator("visible=true").fill("250")
        page.get_by_role("spinbutton", name=re.compile("Images")).locator("visible=true").fill("16")
        press(page, "Generate", "Generate")
        page.get_by_text(re.compile(r"step \d+ of 250")).wait_for()
        page.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()
        page.wait_for_timeout(2000)
        before = page.get_by_text(re.compile(r"step \d+ of 250")).inner_text()
        page.wait_for_timeout(3000)
        assert page.get_by_text(re.compile(r"step \d+ of 250")).inner_text() == before
        assert page.get_by_text("16 images in").count() == 0


def test_visitors_get_their_own_images(browser, address, pipe):
    pages = [opened(browser, address) for _ in range(3)]
    for number, page in enumerate(pages):
        page.get_by_label("Seed", exact=True).locator("visible=true").fill(str(100 * number))
        choose(page, "Class", pipe.classes[number])
        press(page, "Generate", "Generate")
    for number, page in enumerate(pages):
        page.get_by_text(re.compile("4 images in")).wait_for()
        wanted = pipe(classes=pipe.classes[number], count=4, seed=100 * number, guidance=3.0)
        assert close(page, "#generated", list(wanted))
        page.close()


def test_the_page_fits_a_phone(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    page.set_default_timeout(SECONDS)
    press(page, "Generate", "Generate")
    page.get_by_text(re.compile("4 images in")).wait_for()
    images = [image.bounding_box() for image in page.locator("#generated img").all()]
    assert len(images) == 4
    assert all(box and box["width"] > 100 and box["x"] + box["width"] <= 390 for box in images)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_the_files_of_a_hosted_demo(tiny_model, tmp_path):
    def run(model: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "raekit", "app", str(model), "--space", "someone/demo"]
        place = {"PYTHONPATH": str(Path(raekit.__file__).parents[1])}  # the given one may be relative
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | place)

    assert "hf upload someone/demo demo" in run("builtin:emoji").stdout
    code = (tmp_path / "demo" / "app.py").read_text()
    compile(code, "app.py", "exec")
    assert "Pipeline.from_pretrained('builtin:emoji')" in code
    assert 'sdk: "gradio"' in (tmp_path / "demo" / "README.md").read_text()
    assert "is not empty" in run("builtin:emoji").stderr
    assert "publish it first" in run(Path(tiny_model)).stderr
