import copy
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from raekit import randomness
from raekit.data.images import read_image
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow.guidance import Guidance, parse_guidance, with_interval_ends
from raekit.flow.path import similarity
from raekit.flow.sampling import Sampling, latents_to_noise, sample_latents, sample_noise, slerp
from raekit.flow.solvers import time_grid
from raekit.inference import generation
from raekit.inference.generation import (
    _fitting,
    _trial_labels,
    fitting_batch,
    generate,
    images_to_noise,
    interpolate,
    noise_to_images,
    trajectory,
)
from raekit.inference.model import Model, load, reconstruct
from raekit.inference.statistics import measure_latents
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import ContextConfig, DenoiserConfig, TransformerConfig
from raekit.pictures import from_pil, to_pil

ONE = World()
FEW = Sampling(steps=3)
LABELS = [0, 2, 1, 1, 0, 2, 2]
MANY = LABELS * 10  # more than the largest batch


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return load(str(tiny_model))


@pytest.fixture
def unconditional(model) -> Model:
    part = TransformerConfig(width=16, depth=1, heads=2)
    return Model(model.autoencoder, Denoiser(DenoiserConfig(channels=16, grid=(4, 4), backbone=part, num_classes=0)))


@pytest.fixture(scope="module")
def two_outputs(model) -> Model:
    """Return a model with a base output."""
    part = TransformerConfig(width=16, depth=2, heads=2)
    head = TransformerConfig(width=16, depth=1, heads=2)
    config = DenoiserConfig(
        channels=16, grid=(4, 4), backbone=part, head=head, num_classes=3, base_depth=1, context=ContextConfig()
    )
    return other_weights(Model(model.autoencoder, Denoiser(config)))


def other_weights(model: Model) -> Model:
    """Return a copy of the model with random weights in the denoiser."""
    denoiser = copy.deepcopy(model.denoiser)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Model(model.autoencoder, denoiser)


def images_of(model: Model, labels: Sequence[int] | None = LABELS, sampling: Sampling = FEW, **options) -> Tensor:
    """Return all samples in the order of their numbers."""
    batches = list(generate(model, labels, sampling=sampling, **options))
    order = torch.cat([batch.indices for batch in batches]).argsort()
    return torch.cat([batch.images for batch in batches])[order]


def test_loading_a_model_by_its_folder(model):
    assert model.classes == ("blue", "green", "red")
    assert model.device == torch.device("cpu")
    assert not model.denoiser.training
    assert not model.autoencoder.training


def test_samples_are_images_with_their_labels_and_numbers(model):
    batches = list(generate(model, LABELS, sampling=FEW, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.labels for batch in batches]).tolist() == LABELS
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))
    for batch in batches:
        assert batch.images.shape == (len(batch), 3, 16, 16)
        assert batch.images.dtype == torch.float32
        assert batch.images.min() >= 0
        assert batch.images.max() <= 1
        assert not batch.images.requires_grad


@pytest.mark.parametrize("guidance", ["", "cfg:2.0@0.2-0.8", "internal:1.5+auto:1.3"])
@pytest.mark.parametrize("solver", ["euler", "heun", "abm", "euler-maruyama"])
def test_a_sample_is_the_same_in_any_batch(model, two_outputs, guidance, solver):
    rules = parse_guidance(guidance) if guidance else ()
    weak = two_outputs.denoiser if "auto" in guidance else None
    model = other_weights(two_outputs) if weak else model
    sampling = Sampling(steps=3, solver=solver, guidance=rules, weak=weak)
    whole = images_of(model, MANY, sampling, batch_size=7)
    for batch_size in (1, 64, "auto"):
        images = images_of(model, MANY, sampling, batch_size=batch_size)
        assert torch.allclose(images, whole, rtol=0, atol=1e-5)


def made_in_rank(world: World, folder: Path) -> dict[int, tuple[Tensor, Tensor]]:
    found = {}
    for size in (1, 7, 64):
        batches = list(generate(load(str(folder)), MANY, sampling=FEW, batch_size=size, world=world))
        found[size] = torch.cat([b.indices for b in batches]), torch.cat([b.images for b in batches])
    return found


def test_samples_of_two_real_processes_and_of_any_batch_size_are_those_of_one(model, tiny_model, run_ranks):
    whole = images_of(model, MANY, batch_size=7)
    ranks = run_ranks(made_in_rank, 2, tiny_model)
    for size in (1, 7, 64):
        made = [rank[size] for rank in ranks]
        assert sorted(i for indices, _ in made for i in indices.tolist()) == list(range(70))
        assert len(made[0][0]) == {1: 35, 7: 35, 64: 64}[size]  # the processes take turns
        for indices, images in made:
            assert torch.allclose(images, whole[indices], rtol=0, atol=1e-5)


class Small(nn.Module):
    """A denoiser on a device whose memory holds at most `limit` images."""

    compiled = False

    def __init__(self, denoiser: Denoiser, limit: int) -> None:
        super().__init__()
        self.denoiser, self.config, self.limit = denoiser, denoiser.config, limit
        self.tried: list[int] = []

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        if self.tried[-1:] != [len(x)]:
            self.tried.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError
        return self.denoiser(x, *arguments, **options)


def test_samples_that_are_not_finite_are_one_clear_error(model):
    wild = Sampling(steps=2, guidance="cfg:1e30")  # type: ignore[arg-type]
    noise = torch.randn(2, 16, 4, 4)
    calls = [
        lambda: next(generate(model, [0, 1], sampling=wild)),
        lambda: next(interpolate(model, seeds=[0, 1], labels=[0, 1], frames=2, sampling=wild)),
        lambda: trajectory(model, [0, 1], frames=2, sampling=wild),
        lambda: noise_to_images(model, noise, [0, 1], wild),
        lambda: sample_latents(model.denoiser, torch.tensor([0, 1]), torch.arange(2), 0, wild, "cpu"),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"^sample 0: its values are not finite; lower the scale of guidance cfg:1"):
            call()
    stream = generate(model, [0, 1], sampling=wild, must_be_finite=False)
    assert next(stream).images.isnan().all()


