"""The commands as a user types them, run in this process. The tests check the exit code and the printed text."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._inductor.exc import InductorError
from torch.distributed.run import parse_args

import raekit
from raekit import cli
from raekit.config import to_dict
from raekit.data.images import log_once, read_image
from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.distributed.locks import lock
from raekit.evaluation.pairs import psnr, ssim
from raekit.evaluation.references import read_reference
from raekit.evaluation.reports import read_report
from raekit.flow.sampling import Sampling
from raekit.inference.generation import generate
from raekit.inference.model import load
from raekit.inference.sample_folders import generate_folder, parts_of
from raekit.inference.shards import statistics_fingerprint
from raekit.models import registry
from raekit.models.autoencoder import Autoencoder
from raekit.models.encoders import load_encoder
from raekit.models.perceptual import LPIPS, load_perceptual
from raekit.models.registry import LayersConfig
from raekit.pictures import from_pil, quantize, to_pil
from raekit.recipes import find, names
from raekit.training import checkpoint
from raekit.training.tracking import read_metrics


@dataclass(frozen=True)
class Done:
    code: int | str | None
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Return a function: `run("train", ...)` runs `raekit train ...` and returns the exit code and the output."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> Done:
        log_once.cache_clear()  # as in a new process
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
    """Assert that a command ended with `code` and one message that contains all words, without a traceback."""
    assert done.code == code, done
    assert len(re.findall("^error: ", done.err, re.MULTILINE)) == 1 or code == 2
    assert "Traceback" not in done.err
    for word in words:
        assert str(word) in done.err, done.err


# The command line itself


def test_a_reader_that_ends_early_is_not_an_error():
    for arguments in (["--help"], ["generate", "--help"]):
        command = [sys.executable, "-m", "raekit", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stderr
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0


def test_version(run):
    for flag in ("--version", "-V"):
        assert run(flag) == Done(0, f"raekit {raekit.__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(run, arguments):
    done = run(*arguments)
    assert done.code == 0
    assert all(re.search(rf"^  {name} +[A-Z]", done.out, re.MULTILINE) for name in cli.COMMANDS)


def test_a_command_is_described_in_one_line_of_a_hundred_columns(run):
    assert all(len(line) <= 100 for line in run("--help").out.splitlines())


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_group_lists_its_commands(run, flag):
    done = run("latents", flag)
    assert done.code == 0
    assert re.findall(r"^  (\w+ \w+)", done.out, re.MULTILINE) == [
        "latents measure",
        "latents cache",
        "latents generate",
    ]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(run, name):
    done = run(*name.split(), "--help")
    assert done.code == 0
    assert f"Example: raekit {name}" in done.out
    assert done.err == ""


def test_positional_arguments_have_names_and_the_help_of_a_field_is_one_paragraph(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert "usage: raekit generate [-h] [OPTIONS] [MODEL]" in run("generate", "--help").out
    assert "usage: raekit push [-h] [OPTIONS] MODEL REPOSITORY" in run("push", "--help").out
    text = " ".join(run("train", "emoji_decoder", "--help").out.replace("│", " ").split())
    assert "as in the paper; `uniform` is tau * U(0, 1), as in the published code." in text
    lines = run("train", "emoji_decoder", "--help").out.splitlines()
    assert not any(line.startswith("│       (RAE v1)") for line in lines)


@pytest.mark.parametrize("wrong", [["trian"], ["latents"], ["latents", "mesure"], ["--verbose"], ["trian", "--help"]])
def test_an_unknown_command_is_named(run, wrong):
    done = run(*wrong)
    named = " ".join(each for each in wrong if each != "--help")
    assert_fails(done, f"error: {named!r} is not a command", "generate", code=2)
    assert done.out == ""


def test_commands_are_listed_in_groups(run):
    done = run("--help")
    titles = re.findall(r"^(\w.*)$", done.out, re.MULTILINE)[1:]
    assert titles == list(cli.GROUPS)
    family = run("latents", "--help")
    members = re.findall(r"^  (\w+)", family.out, re.MULTILINE)
    assert {*members} == {"latents"}
    assert len(members) == sum(name.startswith("latents ") for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [(["gennerate"], "generate"), (["latents", "mesure"], "latents measure"), (["recipe"], "recipes")],
)
def test_a_mistyped_command_has_a_suggestion(run, wrong, meant):
    assert_fails(run(*wrong), f"'{' '.join(wrong)}' is not a command; did you mean {meant}", code=2)


@pytest.mark.parametrize(
    ("words", "index", "wanted"),
    [
        (["raekit", "gen"], 1, ["generate"]),
        (["raekit", "generate", "--cl"], 2, ["--class"]),
        (["raekit", "generate", "--guid"], 2, ["--guidance"]),
        (["raekit", "latents", "c"], 2, ["cache"]),
        (["raekit", "latents", "cache", "--fl"], 3, ["--flip"]),
        (["raekit", "train", "emoji_r"], 2, ["emoji_raev2"]),
    ],
)
def test_a_shell_completes_commands_and_options(run, tmp_path, words, index, wanted):
    script = run("completion", "bash").out
    line = f'{script}\nCOMP_WORDS=({" ".join(words)}); COMP_CWORD={index}; _raekit; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.split() == wanted


def test_completions_of_other_shells_name_every_command(run):
    for shell in ("zsh", "fish"):
        script = run("completion", shell).out
        assert all(name.split()[-1] in script for name in cli.COMMANDS)


def test_a_dataset_is_looked_at(run, images, tmp_path):
    done = run("data", corrupt(images, tmp_path / "images", 3), "--out", tmp_path / "montage.png")
    assert done.code == 0, done.err
    assert ": 30 training and 9 held-out images in 3 classes\n" in done.out
    assert re.search(r"^ ?blue +13 *$", done.out, re.MULTILINE)
    assert re.search(r"^ ?width +16 +18 +20 *$", done.out, re.MULTILINE)
    assert "3 of 39 images cannot be read" in done.out
    assert "00.png: not a known image format" in done.out
    assert pixels(tmp_path / "montage.png").shape == (6 * 98 + 2, 6 * 98 + 2, 3)
    assert "of 39 images nearly equal an earlier image" in done.out
    few = run("data", images, "--count", 4, "--split", "heldout").out
    assert "9 held-out images in 3 classes" in few
    assert "0 of 4 images cannot be read" in few
    assert "nearly equal" not in run("data", images, "--encoder", "None").out
    assert_fails(run("data", images, "--count", 0), "--count: 0 must be at least 1")
    inside = images.removeprefix("folder:")
    assert_fails(run("data", images, "--out", f"{inside}/montage.png"), "montage.png: lies in the folder of folder:")


def test_a_missing_or_mistyped_option_is_named(run, tiny_model):
    assert_fails(run("interpolate", tiny_model), "--out", code=2)
    assert_fails(run("generate", tiny_model, "--out", "x.png", "--cuont", 3), "--cuont", code=2)


def test_an_interrupt_is_130(run, monkeypatch):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.tyro, "cli", interrupted)
    assert run("info", "x").code == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("demo --run OUT", "raekit.experiments.demo.run_demo"),
        ("study width --out OUT", "raekit.experiments.studies.run_study"),
        ("evaluate builtin:emoji --out OUT", "raekit.evaluation.evaluate.evaluate"),
        ("generate builtin:emoji --out OUT", "raekit.inference.sample_folders.generate_folder"),
        ("generate builtin:emoji --out OUT.npz", "raekit.inference.sample_folders.generate_npz"),
        ("reconstruct builtin:emoji x.png --out OUT", "raekit.inference.reconstruction_folders.reconstruct_folder"),
        ("encode builtin:emoji x.png --out OUT", "raekit.inference.latents.encode_files"),
        ("latents cache builtin:emoji --out OUT", "raekit.inference.cache.cache_latents"),
        ("data pack emoji --size 32 --out OUT", "raekit.data.packing.pack"),
    ],
)
def test_a_signal_ends_work_that_can_be_resumed_with_the_status_for_that(
    run, tmp_path, monkeypatch, command, work, number
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    monkeypatch.setattr(work, lambda *arguments, **options: signal.raise_signal(number))
    try:
        done = run(*command.replace("OUT", str(tmp_path / "out")).split())
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 75
    assert done.err.endswith("stopped; run the same command again to resume\n")


def test_an_interrupted_grid_cannot_be_resumed(run, tmp_path, monkeypatch):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raekit.inference.generation.generate", interrupted)
    done = run("generate", "builtin:emoji", "--class", "flags", "--out", tmp_path / "grid.png")
    assert done.code == 130
    assert "a grid cannot be resumed" in done.err


def test_studies_are_listed_with_their_claims_and_costs(run):
    done = run("study")
    assert done.code == 0
    assert re.search(r"width .* transformer narrower than a token .* minutes on one core", done.out)
    assert_fails(run("study", "widht"), "did you mean width?")


def test_recipes_are_listed_by_purpose_with_their_summaries_and_costs(run):
    done = run("recipes")
    assert done.code == 0
    order = (
        "Start here",
        "emoji_dit_dh",
        "Stage 1 on ImageNet: a",
        "mae_decoder",
        "Stage 2 on ImageNet: a",
        "pixel_dit",
    )
    places = [done.out.index(words) for words in order]
    assert places == sorted(places)
    assert "27 minutes on one busy CPU core" in done.out
    for what in ("size", "memory", "cost"):
        assert len(re.findall(rf"^    {what}: +\S", done.out, re.MULTILINE)) == len(names())
    for name in ("emoji_encoder", "emoji_decoder", "emoji_dit_dh"):
        assert re.search(rf"  {name}\n    [A-Z].*emoji", done.out)


# Training


def tiny(images: str, **options: object) -> list[str]:
    """Return options that shrink a recipe so that it trains in a second."""
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
    assert re.search(r"run: 3/3 .* encoder/loss \d\.\d{4}", done.err)
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "encoder/loss" in r] == [1, 2, 3]
    assert load_encoder(str(tmp_path / "run")).spec.width == 16
    info = run("info", tmp_path / "run")
    assert info.code == 0
    assert "run: checkpoints step-00000002, step-00000003" in info.out
    assert re.search(r'last record: \{"step": 3, .*"encoder/loss": ', info.out)
    assert "encoder: " in info.out
    assert '"width": 16' in info.out
    report = run("report", tmp_path / "run")
    assert report.out == f"report: {tmp_path / 'run' / 'report.html'}\n"
    assert "encoder loss" in (tmp_path / "run" / "report.html").read_text()
    # The same command has nothing to do.
    assert run("train", "emoji_encoder", "--run", tmp_path / "run", *tiny(images)).code == 0


def test_a_list_that_is_given_twice_is_an_error(run):
    for arguments, option in [
        (("generate", "builtin:emoji", "--class", "flags", "--class=symbols"), "--class"),
        (("evaluate", "builtin:emoji", "--relative-to", "a", "--relative_to", "b"), "--relative-to"),
        (("train", "emoji_decoder", "--train.track", "wandb", "--train.track", "tensorboard"), "--train.track"),
    ]:
        assert_fails(run(*arguments), f"{option}: given 2 times; give all values after one {option}", code=2)


def test_training_without_a_recipe_shows_the_usage(run):
    done = run("train")
    assert done.code == 2
    assert "usage: raekit train RECIPE" in done.out
    assert "emoji_encoder" in done.out


def test_an_unknown_recipe_lists_those_that_there_are(run, tmp_path):
    (tmp_path / "config.json").touch()
    assert_fails(run("train", tmp_path), f"a run, not a recipe; to resume it, use raekit train --resume {tmp_path}")
    assert_fails(run("train", "nothing"), "recipe 'nothing': no such recipe; choose from: ", "emoji_decoder")
    assert_fails(run("train", "emoji_dit"), "recipe 'emoji_dit': no such recipe; did you mean emoji_dit_dh")


def test_torchrun_passes_the_documented_command_on():
    guide = (Path(__file__).parents[1] / "docs" / "training.md").read_text("utf-8")
    documented = re.search(r"`torchrun (.* -- train RECIPE)`", guide)
    assert documented
    options = parse_args([*documented[1].split(), "--run", "runs/x", "--train.steps", "5"])
    assert (options.training_script, options.module, options.nproc_per_node) == ("raekit", True, "8")
    assert options.training_script_args == ["train", "RECIPE", "--run", "runs/x", "--train.steps", "5"]


@pytest.mark.parametrize("recipe", ["emoji_encoder", "emoji_decoder_gan", "emoji_dit_dh", "emoji_raev2"])
def test_every_option_of_a_recipe_is_explained(run, recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # so that no panel stands next to another
    lines = [line.strip(" │") for line in run("train", recipe, "--help").out.splitlines()]
    options = [i for i, line in enumerate(lines) if line.startswith("--")]
    assert len(options) > 30
    for i in options:
        explained = re.split(r"  +", lines[i], maxsplit=1)[1:] or [lines[i + 1]]
        assert not re.match(r"\((default|required|optional)", explained[0]), lines[i]


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
        ({"optim.eps": "nan"}, ["OptimConfig.eps: Input should be a finite number (given: nan)"]),
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
    (tmp_path / "photos").mkdir()
    done = run("train", "emoji_encoder", "--run", tmp_path / "run", *tiny(f"folder:{tmp_path / 'photos'}"))
    assert_fails(done, tmp_path / "photos", ".png", ".webp")


def test_another_config_on_a_run_prints_the_difference_and_runs_nothing(run, images, tmp_path):
    assert run("train", "emoji_encoder", "--run", tmp_path, *tiny(images, train__steps=1)).code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = run("train", "emoji_encoder", "--run", tmp_path, *tiny(images, train__steps=2, optim__lr=0.5))
    assert_fails(
        done,
        f"{tmp_path}: belongs to a run with a different config:",
        "  train.steps: 1 -> 2 (possible with --change)\n",
    )
    assert re.search(r"^  optim\.lr: 0\.\d+ -> 0\.5 \(possible with --change\)$", done.err, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_in_use_is_said_by_every_command_that_fills_it(run, images, tiny_model, tmp_path):
    picture = next(Path(images.removeprefix("folder:")).rglob("*.png"))
    commands = [
        ["train", "emoji_encoder", "--run", tmp_path, *tiny(images)],
        ["generate", tiny_model, "--out", tmp_path],
        ["generate", tiny_model, "--out", tmp_path.with_suffix(".npz")],
        ["reconstruct", tiny_model, picture, "--out", tmp_path],
        ["encode", tiny_model, picture, "--out", tmp_path],
        ["latents", "cache", tiny_model, "--source", images, "--out", tmp_path],
        ["evaluate", tiny_model, "--count", 4, "--source", images, "--features", "builtin:vit-tiny", "--out", tmp_path],
        ["demo", "--quick", "--run", tmp_path],
    ]
    with lock(tmp_path, World()), lock(parts_of(tmp_path.with_suffix(".npz")), World()):
        for command in commands:
            assert_fails(run(*command), f"in use by process {os.getpid()} on ")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_run_is_resumed_and_extended_by_its_name_alone(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(images.removeprefix("folder:")).parent)
    source = f"folder:{Path(images).name}"
    done = run("train", "emoji_encoder", "--run", tmp_path / "run", *tiny(source, optim__decay="constant"))
    assert done.code == 0, done.err
    monkeypatch.chdir(tmp_path)
    done = run("train", "--resume", "run", "--train.steps", 5)
    assert_fails(done, "run: belongs to a run with a different config:", "train.steps: 3 -> 5 (possible with --change)")
    done = run("train", "--resume", "run", "--train.steps", 5, "--dry-run")
    assert done.code == 0
    refusal = "5 steps of 4 images: 20 images\n\nThis training would not start. run: belongs to a run with a different"
    assert refusal in done.out
    assert "would not start" not in run("train", "--resume", "run", "--change", "--train.steps", 5, "--dry-run").out
    fewer = run("train", "--resume", "run", "--change", "--train.steps", 2, "--dry-run").out
    assert fewer.endswith("This training would not start. train.steps: 2, but run has trained 3 steps; give more\n")
    uneven = run("train", "--resume", "run", "--train.micro-batch", 3, "--dry-run").out
    assert "This training would not start. train.batch_size: 4 must divide into 1 processes with whole" in uneven
    with lock(tmp_path / "run", World()):
        assert "This training would not start. run: in use by" in run("train", "--resume", "run", "--dry-run").out
    done = run("train", "--resume", "run", "--change", "--train.steps", 5, "--train.keep", 1)
    assert done.code == 0, done.err
    assert done.out == "artifact: run/artifact\n"
    assert "run: 5/5" in done.err
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "encoder/loss" in r] == [1, 2, 3, 4, 5]
    assert run("train", "--resume", "run").code == 0
    help = run("train", "--resume", "run", "--help").out
    assert "raekit train --resume run" in help
    assert run("train", "--resume", "run", "--run", "other").code == 2
    assert_fails(run("train", "--resume", "nowhere"), "nowhere: there is no such folder")
    assert run("train", "--resume").code == 2


def test_epochs_scale_a_recipe_to_the_images(run, images, tmp_path):
    """30 images in batches of 4, for 4 epochs, are 30 steps, and the recipe is of another length."""
    given = tiny(images, train__checkpoint_every=7)
    at = given.index("--train.steps")
    arguments = [*given[:at], "--epochs", "4", *given[at + 2 :]]
    done = run("train", "emoji_encoder", "--dry-run", "--run", tmp_path / "run", *arguments)
    assert done.code == 0, done.err
    config = json.loads(done.out.partition("\n\n")[0])
    recipe = to_dict(find("emoji_encoder").config)
    assert config["train"]["steps"] == 30
    assert config["train"]["checkpoint_every"] == 7  # as given
    for part, name in (("optim", "decay_end"), ("optim", "warmup_steps")):
        assert config[part][name] == recipe[part][name] * 30 // recipe["train"]["steps"]
    assert_fails(run("train", "emoji_encoder", *tiny(images), "--epochs", 4), "--epochs: sets train.steps")
    assert_fails(run("train", "emoji_encoder", *arguments, "--epochs", 0), "--epochs: 0.0 must be positive")


@pytest.mark.parametrize("allocate", [lambda: np.empty(2**55), lambda: torch.empty(2**55)])
def test_too_little_memory_is_one_message(run, monkeypatch, allocate):
    monkeypatch.setitem(cli.COMMANDS, "models", lambda: allocate())
    assert_fails(run("models"), "memory: there is not enough", "ask for fewer or smaller images at once")


def test_a_closed_standard_output_is_no_error():
    command = ["sh", "-c", '"$0" -m raekit --version >&-', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "emoji_encoder", "--gpus", 0], "--gpus, --processes: 0 must be at least 1"),
        (["train", "emoji_encoder", "--processes", 0], "--gpus, --processes: 0 must be at least 1"),
        (["train", "emoji_encoder", "--gpus", 1, "--processes", 1], "leave out one of the two"),
        (
            ["latents", "measure", "builtin:vit-tiny", "--image-size", 0, "--out", "x.safetensors"],
            "data.image_size: ",
        ),
        (["probe", "builtin:vit-tiny", "--image-size", 0], "data.image_size: 0 must be from 1 to 65,536"),
        (["probe", "missing", "--penalty", 0], "penalty: 0.0 must be positive"),
        (["trajectory", "missing", "--frames", 0, "--out", "x.png"], "--frames: 0 must be at least 2"),
        (
            ["trajectory", "missing", "--count", 10**20, "--out", "x.png"],
            f"--count: {10**20} must be at most 100000000",
        ),
        (["generate", "missing", "--count", 10**12, "--out", "x"], f"--count: {10**12} must be at most 100000000"),
        (["evaluate", "missing", "--count", 10**14], f"count: {10**14} must be at most 100000000"),
        (
            ["latents", "generate", "missing", "--count", 10**11, "--out", "x.safetensors"],
            "--count: 100000000000 must be",
        ),
        (
            ["train", "emoji_dit_dh", "--train.seed", 10**24, "--run", "x"],
            "train.seed: 1000000000000000000000000 must be",
        ),
        (
            ["train", "emoji_dit_dh", "--train.steps", 10**23, "--run", "x"],
            "train.steps: 100000000000000000000000 must",
        ),
        (["interpolate", "missing", "--frames", 0, "--out", "x.png"], "--frames: 0 must be at least 2"),
    ],
)
def test_zero_is_not_a_missing_option(run, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    assert_fails(run(*command), message)


def test_a_printed_recipe_trains_as_a_file(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("recipes", "emoji_encoder")
    assert done.code == 0
    assert done.out == find("emoji_encoder").path.read_text()
    Path("mine.py").write_text(done.out)
    assert run("train", "mine.py", *tiny(images, train__steps=1)).out == "artifact: runs/mine/artifact\n"
    derived = "\nclass Mine(RepresentationConfig): ...\nbase = config()\ndef config():\n    return Mine(**vars(base))"
    for text, words in (
        ("import nowhere", ["mine.py: the code failed in line 1", "nowhere"]),
        ("x = (", ["mine.py: the code failed", "SyntaxError"]),
        ("def config():\n    return 3", ["mine.py: config() must return the config of a stage, not int"]),
        (f"{done.out}{derived}", ["config() must return the config of a stage, not Mine"]),
        ("y = 1", ["mine.py: has no function config()"]),
        (
            done.out.replace("ema=(0.998,)", "ema=(0.998)"),
            ["error: mine.py: RepresentationConfig.ema: Input should be a valid tuple"],
        ),
        (
            done.out.replace('"cosine"', '"cos"'),
            ["error: mine.py: OptimConfig.decay: Input should be 'constant', 'linear' or 'cosine' (given: 'cos')"],
        ),
    ):
        Path("mine.py").write_text(text)
        assert_fails(run("train", "mine.py"), *words)
    assert_fails(run("train", "other.py"), "other.py: no such file; `raekit recipes NAME > other.py`")
    assert_fails(run("recipes", "emoji"), "recipe 'emoji': no such recipe")


def test_commands_load_encoders_that_a_file_registers(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for known, name in ((registry.REGISTRY, "my-encoder"), (registry.FAMILIES, "mine")):
        monkeypatch.setitem(known, name, None)  # so that it is forgotten after the test
        del known[name]
    guide = Path(__file__).parent.parent / "docs/guides/own-loop.md"
    *_, code, weights = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    Path("mine.py").write_text(code)
    exec(f"{code}\n{weights}", {"__name__": "guide"})
    del registry.REGISTRY["my-encoder"]
    probe = ("probe", "my-encoder", "--source", images)
    assert_fails(run(*probe), "my-encoder", "set RAEKIT_IMPORT to its FILE.py")
    monkeypatch.setenv("RAEKIT_IMPORT", "mine.py")
    assert run(*probe).code == 0
    assert "my-encoder" in run("models", "--encoders").out
    Path("mine.py").write_text("\n1 / 0")
    assert_fails(run(*probe), "RAEKIT_IMPORT: mine.py: the code failed in line 2 (ZeroDivisionError")
    monkeypatch.setenv("RAEKIT_IMPORT", "mine")
    assert_fails(run(*probe), "RAEKIT_IMPORT: mine: must be a Python file")
    monkeypatch.setenv("RAEKIT_IMPORT", f"mine.py{os.pathsep}other.py")
    Path("mine.py").write_text("")
    assert_fails(run(*probe), "RAEKIT_IMPORT: other.py: no such file")


def test_a_recipe_file_may_register_encoders(run, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    text = find("emoji_decoder").path.read_text().replace('"builtin:vit-tiny"', '"my-encoder"')
    (tmp_path / "mine.py").write_text(
        text + "\nfrom raekit.models import registry\nregistry.register('my-encoder', registry.REGISTRY['dinov2-s'])\n"
    )
    done = run("train", tmp_path / "mine.py", "--help")
    assert done.code == 0, done.err
    assert "my-encoder" in done.out  # the default of --encoder
    assert "my-encoder" in registry.REGISTRY


def test_a_stopped_training_says_how_to_go_on(run, images, tmp_path, monkeypatch):
    def stopped(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("raekit.stages.run.train", stopped)
    done = run("train", "emoji_encoder", "--run", tmp_path, *tiny(images))
    assert (done.code, done.out, done.err) == (75, "", "stopped; run the same command again to resume\n")


def test_a_truncated_checkpoint_is_named(run, images, tmp_path):
    command = ["train", "emoji_encoder", "--run", tmp_path, *tiny(images)]
    assert run(*command).code == 0
    newest = checkpoint.checkpoints(tmp_path / "checkpoints")[-1]
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:500])
    done = run(*command)
    assert_fails(done, newest, "damaged (", f"mv {newest} {newest}.damaged")
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
    """Copy the pictures, replace `count` of the 30 training pictures by invalid files, and return the address."""
    root = Path(images.removeprefix("folder:"))
    paths = sorted(root.rglob("*.png"))
    broken = [path for path in paths if path.relative_to(root).parts[0] == "train"][:count]
    for path in paths:
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"broken" if path in broken else path.read_bytes())
    return f"folder:{folder}"


def test_a_corrupt_image_is_named_and_left_out(images, tmp_path):
    """Run in a separate process, to capture the log."""
    source = corrupt(images, tmp_path / "images", 1)
    options = tiny(source, data__max_unreadable=0.1, train__steps=8)
    command = [sys.executable, "-m", "raekit", "train", "emoji_encoder", "--run", str(tmp_path / "run"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    broken = tmp_path / "images" / "train" / "blue" / "00.png"
    assert done.stderr.count(f"WARNING: unreadable image {broken}: not a known image format\n") == 1
    assert done.stderr.count(f"{source}: 30 training and 9 held-out images in 3 classes\n") == 1
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
    assert re.search(r"^  0\.00 GFLOPs per image in the forward pass", cost, re.MULTILINE)
    assert re.search(
        r"memory: about 0\.00 GiB of state, 0\.00 GiB of frozen networks and copies of weights, and 0\.00 GiB of "
        r"activations for 4 images at a time, 0\.\d+ GiB for each",
        cost,
    )
    assert cost.endswith("1,500 steps of 4 images: 6,000 images\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["emoji_encoder", "emoji_decoder"])
def test_a_dry_run_of_a_recipe_as_it_is(run, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    done = run("train", recipe, "--dry-run", "--train.batch-size", 2)
    assert done.code == 0, done.err
    gflops = float(re.search(r"([\d.]+) GFLOPs per image in the forward pass", done.out)[1])  # type: ignore[index]
    assert gflops > 0.01
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_is_one_message(run, tmp_path, monkeypatch):
    """The error is the one that torch raises after a killed compilation left an empty library in its cache."""

    def fail(*arguments: object) -> None:
        raise InductorError(ImportError("x.main.so: file too short"), None)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("raekit.stages.run.train", fail)
    done = run("train", "emoji_encoder", "--run", tmp_path / "run")
    assert_fails(done, "torch.compile: ImportError: x.main.so: file too short", f"remove {tmp_path / 'cache'}")
    monkeypatch.setattr("raekit.stages.run.train", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # other exceptions are not caught
        run("train", "emoji_encoder", "--run", tmp_path / "run")


def test_parts_are_added_to_a_recipe_and_left_out(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def dry(recipe: str, *options: str) -> Done:
        return run("train", recipe, "--dry-run", "--train.batch-size", 2, *options)

    def resolved(done: Done) -> dict:
        assert done.code == 0, done.err
        return json.loads(done.out.partition("\n\n")[0])

    plain = resolved(dry("emoji_decoder"))
    assert plain["selection"] is plain["adversarial"] is None
    added = ["--selection.every", "70", "--adversarial.discriminator.backbone", "builtin:vit-tiny"]
    more = ["--adversarial.discriminator.blocks", "0", "2", "--adversarial.optim.lr", "0.1"]
    both = resolved(dry("emoji_decoder", *added, *more, "--adversarial.max_weight=9"))
    assert both["selection"] == {"every": 70, "latents": None, "features": None}
    assert both["adversarial"]["discriminator"]["blocks"] == [0, 2]
    assert (both["adversarial"]["optim"]["lr"], both["adversarial"]["max_weight"]) == (0.1, 9)
    assert {**both, "selection": None, "adversarial": None} == plain
    assert resolved(dry("emoji_decoder_gan", "--perceptual", "None", "--adversarial=None")) == plain
    assert (
        resolved(dry("emoji_dit_dh", "--denoiser.head", "None", "--denoiser.allow-narrow"))["denoiser"]["head"] is None
    )
    assert_fails(dry("emoji_decoder", "--selection.latents", "x"), "--selection.every", code=2)
    assert_fails(dry("emoji_decoder", "--optim", "None"), "--optim", code=2)


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
    assert done.out == f"6 images: {out} (2 model passes per image)\n"
    sheet = pixels(out)
    assert sheet.shape == (3 * 18 + 2, 2 * 18 + 2, 3)
    model = load(str(tiny_model))
    samples = torch.cat([s.images for s in generate(model, [0, 1, 2, 0, 1, 2], seed=3, sampling=Sampling(steps=2))])
    for i, image in enumerate(samples):
        y, x = 2 + i % 3 * 18, 2 + i // 3 * 18
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
    command = ["generate", tiny_model, "--out", out, "--steps", 2, "--batch-size", 4]
    assert run(*command, "--count", 2).code == 0
    names = [f"{i:06d}.png" for i in range(6)]
    assert sorted(path.name for path in out.iterdir()) == names
    first = [pixels(out / name) for name in names]
    assert len({image.tobytes() for image in first}) == 6
    (out / names[1]).unlink()
    (out / names[4]).write_bytes(b"")
    before = times(out)
    done = run(*command, "--count", 2)
    assert (done.code, done.out) == (0, f"6 images: {out} (2 model passes per image)\n")
    assert sorted(path.name for path in out.iterdir()) == names
    for name, image in zip(names, first, strict=True):  # another batch may round differently
        assert np.abs(pixels(out / name).astype(int) - image).max() <= 1
    assert {name for name, time in times(out).items() if time != before.get(name)} == {names[1], names[4]}
    # A larger count adds samples. Samples of another seed, class, format or setting are rejected.
    before = times(out)
    assert run(*command, "--count", 3).code == 0
    assert {name for name, time in times(out).items() if time != before.get(name)} == {
        f"{i:06d}.png" for i in (6, 7, 8)
    }
    before = times(out)
    for other in (["--seed", 1], ["--class", "red"], ["--format", "webp"], ["--steps", 3]):
        done = run(*command, "--count", 1, *other)
        assert_fails(
            done, f"{out}: holds other pictures, such as 000000.png", "give another folder or remove the pictures"
        )
    stranger = tmp_path / "photos"
    stranger.mkdir()
    Image.new("RGB", (8, 8)).save(stranger / "000000.png")
    assert_fails(
        run("generate", tiny_model, "--out", stranger), f"{stranger}: holds other pictures, such as 000000.png"
    )
    assert (times(out), len(list(stranger.iterdir()))) == (before, 1)


def test_ranges_of_classes_and_webp(run, tiny_model, tmp_path):
    options = ["--count", 1, "--steps", 1]
    for name, classes in (("range", ["0-1", "red"]), ("ids", [0, 1, 2])):
        done = run("generate", tiny_model, "--class", *classes, *options, "--out", tmp_path / f"{name}.webp")
        assert done.code == 0, done.err
    with Image.open(tmp_path / "range.webp") as a, Image.open(tmp_path / "ids.webp") as b:
        assert (a.format, a.size) == ("WEBP", (20, 56))
        assert np.array_equal(np.asarray(a), np.asarray(b))
    done = run("generate", tiny_model, *options, "--format", "webp", "--out", tmp_path / "folder")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [f"{i:06d}.webp" for i in range(3)]
    assert_fails(run("generate", tiny_model, "--format", "webp", "--out", tmp_path / "x.png"), "--format: no effect on")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["encode", "MODEL", "x.png", "--out", ""], "--out"),
        (["encode", "MODEL", "", "--out", "latents"], "an argument"),
        (["generate", "MODEL", "--out=", "--steps", 1], "--out"),
        (["evaluate", "MODEL", "--out", "report", "--reference", "x.npz", ""], "--reference"),
        (["train", "emoji_decoder", "--run", ""], "--run"),
    ],
)
def test_an_empty_path_is_not_the_working_folder(run, tiny_model, tmp_path, monkeypatch, arguments, name):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "x.png", 0)
    done = run(*(tiny_model if each == "MODEL" else each for each in arguments))
    assert_fails(done, f"error: {name}: the value is empty; give one, or set the shell's variable", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_without_out_a_grid_is_written_to_the_working_folder(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--class", "blue", "red", tiny_model, "--count", 2, "--steps", 2, "--seed", 3]
    for name in (f"{tiny_model.name}-blue-red-seed3.png", f"{tiny_model.name}-blue-red-seed3-2.png"):
        done = run(*command)
        assert done.code == 0, done.err
        assert done.out.startswith(f"4 images: {name} (")
        assert pixels(tmp_path / name).shape == (2 * 18 + 2, 2 * 18 + 2, 3)
    # A command takes its name before it works, and gives it back if it fails.
    taken = []
    monkeypatch.setattr("raekit.inference.model.load", lambda *options: taken.extend(times(Path())) or load(*options))
    assert_fails(run("generate", tiny_model, "--class", "violet", "--seed", 3), "violet")
    assert f"{tiny_model.name}-violet-seed3.png" in taken
    assert f"{tiny_model.name}-violet-seed3.png" not in times(Path())


def test_any_model_and_classes_make_a_file_name(run, tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    options = ["--count", 1, "--steps", 1, "--class", *["red"] * 80]
    done = run("generate", ".", *options)
    assert done.code == 0, done.err
    (written,) = times(Path())
    assert written.startswith("mine-red-red-")
    assert written.endswith("-seed0.png")


def test_a_grid_of_many_classes_has_random_classes(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("raekit.cli.generation.MANY_CLASSES", 2)
    done = run("generate", tiny_model, "--steps", 2, "--out", tmp_path / "grid.png")
    assert done.code == 0, done.err
    assert done.out.startswith("16 images: ")
    assert pixels(tmp_path / "grid.png").shape == (4 * 18 + 2, 4 * 18 + 2, 3)
    assert run("generate", tiny_model, "--steps", 2, "--count", 1, "--out", tmp_path / "folder").out.startswith(
        "3 images"
    )


def test_models_and_encoders_are_listed(run):
    done = run("models")
    assert done.code == 0
    assert re.search(
        r"^ ?builtin:emoji +images +64 +12 M +9 +builtin:vit-tiny +apache-2\.0 +yes", done.out, re.MULTILINE
    )
    assert "rae-mae-b" in done.out
    assert "rae-mae-b" not in run("models", "512").out
    assert re.search(r"clip-b +768 +256x256 +16 +256 +mit", run("models", "clip", "--encoders").out)
    assert_fails(run("models", "nothing"), "nothing: occurs in no name")


def test_a_dry_run_of_a_push_shows_what_would_be_sent(run, tiny_model, tmp_path):
    done = run("push", tiny_model, "someone/toy", "--dtype", "bf16", "--dry-run")
    assert done.code == 0, done.err
    size = re.search(r"^ +([\d,]+) bytes  denoiser/model\.safetensors$", done.out, re.MULTILINE)
    assert size
    assert int(size[1].replace(",", "")) < (tiny_model / "denoiser" / "model.safetensors").stat().st_size
    assert 'raekit.Pipeline.from_pretrained("someone/toy")' in done.out
    assert_fails(run("push", "nowhere", "toy"), "toy: not the name of a repository")  # before the model is loaded


def test_an_archive_is_generated(run, tiny_model, tmp_path):
    command = ["generate", tiny_model, "--count", 2, "--steps", 2, "--precision", "bf16", "--batch-size", "auto"]
    done = run(*command, "--out", tmp_path / "new" / "samples.npz")
    assert (done.code, done.out) == (0, f"6 images: {tmp_path / 'new' / 'samples.npz'} (2 model passes per image)\n")
    with np.load(tmp_path / "new" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (6, 16, 16, 3)
        assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
    done = run(*command, "--out", tmp_path / "new" / "samples.npz")
    assert (done.code, done.out) == (0, f"6 images: {tmp_path / 'new' / 'samples.npz'}\n")


def test_rows_of_interpolated_images(run, tiny_model, tmp_path):
    out = tmp_path / "row.png"
    options = ["--seeds", 1, 2, "--class", "red", "blue", "--frames", 5, "--steps", 3, "--guidance", "cfg:2.0"]
    done = run("interpolate", tiny_model, *options, "--out", out)
    assert (done.code, done.out) == (0, f"5 images: {out} (3 model + 3 unconditional passes per image)\n"), done.err
    row = pixels(out)
    assert row.shape == (20, 5 * 18 + 2, 3)
    for seed, name, x in ((1, "red", 2), (2, "blue", 2 + 4 * 18)):
        options = ["--class", name, "--count", 1, "--seed", seed, "--steps", 3, "--guidance", "cfg:2.0"]
        assert run("generate", tiny_model, *options, "--out", tmp_path / "end.png").code == 0
        end = pixels(tmp_path / "end.png")[2:18, 2:18].astype(int)
        assert np.abs(row[2:18, x : x + 16] - end).max() <= 1
    assert_fails(run("interpolate", tiny_model, "--out", out), "both ends are the same")
    assert_fails(run("interpolate", tiny_model, "--seeds", 1, 2, 3, "--out", out), "--seeds: takes one", "not 3")
    assert_fails(run("interpolate", tiny_model, "--seeds", 1, 2, "--out", tmp_path / "x.gif"), ".png or .webp")


def test_a_strip_of_a_trajectory(run, tiny_model, tmp_path):
    out = tmp_path / "strip.png"
    options = ["--class", "0-1", "--count", 2, "--steps", 6]
    done = run("trajectory", tiny_model, *options, "--frames", 4, "--out", out)
    assert done.code == 0, done.err
    assert done.out.startswith("4 x 4 images at times 1.000, ")
    strip = pixels(out)
    assert strip.shape == (4 * 18 + 2, 4 * 18 + 2, 3)
    assert run("generate", tiny_model, *options, "--out", tmp_path / "grid.png").code == 0
    grid = pixels(tmp_path / "grid.png").astype(int)
    for row in range(4):  # two of each class
        y, x = 2 + row // 2 * 18, 2 + row % 2 * 18
        assert np.abs(strip[2 + row * 18 : 18 + row * 18, -18:-2] - grid[y : y + 16, x : x + 16]).max() <= 1
    assert_fails(run("trajectory", tiny_model, "--frames", 60, "--out", out), "frames: 60 must be from 2 to 51")


def test_a_published_yaml_is_generated_from(run, tiny_model, tmp_path, monkeypatch):
    given = []

    def load_published(path: Path, device: object, dtype: torch.dtype) -> object:
        given.append(path)
        assert dtype == torch.float32
        return load(str(tiny_model)), Sampling(steps=3, grid="published")

    monkeypatch.setattr("raekit.inference.model.load_published", load_published)
    command = ["generate", "--published", "a.yaml", "--count", 1, "--out", tmp_path / "grid.png"]
    done = run(*command)
    assert done.code == 0, done.err
    assert "(2 model passes per image)" in done.out
    assert given == [Path("a.yaml")]
    assert_fails(run(*command, "--steps", 5, "--guidance", "cfg:2"), "--published: a.yaml sets --steps, --guidance")
    for option, default in (
        ("--steps", 50),
        ("--solver", "euler"),
        ("--grid", "full"),
    ):  # also if the value is the default
        assert_fails(run(*command, option, default), f"--published: a.yaml sets {option}; leave out")
    assert_fails(run(*command, tiny_model), "give either a model or --published FILE.yaml")
    assert_fails(run("generate", "--out", tmp_path / "x.png"), "no model is given; name it first")


def test_two_processes_complete_a_folder(tiny_model, tmp_path, monkeypatch):
    """Two threads play the two processes and meet at the barrier."""
    model, meeting = load(str(tiny_model)), threading.Barrier(2)
    monkeypatch.setattr(World, "barrier", lambda world: meeting.wait() if world.size > 1 else None)

    def run_ranks(folder: str, size: int) -> None:
        def one(rank: int) -> None:
            here = World(rank=rank, size=size)
            generate_folder(
                model, tmp_path / folder, [0, 2], total=7, sampling=Sampling(steps=1), batch_size=2, world=here
            )

        with ThreadPoolExecutor(size) as pool:
            list(pool.map(one, range(size)))

    run_ranks("one", 1)
    run_ranks("two", 1)
    for i in (0, 2, 3, 6):
        (tmp_path / "two" / f"{i:06d}.png").unlink()
    kept = times(tmp_path / "two")
    run_ranks("two", 2)
    after = times(tmp_path / "two")
    assert after.keys() == times(tmp_path / "one").keys()
    assert kept == {name: after[name] for name in kept}
    for name in after:
        a, b = (pixels(tmp_path / folder / name).astype(int) for folder in ("one", "two"))
        assert np.abs(a - b).max() <= 1


def test_an_interrupted_grid_says_that_it_does_not_resume(run, tiny_model, tmp_path, monkeypatch):
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raekit.inference.generation.generate", interrupt)
    done = run("generate", tiny_model, "--out", tmp_path / "grid.png")
    assert (done.code, list(tmp_path.iterdir())) == (130, [])
    assert done.err == "stopped; a grid cannot be resumed, so give a folder as --out for many images\n"


def test_guidance_changes_the_picture(run, tiny_model, tmp_path):
    for name, options in (("plain", []), ("guided", ["--guidance", "cfg:3.0@0.1-0.9"])):
        command = ["generate", tiny_model, "--class", "red", "--count", 1, "--steps", 3, *options]
        assert run(*command, "--out", tmp_path / f"{name}.png").code == 0
    assert not np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "guided.png"))


def test_a_weaker_model_guides_and_the_passes_are_told(run, tiny_model, weaker, tmp_path):
    command = ["generate", tiny_model, "--class", "red", "--count", 1, "--steps", 3, "--out"]
    plain = run(*command, tmp_path / "plain.png")
    assert "(3 model passes per image)" in plain.out
    done = run(*command, tmp_path / "guided.png", "--guidance", "auto:3.0", "--weak", weaker)
    assert "(3 model + 3 weak passes per image)" in done.out, done.err
    assert not np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "guided.png"))
    same = run(*command, tmp_path / "same.png", "--guidance", "auto:3.0", "--weak", tiny_model)
    assert_fails(same, f"--weak: {tiny_model} is the model itself")
    same = run(
        *command, tmp_path / "same.png", "--guidance", "auto:3.0", "--weak", f"{tiny_model}/../{tiny_model.name}/"
    )
    assert_fails(same, f"{tiny_model.name}/ is the model itself")
    assert_fails(run(*command, tmp_path / "no.png", "--weak", weaker), "weak: no effect without guidance auto")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--class", "purple"], ["class 'purple': no such class; the classes are blue, green, red"]),
        (["--class", "7"], ["class '7': no such class"]),
        (["--count", "0"], ["--count: 0"]),
        (["--batch-size", "0"], ["batch_size: 0"]),
        (["--steps", "0"], ["steps: 0"]),
        (["--guidance", "cfg"], ["guidance: 'cfg'", "cfg:2.0@0.1-0.9"]),
        (["--guidance", "cfg:1"], ["a scale of 1"]),
        (["--guidance", "internal:2"], ["guidance: internal needs a base output"]),
        (["--guidance", "auto:2"], ["guidance: auto needs a weaker model (--weak"]),
        (["--reuse", "2", "--solver", "heun"], ["reuse: it needs solver euler or euler-maruyama, not heun"]),
        (["--solver", "dopri5", "--steps", "50"], ["--steps: no effect with --solver dopri5"]),
        (["--atol", "1e-6"], ["--atol: no effect with --solver euler"]),
        (["--guidance", "cfg:1e30"], ["sample 0: its values are not finite; lower the scale of guidance cfg:1e+30"]),
    ],
)
def test_a_wrong_wish_is_one_message_and_leaves_no_picture(run, tiny_model, tmp_path, options, words):
    done = run("generate", tiny_model, "--out", tmp_path / "grid.png", *options)
    assert_fails(done, *words)
    assert len([line for line in done.err.splitlines() if not line.startswith("generate: 0/")]) == 1  # progress
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


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "builtin:emoji", "--out", "FOLDER.png"],
        ["generate", "builtin:emoji", "--out", "FOLDER.npz"],
        ["interpolate", "builtin:emoji", "--seeds", "0", "1", "--out", "FOLDER.png"],
        ["trajectory", "builtin:emoji", "--out", "FOLDER.webp"],
        ["latents", "measure", "builtin:vit-tiny", "--out", "FOLDER.safetensors"],
        ["latents", "generate", "builtin:emoji", "--out", "FOLDER.safetensors"],
        ["reference", "emoji", "--image-size", "64", "--out", "FOLDER.safetensors"],
        ["probe", "builtin:vit-tiny", "--out", "FOLDER"],
    ],
    ids=" ".join,
)
def test_a_folder_where_a_file_is_meant_is_left_alone(run, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    folder = Path(command[-1])
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert_fails(run(*command), f"{folder}: is a folder; give the path of a file")
    assert [path.read_text() for path in folder.iterdir()] == ["years of work"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "builtin:emoji", "--out", "x.jpg"], "x.jpg must be a .png, .webp or .npz file, or a folder"),
        (["generate", "builtin:emoji", "--out", "file"], "file: is a file; give the path of a folder"),
        (["latents", "cache", "builtin:emoji", "--out", "file"], "file: is a file; give the path of a folder"),
        (["reconstruct", "builtin:emoji", "file", "--out", "x.png"], "x.png: a folder is written here, and .png is"),
        (["encode", "builtin:emoji", "file", "--out", "x.pt"], "x.pt: a folder is written here, and .pt is"),
        (["latents", "generate", "builtin:emoji", "--out", "x.png"], "x.png: the output file must end in .safetens"),
        (["latents", "generate", "builtin:emoji", "--out", "x.safetensors", "--guidance", "auto:2"], "a weaker model"),
        (["latents", "measure", "builtin:vit-tiny", "--out", "file/x.safetensors"], "because file is a file"),
    ],
    ids=str,
)
def test_a_place_of_another_kind_is_refused_at_once(run, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert_fails(run(*command), message)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


# Every command that writes, with an output that cannot be written: `file` is a file. No command reaches its input,
# which does not exist either.
BLOCKED = {
    "demo": [["--run", "file/run"]],
    "study": [["width", "--out", "file/study"]],
    "generate": [["nowhere", "--out", f"file/{name}"] for name in ("grid.png", "images.npz", "images")],
    "interpolate": [["nowhere", "--out", "file/row.png"]],
    "trajectory": [["nowhere", "--out", "file/strip.webp"]],
    "reconstruct": [["nowhere", "missing.png", "--out", "file/images"]],
    "encode": [["nowhere", "missing.png", "--out", f"file/{name}"] for name in ("latents", "latents.safetensors")],
    "app": [["nowhere/model", "--space", "owner/file"]],
    "train": [["emoji_decoder", "--data.source", "folder:missing", "--run", "file/run"]],
    "report": [["nowhere", "--out", "file/page.html"]],
    "data": [["folder:missing", "--out", "file/montage.png"]],
    "data pack": [["folder:missing", "--size", "8", "--out", "file/shards"]],
    "latents measure": [["nowhere", "--out", "file/statistics.safetensors"]],
    "latents cache": [["nowhere", "--out", "file/latents"]],
    "latents generate": [["nowhere", "--out", "file/latents.safetensors"]],
    "evaluate": [["nowhere", "--out", "file/report"]],
    "compare": [["nowhere", "missing", "--out", "file/comparison.md"]],
    "reference": [["folder:missing", "--image-size", "8", "--out", "file/reference.safetensors"]],
    "probe": [["nowhere", "--out", "file/probe.json"]],
    "convert": [["nowhere", f"file/{to}", "--to", to] for to in ("raekit", "v1", "diffusers")],
}
SILENT = {"models", "recipes", "info", "push", "completion"}
"""The commands that write no files of the user's."""


