"""The commands as a user types them, in this process; the exit code and what is printed are what counts."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.run import parse_args

import raekit
from raekit import cli
from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.evaluation.metrics import psnr
from raekit.inference import Sampling, generate, load
from raekit.models.autoencoder import Autoencoder
from raekit.models.encoders import load_encoder
from raekit.pictures import from_pil, to_pil
from raekit.train import checkpoint
from raekit.train.tracking import read_metrics


@dataclass(frozen=True)
class Done:
    code: int | str | None
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """`run("train", ...)`: what `raekit train ...` prints, and its exit code."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["raekit", *map(str, arguments)])
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return command


def assert_fails(done: Done, *words: object, code: int = 1) -> None:
    """It ended with `code` and one message that has all the words in it, without a traceback."""
    assert done.code == code, done
    assert len(re.findall("^error: ", done.err, re.MULTILINE)) == 1 or code == 2
    assert "Traceback" not in done.err
    for word in words:
        assert str(word) in done.err, done.err


# The command line itself


def test_version(run):
    for flag in ("--version", "-V"):
        assert run(flag) == Done(0, f"raekit {raekit.__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(run, arguments):
    done = run(*arguments)
    assert done.code == 0
    assert all(re.search(rf"^  {name} +[A-Z]", done.out, re.MULTILINE) for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(run, name):
    done = run(*name.split(), "--help")
    assert done.code == 0
    assert f"Example: raekit {name}" in done.out
    assert done.err == ""


@pytest.mark.parametrize("wrong", [["trian"], ["latents"], ["latents", "mesure"], ["--verbose"]])
def test_an_unknown_command_is_named(run, wrong):
    done = run(*wrong)
    assert_fails(done, repr(" ".join(wrong)), "is no command", "generate", code=2)
    assert done.out == ""


def test_a_missing_or_mistyped_option_is_named(run, tiny_model):
    assert_fails(run("generate", tiny_model), "--out", code=2)
    assert_fails(run("generate", tiny_model, "--out", "x.png", "--cuont", 3), "--cuont", code=2)


def test_an_interrupt_is_130(run, monkeypatch):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.tyro, "cli", interrupted)
    assert run("info", "x").code == 130


def test_recipes_are_listed_with_their_summaries(run):
    done = run("recipes")
    assert done.code == 0
    for name in ("emoji_encoder", "emoji_decoder", "emoji_dit_dh"):
        assert re.search(rf"{name} +[A-Z].*emoji", done.out)


# Training


def tiny(images: str, **options: object) -> list[str]:
    """Overrides that make a minute's recipe one of a second."""
    settings: dict[str, object] = {
        "data.source": images,
        "data.image-size": 16,
        "encoder.image-size": 16,
        "encoder.patch-size": 4,
        "encoder.width": 16,
        "encoder.depth": 1,
        "encoder.heads": 2,
        "decoder-width": 16,
        "train.steps": 3,
        "train.batch-size": 4,
        "train.precision": "fp32",
        "train.log-every": 1,
        "train.checkpoint-every": 1,
    }
    settings |= {name.replace("__", ".").replace("_", "-"): value for name, value in options.items()}
    return [text for name, value in settings.items() for text in (f"--{name}", *str(value).split(" "))]


def test_a_recipe_trains_and_its_run_can_be_looked_at(run, images, tmp_path):
    done = run("train", "emoji_encoder", "--run", tmp_path / "run", *tiny(images))
    assert done.code == 0, done.err
    assert done.out == f"artifact: {tmp_path / 'run' / 'artifact'}\n"
    assert re.search(r"emoji_encoder: 3/3 .* encoder/loss \d\.\d{4}", done.err)
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "encoder/loss" in r] == [1, 2, 3]
    assert load_encoder(str(tmp_path / "run")).spec.width == 16
    info = run("info", tmp_path / "run")
    assert info.code == 0
    assert "run: checkpoints step-00000002, step-00000003" in info.out
    assert "encoder: " in info.out
    assert '"width": 16' in info.out
    # The same again has nothing to do.
    assert run("train", "emoji_encoder", "--run", tmp_path / "run", *tiny(images)).code == 0