def test_batches_are_halved_where_memory_does_not_suffice(model, caplog):
    small = Small(model.denoiser, 3)
    tight = Model(model.autoencoder, small)  # type: ignore[arg-type]
    batches = list(generate(tight, LABELS * 2, sampling=FEW, batch_size=10))
    assert [len(batch) for batch in batches] == [2] * 7  # 10 is halved to 5, and 5 to 2
    assert small.tried == [10, 5, 2]
    assert torch.allclose(torch.cat([batch.images for batch in batches]), images_of(model, LABELS * 2), atol=1e-5)
    assert "a batch of 10 images does not fit into the GPU's memory; continuing with 5" in caplog.text
    with pytest.raises(UserError, match="not even one image fits"):
        list(generate(Model(model.autoencoder, Small(model.denoiser, 0)), [0], sampling=FEW))  # type: ignore[arg-type]


def test_batch_sizes_that_fit_the_memory():
    assert _fitting(80 * 2**30, 0.2 * 2**30) == 256
    assert _fitting(2**30, 2**20) == 512
    assert _fitting(2**40, 1) == 1024
    assert _fitting(2**20, 2**30) == _fitting(2**20, math.inf) == 1


def test_the_batch_of_a_gpu_is_found_by_a_trial_unless_few_images_are_wanted(model, monkeypatch):
    trials = []
    monkeypatch.setattr(generation, "_trial_labels", lambda *arguments: None)
    monkeypatch.setattr(generation, "sample_latents", lambda *arguments: trials.append(len(arguments[2])))
    monkeypatch.setattr(generation, "_decode", lambda *arguments: None)
    for name, value in {"memory_allocated": 100, "max_memory_allocated": 140, "mem_get_info": (1290, 2000)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    gpu = World(device=torch.device("cuda"))
    assert [fitting_batch(model, Sampling(), "auto", gpu, total) for total in (1, 4)] == [4, 4]
    assert trials == []
    assert fitting_batch(model, Sampling(), "auto", gpu, 5) == 64  # 80 % of 1290 bytes, at 10 bytes an image
    assert trials == [4]


def test_a_trial_has_the_condition_of_the_samples(model):
    classes = _trial_labels(model, torch.tensor([2, 1]), 4)
    assert classes is not None
    assert classes.tolist() == [0] * 4
    own = Model(model.autoencoder, Denoiser(replace(model.denoiser.config, num_classes=0, class_names=())))
    rows = torch.arange(6.0).view(2, 3)
    repeated = _trial_labels(own, rows, 4)
    assert repeated is not None
    assert torch.equal(repeated, rows[:1].repeat(4, 1))
    assert _trial_labels(own, None, 4) is None


def test_interpolation_goes_from_one_sample_to_another(model, two_outputs):
    weak = two_outputs.denoiser
    for solver, text in (("euler", "auto:1.5+cfg:1.3"), ("euler-maruyama", "")):
        sampling = Sampling(steps=3, solver=solver, guidance=parse_guidance(text) if text else ())  # type: ignore[arg-type]
        sampling = replace(sampling, weak=weak if text else None)
        ends = [next(iter(generate(model, [label], seed=seed, sampling=sampling))) for label, seed in ((0, 3), (2, 4))]
        settings: Any = {"seeds": (3, 4), "labels": (0, 2), "frames": 5, "sampling": sampling}
        images = torch.cat([batch.images for batch in interpolate(model, **settings)])
        assert images.shape == (5, 3, 16, 16)
        for i, end in zip((0, -1), ends, strict=True):
            assert torch.allclose(images[i], end.images[0], atol=1e-5)
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in pairwise(images))
        parts = [batch.images for batch in interpolate(model, batch_size=2, **settings)]
        assert [len(part) for part in parts] == [2, 2, 1]
        assert torch.allclose(torch.cat(parts), images, atol=1e-5)


def test_interpolation_goes_in_equal_steps(model, monkeypatch):
    given: list[Tensor] = []

    def see(denoiser: Denoiser, noise: Callable[[str], Tensor], labels: Tensor, *_: Any) -> Tensor:
        given.extend([noise("sample"), labels])
        return given[0]

    monkeypatch.setattr("raekit.inference.generation.denoise", see)
    list(interpolate(model, seeds=(3, 4), labels=(0, 2), frames=5))
    way = torch.linspace(0, 1, 5, dtype=torch.float64)
    ends = [randomness.normal(seed, "sample", [0], (16, 4, 4))[0] for seed in (3, 4)]
    assert torch.allclose(given[0], slerp(*ends, way), atol=1e-6)  # type: ignore[reportCallIssue]
    assert torch.equal(given[1], torch.stack([1 - way, 0 * way, way, 0 * way], 1).float())


def test_interpolation_without_classes(unconditional):
    batches = list(interpolate(unconditional, seeds=(0, 1), frames=3, sampling=FEW))
    assert batches[0].labels.tolist() == [-1] * 3
    assert batches[0].passes == {"model": 3}
    for options, message in (
        ({"frames": 1}, "frames: 1 must be at least 2"),
        ({"seeds": (1, 1)}, "both ends are the same"),
        ({"labels": (0, 0)}, "labels: 0 is not among the model's 0 classes"),
    ):
        with pytest.raises(UserError, match=message):
            list(interpolate(unconditional, **({"seeds": (0, 1)} | options)))  # type: ignore[arg-type]


def test_the_great_circle():
    a, b = torch.randn(2, 40, 4, 4)
    way = slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.allclose(way[0], a)
    assert torch.allclose(way[-1], b)
    unit = slerp(a / a.norm(), b / b.norm(), torch.linspace(0, 1, 5)).flatten(1)
    assert torch.allclose(unit.norm(dim=1), torch.ones(5))
    steps = (unit[1:] * unit[:-1]).sum(1)
    assert torch.allclose(steps, steps[:1].expand(4))
    assert torch.allclose(slerp(a, a, torch.tensor([0.3])), a)


