import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from raekit.errors import UserError
from raekit.experiments.studies import shift_encoder
from raekit.experiments.studies.engine import execution
from raekit.experiments.studies.engine.plan import Verdict
from raekit.progress import silent


def write_idx(folder: Path, images: int = 60) -> None:
    """Write random images of 28 x 28 pixels as the four files of Fashion-MNIST."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = generator.integers(0, 256, (images, 28, 28), np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, *pixels.shape) + bytes(pixels)
        )
        labels = bytes(i % 10 for i in range(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, images) + labels)


def test_a_trial_of_the_study_runs_on_images_in_its_folder(tmp_path: Path):
    write_idx(tmp_path / shift_encoder.FASHION)
    shift_encoder.prepare(tmp_path, True, "cpu", silent)
    images = np.load(tmp_path / "images" / "train.npz")["arr_0"]
    assert images.shape == (60, 32, 32, 3)
    assert not images[:, :2].any()  # the margin
    runs = [run for run in shift_encoder.plan(tmp_path, True) if run.settings["seed"] == 0]
    for run in runs:
        execution.finish(shift_encoder, run, tmp_path, "cpu", silent, run.name)
    results = [execution.result(run, tmp_path) for run in runs]
    growth, gain = shift_encoder.judge(results, tmp_path)
    assert all(result.values["distance"] > result.values["real"]["distance"] > 0 for result in results)
    assert f"Distance of held-out images {results[0].values['real']['distance']:.2g} for m = 768" in growth.found
    assert growth.verdict == gain.verdict == Verdict.UNDECIDED  # one shift decides nothing


def test_without_images_the_study_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shift_encoder, "DEBIAN", tmp_path / "absent")
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        shift_encoder.prepare(tmp_path, True, "cpu", silent)


def test_a_description_sees_the_content_and_the_fine_structure():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(400, 6, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    real, other = (shift_encoder.describe(half) for half in smooth.split(200))
    same = shift_encoder.distances(other, real)
    moved = shift_encoder.distances(shift_encoder.describe(smooth[200:] + 1), real)
    noisy = smooth[200:] + 0.5 * torch.randn(200, 6, 8, 8, generator=generator)
    rough = shift_encoder.distances(shift_encoder.describe(noisy), real)
    assert moved["content"] > 3 * same["content"]
    assert rough["structure"] > 3 * same["structure"]
    assert rough["content"] < 2 * same["content"]  # the noise has nearly no mean
    assert shift_encoder.distances(real, real)["distance"] == pytest.approx(0, abs=1e-6)