def test_training_without_a_recipe_shows_the_usage(run):
    done = run("train")
    assert done.code == 2
    assert "usage: raekit train RECIPE" in done.out
    assert "emoji_encoder" in done.out


def test_an_unknown_recipe_lists_those_that_there_are(run):
    assert_fails(run("train", "emoji"), "recipe 'emoji': no such recipe; there are ", "emoji_decoder")


def test_torchrun_passes_the_documented_command_on(run):
    documented = next(line for line in run("train", "--help").out.splitlines() if "torchrun" in line)
    words = documented.partition("torchrun ")[2].split()
    options = parse_args([*words, "--run", "runs/x", "--train.steps", "5"])
    assert (options.training_script, options.module, options.nproc_per_node) == ("raekit", True, "8")
    assert options.training_script_args == ["train", "RECIPE", "--run", "runs/x", "--train.steps", "5"]


def test_a_recipes_help_lists_what_can_be_overridden(run):
    done = run("train", "emoji_dit_dh", "--help")
    assert done.code == 0
    for option in ("--run", "--dry-run", "--train.steps", "--optim.lr", "--denoiser.head.width", "--data.source"):
        assert option in done.out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["--trian.steps", "5"], ["--trian.steps"]),
        (["--train.step", "5"], ["--train.step"]),
        (["--train.steps", "many"], ["--train.steps", "many"]),
        (["--optim.decay", "square"], ["--optim.decay", "square"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_override_is_named_and_nothing_runs(run, images, tmp_path, override, words):
    done = run("train", "emoji_encoder", "--run", tmp_path / "run", *tiny(images), *override)
    assert_fails(done, *words, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"train.steps": 0}, ["train.steps: 0 must be at least 1"]),
        ({"train.micro-batch": -2}, ["train.micro_batch: -2"]),
        ({"train.micro-batch": 3}, ["train.batch_size: 4", "train.micro_batch = 3"]),
        ({"mask-ratio": 1.5}, ["mask_ratio: 1.5"]),
        ({"encoder.patch-size": 5}, ["encoder.patch_size: 5", "encoder.image_size = 16"]),
        ({"encoder.heads": 3}, ["width: 16", "heads = 3"]),
        ({"decoder-width": 18}, ["decoder_width: 18"]),
        ({"optim.lr": -1}, ["optim.lr: -1.0 must not be negative"]),
        ({"optim.eps": "nan"}, ["optim.eps: nan"]),
        ({"optim.betas": "0.9 1.0"}, ["optim.betas: (0.9, 1.0)"]),
        ({"ema": 1.5}, ["ema: 1.5 must be at least 0 and below 1"]),
        ({"optim.decay-end": 0}, ["optim.decay_end: 0", "optim.warmup_steps"]),
        ({"data.image-size": 32}, ["data.image_size: 32", "encoder.image_size = 16"]),
        ({"data.source": "folder:/nowhere/at/all"}, ["/nowhere/at/all"]),
        ({"data.source": "emojis"}, ["'emojis'", "folder:DIR"]),
    ],
)
def test_a_bad_value_is_one_message_that_names_it_and_does_not_occupy_the_run(run, images, tmp_path, override, words):
    command = ["train", "emoji_encoder", "--run", tmp_path / "run"]
    done = run(*command, *tiny(images, **override))
    assert_fails(done, *words)
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "run" / "config.json").exists()
    assert run(*command, *tiny(images, train__steps=1)).code == 0


def test_a_folder_without_an_image_says_what_is_read(run, tmp_path):
    done = run("train", "emoji_encoder", "--run", tmp_path / "run", *tiny(f"folder:{tmp_path}"))
    assert_fails(done, tmp_path, ".png", ".webp")