@pytest.mark.parametrize(
    ("command", "arguments"), [(name, each) for name, every in BLOCKED.items() for each in every], ids=str
)
def test_an_output_that_cannot_be_written_is_found_before_any_work(run, tmp_path, monkeypatch, command, arguments):
    if command == "app":
        pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    done = run(*command.split(), *arguments)
    assert_fails(done, "file")
    assert not any(word in done.err for word in ("nowhere", "missing"))
    assert len(done.err.splitlines()) == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_the_outputs_of_all_commands_are_tried():
    assert BLOCKED.keys() | SILENT == cli.COMMANDS.keys()


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


def test_reconstructions_are_written_with_their_scores(run, tiny_model, tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    out = tmp_path / "out"
    command = ["reconstruct", tiny_model, *paths, "--out", out, "--batch-size", 2]
    done = run(*command)
    assert done.code == 0, done.err
    assert "reconstruct: 3/3" in done.err
    assert sorted(path.name for path in out.iterdir()) == [
        "0.png", "1.png", "2.png", "contact-sheet.png", "scores.csv", "scores.json",
    ]  # fmt: skip
    autoencoder = Autoencoder.load(str(tiny_model))
    written = json.loads((out / "scores.json").read_text())
    with (out / "scores.csv").open() as file:
        table = list(csv.DictReader(file))
    for path, row, line in zip(paths, written["images"], table, strict=False):
        original = from_pil(read_image(path, 16))[None]
        decoded = quantize(autoencoder.decode(autoencoder.encode(original)))
        assert np.array_equal(pixels(out / path.name), np.asarray(to_pil(decoded[0])))
        assert row == {
            "image": str(path),
            "output": str(out / path.name),
            "psnr": pytest.approx(psnr(decoded, original).item(), rel=1e-6),
            "ssim": pytest.approx(ssim(decoded, original).item(), rel=1e-4),
        }
        assert line == {name: str(value) for name, value in row.items()}
        assert re.search(rf"{path.name} .* {row['psnr']:.4g} ", done.out)
    means = {name: np.mean([row[name] for row in written["images"]]) for name in ("psnr", "ssim")}
    assert written["means"] == pytest.approx(means)
    assert (table[3]["image"], float(table[3]["psnr"])) == ("mean", pytest.approx(means["psnr"]))
    assert written["unreadable"] == []


def test_the_contact_sheet_has_reconstructions_below_their_originals_and_is_bounded(run, tiny_model, tmp_path):
    paths = [picture(tmp_path / "in" / f"{i:02}.png", i) for i in range(34)]
    assert run("reconstruct", tiny_model, tmp_path / "in", "--out", tmp_path / "out").code == 0
    sheet = pixels(tmp_path / "out" / "contact-sheet.png")
    assert sheet.shape == (4 * 40 + 2, 8 * 22 + 2, 3)
    for i, path in enumerate(paths[:32]):
        y, x = 4 + i // 8 * 40, 4 + i % 8 * 22
        assert np.array_equal(sheet[y : y + 16, x : x + 16], np.asarray(read_image(path, 16)))
        assert np.array_equal(sheet[y + 18 : y + 34, x : x + 16], pixels(tmp_path / "out" / path.name))


def times(folder: Path, files: str = "*.png") -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob(files)}


