import copy
import math
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from raekit import artifacts, hub
from raekit.data.images import read_image
from raekit.errors import UserError
from raekit.flow.guidance import Guidance, parse_guidance
from raekit.flow.sampling import Sampling
from raekit.formats.native import read_model, write_model
from raekit.inference.catalogue import list_encoders, list_models
from raekit.inference.gallery import Pictures
from raekit.inference.generation import generate, images_to_noise, noise_to_images, random_labels
from raekit.inference.model import Model, load, reconstruct
from raekit.inference.pipeline import Pipeline
from raekit.inference.reconstruction_folders import reconstruct_folder
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig, TransformerConfig
from raekit.models.encoders import load_encoder
from raekit.pictures import read_origin, to_pil

FEW: dict[str, Any] = {"steps": 3}


@pytest.fixture(scope="module")
def pipe(tiny_model) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


def test_images_come_with_their_classes_and_seeds(pipe):
    made = pipe(classes=["red", "blue"], count=2, seed=5, **FEW)
    assert made.labels == ("red", "red", "blue", "blue")
    assert made.seeds == (5, 6, 7, 8)
    assert [image.size for image in made] == [(16, 16)] * 4
    assert repr(made) == "4 images of blue, red"
    assert made.grid().size == (2 * 18 + 2, 2 * 18 + 2)


def test_an_image_depends_on_its_own_seed_and_class(pipe):
    many = pipe(labels=[2, 0, 1], seed=[4, 9, 6], output="pt", batch_size=2, **FEW).images
    assert same(pipe(classes="green", seed=6, output="pt", **FEW).images[0], many[2])
    plain = generate(pipe.model, [0], seed=9, sampling=Sampling(steps=3))
    assert same(next(plain).images[0], many[1])
    assert not same(many[0], many[1])


def test_outputs_hold_the_same_images(pipe):
    pt, array, pil = (pipe(count=2, output=output, **FEW) for output in ("pt", "np", "pil"))
    assert pt.images.shape == (2, 3, 16, 16)
    assert np.array_equal(array.images, pt.images.permute(0, 2, 3, 1).numpy())
    for other in (pt, array):
        assert [image.tobytes() for image in other.pil()] == [image.tobytes() for image in pil]
    with pytest.raises(UserError, match="output: 'jpeg' is none of pil, pt, np"):
        pipe(output="jpeg", **FEW)


def test_classes_are_random_functions_of_the_seeds_by_default(pipe):
    labels = pipe(count=6, seed=2, **FEW).labels
    assert len({*labels}) > 1
    assert pipe(count=1, seed=4, **FEW).labels[0] == labels[2]
    drawn = random_labels(pipe.model, 0, 300)
    assert {drawn.count(label) > 60 for label in range(3)} == {True}


def test_an_unknown_argument_is_named(pipe):
    for call in (pipe, pipe.trajectory):
        with pytest.raises(UserError, match=r"^stepz: no such argument; did you mean steps\?"):
            call("green", stepz=3)


@pytest.mark.parametrize("guidance", [2.0, 2, "2", "cfg:2.0", Guidance(scale=2.0), [Guidance(scale=2.0)]])
def test_guidance_in_any_form(pipe, guidance):
    wanted = next(generate(pipe.model, [1], sampling=Sampling(steps=3, guidance=(Guidance(scale=2.0),)))).images
    assert same(pipe(classes="green", guidance=guidance, output="pt", **FEW).images, wanted)
    assert not same(pipe(classes="green", guidance=1, output="pt", **FEW).images, wanted)


@pytest.mark.parametrize("solver", ["euler", "heun", "abm", "dopri5"])
def test_a_callback_hears_of_every_step_and_sees_the_images(pipe, solver):
    calls, shown = [], []

    def callback(step, total, preview):
        calls.append((step, total))
        shown.append(preview())

    steps = {} if solver == "dopri5" else {"steps": 4}
    made = pipe(labels=[0, 1, 2], batch_size=2, solver=solver, **steps, callback=callback)
    assert calls == [(step, 8) for step in range(1, 9)] or solver == "dopri5"
    assert calls == sorted({*calls})
    assert [len(images) for images in shown[:: len(shown) - 1]] == [2, 1]
    near = np.abs(np.asarray(shown[-1][0], float) - np.asarray(made[2], float)).mean()
    far = np.abs(np.asarray(shown[0][0], float) - np.asarray(made[2], float)).mean()
    assert near < far