def test_another_config_on_a_run_prints_the_difference_and_runs_nothing(run, images, tmp_path):
    assert run("train", "emoji_encoder", "--run", tmp_path, *tiny(images, train__steps=1)).code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = run("train", "emoji_encoder", "--run", tmp_path, *tiny(images, train__steps=2, optim__lr=0.5))
    assert_fails(done, f"{tmp_path}: belongs to another configuration:", "  train.steps: 1 -> 2\n")
    assert re.search(r"^  optim\.lr: 0\.\d+ -> 0\.5$", done.err, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_stopped_training_says_how_to_go_on(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr("raekit.stages.run.train", lambda *arguments: False)
    done = run("train", "emoji_encoder", "--run", tmp_path, *tiny(images))
    assert (done.code, done.out, done.err) == (130, "", "stopped; the same command goes on from here\n")


def test_a_truncated_checkpoint_is_named(run, images, tmp_path):
    command = ["train", "emoji_encoder", "--run", tmp_path, *tiny(images)]
    assert run(*command).code == 0
    newest = checkpoint.checkpoints(tmp_path / "checkpoints")[-1]
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:500])
    done = run(*command)
    assert_fails(done, newest, "remove this folder")
    assert len(done.err.splitlines()) == 1
    assert load_encoder(str(tmp_path)).spec.width == 16


def test_a_full_disk_is_one_message(run, images, full_disk):
    with suppress(OSError), (full_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    command = ["train", "emoji_encoder", "--run", full_disk / "run", *tiny(images)]
    done = run(*command)
    assert_fails(done, full_disk / "run", "No space left on device")
    assert len(done.err.splitlines()) == 1
    (full_disk / "filler").unlink()
    assert run(*command).code == 0


def corrupt(images: str, folder: Path, count: int) -> str:
    """A copy of the pictures in which `count` of the 30 for training are no pictures."""
    root = Path(images.removeprefix("folder:"))
    paths = sorted(root.rglob("*.png"))
    broken = [path for path in paths if path.relative_to(root).parts[0] == "train"][:count]
    for path in paths:
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"broken" if path in broken else path.read_bytes())
    return f"folder:{folder}"


