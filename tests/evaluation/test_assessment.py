"""Complete evaluations, from images to a report: stopped and resumed, on one and several processes."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from raekit.config import read_json
from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation import features, streams
from raekit.evaluation.against import Against, find_networks
from raekit.evaluation.assessment import assess
from raekit.evaluation.features import Images, InceptionFeatures, PairScore, load_networks
from raekit.evaluation.frechet import frechet_distance
from raekit.evaluation.metrics import FDR6, FrechetDistance
from raekit.evaluation.pairs import PairMean, psnr, ssim
from raekit.evaluation.references import About, Reference, measure_reference, read_reference
from raekit.evaluation.reports import Report, read_report
from raekit.evaluation.streaming import score_stream
from raekit.evaluation.streams import Reconstructions, Samples, StoredImages
from raekit.flow.guidance import parse_guidance
from raekit.flow.sampling import Sampling
from raekit.inference.generation import generate
from raekit.inference.model import load, reconstruct
from raekit.models.autoencoder import Autoencoder
from raekit.models.pooled import POOLED
from raekit.moments import Moments
from tests.models.test_pooled import save as save_pooled

ALONE = World()
SAMPLING = Sampling(steps=2)


class SmallInception(torch.nn.Module):
    """A stand-in for FID's network: 6 pooled features, 5 logits, 4 spatial features."""

    resize = "tf1"

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(12, 15, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1) @ cast(Tensor, self.weight)


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, width in ("POOL", 6), ("LOGITS", 5), ("SPATIAL", 4):
        monkeypatch.setattr(features, name, width)
    monkeypatch.setattr(InceptionFeatures, "width", 15)
    monkeypatch.setattr(features, "load_inception", lambda source, resize: SmallInception())


@pytest.fixture
def reference(images: str, tiny_model: Path, tmp_path: Path) -> Reference:
    return measured(images, [str(tiny_model)])


def measured(images: str, names: list[str], split: Any = "all", keep: int = 100) -> Reference:
    networks = {key: network for name in names for key, network in load_networks(name, ALONE.device).items()}
    data = DataConfig(source=images, split=split, image_size=16)
    return measure_reference(data, networks, ALONE, keep=keep)


def run(
    reference: Reference, tiny_model: Path, out: Path, *, count: int = 60, world: World = ALONE, **options: Any
) -> Report:
    """Return the report of samples of the tiny model."""
    assessed = {name: options.pop(name) for name in ("intervals", "progress") if name in options}
    networks = options.pop("networks", [str(tiny_model)])
    model = load(str(tiny_model), dtype=options.pop("dtype", torch.float32))
    stream = Samples(model, count, options.pop("sampling", SAMPLING), **options)
    return assess(stream, against([reference], networks), {"model": "tiny"}, out, world=world, **assessed)[0]


def against(references: Sequence[Reference], names: Sequence[str], baselines: Sequence[Reference] = ()) -> Against:
    return Against(references, find_networks(references, names, ALONE.device), ALONE.device, baselines)


def name_of(tiny_model: Path) -> str:
    return next(iter(load_networks(str(tiny_model), ALONE.device)))


def test_a_report_has_the_scores_of_the_samples_and_all_settings_that_affect_them(reference, tiny_model, tmp_path):
    report = run(reference, tiny_model, tmp_path / "out", seed=3)
    name = name_of(tiny_model)
    assert list(report.results) == [f"fd_{name}", f"precision_{name}", f"recall_{name}"]
    labels = Samples(load(str(tiny_model)), 60, SAMPLING, seed=3).labels
    stream = (
        Images(batch.images, batch.labels, batch.indices)
        for batch in generate(load(str(tiny_model)), labels, seed=3, sampling=SAMPLING)
    )
    network = load_networks(str(tiny_model), ALONE.device)[name]
    plain = score_stream(stream, [FrechetDistance(network, reference.gaussian(network))], ALONE)
    assert report.results[f"fd_{name}"] == pytest.approx(plain[f"fd_{name}"], rel=1e-9)
    settings = report.settings
    assert (settings["count"], settings["seed"], settings["labels"]) == (60, 3, "balanced")
    assert settings["sampling"]["steps"] == 2
    assert settings["references"][0]["hash"] == reference.about.hash
    assert {"autoencoder", "denoiser"} == settings["weights"].keys()
    assert {"torch", "raekit", "device", "processes"} <= report.environment.keys()
    assert any("early estimate" in note and "60 images" in note for note in report.notes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "report.html",
        "report.json",
        "report.md",
        "samples.png",
    ]
    assert read_report(tmp_path / "out") == report