def test_reconstructing_goes_on_and_redoes_only_what_has_changed(run, tiny_model, tmp_path):
    paths = [picture(tmp_path / "in" / f"{i}.png", i) for i in range(3)]
    out = tmp_path / "out"
    command = ["reconstruct", tiny_model, tmp_path / "in", "--out", out]
    first = run(*command)
    assert first.code == 0, first.err
    before, scores = times(out), (out / "scores.json").read_text()

    def redone() -> set[str]:
        after = times(out)
        changed = {name for name in after if after[name] != before.get(name)} - {"contact-sheet.png"}
        before.update(after)
        return changed

    again = run(*command)
    assert (again.code, again.out) == (0, first.out)
    assert not redone()
    assert (out / "scores.json").read_text() == scores
    (out / "1.png").unlink()
    assert run(*command).code == 0
    assert redone() == {"1.png"}
    assert (out / "scores.json").read_text() == scores
    picture(paths[2], 7)
    assert run(*command).code == 0
    assert redone() == {"2.png"}
    assert run(*command, "--fit", "pad").code == 0
    assert redone() == {"0.png", "1.png", "2.png"}


def test_another_model_redoes_everything(run, tiny_model, tmp_path):
    path = picture(tmp_path / "in" / "x.png", 0)
    other = Autoencoder.load(str(tiny_model))
    with torch.no_grad():
        other.decoder.out.bias.add_(0.1)
    other.save(tmp_path / "other")
    made = []
    for model in (tiny_model, tmp_path / "other"):
        assert run("reconstruct", model, path, "--out", tmp_path / "out").code == 0
        made.append(pixels(tmp_path / "out" / "x.png"))
    assert not np.array_equal(*made)


