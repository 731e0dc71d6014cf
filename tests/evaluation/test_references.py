"""References: raekit's own files, the files of other projects, and files that were made to do harm."""

import io
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from raekit.data.loader import DataConfig, Loader
from raekit.data.sources import open_source
from raekit.data.transforms import center_crop
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation import references
from raekit.evaluation.frechet import frechet_distance
from raekit.evaluation.manifold import Manifold, PrecisionRecall
from raekit.evaluation.metrics import FrechetDistance
from raekit.evaluation.references import measure_reference, read_reference
from raekit.evaluation.streaming import images_of, score_stream

ALONE = World()


class Means:
    """Features: the downscaled image."""

    resize = "mean"

    def __init__(self, name: str = "inception", width: int = 12):
        self.name, self.width = name, width

    def __call__(self, images: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(images, (2, self.width // 6))
        return small.flatten(1)


NETWORKS = {"inception": Means(), "inception_spatial": Means("inception_spatial", 18)}


def data(images: str, split: Any = "all") -> DataConfig:
    return DataConfig(source=images, split=split, image_size=16)


def statistics(dim: int = 6) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(dim).normal(size=(50, dim))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def adm(path: Path, **others: Any) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    spatial = {f"{key}_s": value for key, value in statistics(7).items()}
    arrays = statistics() | spatial | {"arr_0": images} | others
    np.savez(path, allow_pickle=True, **{key: value for key, value in arrays.items() if value is not None})
    return path


# raekit's own files


def test_a_measured_reference_scores_as_the_images_themselves(images: str, tmp_path: Path):
    reports = []

    def report(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        reports.append((what, done, total))

    reference = measure_reference(data(images, "train"), NETWORKS, ALONE, keep=10, progress=report)
    assert reports[-1] == ("reference", 30, 30)
    rows = torch.stack([torch.from_numpy(crop(image)) for image in pictures(images)])
    features = NETWORKS["inception"](rows.permute(0, 3, 1, 2).float() / 255)
    expected = torch.cov(features.double().T)
    torch.testing.assert_close(reference.gaussian(NETWORKS["inception"]).covariance, expected)
    assert torch.equal(reference.features["inception"], features[::3])
    assert reference.features.keys() == {"inception"}

    reference.write(tmp_path / "r.safetensors")
    again = read_reference(tmp_path / "r.safetensors")
    about = again.about
    assert about == reference.about
    assert (about.source, about.split, about.image_size, about.count) == (images, "train", 16, 30)
    assert about.resize == {"inception": "mean", "inception_spatial": "mean"}
    assert len(about.hash) == 16
    other = measure_reference(data(images, "heldout"), NETWORKS, ALONE, keep=0)
    assert other.about.hash != about.hash
    assert not other.features
    for name, network in NETWORKS.items():
        mine, theirs = other.gaussian(network), again.gaussian(network)
        assert frechet_distance(mine, theirs) == frechet_distance(mine, reference.gaussians[name])
        assert theirs.count == 30
    assert torch.equal(again.features["inception"], reference.features["inception"])


def pictures(images: str):
    source = open_source(images, "train")
    return [source[i][0] for i in range(len(source))]


def crop(image) -> np.ndarray:
    return np.asarray(center_crop(image, 16)).copy()


def measured(world: World, images: str) -> tuple[str, list[float]]:
    reference = measure_reference(data(images), NETWORKS, world, keep=7)
    return reference.about.source or "", [
        *reference.gaussians["inception"].covariance.flatten().tolist(),
        *reference.features["inception"].flatten().tolist(),
    ]


def test_processes_measure_the_same(images: str, run_ranks):
    one = measured(ALONE, images)
    for found in run_ranks(measured, 2, images):
        assert found[0] == one[0]
        assert found[1] == pytest.approx(one[1], rel=1e-9, abs=1e-15)


def test_every_metric_accepts_a_reference_from_a_file(images: str, tmp_path: Path):
    measure_reference(data(images), NETWORKS, ALONE).write(tmp_path / "r.safetensors")
    reference, network = read_reference(tmp_path / "r.safetensors"), NETWORKS["inception"]
    metrics = [
        FrechetDistance(network, reference.gaussian(network)),
        PrecisionRecall(network, Manifold(reference.features[network.name])),
    ]
    result = score_stream(images_of(Loader(data(images), 0).once(8, ALONE), ALONE), metrics, ALONE)
    assert result == {"fid": pytest.approx(0, abs=1e-12), "precision": 1, "recall": 1}


def test_a_changed_file_is_rejected(images: str, tmp_path: Path):
    path = tmp_path / "r.safetensors"
    measure_reference(data(images), NETWORKS, ALONE).write(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()[references._METADATA]
    wrong = tensors["inception.mean"] + 1e-9
    cases: list[tuple[str, dict[str, Tensor], str]] = [
        (header, {"inception.mean": wrong}, "its numbers do not have the hash"),
        (header, {"extra": wrong}, "damaged: it holds extra"),
        (header, {"other.features": wrong}, "damaged: it holds"),
        (header, {"inception.mean": torch.zeros(12, dtype=torch.int64)}, "damaged: it holds"),
        (header, {"inception.mean": wrong[:5]}, r"the mean has shape \(5,\)"),
        (header, {"inception.features": wrong}, "damaged: features and statistics have different dimensions"),
        ("{}", {}, "about: Field required"),
        ("no json", {}, "its header lacks"),
        (header.replace('"count"', '"counted"'), {}, "counted"),
        (header.replace('"inception": 39', '"inception": "many"'), {}, "counts.inception"),
    ]
    for text, others, message in cases:
        save_file(tensors | others, path, {references._METADATA: text})
        with pytest.raises(UserError, match=message):
            read_reference(path)
    save_file(tensors, path)
    with pytest.raises(UserError, match="its header lacks"):
        read_reference(path)


# Files of other projects


def test_adms_file_has_statistics_of_fid_and_sfid_and_images(tmp_path: Path):
    reference = read_reference(adm(tmp_path / "VIRTUAL_imagenet16_labeled.npz"))
    assert reference.about.image_size == 16
    assert (reference.about.source, reference.about.count) == (None, None)
    for name, dim in ("inception", 6), ("inception_spatial", 7):
        expected = statistics(dim)
        gaussian = reference.gaussian(Means(name, dim))
        assert np.array_equal(gaussian.mean.numpy(), expected["mu"])
        assert np.array_equal(gaussian.covariance.numpy(), expected["sigma"])
    assert reference.images == f"npz:{tmp_path}/VIRTUAL_imagenet16_labeled.npz"
    assert len(open_source(f"npz:{tmp_path}/VIRTUAL_imagenet16_labeled.npz", "all")) == 9
    assert not reference.features


@pytest.mark.parametrize(
    ("name", "network", "found"),
    [
        ("imagenet.npz", None, "inception"),
        ("ffhq_clean_trainval70k_1024.npz", None, "clean_inception"),
        ("ffhq_clean_trainval70k_1024.npz", "inception", "inception"),
        ("dinov2.npz", "dinov2_l", "dinov2_l"),
    ],
)
def test_bare_statistics_belong_to_the_named_network(tmp_path: Path, name: str, network: str | None, found: str):
    np.savez_compressed(tmp_path / name, allow_pickle=False, **statistics())
    reference = read_reference(tmp_path / name, network)
    assert list(reference.gaussians) == [found]
    assert reference.images is None


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_torch_fidelitys_file_is_read_without_running_code(
    tmp_path: Path, core: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "images-inception-v3-compat-stat-fid-2048.pt"
    torch.save(statistics(), path)
    with zipfile.ZipFile(path) as archive:  # numpy 1 and 2 use different names for a function
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(b"numpy._core", core.encode()))
    gaussian = read_reference(path).gaussian(Means(width=6))
    assert np.array_equal(gaussian.covariance.numpy(), statistics()["sigma"])
    for bad in {"mu": Code(), "sigma": statistics()["sigma"]}, {"mu": np.array([Code()]), "sigma": Code()}:
        torch.save(bad, path)
        with pytest.raises(UserError, match=r"fid-2048\.pt: (rejected|damaged)"):
            read_reference(path)
    for bad in {"mu": 3}, [1], {"mean": statistics()["mu"]}:
        torch.save(bad, path)
        with pytest.raises(UserError, match=r"fid-2048\.pt: (.*holds|not a state dict)"):
            read_reference(path)
    assert "code was run" not in capsys.readouterr().out


class Code:
    def __reduce__(self):
        return (print, ("code was run",))


# Files made to do harm, or by mistake


def spoiled(key: str, index: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    array = statistics()[key].copy()
    array[index] = value
    return {key: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": None}, r"sigma is missing, it holds mu, .*; measure its images: raekit reference npz:"),
        ({"sigma": None, "arr_0": None}, r"sigma is missing, it holds mu, mu_s, sigma_s$"),
        ({"sigma_s": None}, "sigma_s is missing"),
        ({"mu": np.zeros(5)}, r"the mean has shape \(5,\), the covariance \(6, 6\)"),
        ({"sigma": np.zeros((6, 5))}, r"the covariance \(6, 5\)"),
        ({"sigma": np.zeros((6, 6, 1))}, r"sigma is float64 \(6, 6, 1\)"),
        ({"sigma": np.float64(3)}, r"sigma is float64 \(\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"the mean has shape \(0,\)"),
        ({"mu": np.arange(6)}, r"mu is int64 \(6,\)"),
        ({"mu": np.array(["a"] * 6)}, r"mu is <U1"),
        ({"mu": np.zeros(20_000)}, r"mu is float64 \(20000,\)"),
        ({"mu": np.array([Code()] * 6)}, "mu holds Python objects"),
        ({"arr_0": np.array([Code()] * 6)}, "arr_0 holds Python objects"),
        (spoiled("mu", (2,), np.nan), "not finite"),
        (spoiled("sigma", (2, 2), np.inf), "not finite"),
        (spoiled("sigma", (2, 3), 0.7), "the covariance is not symmetric"),
        (spoiled("sigma", (4, 4), -0.7), "has a negative variance"),
    ],
)
def test_invalid_npz_files_are_rejected(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
):
    path = adm(tmp_path / "x.npz", **change)
    with pytest.raises(UserError, match=rf"^{path}: .*{message}"):
        read_reference(path)
    assert "code was run" not in capsys.readouterr().out


def test_a_covariance_that_would_fill_the_memory_is_rejected_without_reading_it(tmp_path: Path):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})
    path = adm(tmp_path / "x.npz", sigma=None)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sigma.npy", file.getvalue())
    with pytest.raises(UserError, match="sigma is damaged: its size does not fit shape"):
        read_reference(path)


@pytest.mark.parametrize("name", ["x.npz", "x.pt", "x.safetensors", "x.txt"])
def test_files_that_are_not_references_are_rejected(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"{name}: no such file"):
        read_reference(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=rf"{name}: (damaged|rejected|not a reference)"):
        read_reference(tmp_path / name)


# References of the wrong kind


def test_a_reference_knows_its_images_again(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither another working folder nor another image of the same name passes for them."""
    for folder in "here", "there":
        shutil.copytree(images.removeprefix("folder:"), tmp_path / folder / "im")
    first, second, *_ = sorted((tmp_path / "there" / "im").rglob("*.png"))
    first.write_bytes(second.read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    reference = measure_reference(data("flat:im"), NETWORKS, ALONE)
    reference.check_originals("flat:im", "all", 39)
    monkeypatch.chdir(tmp_path / "there")
    assert reference.about.source == f"flat:{tmp_path / 'here' / 'im'}"
    with pytest.raises(UserError, match=r"here/im \(all\), and the originals are flat:.*there/im \(all\)"):
        reference.check_originals("flat:im", "all", 39)
    shutil.copytree(tmp_path / "here", tmp_path / "moved")
    reference.check_originals(f"flat:{tmp_path / 'moved' / 'im'}", "all", 39)  # the same files at another place
    first, second, *_ = sorted((tmp_path / "here" / "im").rglob("*.png"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"have changed since it was measured on 39 images.*run raekit reference"):
        reference.check_originals(str(reference.about.source), "all", 39)
    first.unlink()
    with pytest.raises(UserError, match="have changed since it was measured on 39 images, and 38 are there now"):
        reference.check_originals(str(reference.about.source), "all", 38)


def test_unreadable_originals_are_named_as_the_reason(images: str, tmp_path: Path):
    shutil.copytree(images.removeprefix("folder:"), tmp_path / "im")
    next((tmp_path / "im").rglob("*.png")).write_bytes(b"damaged")
    source = f"flat:{tmp_path / 'im'}"
    reference = measure_reference(replace(data(source), max_unreadable=0.1), NETWORKS, ALONE)
    with pytest.raises(UserError, match=r"1 of the 39 images of .* could not be read when it was measured"):
        reference.check_originals(source, "all", 39)


def test_a_reference_of_the_wrong_kind_is_rejected_with_the_reason(images: str, tmp_path: Path):
    reference = measure_reference(data(images, "heldout"), NETWORKS, ALONE)
    theirs = read_reference(adm(tmp_path / "x.npz"))
    with pytest.raises(UserError, match="has statistics of inception, inception_spatial, and not of vit_tiny"):
        reference.gaussian(Means("vit_tiny"))
    with pytest.raises(UserError, match="inception have 12 dimensions, but the features of this network have 6"):
        reference.gaussian(Means(width=6))
    for each in reference, theirs:
        each.check_size(16)
        with pytest.raises(UserError, match="was measured on images of 16 pixels, and these images have 256"):
            each.check_size(256)
    reference.check_originals(images, "heldout", 9)
    with pytest.raises(UserError, match=r"own originals; run raekit reference folder:.* --split train"):
        reference.check_originals(images, "train", 30)
    with pytest.raises(UserError, match=r"images that it does not name.*a reference for generated images"):
        theirs.check_originals(images, "heldout", 9)
    np.savez(tmp_path / "plain.npz", allow_pickle=False, **statistics())
    read_reference(tmp_path / "plain.npz").check_size(256)  # the file does not record its image size
    with pytest.raises(UserError, match="at least one network"):
        measure_reference(data(images), {}, ALONE)