@pytest.mark.parametrize("solver", ["euler", "heun", "abm"])
def test_a_trajectory_ends_in_the_sample(model, solver):
    sampling = Sampling(steps=6, solver=solver, guidance=parse_guidance("cfg:1.5@0.1-0.9"))
    times, images = trajectory(model, [1, 2], frames=4, seed=5, sampling=sampling)
    assert images.shape == (4, 2, 3, 16, 16)
    assert times[0] == 1
    assert times[-1] == 0
    assert sorted(times, reverse=True) == times
    assert torch.allclose(images[-1], images_of(model, [1, 2], sampling, seed=5), atol=1e-5)
    # At time 1 the predicted data are x - v.
    noise = randomness.normal(5, "sample", [0, 1], (16, 4, 4))
    with torch.no_grad():
        v = model.denoiser(noise, torch.ones(2), torch.tensor([1, 2]))
        assert torch.allclose(images[0], model.autoencoder.decode(noise - v), atol=1e-5)
    with pytest.raises(UserError, match="frames: 9 must be from 2 to 7"):
        trajectory(model, [0], frames=9, sampling=sampling)
    assert trajectory(model, count=1, frames=7, sampling=Sampling(steps=6))[1].shape == (7, 1, 3, 16, 16)


def test_a_trajectory_shows_the_data_predicted_at_times_spread_evenly(model):
    seen: dict[float, Tensor] = {}

    def keep(x: Tensor, v: Tensor, t: float) -> None:
        seen[t] = x - t * v

    times, images = trajectory(model, [1], frames=5, sampling=Sampling(steps=6), watch=keep)
    assert times == [*(sorted(seen, reverse=True)[i] for i in (0, 2, 3, 5)), 0]
    for t, image in zip(times[:-1], images[:-1], strict=True):
        assert torch.allclose(image, model.autoencoder.decode(seen[t]), atol=1e-5)


def test_two_processes_share_the_samples_of_one(model):
    alone = images_of(model, batch_size=2)
    shares = [list(generate(model, LABELS, sampling=FEW, batch_size=2, world=World(rank=r, size=2))) for r in (0, 1)]
    numbers = [[batch.indices.tolist() for batch in share] for share in shares]
    assert numbers == [[[0, 1], [4, 5]], [[2, 3], [6]]]
    for share in shares:
        for batch in share:
            assert torch.equal(batch.images, alone[batch.indices])
            assert batch.labels.tolist() == [LABELS[i] for i in batch.indices]


def test_indices_are_the_samples_that_are_made(model):
    whole = images_of(model, batch_size=2)
    assert torch.allclose(images_of(model, batch_size=2, indices=[1, 4, 5]), whole[[1, 4, 5]], atol=1e-5)
    made = [list(generate(model, LABELS, indices=[1, 4, 5], batch_size=2, world=World(rank=r, size=2))) for r in (0, 1)]
    assert [[batch.indices.tolist() for batch in share] for share in made] == [[[1, 4]], [[5]]]
    assert [batch.labels.tolist() for share in made for batch in share] == [[2, 0], [2]]
    assert not list(generate(model, LABELS, indices=[]))


def test_seeds_and_classes_make_different_samples(model):
    whole = images_of(model)
    assert torch.equal(images_of(model), whole)
    assert not torch.allclose(images_of(model, seed=1), whole, atol=1e-3)
    other = images_of(model, [1] * 7)
    same = torch.tensor([label == 1 for label in LABELS])
    assert torch.allclose(other[same], whole[same], atol=1e-5)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(other[~same], whole[~same], strict=True))
    assert all(not torch.allclose(whole[0], image, atol=1e-3) for image in whole[1:])


def test_a_model_without_classes_generates_by_count(unconditional):
    images = images_of(unconditional, None, count=5, batch_size=2)
    assert images.shape == (5, 3, 16, 16)
    assert next(iter(generate(unconditional, count=1, sampling=FEW))).labels.tolist() == [-1]
    with pytest.raises(UserError, match="labels: 0 is not among the model's 0 classes"):
        images_of(unconditional, [0])
    with pytest.raises(UserError, match=r"guidance: cfg needs labels"):
        images_of(unconditional, None, Sampling(guidance=(Guidance(scale=2.0),)), count=1)


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_outside_the_classes_is_refused(model, label):
    with pytest.raises(UserError, match=f"labels: {label} is not among the model's 3 classes"):
        images_of(model, [0, label])