def test_lpips_is_scored_with_the_weights_of_a_file(run, tiny_model, tmp_path):
    path, out = picture(tmp_path / "in" / "x.png", 0), tmp_path / "out"
    command = ["reconstruct", tiny_model, path, "--out", out, "--lpips", tmp_path / "vgg.safetensors"]
    assert_fails(run(*command), tmp_path / "vgg.safetensors", "no such file")
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = {key: 0.1 * torch.randn_like(value) for key, value in LPIPS().state_dict().items() if key[:3] != "lin"}
        save_file(state, tmp_path / "vgg.safetensors")
        done = run(*command)
        assert done.code == 0, done.err
        (row,) = json.loads((out / "scores.json").read_text())["images"]
        score = load_perceptual(str(tmp_path / "vgg.safetensors"))
        images = [from_pil(Image.fromarray(pixels(out / "x.png"))), from_pil(read_image(path, 16))]
        assert row["lpips"] == pytest.approx(score(*(image[None] for image in images)).item(), rel=1e-5)
        values.append(row["lpips"])
    assert values[0] != values[1]


def test_one_unreadable_file_does_not_keep_the_others_from_being_written(run, tiny_model, tmp_path):
    good = [picture(tmp_path / name, 0) for name in ("first.png", "last.png")]
    (tmp_path / "bad.png").write_text("bad")
    out = tmp_path / "out"
    command = ["reconstruct", tiny_model, good[0], tmp_path / "bad.png", tmp_path / "no.png", good[1], "--out", out]
    for _ in range(2):
        done = run(*command)
        assert_fails(
            done,
            "2 of 4 images could not be read",
            f"{tmp_path / 'bad.png'}: not a readable image",
            f"{tmp_path / 'no.png'}: no such file",
        )
        assert "first.png" in done.out
        assert {"first.png", "last.png"} < {path.name for path in out.iterdir()}
        assert len(json.loads((out / "scores.json").read_text())["unreadable"]) == 2