def test_neither_variations_nor_previews_are_black(pipe):
    message = "sample 0: its values are not finite; lower the scale of guidance"
    with pytest.raises(UserError, match=message):
        pipe.variations(torch.rand(1, 3, 16, 16), 1.0, "red", count=1, guidance=1e30, **FEW)

    def callback(step, total, preview):
        assert step == 1 or preview()

    with pytest.raises(UserError, match=message):
        pipe("red", guidance=1e30, callback=callback, **FEW)


def test_an_exception_of_the_callback_stops_the_work(pipe):
    def callback(step, total, preview):
        if step == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        pipe(callback=callback, **FEW)


def test_ends_of_interpolations_and_trajectories_are_the_pipelines_images(pipe, tmp_path):
    first, last = (pipe(classes=c, seed=s, output="pt", **FEW).images[0] for c, s in (("red", 3), ("blue", 8)))
    row = pipe.interpolate(np.array([3, 8]), ("red", "blue"), frames=np.int64(4), output="pt", **FEW)
    assert same(row.images[0], first)
    assert same(row.images[-1], last)
    assert row.labels == ("red", None, None, "blue")
    row.save(tmp_path / "row")  # writes the seeds as JSON
    assert read_origin(tmp_path / "row" / "000003.png")["seed"] == 8
    way = pipe.trajectory(labels=[2, 0], seed=[3, 8], frames=3, output="pt", **FEW)
    assert same(way.images[2], first)
    assert same(way.images[5], last)
    assert way.seeds == (3, 3, 3, 8, 8, 8)
    assert way.grid().size == (3 * 18 + 2, 2 * 18 + 2)


def test_each_row_of_a_trajectory_is_one_image(pipe):
    made = pipe.trajectory(count=3, frames=2, seed=4, output="pt", **FEW)
    ends = pipe(count=3, seed=4, output="pt", **FEW).images
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    assert torch.allclose(made.images[1::2], ends, atol=1e-5)


def test_a_random_class_depends_on_the_seed_of_its_image_alone(pipe):
    assert all(len({*pipe(count=12, seed=[seed] * 12, output="pt", **FEW).labels}) == 1 for seed in (3, 4))


def test_variations_leave_the_image_by_their_strength(pipe):
    image = pipe(classes="red", seed=1, output="pt", steps=20)
    settings = {"classes": "red", "steps": 20, "solver": "heun", "output": "pt", "count": 2}
    kept, near, far = (pipe.variations(image.images, s, **settings).images for s in (0.0, 0.2, 1.0))
    assert same(kept[0], kept[1])
    errors = [(each - kept).abs().mean().item() for each in (near, far)]
    assert 0 < errors[0] < errors[1]
    assert same(far[0], pipe(classes="red", seed=0, steps=20, solver="heun", output="pt").images[0])
    with pytest.raises(UserError, match=r"strength: 1\.5 must be from 0 to 1"):
        pipe.variations(image.images, 1.5)


@pytest.mark.parametrize("settings", [{"steps": 6, "grid": "few"}, {"solver": "dopri5", "atol": 1e-2, "rtol": 1e-2}])
def test_variations_go_to_the_noise_as_they_come_back(pipe, settings):
    image = pipe(classes="red", seed=1, output="pt").images
    there = Sampling(**settings)
    back = noise_to_images(pipe.model, images_to_noise(pipe.model, image, [2], there), [2], there)
    kept = pipe.variations(image, 0.0, "red", count=1, output="pt", **settings).images
    assert same(kept, back)


def test_variations_go_to_the_noise_without_guidance(pipe):
    image = pipe(classes="red", seed=1, output="pt").images
    noise = images_to_noise(pipe.model, image, [2], Sampling(steps=6))
    back = noise_to_images(pipe.model, noise, [2], Sampling(steps=6, guidance=parse_guidance("cfg:2.0")))
    kept = pipe.variations(image, 0.0, "red", count=1, steps=6, guidance="cfg:2.0", output="pt").images
    assert same(kept, back)