def test_a_corrupt_image_is_named_and_left_out(images, tmp_path):
    """In a process of its own, for what it logs."""
    source = corrupt(images, tmp_path / "images", 1)
    options = tiny(source, data__max_unreadable=0.1, train__steps=8)
    command = [sys.executable, "-m", "raekit", "train", "emoji_encoder", "--run", str(tmp_path / "run"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    broken = tmp_path / "images" / "train" / "blue" / "00.png"
    assert done.stderr.count(f"WARNING: unreadable image {broken}: no known image format\n") >= 1
    assert done.stdout == f"artifact: {tmp_path / 'run' / 'artifact'}\n"


def test_too_many_corrupt_images_are_counted_and_named(run, images, tmp_path):
    source = corrupt(images, tmp_path / "images", 4)
    options = tiny(source, data__max_unreadable=0.1, train__steps=8)
    done = run("train", "emoji_encoder", "--run", tmp_path / "run", *options)
    assert_fails(done, "4 of 30 images are unreadable", "max_unreadable=0.1", tmp_path / "images" / "train" / "blue")


def test_a_dry_run_tells_the_cost_and_writes_nothing(run, images, tmp_path):
    done = run("train", "emoji_encoder", "--dry-run", "--run", tmp_path / "run", *tiny(images, train__steps=1500))
    assert done.code == 0, done.err
    config, _, cost = done.out.partition("\n\n")
    assert json.loads(config)["train"]["steps"] == 1500
    # ViT: 48 x 16 + 16, one block of 3,280; decoder: 16 x 16 + 16, a mask token, two blocks, a norm, 16 x 48 + 48.
    block = 2 * 2 * 16 + 4 * (16 * 16 + 16) + 2 * 16 * 64 + 64 + 16
    parameters = 48 * 16 + 16 + block + 16 * 16 + 16 + 16 + 2 * block + 2 * 16 + 16 * 48 + 48
    assert f"encoder: {parameters:,} parameters\n" in cost
    assert re.search(r"^  0\.00 GFLOPs forward an image", cost, re.MULTILINE)
    assert re.search(r"memory: about 0\.00 GiB of state and 0\.00 GiB of activations for 4 images", cost)
    assert cost.endswith("1,500 steps of 4 images: 6,000 images\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["emoji_encoder", "emoji_decoder"])
def test_a_dry_run_of_a_recipe_as_it_is(run, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    done = run("train", recipe, "--dry-run", "--train.batch-size", 2)
    assert done.code == 0, done.err
    gflops = float(re.search(r"([\d.]+) GFLOPs forward an image", done.out)[1])  # type: ignore[index]
    assert gflops > 0.01
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("train", "emoji_encoder", "--device", "cuda", "--run", tmp_path, *tiny(images))
    assert_fails(done, "--device cuda", "no CUDA device")


# Generating


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def test_a_grid_has_a_row_for_each_class(run, tiny_model, tmp_path):
    out = tmp_path / "new" / "grid.png"
    done = run("generate", tiny_model, "--out", out, "--count", 2, "--steps", 2, "--seed", 3)
    assert done.code == 0, done.err
    assert done.out == f"6 images: {out}\n"
    sheet = pixels(out)
    assert sheet.shape == (3 * 18 + 2, 2 * 18 + 2, 3)
    model = load(str(tiny_model))
    samples = torch.cat([s.images for s in generate(model, [0, 0, 1, 1, 2, 2], seed=3, sampling=Sampling(steps=2))])
    for i, image in enumerate(samples):
        y, x = 2 + i // 2 * 18, 2 + i % 2 * 18
        assert np.array_equal(sheet[y : y + 16, x : x + 16], np.asarray(to_pil(image)))
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"]


def test_a_grid_of_one_class_is_as_square_as_possible(run, tiny_model, tmp_path):
    done = run("generate", tiny_model, "--class", "green", "--count", 5, "--steps", 1, "--out", tmp_path / "grid.png")
    assert done.code == 0, done.err
    assert pixels(tmp_path / "grid.png").shape == (2 * 18 + 2, 3 * 18 + 2, 3)


def test_classes_are_given_by_name_or_number_in_any_number(run, tiny_model, tmp_path):
    options = ["--count", 1, "--steps", 1]
    for name, classes in (("names", ["red", "blue"]), ("numbers", [2, 0])):
        done = run("generate", tiny_model, "--class", *classes, *options, "--out", tmp_path / f"{name}.png")
        assert done.code == 0, done.err
    assert np.array_equal(pixels(tmp_path / "names.png"), pixels(tmp_path / "numbers.png"))


def test_a_folder_gets_one_picture_a_sample_and_is_completed_by_the_same_command(run, tiny_model, tmp_path):
    out = tmp_path / "samples"
    command = ["generate", tiny_model, "--out", out, "--count", 2, "--steps", 2, "--batch-size", 4]
    assert run(*command).code == 0
    names = [f"{i:06d}.png" for i in range(6)]
    assert sorted(path.name for path in out.iterdir()) == names
    first = [pixels(out / name) for name in names]
    assert len({image.tobytes() for image in first}) == 6
    (out / names[1]).unlink()
    (out / names[4]).write_bytes(b"torn")
    assert run(*command).code == 0
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(np.array_equal(pixels(out / name), image) for name, image in zip(names, first, strict=True))


def test_guidance_changes_the_picture(run, tiny_model, tmp_path):
    for name, options in (("plain", []), ("guided", ["--guidance", "cfg:3.0@0.1-0.9"])):
        command = ["generate", tiny_model, "--class", "red", "--count", 1, "--steps", 3, *options]
        assert run(*command, "--out", tmp_path / f"{name}.png").code == 0
    assert not np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "guided.png"))


def test_a_weaker_model_guides_and_the_passes_are_told(run, tiny_model, weaker, tmp_path):
    command = ["generate", tiny_model, "--class", "red", "--count", 1, "--steps", 3, "--out"]
    plain = run(*command, tmp_path / "plain.png")
    assert "(forward passes for an image: 3 model)" in plain.out
    done = run(*command, tmp_path / "guided.png", "--guidance", "auto:3.0", "--weak", weaker)
    assert "(forward passes for an image: 3 model, 3 weak)" in done.out, done.err
    assert not np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "guided.png"))
    same = run(*command, tmp_path / "same.png", "--guidance", "auto:3.0", "--weak", tiny_model)
    assert_fails(same, f"--weak: {tiny_model} is the model itself")
    assert_fails(run(*command, tmp_path / "no.png", "--weak", weaker), "weak: no effect without guidance auto")