def test_odd_names_are_written_and_a_bad_one_is_one_line_at_the_end(run, tiny_model, tmp_path):
    folder = tmp_path / "in"
    for name in (os.fsdecode(b"Mu\xf1oz.png"), "p" * 251 + ".png", "ok.png"):
        picture(folder / name, 0)
    (folder / "loop.png").symlink_to("loop.png")
    picture(tmp_path / "short.png", 0).rename(folder / ("q" * 251 + ".J2K"))
    picture(folder / ("q" * 251 + ".png"), 0)  # the reconstruction of the other cannot have this name, nor a longer one
    out = tmp_path / "out"
    done = run("reconstruct", tiny_model, folder, "--out", out)
    assert_fails(done, "2 of 6 images could not be read or written", "loop.png", "its output", "File name too long")
    assert {os.fsencode(path.name) for path in out.glob("*.png")} == {
        b"Mu\xf1oz.png",
        b"p" * 251 + b".png",
        b"q" * 251 + b".png",
        b"ok.png",
        b"contact-sheet.png",
    }
    done = run("encode", tiny_model, folder, "--out", tmp_path / "latents", "--shard-size", 1)
    assert_fails(done, "1 of 6 images could not be read or written", "loop.png")
    assert [len(shard.latents) for shard in raekit.read_latents(tmp_path / "latents")].count(0) == 1