def test_variations_of_full_strength_have_the_noise_of_their_seeds_at_every_step(pipe):
    settings = {"classes": "red", "seed": 5, "count": 2, "steps": 4, "solver": "euler-maruyama", "output": "pt"}
    made = pipe(**settings).images
    assert not same(made[0], made[1])
    assert same(pipe.variations(made[:1], 1.0, **settings).images, made)
    kept = pipe.variations(made[:1], 0.0, **settings).images  # of one start, with the steps' noise of two seeds
    assert not same(kept[0], kept[1])


def test_images_of_any_kind_are_encoded_and_reconstructed(pipe, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    wanted = reconstruct(pipe.autoencoder, tensor)
    for given in (image, [image], str(tmp_path / "image.png"), [tmp_path / "image.png"], tensor):
        assert same(pipe.reconstruct(given, output="pt").images, wanted)
    assert same(pipe.decode(pipe.encode(image), output="pt").images, wanted)
    assert pipe.reconstruct([image, Image.new("L", (40, 30))])[1].size == (16, 16)
    with pytest.raises(UserError, match=r"no\.png: no such file"):
        pipe.encode(tmp_path / "no.png")
    with pytest.raises(UserError, match="images: none are given"):
        pipe.encode([])


def test_results_are_shown_in_notebooks_and_written(pipe, tmp_path):
    made = pipe(classes="red", count=2, **FEW)
    page = made._repr_html_()
    assert page.count("data:image/png;base64,") == 2
    assert "red, seed 1" in page
    made.save(tmp_path / "grid.webp")
    made.save(tmp_path / "folder")
    assert np.array_equal(np.asarray(read_image(tmp_path / "folder" / "000001.png", 16)), np.asarray(made[1]))
    with Image.open(tmp_path / "grid.webp") as grid:
        assert grid.size == made.grid().size


@pytest.mark.parametrize("output", ["pil", "pt", "np"])
def test_a_part_of_a_result_keeps_its_classes_and_seeds(pipe, tmp_path, output):
    made = pipe(classes=["red", "green", "blue"], output=output, **FEW)
    part = made[1:]
    assert (part.labels, part.seeds) == (("green", "blue"), made.seeds[1:])
    assert [image.tobytes() for image in part.pil()] == [image.tobytes() for image in made.pil()[1:]]
    assert repr(part) == "2 images of blue, green"
    part.save(tmp_path / "part.png")
    assert repr(made[:0]) == "0 images"
    with pytest.raises(UserError, match="there are no images to put into a grid"):
        made[:0].save(tmp_path / "none.png")


def test_a_grid_beyond_its_format_is_not_written(tmp_path):
    image = Image.new("RGB", (100, 8))
    row = Pictures([image] * 200, (None,) * 200, (None,) * 200, columns=200)
    with pytest.raises(UserError, match=r"row\.webp: 200 images make a picture of 20,402 x 12 pixels, but a side"):
        row.save(tmp_path / "row.webp")
    assert not any(tmp_path.iterdir())
    row.save(tmp_path / "row.png")


def test_saving_overwrites_no_other_picture(pipe, tmp_path):
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    made = pipe(classes="red", count=2, **FEW)
    (tmp_path / "notes.txt").write_text("mine")
    made.save(tmp_path)
    before = contents()
    made.save(tmp_path)
    for other in (pipe(classes="red", count=2, seed=1, **FEW), pipe(classes="red", **FEW)):
        with pytest.raises(UserError, match=r"holds other pictures, such as 00000\d\.png.*give another folder"):
            other.save(tmp_path)
    assert contents() == before
    (tmp_path / "000001.png").unlink()
    made.save(tmp_path)
    assert contents() == before
    made[0].save(tmp_path / "000000.png")  # without a record, so not by raekit
    with pytest.raises(UserError, match=r"holds other pictures, such as 000000\.png"):
        made.save(tmp_path)


def test_a_pipeline_is_saved_loaded_and_moved(pipe, tiny_model, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(str(tmp_path / "model"))
    assert again(labels=[1], **FEW)[0].tobytes() == pipe(labels=[1], **FEW)[0].tobytes()
    assert again.to("cpu") is again
    exact = again.autoencoder.decoder.out.weight.clone()
    assert again.to(torch.bfloat16).dtype == torch.bfloat16
    assert re.fullmatch(
        r"Pipeline\(.*model: 16 x 16 pixels, 3 classes, 0\.0 M parameters, bfloat16, cpu\)", repr(again)
    )
    assert torch.equal(again.to(torch.float32).autoencoder.decoder.out.weight, exact)
    types: list[Any] = [torch.float16, "bfloat16"]
    for wrong in types:
        for call in (Pipeline.from_pretrained, load, load_encoder):
            with pytest.raises(UserError, match=r"dtype: .* is none of torch\.float32, torch\.b"):
                call("builtin:emoji" if call is not load_encoder else "builtin:vit-tiny", dtype=wrong)
    with pytest.raises(UserError, match=r"dtype: torch\.float16 is none of"):
        again.to(torch.float16)
    with pytest.raises(UserError, match="only in memory"):
        Pipeline(pipe.autoencoder, pipe.denoiser).to(torch.bfloat16)
    missing = f"cuda:{torch.cuda.device_count()}"
    for device, message in ((missing, r"device: cuda:\d+ does not exist"), ("gpu", "device: 'gpu' is not the name")):
        for call in (again.to, lambda place: load(str(tiny_model), place)):
            with pytest.raises(UserError, match=message):
                call(device)


def test_a_saved_model_says_which_average_it_holds(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "trained")
    denoiser = Denoiser.load(tiny_model)
    for ema, beside in ((0.99, False), (0.5, True)):
        denoiser.ema = ema
        denoiser.save(tmp_path / "trained", beside=beside)
    for ema, decay in ((None, 0.99), (0.5, 0.5)):
        Pipeline.from_pretrained(tmp_path / "trained", ema=ema).save_pretrained(tmp_path / "saved")
        assert artifacts.find(tmp_path / "saved", "denoiser").ema == decay
        Denoiser.load(tmp_path / "trained", ema=ema).save(tmp_path / "again")
        assert artifacts.find(tmp_path / "again", "denoiser").ema == decay
    write_model(read_model(str(tmp_path / "trained")), tmp_path / "converted")
    assert artifacts.find(tmp_path / "converted", "denoiser").ema == 0.99


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")])
def test_results_do_not_depend_on_the_defaults_of_torch(pipe, tiny_model, default):
    image = Image.new("RGB", (16, 16), "red")

    def results(pipe: Pipeline) -> list[Tensor]:
        made = [
            pipe(count=2, guidance=2.0, output="pt", **FEW),
            pipe(solver="euler-maruyama", grid="diffusers", output="pt", **FEW),
            pipe.interpolate((0, 1), ("red", "blue"), frames=3, output="pt", **FEW),
            pipe.trajectory(labels=[0], frames=3, solver="heun", output="pt", **FEW),
            pipe.variations(image, count=1, output="pt", **FEW),
        ]
        return [*(each.images for each in made), pipe.encode(image)]

    expected = results(pipe)
    try:
        if isinstance(default, torch.device):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        again = Pipeline.from_pretrained(tiny_model)
        assert (
            torch.get_default_device() if isinstance(default, torch.device) else torch.get_default_dtype()
        ) == default
        found = results(again), results(pipe)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for each in found:
        assert all(map(torch.equal, each, expected))


def test_an_autoencoder_without_a_denoiser_only_reconstructs(pipe, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "denoiser")
    alone = Pipeline.from_pretrained(tmp_path / "model")
    image = Image.new("RGB", (16, 16), "red")
    assert same(alone.encode(image), pipe.encode(image))
    assert "classes" not in repr(alone)
    with pytest.raises(UserError, match="model: has no denoiser, so it cannot generate"):
        alone(**FEW)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ["purple"]}, "class 'purple': no such class"),
        ({"labels": [3]}, "labels: 3 is not among"),
        ({"classes": "red", "labels": [0]}, "labels: no effect with classes"),
        ({"classes": 3}, "class 3: must be a text"),
        ({"classes": []}, "labels: none are given"),
        ({"count": 0}, "count: 0 must be at least 1"),
        ({"count": 1.5}, "count: 1.5 must be a whole number"),
        ({"seed": None}, "seed: None must be a whole number"),
        ({"seed": [1, 2]}, "seed: 2 seeds for 1 images"),
        ({"guidance": "cfg"}, "guidance: 'cfg' is not of the form"),
        ({"solver": "rk4"}, "solver: 'rk4' is none of"),
        (
            {"output": "jpeg", "callback": lambda *given: pytest.fail("the work started")},
            "output: 'jpeg' is none of pil, pt, np",
        ),
        ({"labels": torch.tensor(1)}, "labels: tensor(1) must be a sequence of class ids"),
        ({"labels": [True]}, "labels: True must be a whole number"),
    ],
)
def test_wrong_settings_are_one_clear_error(pipe, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        pipe(**options)


def test_damaged_weights_make_no_black_pictures(pipe, tmp_path):
    broken = copy.deepcopy(pipe.autoencoder)
    next(broken.decoder.parameters()).data.fill_(math.nan)
    image = torch.rand(2, 3, 16, 16)
    for call in (lambda: Pipeline(broken).reconstruct(image), lambda: Pipeline(broken).decode(broken.encode(image))):
        with pytest.raises(UserError, match="image 0: its values are not finite; load the model in float32"):
            call()
    to_pil(image[0]).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"the reconstruction of .*a\.png: its values are not finite"):
        reconstruct_folder(broken, [tmp_path / "a.png"], tmp_path / "out", metrics={})
    assert not list(tmp_path.glob("out/*.png"))