def test_each_setting_changes_the_hash_and_the_images_and_equal_settings_give_equal_digits(
    reference, tiny_model, tmp_path
):
    first = run(reference, tiny_model, tmp_path / "0")
    again = run(reference, tiny_model, tmp_path / "1")
    assert again == first
    others = [
        {"seed": 1},
        {"labels": "random"},
        {"count": 61},
        {"sampling": replace(SAMPLING, steps=3)},
        {"sampling": replace(SAMPLING, solver="heun")},
        {"sampling": replace(SAMPLING, guidance=parse_guidance("cfg:2.0"))},
        {"dtype": torch.bfloat16},
    ]
    reports = [run(reference, tiny_model, tmp_path / f"{i + 2}", **each) for i, each in enumerate(others)]
    assert len({report.hash for report in [first, *reports]}) == 1 + len(others)
    assert len({report.images for report in [first, *reports]}) == 1 + len(others)


def test_a_stopped_evaluation_resumes_and_gives_the_same_digits(reference, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK", 20)
    options: dict[str, Any] = {"count": 90, "batch_size": 7, "intervals": True}
    whole = run(reference, tiny_model, tmp_path / "whole", **options)
    made: list[int] = []
    original = streams.generate
    monkeypatch.setattr(
        streams, "generate", lambda *a, indices, **o: made.extend(indices) or original(*a, indices=indices, **o)
    )

    def stop(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        if done >= 54:
            raise KeyboardInterrupt

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(reference, tiny_model, out, progress=stop, **options)
    message = r"holds an unfinished evaluation with other settings:\n  seed: 0 -> 5\nRemove this folder, choose another"
    with pytest.raises(UserError, match=message):
        run(reference, tiny_model, out, **{**options, "seed": 5})
    assert [path.name for path in sorted((out / "features").iterdir())] == [
        "00000000.safetensors",
        "00000020.safetensors",
    ]
    made.clear()
    assert run(reference, tiny_model, out, **options) == whole
    assert made == list(range(40, 90))
    made.clear()
    assert run(reference, tiny_model, out, **options) == whole
    assert not made
    with pytest.raises(UserError, match=r"holds another evaluation with other settings:\n  seed: 0 -> 5\nChoose an"):
        run(reference, tiny_model, out, seed=5, **options)


def test_a_damaged_chunk_is_named(reference, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK", 20)

    def stop(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        if what == "scores":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(reference, tiny_model, tmp_path, progress=stop)
    path = tmp_path / "features" / "00000020.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"00000020\.safetensors: damaged; remove it and run the same command again"):
        run(reference, tiny_model, tmp_path)
    path.unlink()
    assert run(reference, tiny_model, tmp_path).results


def of_sizes(world: World, images: str, tiny_model: Path, out: Path) -> dict[int, dict[str, Any]]:
    streams.CHUNK = 50
    reference = measured(images, [str(tiny_model)])
    found = {}
    for size in (8, 50):
        place = out / str(size)
        report = run(reference, tiny_model, place, count=230, world=world, batch_size=size, intervals=True)
        found[size] = {"results": report.results, "images": report.images, "hash": report.hash}
    return found


def test_scores_depend_on_batches_by_rounding_and_not_on_processes(
    run_ranks, images, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(streams, "CHUNK", 50)
    alone = of_sizes(ALONE, images, tiny_model, tmp_path / "alone")
    for found in run_ranks(of_sizes, 2, images, tiny_model, tmp_path / "ranks"):
        assert found == alone  # to the last digit
    # On some processors the last digits of a product depend on the batch size, which can change a pixel by one level.
    assert alone[50]["results"] == pytest.approx(alone[8]["results"], rel=1e-3)


def test_saved_images_score_as_when_they_were_generated(reference, tiny_model, tmp_path, monkeypatch):
    report = run(reference, tiny_model, tmp_path / "model")
    labels = Samples(load(str(tiny_model)), 60, SAMPLING).labels
    batches = generate(load(str(tiny_model)), labels, sampling=SAMPLING)
    pixels = torch.cat([batch.images for batch in batches]).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", pixels)

    def saved() -> tuple[Report, Path]:
        stored = StoredImages(f"npz:{tmp_path / 'samples.npz'}")
        return assess(stored, against([reference], [str(tiny_model)]), {"model": "npz"})

    monkeypatch.chdir(tmp_path)
    found, out = saved()
    assert found.results == pytest.approx(report.results, rel=1e-9)
    assert found.images == report.images
    assert any("cannot say how they were made" in note for note in found.notes)
    assert saved()[1] == out
    np.savez(tmp_path / "samples.npz", 255 - pixels)  # other images at the same place need a new evaluation
    changed, other = saved()
    assert other != out
    assert changed.hash == found.hash
    assert changed.results != found.results


def reconstructions(images: str, tiny_model: Path, split: Any = "heldout", batch_size: int = 4) -> Reconstructions:
    model = Autoencoder.load(str(tiny_model))
    return Reconstructions(model, images, split, {"psnr": psnr, "ssim": ssim}, batch_size=batch_size)


def test_reconstructions_are_compared_with_their_originals(inception, images, tiny_model, tmp_path, monkeypatch):
    """The scores equal the scores of one pass. A stop and the batch size change nothing."""
    monkeypatch.setattr(streams, "CHUNK", 7)
    names = ["inception", str(tiny_model)]
    reference, name = measured(images, names, "train"), name_of(tiny_model)
    compared = against([reference], names)

    def scored(out: str, **options: Any) -> Report:
        stream = reconstructions(images, tiny_model, "train", options.pop("batch_size", 4))
        return assess(stream, compared, {"model": "x"}, tmp_path / out, **options)[0]

    report = scored("whole")
    assert list(report.results) == ["rfid", "rsfid", f"rfd_{name}", "psnr", "ssim"]
    assert report.settings["reconstructions"]
    assert "denoiser" not in report.settings["weights"]

    network, model = compared.networks[name], Autoencoder.load(str(tiny_model))
    loader = Loader(DataConfig(source=images, split="train", image_size=16), seed=0)
    originals = torch.cat([batch.pixels() for batch in loader.once(5, ALONE)])
    with torch.no_grad():
        indices = torch.arange(len(originals))
        whole = Images(reconstruct(model, originals), torch.zeros_like(indices), indices, originals)
    distance = FrechetDistance(network, reference.gaussian(network))
    plain = score_stream([whole], [distance, PairMean(PairScore("psnr", psnr))], ALONE)
    assert report.results[f"rfd_{name}"] == pytest.approx(plain[f"fd_{name}"], rel=1e-6)
    assert report.results["psnr"] == pytest.approx(plain["psnr"], rel=1e-6)

    def stop(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored("stopped", progress=stop)
    assert scored("stopped") == report
    assert scored("others", batch_size=3).results == pytest.approx(report.results, rel=1e-6)


def test_reconstructions_are_not_compared_with_other_images(images, tiny_model, tmp_path):
    for reference, reason in (
        (measured(images, [str(tiny_model)], "train"), "these images are compared with their own originals"),
        (replace(measured(images, [str(tiny_model)]), about=About()), "a reference for generated images"),
    ):
        with pytest.raises(UserError, match=reason):
            assess(reconstructions(images, tiny_model), against([reference], [str(tiny_model)]), {}, tmp_path / "x")
        assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="batch_size: 0"):
        reconstructions(images, tiny_model, batch_size=0)


def test_all_metrics_that_a_reference_allows(inception, images, tiny_model, tmp_path):
    """The metrics of Inception, the metrics of an encoder, and the ratios to held-out images."""
    names = ["inception", str(tiny_model)]
    train, heldout = (measured(images, names, split) for split in ("train", "heldout"))
    stream = Samples(load(str(tiny_model)), 60, SAMPLING)
    report, _ = assess(stream, against([train], names, [heldout]), {"model": "x"}, tmp_path, intervals=True)
    name = name_of(tiny_model)
    assert set(report.metrics) == {
        "fid",
        "sfid",
        f"fd_{name}",
        "fdr_fid",
        "fdr_sfid",
        f"fdr_{name}",
        "fdr_mean",
        "inception_score",
        "precision",
        "recall",
        f"precision_{name}",
        f"recall_{name}",
    }
    assert any("the last split has 60: the score" in note for note in report.notes)
    assert report.results["precision_low"] <= report.results["precision"] < report.results["precision_high"]
    assert report.results["fid_low"] < report.results["fid"] < report.results["fid_high"]
    assert report.settings["networks"].keys() == {"inception", "inception_spatial", "inception_logits", name}
    assert report.settings["relative_to"][0]["hash"] == heldout.about.hash


def test_fdr6_has_six_distances_six_ratios_and_their_mean(inception, images, tiny_model, tmp_path, monkeypatch):
    for name in POOLED:
        save_pooled(name, tmp_path / "networks" / name, monkeypatch)
    place = f"fdr6:{tmp_path / 'networks'}"
    measured(images, [place], "train", keep=0).write(tmp_path / "six.safetensors")
    six = read_reference(tmp_path / "six.safetensors")
    stream = Samples(load(str(tiny_model)), 60, SAMPLING)
    report, folder = assess(stream, against([six], [place]), {"model": "x"}, tmp_path / "out")
    results = report.results
    raw = {name: results["fid" if name == "inception" else f"fd_{name}"] for name in FDR6}
    ratios = {name: raw[name] / constant for name, constant in FDR6.items()}
    found = {name: results["fdr_fid" if name == "inception" else f"fdr_{name}"] for name in FDR6}
    assert found == pytest.approx(ratios)
    assert results["fdr6"] == pytest.approx(sum(ratios.values()) / 6)
    assert set(results) == {*(f"fd_{n}" for n in POOLED), *(f"fdr_{n}" for n in POOLED)} | {
        "fid",
        "fdr_fid",
        "fdr6",
        "inception_score",
    }
    assert any(note.startswith("fdr6 divides the distances by the published") for note in report.notes)
    assert "| fdr6 ↓ |" in (folder / "report.md").read_text("utf-8")
    # With FID and sFID, one Inception serves all.
    gaussians = {**six.gaussians, "inception_spatial": six.gaussians["inception"]}
    networks: Any = find_networks([replace(six, gaussians=gaussians)], ["inception", place], ALONE.device)
    assert networks["inception"].whole is networks["inception_spatial"].whole
    # A streamed distance is the distance of the features of all images at once.
    network = load_networks(place, ALONE.device)["clip_cls"]
    pixels = torch.cat([batch.images for batch in stream.batches([range(60)], ALONE)])
    whole = Moments(network.width)
    whole.update(network(pixels))
    assert raw["clip_cls"] == pytest.approx(frechet_distance(whole, six.gaussians["clip_cls"]), rel=1e-3)
    # Against other real images the ratios are to their distances, and the mean has another name.
    other = measured(images, [place], "heldout", keep=0)
    report, _ = assess(stream, against([six], [place], [other]), {"model": "x"}, tmp_path / "relative")
    assert "fdr6" not in report.results
    assert report.results["fdr_mean"] > 0


def test_a_network_of_other_weights_under_the_same_name_is_rejected(images, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / tiny_model.name)
    file = tmp_path / tiny_model.name / "encoder" / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    known = measured(images, [str(tiny_model)])
    known.write(tmp_path / "reference.safetensors")
    for reference in known, read_reference(tmp_path / "reference.safetensors"):
        against([reference], [str(tiny_model)])
        with pytest.raises(UserError, match="was measured with other weights"):
            against([reference], [str(tmp_path / tiny_model.name)])


def test_kid_comes_with_enough_images(inception, images):
    many = replace(measured(images, ["inception"]), features={"inception": torch.rand(1000, 6)})
    allowed = against([many], ["inception"])
    kinds = {count: [type(each).__name__ for each in allowed.accumulators(count)] for count in (3, 999, 1000)}
    assert kinds[999] == ["FrechetDistance", "FrechetDistance", "PrecisionRecall", "InceptionScore"]
    assert "PrecisionRecall" not in kinds[3]
    assert "KernelDistance" in kinds[1000]


def test_the_images_in_a_reference_file_are_measured(inception, images, tiny_model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", pixels)
    theirs = replace(measured(images, ["inception"], keep=0), images=f"npz:{tmp_path / 'adm.npz'}")
    report = run(theirs, tiny_model, tmp_path / "out", networks=[])
    network = load_networks("inception", ALONE.device)["inception"]
    real = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    ours = replace(theirs, images=None, features={"inception": real})
    expected = run(ours, tiny_model, tmp_path / "other", networks=[])
    assert "precision" in report.results
    assert report.results == expected.results


def refused(message: str, action: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=message):
        action()


def test_images_and_references_that_do_not_fit_are_rejected(reference, images, tiny_model, tmp_path):
    large = replace(reference, about=replace(reference.about, image_size=256))
    refused("images of 256 pixels, and these images have 16", lambda: run(large, tiny_model, tmp_path / "no"))
    assert not (tmp_path / "no").exists()
    refused("not a registered encoder; give the network", lambda: against([reference], []))
    refused("and not of vit_tiny", lambda: against([reference], ["builtin:vit-tiny"]))
    twice = [reference, replace(reference, place="other")]
    refused("and other are both of .*; give one", lambda: against(twice, [str(tiny_model)]))
    name = name_of(tiny_model)
    resized = replace(reference, about=replace(reference.about, resize={name: "nearest"}))
    refused("resized for .* by nearest, and these would be", lambda: against([resized], [str(tiny_model)]))
    nothing = replace(reference, place="b", gaussians={"x": reference.gaussians[name]})
    refused("b: has statistics of none of", lambda: against([reference], [str(tiny_model)], [nothing]))
    model = load(str(tiny_model))
    refused("count: 0 must be at least 1", lambda: Samples(model, 0, SAMPLING))
    weak = replace(SAMPLING, guidance=parse_guidance("auto:2.0"))
    refused("needs a weaker model", lambda: Samples(model, 5, weak))
    refused("has 0 labelled images", lambda: Samples(model, 5, SAMPLING, labels="reference"))


def test_a_reference_that_was_measured_again_belongs_to_the_same_evaluation(reference, tiny_model, tmp_path):
    def stop(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(reference, tiny_model, tmp_path, progress=stop)
    # As with another number of threads.
    other = replace(reference, about=replace(reference.about, hash="0" * 16))
    report = run(other, tiny_model, tmp_path)
    assert report.settings["references"][0]["hash"] == "0" * 16
    assert run(reference, tiny_model, tmp_path) == report
    with pytest.raises(UserError, match="holds another evaluation with other settings:\n  references: changed"):
        run(replace(other, measured=False), tiny_model, tmp_path)


def test_labels_of_the_reference_are_drawn_in_its_proportions(images, tiny_model):
    unlike = measured(images, [str(tiny_model)])
    assert unlike.about.classes == (13, 13, 13)
    stream = Samples(load(str(tiny_model)), 8, SAMPLING, labels="reference", of_reference=(3, 1, 0))
    assert stream.labels is not None
    assert np.bincount(stream.labels).tolist() == [6, 2]


def test_the_claim_holds_what_the_report_says(reference, tiny_model, tmp_path):
    report = run(reference, tiny_model, tmp_path)
    claimed, (measured,) = read_json(tmp_path / "evaluation.json")["settings"], report.settings["references"]
    assert claimed == report.settings | {"references": [measured | {"hash": ""}]}