def test_nothing_readable_is_an_error_without_a_table(run, tiny_model, tmp_path):
    out = tmp_path / "out"
    done = run("reconstruct", tiny_model, tmp_path / "no.png", "--out", out)
    assert_fails(done, "1 of 1 images could not be read")
    assert done.out == ""
    assert not out.exists()
    # The files of an earlier call stay.
    assert run("reconstruct", tiny_model, picture(tmp_path / "x.png", 0), "--out", out).code == 0
    before = times(out, "*.*")
    assert before.keys() == {"x.png", "scores.csv", "scores.json", "contact-sheet.png"}
    assert_fails(run("reconstruct", tiny_model, tmp_path / "no.png", "--out", out), "1 of 1 images")
    assert times(out, "*.*") == before


def test_pictures_of_one_name_do_not_overwrite_each_other(run, tiny_model, tmp_path):
    names = ["a/x.png", "b/x.png", "b/x.jpg", "b/y.png", "c/X.png", "c/scores.png", "c/contact-sheet.png"]
    paths = [picture(tmp_path / name, i) for i, name in enumerate(names)]
    out = tmp_path / "out"
    (out).mkdir()
    (out / "y.png").write_text("not ours")
    assert run("reconstruct", tiny_model, *paths, "--out", out).code == 0
    written = {
        row["image"]: Path(row["output"]).name for row in json.loads((out / "scores.json").read_text())["images"]
    }
    wanted = ["x.png", "x-2.png", "x-3.png", "y-2.png", "X-4.png", "scores.png", "contact-sheet-2.png"]
    assert written == {str(path): name for path, name in zip(paths, wanted, strict=True)}
    assert (out / "y.png").read_text() == "not ours"
    # In another order and one by one, each image finds its earlier reconstruction.
    before = times(out)
    for path in reversed(paths[:4]):
        assert run("reconstruct", tiny_model, path, "--out", out).code == 0
    after = times(out)
    assert {name for name in after if after[name] != before.get(name)} == {"contact-sheet.png"}