def test_numbers_of_numpy_and_torch_are_numbers(model):
    expected = images_of(model, [1, 2], seed=[3, 4], indices=[1, 0])
    given: dict[str, Any] = {"labels": np.array([1, 2]), "seed": torch.tensor([3, 4]), "indices": torch.tensor([1, 0])}
    assert torch.equal(images_of(model, **given), expected)
    one: dict[str, Any] = {"labels": torch.tensor([1]), "seed": np.int64(3)}
    assert torch.equal(images_of(model, **one), images_of(model, [1], seed=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [0.5]}, "labels: 0.5 must be a whole number"),
        ({"labels": 1}, "labels: 1 must be a sequence of class ids"),
        ({"labels": []}, "labels: none are given"),
        ({"labels": None, "count": -1}, "count: -1 must be at least 1"),
        ({"seed": "1"}, "seed: '1' must be a whole number"),
        ({"seed": [0.5, 1]}, "seed: 0.5 must be a whole number"),
        ({"batch_size": 2.0}, "batch_size: 2.0 must be a whole number"),
        ({"labels": [0, 1], "indices": [-1]}, "indices: -1 must be at least 0"),
        ({"labels": [0, 1], "indices": [2]}, "indices: 2 is not among the 2 samples"),
    ],
)
def test_what_is_no_number_of_samples_is_one_clear_error(model, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        images_of(model, **arguments)


def test_labels_or_a_count_but_not_both(model):
    for arguments in ({"labels": None}, {"labels": [0], "count": 1}):
        with pytest.raises(UserError, match="give either labels, one for each sample, or count"):
            images_of(model, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(model, batch_size):
    with pytest.raises(UserError, match=f"batch_size: {batch_size} must be at least 1"):
        images_of(model, batch_size=batch_size)


class Counted(nn.Module):
    """A denoiser that records the time of each call and whether the call had class labels."""

    compiled = False

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.config, self.label = denoiser, denoiser.config, denoiser.label
        self.calls: list[tuple[float, bool]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        assert (t == t[0]).all()
        assert labels is not None
        pairs = [part.tolist() for part in labels.split(2)]
        assert all(pair in ([0, 2], [3, 3]) for pair in pairs)
        assert len(x) == len(labels)
        self.calls += [(t[0].item(), pair == [0, 2]) for pair in pairs]
        return self.denoiser(x, t, labels, **options)


Calls = list[tuple[float, bool]]


def calls_of(model: Model, sampling: Sampling) -> tuple[Calls, Calls, Counter[str]]:
    """Return the calls of the model and of the weak model for one batch of two samples, and the reported passes."""
    counted = Counted(model.denoiser)
    weak = Counted(sampling.weak) if sampling.weak else None
    sampling = replace(sampling, weak=weak)  # type: ignore[arg-type]
    model = Model(model.autoencoder, counted)  # type: ignore[arg-type]
    (batch,) = generate(model, [0, 2], sampling=sampling)
    return counted.calls, weak.calls if weak else [], batch.passes


@pytest.mark.parametrize(
    ("sampling", "evaluations"),
    [
        (Sampling(steps=10), 10),
        (Sampling(steps=10, grid="published"), 9),
        (Sampling(steps=10, solver="heun"), 20),
        (Sampling(steps=10, solver="ab2"), 10),
        (Sampling(steps=10, solver="abm"), 10),
        (Sampling(steps=10, solver="euler-maruyama"), 10),
    ],
)
def test_evaluations_of_each_solver_and_grid(model, sampling, evaluations):
    calls, _, passes = calls_of(model, sampling)
    assert len(calls) == evaluations
    assert passes == {"model": evaluations}
    assert calls[0][0] == 1.0
    assert all(given for _, given in calls)


@pytest.mark.parametrize("guidance", ["", "cfg:1.5", "internal:1.5+cfg:1.2+auto:1.2"])
def test_a_model_in_bf16_moves_samples_a_little_and_leaves_them_float32(tiny_model, two_outputs, guidance):
    exact, rounded = (load(str(tiny_model), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.autoencoder.encoder_dtype == rounded.denoiser.dtype == torch.bfloat16
    weak = None
    if "auto" in guidance:
        weak, exact = copy.deepcopy(exact.denoiser), other_weights(two_outputs)
        rounded = Model(rounded.autoencoder, copy.deepcopy(exact.denoiser).set_dtype(torch.bfloat16))
    sampling = Sampling(steps=4, guidance=parse_guidance(guidance) if guidance else (), weak=weak)
    images = images_of(exact, sampling=sampling)
    if weak:
        weak.set_dtype(torch.bfloat16)
    rough = images_of(rounded, sampling=sampling)
    assert rough.dtype == torch.float32
    assert not torch.equal(images, rough)
    assert (images - rough).abs().mean() < 0.05 * images.std()
    latents = sample_latents(rounded.denoiser, torch.tensor([0]), torch.arange(1), 0, FEW, "cpu")
    assert latents.dtype == torch.float32


@pytest.mark.parametrize("guidance", ["cfg:2.0@0.2-0.8", "cfg:1.5+internal:1.3@0.2-0.8", "cfg:2.0@0.2-0.8+auto:1.3"])
@pytest.mark.parametrize("reuse", [1, 2, 0.95])
def test_guidance_in_one_pass_gives_the_samples_of_two(two_outputs, monkeypatch, guidance, reuse):
    model = other_weights(two_outputs)
    weak = two_outputs.denoiser if "auto" in guidance else None
    sampling = Sampling(steps=8, guidance=parse_guidance(guidance), weak=weak, reuse=reuse)
    made, sizes = [], []
    for together in (True, False):
        monkeypatch.setattr("raekit.flow.sampling.one_pass_is_faster", lambda x, together=together: together)
        seen: list[int] = []
        hook = model.denoiser.head_blocks[0].register_forward_hook(lambda *a, seen=seen: seen.append(len(a[2])))
        made.append(next(generate(model, [0, 2, 1], sampling=sampling)))
        hook.remove()
        sizes.append(seen)
    assert torch.allclose(made[0].images, made[1].images, atol=1e-5)
    assert made[0].passes == made[1].passes
    assert 6 in sizes[0]
    assert {*sizes[1]} == {3}
    assert sum(sizes[0]) == sum(sizes[1])


@pytest.mark.parametrize("guidance", ["cfg:2.0@0.2-0.8", "internal:1.3+auto:1.2"])
@pytest.mark.parametrize("reuse", [1, 2])
def test_a_compiled_model_gives_the_same_samples_in_batches_of_one_size(
    model, two_outputs, monkeypatch, guidance, reuse
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    if "auto" in guidance:
        model = other_weights(two_outputs)
    weak = copy.deepcopy(two_outputs.denoiser) if "auto" in guidance else None
    sampling = Sampling(steps=4, guidance=parse_guidance(guidance), weak=weak, reuse=reuse)
    exact = images_of(model, sampling=sampling, batch_size=4)
    fast = copy.deepcopy(model).compile(weak)
    seen: set[int] = set()
    fast.denoiser.final.register_forward_hook(lambda layer, inputs, out: seen.add(len(out)))
    batches = list(generate(fast, LABELS, sampling=sampling, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 3]
    assert [batch.labels.tolist() for batch in batches] == [LABELS[:4], LABELS[4:]]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))
    assert torch.allclose(torch.cat([batch.images for batch in batches]), exact, atol=1e-5)
    assert seen <= {4, 8}
    frames = [*interpolate(fast, seeds=(0, 1), frames=5, sampling=FEW, batch_size=4)]
    assert [len(batch) for batch in frames] == [4, 1]


def test_compiling_without_a_compiler_is_refused(model, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"compile: on a CPU it needs a C\+\+ compiler"):
        copy.deepcopy(model).compile()


def test_interpolation_is_guided_in_one_pass(model, monkeypatch):
    made = []
    for together in (True, False):
        monkeypatch.setattr("raekit.flow.sampling.one_pass_is_faster", lambda x, together=together: together)
        sampling = Sampling(steps=3, guidance=parse_guidance("cfg:2.0"))
        made += interpolate(model, seeds=(0, 1), labels=(0, 2), frames=4, sampling=sampling)
    assert torch.allclose(made[0].images, made[1].images, atol=1e-5)


def test_forward_passes_of_each_guidance(two_outputs):
    """Count the passes of 50 steps.

    Without guidance there are 50. CFG adds one for each step inside its interval, AutoGuidance adds one of the weak
    model for each step, and internal guidance adds none.
    """
    weak = other_weights(two_outputs).denoiser
    times = time_grid(50, two_outputs.denoiser.config.shift)[:-1]
    inside = [t for t in times if 0.1 <= t <= 0.9]
    assert 0 < len(inside) < 50

    def passes_of(text: str) -> tuple[Calls, Calls, Counter[str]]:
        rules = parse_guidance(text) if text else ()
        return calls_of(two_outputs, Sampling(guidance=rules, weak=weak if "auto" in text else None))

    conditional = [(t, True) for t in times]
    assert passes_of("") == (conditional, [], {"model": 50})
    calls, _, passes = passes_of("cfg:2.0@0.1-0.9")
    assert [call for call in calls if call[1]] == conditional
    assert [t for t, given in calls if not given] == inside
    assert passes == {"model": 50, "unconditional": len(inside)}
    assert passes_of("auto:1.42") == (conditional, conditional, {"model": 50, "weak": 50})
    assert passes_of("internal:1.78@0.1-1") == (conditional, [], {"model": 50})
    calls, weak_calls, passes = passes_of("internal:1.78+cfg:2@0.1-0.9+auto:1.2@0.1-0.9")
    assert len(calls) == 50 + len(inside)
    assert [t for t, _ in weak_calls] == inside
    assert passes == {"model": 50, "unconditional": len(inside), "weak": len(inside)}


def test_internal_guidance_leads_away_from_the_base_output(two_outputs):
    """For a denoiser that predicts data, the guided data are base + scale (full - base) (RAE v2)."""
    denoiser = copy.deepcopy(two_outputs.denoiser)
    denoiser.config = replace(denoiser.config, prediction="data")
    x = randomness.normal(0, "sample", [0, 1], (16, 4, 4))
    labels = torch.tensor([1, 2])
    full, base = denoiser(x, torch.ones(2), labels, with_base=True)
    sampling = Sampling(steps=1, guidance=parse_guidance("internal:1.78"))
    ours = sample_latents(denoiser, labels, torch.arange(2), 0, sampling, "cpu")
    assert torch.allclose(ours, base + 1.78 * (full - base), atol=1e-5)


@pytest.mark.parametrize("solver", ["ab2", "abm"])
def test_multistep_solvers_guide_in_the_interval_itself(model, solver):
    # All of these grids have different times; the guided passes cover the interval in each of them.
    for steps in (5, 10, 20):
        sampling = Sampling(steps=steps, solver=solver, guidance=parse_guidance("cfg:1.5@0.2-0.8"))
        times = with_interval_ends(time_grid(steps, model.denoiser.config.shift), sampling.guidance)
        calls, _, passes = calls_of(model, sampling)
        inside = times.index(0.2) - times.index(0.8)
        assert passes == {"model": steps, "unconditional": inside}
        assert {t for t, given in calls if not given} == {torch.tensor(t).item() for t in times if 0.2 < t <= 0.8}


def test_a_weak_model_as_good_as_the_model_changes_nothing(model):
    sampling = Sampling(steps=3, guidance=parse_guidance("auto:1.5"), weak=copy.deepcopy(model.denoiser))
    assert torch.allclose(images_of(model, sampling=sampling), images_of(model), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("internal:2", {}, r"internal needs a base output.*denoiser\.base_depth"),
        ("auto:2", {}, r"auto needs a weaker model \(--weak, Sampling\.weak\)"),
        ("", {"weak": "other"}, "weak: no effect without guidance auto:SCALE"),
        ("cfg:2", {"weak": "other"}, "weak: no effect without guidance auto:SCALE"),
        ("auto:2", {"weak": "same"}, "weak: it is the guided model itself"),
        ("auto:2", {"weak": "smaller"}, r"weak: it is for latents \(16, 2, 2\) and 3 classes"),
        ("auto:2.0", {"weak": "renamed"}, "weak: its classes have other names than the model's classes"),
        ("cfg:2@0.01-0.02", {}, r"cfg would have no effect, .* 0\.01-0\.02"),
        ("cfg:2@0.0-0.001", {"solver": "euler"}, "cfg would have no effect"),
        ("cfg:2@0.0-0.001", {"solver": "heun"}, None),
        ("cfg:2@0.0-0.001", {"solver": "abm"}, None),
        (
            "cfg:2@0.2-0.3",
            {"solver": "abm", "steps": 2},
            r"steps: 2 is too few for guidance that changes at 0\.3, 0\.2",
        ),
        ("", {"reuse": 0.9999}, r"reuse: 0.9999 would have no effect, as neighbouring steps are at most 0\.9\d+ alike"),
    ],
)
def test_settings_without_effect_are_refused(model, text, options, message):
    part = TransformerConfig(width=16, depth=1, heads=2)
    smaller = Denoiser(DenoiserConfig(channels=16, grid=(2, 2), backbone=part, num_classes=3))
    renamed = Denoiser(replace(model.denoiser.config, class_names=("a", "b", "c")))
    models = {"other": copy.deepcopy(model.denoiser), "same": model.denoiser, "smaller": smaller, "renamed": renamed}
    options = {"steps": 4} | options
    if "weak" in options:
        options["weak"] = models[options["weak"]]
    sampling = Sampling(guidance=parse_guidance(text) if text else (), **options)
    if message is None:
        images_of(model, [0], sampling)
    else:
        with pytest.raises(UserError, match=message):
            images_of(model, [0], sampling)


def test_reusing_the_backbone(model, unconditional):
    plain = images_of(model, sampling=Sampling(steps=20))
    features = []
    hook = model.denoiser.blocks[-1].register_forward_hook(lambda *_: features.append(1))
    sampling = Sampling(steps=20, reuse=3, guidance=parse_guidance("cfg:1.001@0.0-0.5"))
    (batch,) = generate(model, LABELS, sampling=sampling)
    hook.remove()
    times = time_grid(20, model.denoiser.config.shift)[:-1]
    inside = sum(t <= 0.5 for t in times)
    assert len(features) == 7 + -(-inside // 3)
    assert batch.passes == {"model": 7, "unconditional": -(-inside // 3), "head": 13 + inside - -(-inside // 3)}
    assert not torch.equal(batch.images, plain)
    assert (batch.images - plain).abs().mean() < 0.1 * plain.std()
    with pytest.raises(UserError, match="reuse: it needs a denoiser with a head"):
        images_of(unconditional, None, Sampling(reuse=2), count=1)


def test_reusing_the_backbone_by_similarity(model):
    times = time_grid(20, model.denoiser.config.shift)[:-1]
    fresh, seen = 0, None
    for t in times:
        if seen is None or similarity(t, seen) < 0.95:
            fresh, seen = fresh + 1, t
    assert 2 < fresh < 18
    features = []
    hook = model.denoiser.blocks[-1].register_forward_hook(lambda *_: features.append(1))
    (batch,) = generate(model, LABELS, sampling=Sampling(steps=20, reuse=0.95))
    hook.remove()
    assert len(features) == fresh
    assert batch.passes == {"model": fresh, "head": 20 - fresh}
    plain = images_of(model, sampling=Sampling(steps=20))
    close = images_of(model, sampling=Sampling(steps=20, reuse=0.99))
    near, far = ((images - plain).abs().mean() for images in (close, batch.images))
    assert 0 < near < far < 0.2 * plain.std()


@pytest.mark.parametrize("solver", ["euler", "ab2", "euler-maruyama"])
def test_samples_follow_the_times_that_the_denoiser_was_trained_with(model, solver):
    shifted = Denoiser(replace(model.denoiser.config, shift=3.0))
    seen: list[float] = []
    batches = generate(
        Model(model.autoencoder, shifted),
        [0],
        sampling=Sampling(steps=4, solver=solver),
        watch=lambda x, v, t: seen.append(t),
    )
    assert len(list(batches)) == 1
    assert seen == pytest.approx([1.0, 0.9, 0.75, 0.5])
    if solver != "euler-maruyama":
        times: list[float] = []
        shifted.register_forward_pre_hook(lambda _, inputs: times.append(inputs[1][0].item()))
        latents_to_noise(shifted, torch.zeros(1, 16, 4, 4), None, Sampling(steps=4, solver=solver))
        assert times == pytest.approx([0.0, 0.5, 0.75, 0.9])


def test_each_step_of_the_sde_has_noise_of_its_own(model, monkeypatch):
    drawn: list[Tensor] = []

    def draw(denoiser, seed, stream, indices, device="cpu") -> Tensor:
        drawn.append(sample_noise(denoiser, seed, stream, indices, device))
        return drawn[-1]

    monkeypatch.setattr("raekit.inference.generation.sample_noise", draw)
    images_of(model, [1], Sampling(steps=4, solver="euler-maruyama"))
    assert len(drawn) == 4  # the start and all steps but the last
    assert all(not torch.equal(a, b) for a, b in combinations(drawn, 2))


@pytest.mark.parametrize("solver", ["heun", "ab2", "abm"])
@pytest.mark.parametrize("grid", ["full", "published"])
def test_latents_go_to_noise_and_back(model, grid, solver):
    labels, indices = torch.tensor([1]), torch.tensor([5])
    sampling = Sampling(steps=40, solver=solver, grid=grid, guidance=parse_guidance("cfg:1.5@0.0-0.7"))
    latents = sample_latents(model.denoiser, labels, indices, 0, sampling, "cpu")
    noise = latents_to_noise(model.denoiser, latents, labels, sampling)
    assert torch.allclose(noise, randomness.normal(0, "sample", indices, (16, 4, 4)), atol=0.1)
    with pytest.raises(UserError, match="solver euler-maruyama: goes from noise to data only"):
        latents_to_noise(model.denoiser, latents, labels, replace(sampling, solver="euler-maruyama"))


def test_images_go_to_noise_and_back_the_better_the_finer_the_steps(model):
    images = images_of(model, [1, 0])
    rebuilt = reconstruct(model.autoencoder, images)
    errors, noises = [], []
    for steps in (5, 20, 80):
        sampling = Sampling(steps=steps, solver="heun")
        noises.append(images_to_noise(model, images, [1, 0], sampling))
        errors.append((noise_to_images(model, noises[-1], [1, 0], sampling) - rebuilt).abs().max().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 1e-3
    assert noises[2].shape == (2, 16, 4, 4)
    assert not torch.allclose(noises[2], images_to_noise(model, images, [0, 0], sampling), atol=1e-3)
    # The noise that `generate` draws gives the images that `generate` returns.
    drawn = randomness.normal(0, "sample", [0, 1], (16, 4, 4))
    assert torch.equal(noise_to_images(model, drawn, [1, 0], FEW), images_of(model, [1, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 16, 4, 4), [0]), "labels: 1 given for 2 images"),
        (((1, 16, 4, 4), [3]), "labels: 3 is not among"),
        (((1, 16, 2, 2), [0]), r"noise: expected .* \(B, 16, 4, 4\), got the shape \(1, 16, 2, 2\)"),
    ],
)
def test_noise_that_does_not_fit_is_refused(model, arguments, message):
    shape, labels = arguments
    with pytest.raises(UserError, match=message):
        noise_to_images(model, torch.zeros(shape), labels)
    with pytest.raises(UserError, match="euler-maruyama"):
        noise_to_images(model, torch.zeros(1, 16, 4, 4), [0], Sampling(solver="euler-maruyama"))


def test_adaptive_and_stochastic_sampling(model):
    pytest.importorskip("torchdiffeq")
    exact = images_of(model, [1], Sampling(steps=60, solver="heun"))
    adaptive = images_of(model, [1], Sampling(solver="dopri5", atol=1e-4, rtol=1e-4))
    assert torch.allclose(adaptive, exact, atol=0.01)
    stochastic = images_of(model, [1], Sampling(steps=10, solver="euler-maruyama"))
    assert torch.equal(stochastic, images_of(model, [1], Sampling(steps=10, solver="euler-maruyama")))
    assert not torch.allclose(stochastic, exact, atol=0.05)


def test_guidance_moves_samples_away_from_the_unconditional_ones(model):
    plain = images_of(model)
    guided = images_of(model, sampling=Sampling(steps=3, guidance=(Guidance(scale=3.0),)))
    assert not torch.allclose(plain, guided, atol=1e-3)
    barely = images_of(model, sampling=Sampling(steps=3, guidance=(Guidance(scale=1.0001),)))
    assert torch.allclose(plain, barely, atol=1e-2)


def test_models_that_do_not_fit_together_are_refused(model):
    part = TransformerConfig(width=16, depth=1, heads=2)
    other = Denoiser(DenoiserConfig(channels=16, grid=(2, 2), backbone=part, num_classes=3))
    with pytest.raises(
        UserError, match=r"the denoiser needs latents of shape \(16, 2, 2\), but the autoencoder has \(16, 4, 4\)"
    ):
        Model(model.autoencoder, other)


def test_classes_by_name_or_number(model, unconditional):
    assert [model.class_id(name) for name in ("green", "0", "2")] == [1, 0, 2]
    for name in ("purple", "3", "-1", "", "²"):
        with pytest.raises(UserError, match=f"class '{name}': no such class; the classes are blue, green, red"):
            model.class_id(name)
    with pytest.raises(UserError, match="this model is unconditional"):
        unconditional.class_id("0")
    part = TransformerConfig(width=16, depth=1, heads=2)
    nameless = Denoiser(DenoiserConfig(channels=16, grid=(4, 4), backbone=part, num_classes=12))
    twelve = Model(model.autoencoder, nameless)
    assert twelve.class_id("11") == 11
    assert twelve.class_ids("9-11") == [9, 10, 11]
    assert twelve.class_ids("4") == [4]
    assert model.class_ids("green") == [1]
    for name, message in (("9-12", "class '12': no such"), ("3-1", "range runs backwards; give 1-3"), ("a-b", "'a-b'")):
        with pytest.raises(UserError, match=message):
            twelve.class_ids(name)
    dashed = replace(nameless.config, class_names=tuple(f"{i}-{i}" for i in range(12)))
    assert Model(model.autoencoder, Denoiser(dashed)).class_ids("3-3") == [3]  # a name takes precedence over a range


def test_numbers_are_class_names_where_classes_are_named_by_numbers(model):
    part = TransformerConfig(width=16, depth=1, heads=2)

    def of(*names: str) -> Model:
        config = DenoiserConfig(
            channels=16, grid=(4, 4), backbone=part, num_classes=len(names), class_names=tuple(sorted(names))
        )
        return Model(model.autoencoder, Denoiser(config))

    twelve = of(*map(str, range(12)))  # in the order 0, 1, 10, 11, 2, ...
    assert [twelve.classes[i] for i in twelve.class_ids("0-9")] == [*"0123456789"]
    assert [twelve.classes[i] for i in twelve.class_ids("2-10")] == [*"23456789", "10"]
    assert twelve.classes[twelve.class_id("10")] == "10"
    years = of("2010", "2012", "2024", "other")
    assert [years.classes[i] for i in years.class_ids("2010-2024")] == ["2010", "2012", "2024"]
    padded = of(*(f"{number:03}" for number in range(1, 13)))
    assert [padded.classes[i] for i in padded.class_ids("9-11")] == ["009", "010", "011"]
    for number in ("0", "0-2010", "9" * 5000):  # not an id
        with pytest.raises(UserError, match="no such class"):
            years.class_ids(number)


# Statistics of latents


def batches(source: str, batch_size: int, world: World) -> list[Batch]:
    return list(Loader(DataConfig(source=source, split="all", image_size=16), 0).once(batch_size, world))


def measure(world: World, model: Path, source: str, batch_size: int, mirror: bool) -> tuple[Tensor, Tensor]:
    autoencoder = Autoencoder.load(str(model))
    return measure_latents(autoencoder.tokens, batches(source, batch_size, world), (16, 4, 4), world, mirror)


def measure_in_two(world: World, model: Path, source: str) -> list[tuple[Tensor, Tensor]]:
    return [measure(world, model, source, batch_size, mirror=False) for batch_size in (8, 64)]


@pytest.fixture(scope="module")
def tokens(model, images) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all 39 images and of their mirror images, float64."""
    pixels = torch.cat([batch.pixels() for batch in batches(images, 39, ONE)])
    return tuple(model.autoencoder.tokens(view).double().numpy() for view in (pixels, pixels.flip(-1)))


def assert_exact(measured: tuple[Tensor, Tensor], values: np.ndarray) -> None:
    mean, var = measured
    assert mean.dtype == var.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), values.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(var.numpy(), values.var(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_statistics_of_latents_are_those_of_the_whole_array(tiny_model, images, tokens, batch_size):
    assert_exact(measure(ONE, tiny_model, images, batch_size, mirror=False), tokens[0])


def test_mirrored_images_count_too(tiny_model, images, tokens):
    assert_exact(measure(ONE, tiny_model, images, 7, mirror=True), np.concatenate(tokens))


def test_two_processes_measure_as_one(tiny_model, images, tokens, run_ranks):
    for rank in run_ranks(measure_in_two, 2, tiny_model, images):
        for measured in rank:
            assert_exact(measured, tokens[0])


def test_statistics_far_from_zero_lose_no_digits(images):
    def far(pixels: Tensor) -> Tensor:
        return 3000 + pixels

    values = torch.cat([batch.pixels() for batch in batches(images, 39, ONE)]).add(3000).double().numpy()
    _, var = measure_latents(far, batches(images, 7, ONE), (3, 16, 16), ONE)
    np.testing.assert_allclose(var.numpy(), values.var(0), rtol=1e-6, atol=1e-6)


# Pictures


def test_reconstructing_is_encoding_and_decoding(model):
    images = torch.rand(3, 3, 16, 16)
    decoded = reconstruct(model.autoencoder, images)
    assert torch.equal(decoded, model.autoencoder.decode(model.autoencoder.encode(images)))
    assert decoded.shape == images.shape
    assert not decoded.requires_grad


def test_encoding_leaves_the_model_alone(model):
    before = copy.deepcopy(model.autoencoder.state_dict())
    reconstruct(model.autoencoder, torch.rand(1, 3, 16, 16))
    assert all(torch.equal(value, before[key]) for key, value in model.autoencoder.state_dict().items())


def test_a_picture_of_any_kind_is_read_and_cropped(tmp_path):
    for mode, suffix in (("RGB", "jpg"), ("RGBA", "png"), ("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "png")):
        path = tmp_path / f"{mode}.{suffix}"
        Image.new(mode, (40, 30), 1).save(path)
        read = read_image(path, 16)
        assert (read.mode, read.size) == ("RGB", (16, 16))


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path / 'none.png'}: no such file$"):
        read_image(tmp_path / "none.png", 16)
    text = tmp_path / "text.png"
    text.write_text("text")
    torn = tmp_path / "torn.png"
    Image.effect_noise((64, 64), 50).save(torn)
    torn.write_bytes(torn.read_bytes()[:1000])
    for path in (text, torn, tmp_path):
        with pytest.raises(UserError, match=rf"^{path}: not a readable image \(.+\)$") as error:
            read_image(path, 16)
        assert "\n" not in str(error.value)


def test_pictures_round_and_keep_every_level():
    levels = torch.arange(256).float().div(255).expand(3, 2, 256)
    assert torch.equal(from_pil(to_pil(levels)), levels)
    assert to_pil(torch.full((3, 1, 1), 0.999)).getpixel((0, 0)) == (255, 255, 255)
    assert to_pil(torch.full((3, 1, 1), 1.7)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "rk4"}, "solver: 'rk4' is none of euler, heun"),
        ({"solver": "Heun"}, "solver: 'Heun' is none of euler, heun"),
        ({"grid": "Full"}, "grid: 'Full' is none of full, few, published"),
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"steps": 10**9}, "steps: 1000000000 must be at most 100000"),
        ({"steps": 2.0}, "steps: 2.0 must be a whole number"),
        ({"reuse": "2"}, "reuse: '2' must be a number"),
        ({"reuse": True}, "reuse: True must be a number"),
        ({"guidance": ["cfg:2"]}, r"guidance: \['cfg:2'\] must be a scale, a text"),
        ({"weak": "builtin:emoji"}, "weak: builtin:emoji is a name; give the loaded model"),
        ({"atol": 0.0}, "atol, rtol: 0.0 and 0.001 must be positive"),
        ({"solver": "dopri5", "atol": 1e-8, "rtol": 1e-9}, "atol, rtol: 1e-08 and 1e-09 are both too small"),
        ({"reuse": 0}, "reuse: 0 must be a number of steps, or a similarity"),
        ({"reuse": 1.5}, "reuse: 1.5 must be a number of steps"),
        ({"reuse": -0.5}, "reuse: -0.5 must be a number of steps"),
        ({"reuse": float("nan")}, "reuse: nan must be a number of steps"),
        ({"reuse": float("inf")}, "reuse: inf must be a number of steps"),
        ({"reuse": 2, "steps": 1}, "reuse: 2 has no effect on a single step; take more steps"),
        ({"reuse": 0.9, "steps": 2, "grid": "published"}, r"reuse: 0\.9 has no effect on a single step"),
        ({"reuse": 2, "solver": "heun"}, "reuse: it needs solver euler or euler-maruyama, not heun"),
        ({"rtol": 1e-4}, "rtol: no effect with solver euler; use dopri5, or leave rtol out"),
        ({"solver": "dopri5", "steps": 3}, "steps: no effect with solver dopri5"),
        ({"solver": "dopri5", "grid": "few"}, "grid: few has no effect with solver dopri5"),
        ({"guidance": "cfg"}, "guidance: 'cfg' is not of the form"),
    ],
)
def test_a_setting_of_another_value_or_without_effect_is_rejected(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_a_model_and_sampling_of_another_type_are_rejected(model):
    noise, images = torch.zeros(1, 16, 4, 4), torch.zeros(1, 3, 16, 16)
    calls: list[Callable[..., Any]] = [
        lambda model, sampling: generate(model, count=1, sampling=sampling),
        lambda model, sampling: interpolate(model, seeds=(0, 1), sampling=sampling),
        lambda model, sampling: trajectory(model, count=1, sampling=sampling),
        lambda model, sampling: images_to_noise(model, images, sampling=sampling),
        lambda model, sampling: noise_to_images(model, noise, sampling=sampling),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"model: a str is no `Model`; give raekit\.load\(NAME\)"):
            call("builtin:emoji", None)
        with pytest.raises(UserError, match=r"sampling: \{'steps': 5\} is no `Sampling`"):
            call(model, {"steps": 5})
    with pytest.raises(UserError, match="noise: none is given; give at least one row"):
        noise_to_images(model, noise[:0])


def test_one_rule_of_guidance_or_its_text_is_enough():
    rules = parse_guidance("cfg:2.0@0.1-0.9")
    given: list[Any] = [rules, [*rules], rules[0], "cfg:2.0@0.1-0.9"]
    assert {Sampling(guidance=each) for each in given} == {Sampling(guidance=rules)}
    scale: Any = np.float32(2)
    assert Sampling(guidance=scale).guidance == (Guidance(scale=2.0),)


def test_numbers_of_numpy_and_torch_become_numbers_of_python():
    """Reports and fingerprints write settings as JSON."""
    numbers: list[Any] = [np.int64(2), np.float32(0.5), torch.tensor(0.25, dtype=torch.float64), 3]
    reuse, atol, rtol, scale = numbers
    sampling = Sampling(reuse=reuse, guidance=Guidance(scale=scale))  # type: ignore[arg-type]
    assert json.dumps([sampling.reuse, str(sampling.guidance[0])]) == '[2, "cfg:3.0"]'
    sampling = Sampling(solver="dopri5", atol=atol, rtol=rtol)
    assert json.dumps([sampling.atol, sampling.rtol]) == "[0.5, 0.25]"