@pytest.fixture
def weaker(tiny_model, tmp_path) -> Path:
    denoiser = load(str(tiny_model)).denoiser
    torch.nn.init.normal_(denoiser.final.out.weight, std=0.1)
    denoiser.save(tmp_path / "weaker")
    return tmp_path / "weaker"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--class", "purple"], ["class 'purple': no such class; there are blue, green, red"]),
        (["--class", "7"], ["class '7': no such class"]),
        (["--count", "0"], ["--count: 0"]),
        (["--batch-size", "0"], ["batch_size: 0"]),
        (["--steps", "0"], ["steps: 0"]),
        (["--guidance", "cfg"], ["guidance: 'cfg'", "cfg:2.0@0.1-0.9"]),
        (["--guidance", "cfg:1"], ["a scale of 1"]),
        (["--guidance", ""], ["guidance: ''"]),
        (["--guidance", "internal:2"], ["guidance: internal needs a base output"]),
        (["--guidance", "auto:2"], ["guidance: auto needs a weaker model; give it with --weak"]),
        (["--reuse", "2", "--solver", "heun"], ["reuse: only for"]),
    ],
)
def test_a_wrong_wish_is_one_message_and_leaves_no_picture(run, tiny_model, tmp_path, options, words):
    done = run("generate", tiny_model, "--out", tmp_path / "grid.png", *options)
    assert_fails(done, *words)
    assert len(done.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_or_not_whole_is_named(run, tiny_model, tmp_path):
    out = tmp_path / "grid.png"
    assert_fails(run("generate", tmp_path / "none", "--out", out), tmp_path / "none", "no such folder")
    assert_fails(run("generate", "builtin:none", "--out", out), "builtin:none", "builtin:emoji")
    assert_fails(run("generate", tmp_path, "--out", out), tmp_path, "holds no autoencoder")
    assert_fails(run("generate", tiny_model / "encoder", "--out", out), "holds no autoencoder")


def test_a_place_that_cannot_be_written_is_named(run, tiny_model, tmp_path):
    (tmp_path / "file").touch()
    done = run("generate", tiny_model, "--steps", 1, "--count", 1, "--out", tmp_path / "file" / "grid.png")
    assert_fails(done, tmp_path / "file")


def test_a_grid_on_a_full_disk_leaves_the_old_one(run, tiny_model, full_disk):
    out = full_disk / "grid.png"
    command = ["generate", tiny_model, "--steps", 1, "--count", 2, "--out", out]
    assert run(*command).code == 0
    before = out.read_bytes()
    with suppress(OSError), (full_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert_fails(run(*command, "--seed", 1), out, "No space left on device")
    assert out.read_bytes() == before


# Reconstructing


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def test_reconstructions_stand_beside_their_originals_with_their_psnr(run, tiny_model, tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(2)]
    out = tmp_path / "out"
    done = run("reconstruct", tiny_model, *paths, "--out", out)
    assert done.code == 0, done.err
    autoencoder = Autoencoder.load(str(tiny_model))
    for path in paths:
        sheet = pixels(out / path.name)
        assert sheet.shape == (16 + 4, 2 * 18 + 2, 3)
        with Image.open(path) as image:
            size = image.resize((16, 16)).size
        original = from_pil(Image.fromarray(sheet[2:18, 2:18]))
        assert (original.shape[2], original.shape[1]) == size
        decoded = autoencoder.decode(autoencoder.encode(original[None]))
        assert np.array_equal(sheet[2:18, 20:36], np.asarray(to_pil(decoded[0])))
        value = psnr(decoded, original[None]).item()
        assert re.search(rf"{path.name} .* {value:.2f} ", done.out)
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png"]
    # The same again writes the same files.
    assert run("reconstruct", tiny_model, *paths, "--out", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png"]


def test_one_unreadable_file_does_not_keep_the_others_from_being_written(run, tiny_model, tmp_path):
    good = [picture(tmp_path / name, 0) for name in ("first.png", "last.png")]
    (tmp_path / "bad.png").write_text("bad")
    out = tmp_path / "out"
    done = run("reconstruct", tiny_model, good[0], tmp_path / "bad.png", tmp_path / "no.png", good[1], "--out", out)
    assert_fails(done, f"{tmp_path / 'bad.png'}: not a readable image", f"{tmp_path / 'no.png'}: no such file")
    assert "first.png" in done.out
    assert sorted(path.name for path in out.iterdir()) == ["first.png", "last.png"]


def test_pictures_of_one_name_do_not_overwrite_each_other(run, tiny_model, tmp_path):
    paths = [picture(tmp_path / name, i) for i, name in enumerate(["a/x.png", "b/x.png", "b/x.jpg", "b/y.png"])]
    out = tmp_path / "out"
    assert run("reconstruct", tiny_model, *paths, "--out", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == ["x-0.png", "x-1.png", "x-2.png", "y.png"]
    assert len({pixels(path).tobytes() for path in out.iterdir()}) == 4


def test_originals_are_never_overwritten(run, tiny_model, tmp_path):
    path = picture(tmp_path / "x.png", 0)
    before = path.read_bytes()
    assert_fails(run("reconstruct", tiny_model, path, "--out", tmp_path), "--out", tmp_path)
    assert path.read_bytes() == before


def test_reconstructing_nothing_is_refused(run, tiny_model, tmp_path):
    done = run("reconstruct", tiny_model, "--out", tmp_path / "out")
    assert_fails(done, code=1 if done.code == 1 else 2)
    assert not (tmp_path / "out").exists()


# Measuring and scoring


def test_measured_latents_are_written(run, images, tiny_model, tmp_path):
    out = tmp_path / "new" / "statistics.safetensors"
    done = run("latents", "measure", tiny_model, "--source", images, "--out", out, "--batch-size", 7)
    assert done.code == 0, done.err
    assert "(16, 4, 4)" in done.out
    measured = load_file(out)
    batch = next(Loader(DataConfig(source=images, image_size=16), 0).once(30, World()))
    tokens = Autoencoder.load(str(tiny_model)).tokens(batch.pixels()).double().numpy()
    np.testing.assert_allclose(measured["mean"].numpy(), tokens.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(measured["var"].numpy(), tokens.var(0), rtol=0, atol=1e-6)


def test_measuring_what_is_not_there(run, images, tiny_model, tmp_path):
    out = tmp_path / "statistics.safetensors"
    assert_fails(run("latents", "measure", "dino", "--source", images, "--out", out), "encoder dino", "dinov2-s")
    done = run("latents", "measure", tiny_model, "--source", "folder:/nowhere", "--out", out)
    assert_fails(done, "/nowhere")
    assert not out.exists()


def test_scores_are_printed_and_written(run, images, tiny_model, weaker, tmp_path):
    out = tmp_path / "scores.json"
    options = ["--source", images, "--features", tiny_model, "--count", 6, "--steps", 1, "--weak", weaker]
    assert_fails(run("evaluate", tiny_model, *options, "--out", out), "--weak: no effect without --guidance auto")
    options += ["--guidance", "cfg:2.0", "auto:1.5"]
    done = run("evaluate", tiny_model, *options, "--out", out)
    assert done.code == 0, done.err
    written = json.loads(out.read_text())
    assert (written["model"], written["count"], written["steps"]) == (str(tiny_model), 6, 1)
    rows = written["scores"]
    assert list(rows) == [
        "held-out images",
        "training images",
        "reconstructions",
        "decoded noise",
        "samples",
        "samples, cfg:2.0",
        "samples, auto:1.5",
    ]
    name = re.sub("[^0-9A-Za-z]+", "_", tiny_model.name).strip("_")
    assert rows["samples"].keys() >= {f"fd_{name}", f"knn_accuracy_{name}", f"nearest_distance_{name}"}
    assert rows["reconstructions"].keys() >= {"psnr", "ssim"}
    for row, values in rows.items():
        assert row in done.out
        assert all(np.isfinite(value) for value in values.values())
    assert f"{rows['samples'][f'fd_{name}']:.4g}" in done.out


def test_info_tells_what_a_model_holds(run, tiny_model, tmp_path):
    done = run("info", tiny_model)
    assert done.code == 0
    numbers = sum(p.numel() for p in load(str(tiny_model)).denoiser.state_dict().values())
    assert f"{numbers:,} numbers, float32" in done.out
    for kind in ("encoder", "autoencoder", "denoiser"):
        assert re.search(rf"^  {kind}: \d+ tensors", done.out, re.MULTILINE)
    assert '"class_names": [' in done.out
    assert_fails(run("info", tmp_path), tmp_path, "neither a model, an artifact nor a run")
    assert_fails(run("info", tmp_path / "none"), tmp_path / "none", "no such folder")