@pytest.mark.parametrize("name", ["scores.json", "scores.csv", "contact-sheet.png"])
def test_reconstruct_replaces_no_scores_of_something_else(run, tiny_model, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    done = run("reconstruct", tiny_model, picture(tmp_path / "x.png", 0), "--out", tmp_path / "out")
    assert_fails(done, f"out: holds {name} of something else than a reconstruction; give another folder, or move that")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "{}"


def test_folders_are_read_whole_and_keep_their_shape(run, tiny_model, tmp_path):
    root = tmp_path / "in"
    for i, name in enumerate(["a.png", "deep/er/b.webp", "deep/c.tif", ".hidden/d.png"]):
        picture(root / name, i)
    (root / "deep" / "loop").symlink_to(root)
    (root / "notes.txt").write_text("no picture")
    out = root / "out"
    for _ in range(2):  # the output folder is not searched for images
        done = run("reconstruct", tiny_model, root, "--out", out)
        assert done.code == 0, done.err
        assert set(times(out)) == {"a.png", "deep/c.png", "deep/er/b.png", "contact-sheet.png"}
    (tmp_path / "empty").mkdir()
    assert_fails(run("reconstruct", tiny_model, tmp_path / "empty", "--out", out), "empty: no images found")


def test_padding_keeps_the_whole_picture(run, tiny_model, tmp_path):
    path = picture(tmp_path / "in" / "x.png", 0, (32, 16))
    padded = np.asarray(read_image(path, 16, "pad"))
    assert (padded[:, :4] == 255).all()
    assert (padded[:, 12:] == 255).all()
    assert (padded[:, 4:12] < 255).any(axis=(0, 2)).all()
    assert run("reconstruct", tiny_model, path, "--out", tmp_path / "out", "--fit", "pad").code == 0
    sheet = pixels(tmp_path / "out" / "contact-sheet.png")
    assert np.array_equal(sheet[4:20, 4:20], padded)


def test_originals_are_never_overwritten(run, tiny_model, tmp_path):
    path = picture(tmp_path / "in" / "x.png", 0)
    before = path.read_bytes()
    for given, out in ((path, path.parent), (path.parent, path.parent), (path.parent, tmp_path)):
        assert_fails(run("reconstruct", tiny_model, given, "--out", out), f"{out}: holds originals")
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_work_on_nothing_is_refused(run, tiny_model, tmp_path, command):
    done = run(command, tiny_model, "--out", tmp_path / "out")
    assert_fails(done, "give at least one image file or folder")
    path = picture(tmp_path / "x.png", 0)
    assert_fails(run(command, tiny_model, path, "--out", tmp_path / "out", "--batch-size", 0), "batch_size: 0")
    assert not (tmp_path / "out").exists()


# Encoding


def test_latents_are_written_and_read_back(run, tiny_model, tmp_path):
    paths = [picture(tmp_path / "in" / f"{i}.png", i) for i in range(5)]
    out = tmp_path / "latents"
    command = ["encode", tiny_model, tmp_path / "in", "--out", out, "--shard-size", 2, "--batch-size", 3]
    done = run(*command)
    assert (done.code, done.out) == (0, f"5 images: {out}\n"), done.err
    assert done.err.count("encode: 5/5") == 1
    assert len(list(out.iterdir())) == 3
    autoencoder = Autoencoder.load(str(tiny_model))
    shards = list(raekit.read_latents(out))
    assert [len(shard.latents) for shard in shards] == [2, 2, 1]
    assert [name for shard in shards for name in shard.info.images] == list(map(str, paths))
    originals = torch.stack([from_pil(read_image(path, 16)) for path in paths])
    assert torch.allclose(torch.cat([shard.latents for shard in shards]), autoencoder.encode(originals), atol=1e-6)
    info = shards[1].info
    assert (info.model, info.image_size, info.version) == (str(tiny_model), 16, raekit.__version__)
    assert info.statistics == statistics_fingerprint(autoencoder)
    # The same command keeps the shards whose originals have not changed.
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    picture(paths[3], 9)
    assert run(*command).code == 0
    changed = [path.name for path in out.iterdir() if path.stat().st_mtime_ns != before[path.name]]
    assert changed == ["latents-00001-of-00003.safetensors"]
    # Another shard size, or another number of images, would mix two sets of shards.
    for changed in ([*command[:-3], 3], [*command[:2], *paths[:2], *command[3:]]):
        assert_fails(run(*changed), out, "-of-00003", "images were added or removed, or the shard size is another")
    # Another precision gives other latents.
    assert run(*command, "--precision", "bf16").code == 0
    rounded = torch.cat([shard.latents for shard in raekit.read_latents(out)])
    expected = Autoencoder.load(str(tiny_model), torch.bfloat16).encode(originals)
    assert torch.allclose(rounded[[0, 1, 2, 4]], expected[[0, 1, 2, 4]], atol=1e-6)  # image 3 was replaced
    assert not torch.allclose(rounded[[0, 1, 2, 4]], autoencoder.encode(originals)[[0, 1, 2, 4]], atol=1e-6)


def test_latents_of_other_images_are_not_replaced(run, tiny_model, tmp_path, monkeypatch):
    for name in ("here/a/1.png", "here/b/1.png", "there/a/1.png"):
        picture(tmp_path / name, 0)
    out = tmp_path / "latents"
    monkeypatch.chdir(tmp_path / "here")
    assert run("encode", tiny_model, "a", "--out", out).code == 0
    before = times(out, "*.safetensors")
    assert_fails(run("encode", tiny_model, "b", "--out", out), "holds latents of other images, such as", "here/a/1.png")
    monkeypatch.chdir(tmp_path / "there")
    assert_fails(run("encode", tiny_model, "a", "--out", out), "holds latents of other images, such as", "here/a/1.png")
    assert times(out, "*.safetensors") == before
    picture(tmp_path / "here" / "a" / "0.png", 1)
    assert run("encode", tiny_model, tmp_path / "here" / "a", "--out", out).code == 0
    (shard,) = raekit.read_latents(out)
    assert [Path(name).name for name in shard.info.images] == ["0.png", "1.png"]


def test_latents_change_with_the_fit_and_the_model(run, tiny_model, tmp_path):
    path = picture(tmp_path / "x.png", 0)
    other = Autoencoder.load(str(tiny_model))
    other.set_statistics(torch.full((16, 4, 4), 0.2), torch.full((16, 4, 4), 2.0))
    other.save(tmp_path / "other")
    for model, fit in ((tiny_model, "crop"), (tiny_model, "pad"), (tmp_path / "other", "pad")):
        assert run("encode", model, path, "--out", tmp_path / "latents", "--fit", fit).code == 0
        (shard,) = raekit.read_latents(tmp_path / "latents")
        image = from_pil(read_image(path, 16, fit))  # type: ignore[arg-type]
        expected = Autoencoder.load(str(model)).encode(image[None])
        assert torch.allclose(shard.latents, expected, atol=1e-5)
        assert shard.info.fit == fit


def test_one_file_of_latents(run, tiny_model, tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    (tmp_path / "bad.png").write_text("bad")
    out = tmp_path / "latents.safetensors"
    done = run("encode", tiny_model, *paths, tmp_path / "bad.png", "--out", out)
    assert_fails(done, "1 of 4 images could not be read", tmp_path / "bad.png")
    (shard,) = raekit.read_latents(out)
    assert shard.info.images == tuple(map(str, paths))
    assert shard.latents.shape == (3, 16, 4, 4)
    assert_fails(run("encode", tiny_model, *paths, "--out", out, "--shard-size", 2), out, "give a folder")


def test_shards_that_are_not_whole_are_refused(run, tiny_model, tmp_path):
    for i in range(3):
        picture(tmp_path / "in" / f"{i}.png", i)
    out = tmp_path / "latents"
    assert run("encode", tiny_model, tmp_path / "in", "--out", out, "--shard-size", 1).code == 0
    (out / "latents-00001-of-00003.safetensors").unlink()
    with pytest.raises(raekit.UserError, match="holds 2 of 3 shards"):
        list(raekit.read_latents(out))
    with pytest.raises(raekit.UserError, match="holds no latents; give a folder that `raekit encode` wrote"):
        list(raekit.read_latents(tmp_path / "in"))


# Probing


def test_a_probe_is_printed_and_written(run, images, tiny_model, tmp_path):
    out = tmp_path / "probe.json"
    done = run("probe", tiny_model, "--source", images, "--penalty", 0.1, "--out", out)
    assert done.code == 0, done.err
    results = json.loads(out.read_text())["results"]
    assert list(results) == [str(tiny_model), "random weights"]
    for row, values in results.items():
        assert values["low"] <= values["accuracy"] <= values["high"]
        assert re.search(rf"{re.escape(row)} .* {values['accuracy']:.1%} ", done.out)
    assert_fails(run("probe", tiny_model, "--source", images.replace("folder", "flat")), "has no labels")
    assert_fails(run("probe", tmp_path / "none"), tmp_path / "none")


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


def test_latents_of_chosen_blocks_and_sizes_are_measured(run, images, tiny_model, tmp_path):
    out = tmp_path / "statistics.safetensors"
    options = ["--encoder-size", 12, 20, "--blocks", 0, "--combine", "sum", "--token-mean", "--image-size", 16]
    done = run("latents", "measure", tiny_model, "--source", images, "--out", out, *options)
    assert done.code == 0, done.err
    assert "(16, 3, 5)" in done.out
    batch = next(Loader(DataConfig(source=images, image_size=16), 0).once(30, World()))
    layers = LayersConfig(blocks=(0,), combine="sum", token_mean=True)
    tokens = load_encoder(str(tiny_model), (12, 20), layers)(batch.pixels()).mT.unflatten(2, (3, 5))
    np.testing.assert_allclose(load_file(out)["mean"].numpy(), tokens.double().numpy().mean(0), rtol=0, atol=1e-6)
    done = run("latents", "measure", tiny_model, "--source", images, "--out", out, "--encoder-size", 20)
    assert "(16, 5, 5)" in done.out
    done = run("latents", "measure", tiny_model, "--source", images, "--out", out, "--blocks", 7)
    assert_fails(done, "layers.blocks: 7")


def test_measuring_what_is_not_there(run, images, tiny_model, tmp_path):
    out = tmp_path / "statistics.safetensors"
    assert_fails(
        run("latents", "measure", "dino", "--source", images, "--out", out),
        "encoder dino: no such folder or model; did you mean dino",
    )
    done = run("latents", "measure", tiny_model, "--source", "folder:/nowhere", "--out", out)
    assert_fails(done, "/nowhere")
    assert not out.exists()


def test_a_reference_is_measured_and_written(run, images, tiny_model, tmp_path, caplog):
    out = tmp_path / "new" / "reference.safetensors"
    options = ["--image-size", 16, "--features", tiny_model, "--keep", 5, "--out", out]
    done = run("reference", images, *options)
    assert done.code == 0, done.err
    reference = read_reference(out)
    assert reference.about.hash in done.out
    assert "39 images, tiny" in done.out
    assert caplog.messages == [f"{images}: 30 training and 9 held-out images in 3 classes"]
    assert (reference.about.count, reference.about.split) == (39, "all")
    (features,) = reference.features.values()
    assert features.shape == (5, 16)
    assert_fails(run("reference", "npz:nowhere", *options), "there is no file nowhere")
    options[options.index(tiny_model)] = "inception:nowhere.pth"
    assert_fails(run("reference", images, *options), "nowhere.pth: no such file")


def test_samples_are_scored_next_to_baselines(run, images, tiny_model, weaker, tmp_path, caplog):
    out = tmp_path / "report"
    command = ["evaluate", tiny_model, "--source", images, "--features", tiny_model, "--count", 6, "--steps", 1]
    command += ["--baselines", "--out", out]
    assert_fails(run(*command, "--weak", weaker), "weak: no effect without guidance auto")
    done = run(*command, "--guidance", "auto:1.5", "--weak", weaker)
    assert done.code == 0, done.err
    report = read_report(out)
    assert (report.names["model"], report.names["weak"]) == (str(tiny_model), str(weaker))
    assert (report.settings["count"], report.settings["sampling"]["guidance"]) == (6, "auto:1.5")
    assert list(report.baselines) == ["held-out images", "training images", "reconstructions", "decoded noise"]
    for row in report.baselines:
        assert row in done.out
    assert f"Compared with the 9 held-out images of {images}." in done.out
    assert f"{images}: 9 held-out images in 3 classes" in caplog.messages


def test_an_evaluation_needs_something_to_compare_with(run, images, tiny_model, tmp_path):
    assert_fails(run("evaluate", tiny_model, "--features", tiny_model), "does not record the dataset")
    assert_fails(run("evaluate", images), "saved images need real images to be compared with")
    command = ["evaluate", tiny_model, "--source", images, "--features", tiny_model, "--count", 39, "--steps", 1]
    assert_fails(run(*command, "--out", tmp_path / "out", "--intervals"), "need at least 40 images, and there are 39")


def test_samples_and_saved_images_are_compared_with_a_reference(run, images, tiny_model, tmp_path, monkeypatch):
    reference = tmp_path / "reference.safetensors"
    assert run("reference", images, "--image-size", 16, "--features", tiny_model, "--out", reference).code == 0
    command = ["evaluate", tiny_model, "--reference", reference, "--count", 45, "--steps", 2, "--intervals"]
    command += ["--features", tiny_model]
    done = run(*command, "--out", tmp_path / "plain", "--labels", "reference")
    assert done.code == 0, done.err
    report = read_report(tmp_path / "plain")
    (name,) = {metric for metric in report.metrics if metric.startswith("fd_")}
    assert re.search(rf"{name} ↓ .* {report.results[name]:.6g} .* to .* bias", done.out)
    assert f"report: {tmp_path / 'plain' / 'report.html'}, settings {report.hash}" in done.out
    assert "An early estimate" in done.out
    assert "Precision and recall depend on the numbers of images" in done.out
    done = run(*command, "--out", tmp_path / "guided", "--labels", "reference", "--guidance", "cfg:2.0")
    assert done.code == 0, done.err
    done = run("compare", tmp_path / "plain", tmp_path / "guided", "--out", tmp_path / "both.png")
    assert done.code == 0, done.err
    assert "settings differ in sampling.guidance: none | cfg:2.0" in done.out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert_fails(run("compare", tmp_path / "plain"), "at least two")

    assert run("generate", tiny_model, "--out", tmp_path / "images", "--count", 5, "--steps", 2).code == 0
    monkeypatch.chdir(tmp_path)
    saved = ["evaluate", f"flat:{tmp_path / 'images'}", "--reference", reference, "--features", tiny_model]
    done = run(*saved)
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "reports").iterdir()
    assert read_report(folder).settings["count"] == 15

    rebuilt = ["evaluate", tiny_model, "--reference", reference, "--features", tiny_model, "--reconstruct"]
    done = run(*rebuilt, "--out", tmp_path / "rebuilt")
    assert done.code == 0, done.err
    assert re.search(rf"r{name} ↓ ", done.out)
    assert read_report(tmp_path / "rebuilt").metrics == [f"r{name}", "psnr", "ssim"]
    assert_fails(run(*rebuilt, "--steps", 3), "sampling: has no effect with reconstruct")
    assert_fails(run(*rebuilt, "--intervals"), "intervals: has no effect with reconstruct")
    assert_fails(run(*rebuilt, "--lpips", tmp_path / "no.safetensors"), "no.safetensors: no such file")
    theirs = tmp_path / "theirs.npz"
    np.savez(theirs, mu=np.zeros(2048), sigma=np.eye(2048))
    assert_fails(
        run("evaluate", tiny_model, "--reference", theirs, "--reconstruct"),
        "does not say which images it was measured on",
    )
    assert_fails(run(*saved, "--reconstruct"), "reconstruct: has no effect on saved images")
    assert_fails(run(*command, "--lpips", "x"), "lpips: has no effect without reconstruct")

    assert_fails(run(*saved, "--steps", 3), "sampling: has no effect on saved images")
    assert_fails(run(*saved, "--count", 3), "count: has no effect on saved images")
    assert_fails(run(*command, "--source", images), "source: has no effect with reference")
    assert_fails(run(*command, "--out", tmp_path / "plain"), "holds another evaluation", 'labels: "reference" -> ')
    assert_fails(run("evaluate", tiny_model, "--reference", tmp_path / "no.npz"), "no.npz: no such file")
    assert_fails(run("evaluate", tiny_model, "--reference", reference), "not a registered encoder")
    large = tmp_path / "large.safetensors"
    run("reference", images, "--image-size", 32, "--features", tiny_model, "--out", large)
    command[command.index(reference)] = large
    assert_fails(run(*command), f"{large}: was measured on images of 32 pixels, and these images have 16")


def test_a_model_is_converted_and_back(run, tiny_model, tmp_path):
    done = run("convert", tiny_model, tmp_path / "v1", "--to", "v1")
    assert done.code == 0, done.err
    assert re.search(r"v1: encoder .*, latents 16x4x4, a decoder of \d,\d+ parameters", done.out)
    options = ["--encoder", tiny_model, "--statistics", tmp_path / "v1" / "stat.pt"]
    source = tmp_path / "v1" / "model.pt"
    assert_fails(run("convert", source, tmp_path / "ours", *options), "model.pt", "--decoder-config")
    done = run("convert", source, tmp_path / "ours", *options, "--decoder-config", tmp_path / "v1")
    assert done.code == 0, done.err
    for name in ("model", "statistics"):
        ours, back = (load_file(f / "autoencoder" / f"{name}.safetensors") for f in (tiny_model, tmp_path / "ours"))
        assert ours.keys() == back.keys()
        assert all(torch.equal(ours[key], back[key]) for key in ours)
    assert_fails(run("convert", tiny_model, tmp_path / "ours"), tmp_path / "ours", "not empty")
    assert_fails(
        run("convert", tiny_model, tmp_path / "x", "--to", "diffusers"),
        "diffusers does not support encoders of",
    )
    assert_fails(run("convert", tiny_model, tmp_path / "x", "--encoder", "mae-b"), "describes itself")


def test_info_tells_what_a_model_holds(run, tiny_model, tmp_path):
    done = run("info", tiny_model)
    assert done.code == 0
    numbers = sum(p.numel() for p in load(str(tiny_model)).denoiser.state_dict().values())
    assert f"{numbers:,} numbers, float32" in done.out
    for kind in ("encoder", "autoencoder", "denoiser"):
        assert re.search(rf"^  {kind}: \d+ tensors", done.out, re.MULTILINE)
    assert '"class_names": [' in done.out
    assert_fails(run("info", tiny_model, "--reach", "loss", 1), "not a run")
    assert_fails(run("info", tmp_path), tmp_path, "neither a model, an artifact nor a run")
    assert_fails(run("info", tmp_path / "none"), tmp_path / "none", "no such folder")
    (tmp_path / "file").touch()
    assert_fails(run("info", tmp_path / "file"), tmp_path / "file", "is a file, and a model is a folder")


@pytest.mark.parametrize(("dtype", "resize", "other"), [("bf16", "fast", "exact"), ("int8", "exact", "fast")])
def test_a_denoiser_trains_from_cached_latents(run, images, tiny_model, tmp_path, dtype, resize, other, caplog):
    out = tmp_path / "cache"
    command = ["latents", "cache", tiny_model, "--source", images, "--out", out, "--dtype", dtype]
    cache = [*command, "--shard-size", 20, "--precision", "fp32", "--flip", "--resize"]
    done = run(*cache, resize)
    assert done.code == 0, done.err
    said = rf"{out}: 30 images in both orientations as {dtype}, 0\.\d MiB in 2 shards; error 0\.[1-9]\d% of .*\n"
    assert re.fullmatch(said, done.out)
    assert caplog.messages == [f"{images}: 30 training and 9 held-out images in 3 classes"]
    small = {"data.source": images, "data.image-size": 16, "autoencoder": tiny_model, "denoiser.backbone.width": 16}
    small |= {"denoiser.backbone.heads": 2, "denoiser.head.width": 16, "denoiser.head.heads": 2, "train.steps": 2}
    small |= {"train.precision": "fp32", "latents": out}
    options = [str(x) for name, value in small.items() for x in (f"--{name}", value)]
    done = run("train", "emoji_dit_dh", "--run", tmp_path / "run", *options, "--data.flip", "--data.resize", resize)
    assert done.code == 0, done.err
    assert f"{images}: 30 images from cached latents" in caplog.messages
    assert load(str(tmp_path / "run")).classes == ("blue", "green", "red")
    drawn = ["generate", tmp_path / "run", "--count", 1, "--steps", 1, "--out", tmp_path / "grid.png"]
    assert run(*drawn, "--ema", 0.998).code == 0
    assert_fails(run(*drawn, "--ema", 0.5), tmp_path / "run", "no average of decay 0.5; its averages have decay 0.998")
    for name, made, wanted in (("split", "train", "all"), ("resize", resize, other)):
        wrong = run("train", "emoji_dit_dh", *options, f"--data.{name}", wanted, "--run", tmp_path / "other")
        assert_fails(wrong, out, f"made with data.{name} {made}, but the config has {wanted}")
    assert not (tmp_path / "other").exists()
    assert_fails(run(*cache, other), out, "holds other latents", f'resize: "{resize}" -> "{other}"')
    assert_fails(run(*command, "--shard-size", 10), out, "images were added or removed, or the shard size is another")


def test_generated_latents_decode_to_the_generated_images(run, tiny_model, tmp_path):
    out = tmp_path / "latents" / "generated.safetensors"
    done = run("latents", "generate", tiny_model, "--count", 7, "--steps", 3, "--batch-size", 3, "--out", out)
    assert done.code == 0, done.err
    latents = load_file(out)["unwhitened"]
    model = load(str(tiny_model))
    labels = [0, 1, 2, 0, 1, 2, 0]
    images = torch.cat([batch.images for batch in generate(model, labels, sampling=Sampling(steps=3))])
    with torch.no_grad():
        decoded = model.autoencoder.decode(model.autoencoder.whiten(latents))
    assert torch.allclose(decoded, images, atol=1e-5)
    assert_fails(run("latents", "generate", tiny_model, "--count", 0, "--out", out), "--count: 0")