def test_wrong_ends_and_images_are_one_clear_error(pipe):
    nothing: Any = None
    name: Any = "builtin:emoji"
    zero: Any = 0
    image = Image.new("RGB", (16, 16))
    for call, words in [
        (lambda: pipe.interpolate((0, 1, 2)), "seeds: [0, 1, 2] must be two numbers"),
        (lambda: pipe.interpolate({0, 1}), "seeds: {0, 1} must be two numbers, for the first"),
        (lambda: pipe(callback=3, **FEW), "callback: 3 is no function"),
        (lambda: pipe(guidance=True), "guidance: True must be a scale"),
        (lambda: pipe(**FEW).save(""), "path: '' is no path"),
        (lambda: pipe.save_pretrained(nothing), "folder: None is no path"),
        (lambda: pipe.save_pretrained("x.png"), "x.png: a folder is written here"),
        (lambda: pipe.to("mps"), "device: 'mps' is not the name of a device"),
        (lambda: pipe.decode(torch.zeros(0, 16, 4, 4)), "latents: none are given"),
        (lambda: Pipeline(pipe.denoiser, pipe.autoencoder), "autoencoder: a Denoiser is no autoencoder"),
        (lambda: Model(pipe.denoiser, pipe.autoencoder), "Denoiser and Autoencoder are no autoencoder and denoiser"),
        (lambda: load(""), "model: '' is no name"),
        (lambda: generate(pipe.model, [0], world=name), "world: 'builtin:emoji' is no `World`"),
        (lambda: generate(pipe.model, [0], watch=name), "watch: 'builtin:emoji' is no function"),
        (lambda: generate(pipe.model, [0], indices=zero), "indices: 0 is no list of numbers"),
        (lambda: pipe.interpolate((0, 1), frames="8"), "frames: '8' must be a whole number"),
        (lambda: pipe.interpolate((0, 1), frames=None), "frames: None must be a whole number"),
        (lambda: pipe.variations(image, "0.3"), "strength: '0.3' must be a number"),
        (lambda: pipe.variations(image, None), "strength: None must be a number"),
        (lambda: pipe(guidance=10**400), "Guidance.scale: Input should be a valid number (given: 1000"),
        (lambda: pipe.interpolate((0, 1), ("red", "blue", "red")), "labels: [2, 0, 2] must be two numbers"),
        (lambda: pipe(guidance="auto:2", weak=pipe), "weak: Pipeline is no denoiser; give the field `denoiser`"),
        (lambda: pipe.variations([image, image]), "image: 2 are given; give one"),
        (lambda: pipe.variations(image, count=0), "count: 0 must be at least 1"),
        (lambda: pipe.reconstruct(np.zeros((2, 16, 16, 3), np.uint8)), "got ndarray"),
        (lambda: pipe.reconstruct(Image.new("F", (16, 16))), "images: a PIL image cannot be read (floating-point"),
        (lambda: pipe.decode(np.zeros((1, 16, 4, 4))), "latents: expected a float tensor (B, 16, 4, 4), got ndarray"),
        (lambda: pipe.to(None), "device: None is not the name of a device"),
        (lambda: load("builtin:emoji", device=nothing), "device: None is not the name of a device"),
        (lambda: Pipeline.from_pretrained("a" * 5000), "no such folder or model"),
        (lambda: Pipeline.from_pretrained("builtin:" + "a" * 5000), "no such built-in model"),
        (lambda: Pipeline.from_pretrained("a" * 5000 + "@3"), "no such folder or model"),
        (lambda: reconstruct(name, torch.zeros(1, 3, 16, 16)), "autoencoder: a str is no autoencoder"),
        (lambda: reconstruct(pipe.model, torch.zeros(1, 3, 16, 16)), "autoencoder: a Model is no autoencoder"),
        *(
            (lambda value=value: pipe.decode(torch.tensor([0.0, value]).view(2, 1, 1, 1).expand(2, 16, 4, 4)), words)
            for value, words in [(math.nan, "latents: the values of number 1 are not finite"), (math.inf, "number 1")]
        ),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            call()


def named(model: Model, names: tuple[str, ...]) -> Model:
    part = TransformerConfig(width=16, depth=1, heads=2)
    sizes = {"channels": 16, "grid": (4, 4), "backbone": part, "num_classes": len(names), "class_names": names}
    return Model(model.autoencoder, Denoiser(DenoiserConfig(**sizes)))


def test_a_class_is_found_by_a_part_of_its_name_that_occurs_once(pipe):
    model = named(
        pipe.model, ("golden retriever", "flat-coated retriever", "lion", "sea lion", "tabby", *"abcdefghijklmnop")
    )
    assert [model.class_id(name) for name in ("golden", "Golden Retriever", "lion", "SEA", "tab")] == [0, 0, 2, 3, 4]
    with pytest.raises(
        UserError, match="'retriever': stands for golden retriever, flat-coated retriever; give a longer"
    ):
        model.class_id("retriever")
    with pytest.raises(UserError, match="'goldn retreiver': no such class; did you mean golden retriever"):
        model.class_id("goldn retreiver")
    with pytest.raises(UserError, match=r"no such class; the classes are golden retriever, .*, o and 1 more$"):
        model.class_id("123456")


def test_published_models_are_listed_with_their_facts(monkeypatch, tmp_path):
    monkeypatch.setenv("RAEKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = {each.name: each for each in list_models()}
    assert {"builtin:emoji", "rae-dinov2-b", "dit-dh-xl-256"} <= found.keys()
    assert "builtin:vit-tiny" not in found
    emoji, published = found["builtin:emoji"], found["dit-dh-xl-512"]
    assert (emoji.image_size, emoji.classes, emoji.cached) == (64, 9, True)
    assert (published.image_size, published.classes, published.encoder) == (512, 1000, "dinov2-b")
    assert (published.licence, published.cached) == ("apache-2.0", False)
    assert published.parameters - found["rae-dinov2-b-512"].parameters == pytest.approx(838.7e6 - 0.9e6, rel=2e-3)
    assert [each.name for each in list_models("siglip")] == ["rae-siglip2-b", "scale-rae-siglip2-so400m"]
    (tmp_path / "rae-siglip2-b" / "autoencoder").mkdir(parents=True)
    assert hub.published
    assert hub.published().in_cache("rae-siglip2-b")  # type: ignore[attr-defined]
    (tiny,) = list_encoders("tiny")
    assert (tiny.name, tiny.width, tiny.tokens, tiny.cached, tiny.hub_id) == ("builtin:vit-tiny", 192, 64, True, "")
    dinov3 = next(each for each in list_encoders("dinov3-l"))
    assert (dinov3.width, dinov3.tokens, dinov3.licence) == (1024, 256, "dinov3-license")


def test_the_classes_of_imagenet_have_names():
    from raekit.formats.releases import DENOISERS

    names = DENOISERS["dit-dh-xl-256"].config.class_names
    assert len({*names}) == 1000
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")


def test_a_seed_for_each_sample_must_be_given_for_each(pipe):
    with pytest.raises(UserError, match="seed: 2 seeds for 3 samples"):
        next(generate(pipe.model, [0, 1, 2], seed=[1, 2]))
    assert to_pil(next(generate(pipe.model, [0], seed=[7], sampling=Sampling(steps=2))).images[0]).size == (16, 16)
