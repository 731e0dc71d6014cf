"""Complete runs from config to artifact, also with interruptions and several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raekit import __version__
from raekit.config import to_dict
from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import Stopped, UserError
from raekit.inference.model import load
from raekit.models.baselines import VAESize
from raekit.models.denoiser_config import TransformerConfig
from raekit.models.vit import ViTConfig
from raekit.stages.classification import ClassificationConfig
from raekit.stages.compression import CompressionConfig
from raekit.stages.cost import cost_of, memory_advice
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig
from raekit.stages.record import config_changes, read_config, read_history
from raekit.stages.report import write_report
from raekit.stages.representation import RepresentationConfig
from raekit.stages.run import StageConfig, build, train
from raekit.stages.watch import HeldoutConfig, PicturesConfig
from raekit.training import checkpoint
from raekit.training.optim import OptimConfig
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig, Trainer

ONE = World()
NAMES = ("encoder", "decoder", "denoiser", "classifier", "vae")
KILL_RESUME = Path(__file__).parents[2] / "tools" / "kill_resume.py"
KILLS = os.environ.get("RAEKIT_KILLS", "3")
"""RAEKIT_KILLS=20 makes the test of resuming as long as the claim."""


def configs(images: str, runs: Path, micro_batch: int | None = None) -> tuple[StageConfig, ...]:
    """Return a config of every stage with every random choice turned on. The second and third use the run before."""
    data = DataConfig(source=images, image_size=16, crop="random", flip=True)
    settings = TrainConfig(
        steps=7, batch_size=8, micro_batch=micro_batch, precision="fp32", seed=4, log_every=1, checkpoint_every=3
    )
    optim = OptimConfig(lr=1e-3, final_lr=1e-4, warmup_steps=2, warmup_from_zero=True, decay="cosine", decay_end=7)
    part = TransformerConfig(width=16, depth=1, heads=2)
    shared: dict[str, Any] = {"data": data, "train": settings, "optim": optim, "ema": (0.8,)}
    vit = ViTConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2)
    size = DecoderSize(width=16, depth=1, heads=2, hidden=32, patch_size=4)
    return (
        RepresentationConfig(encoder=vit, decoder_width=16, decoder_depth=1, **shared),
        ReconstructionConfig(encoder=str(runs / "encoder"), decoder=size, **shared),
        GenerationConfig(
            autoencoder=str(runs / "decoder"),
            denoiser=DenoiserSize(backbone=part, head=part, qk_norm=True),
            time_law="logit-normal",
            **shared,
        ),
        ClassificationConfig(widths=(8, 16), score_every=7, **shared),
        CompressionConfig(
            vae=VAESize(channels=2, widths=(32, 32)),
            samples=PicturesConfig(every=7, count=2),
            heldout=HeldoutConfig(every=7, count=4),
            **shared,
        ),
    )


def train_all(world: World, images: str, runs: Path, micro_batch: int | None = None) -> dict[str, list[float]]:
    """Train all stages; return the losses, which are the same on every rank."""
    losses: dict[str, list[float]] = {name: [] for name in NAMES}
    for name, config in zip(NAMES, configs(images, runs, micro_batch), strict=True):
        key = f"{name}/loss"
        train(config, runs / name, world, lambda _, values, name=name, key=key: losses[name].append(values[key]))
    return losses


def artifact(run: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of a run's artifact."""
    folder = run / "artifact"
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)} {key}": value for path in files for key, value in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    runs = tmp_path_factory.mktemp("alone")
    return runs, train_all(ONE, images, runs)


def test_the_stages_lead_from_images_to_a_model(alone):
    runs, losses = alone
    for name in NAMES:
        assert [record["step"] for record in read_metrics(runs / name) if f"{name}/loss" in record] == list(range(1, 8))
        assert len(losses[name]) == 7
        assert [path.name for path in checkpoint.checkpoints(runs / name / "checkpoints")] == [
            "step-00000006",
            "step-00000007",
        ]
    model = load(str(runs / "denoiser"))
    assert model.classes == ("blue", "green", "red")
    assert model.autoencoder.decode(model.autoencoder.encode(torch.rand(2, 3, 16, 16))).shape == (2, 3, 16, 16)
    # The third run's artifact contains the encoder of the first run.
    encoder = artifact(runs / "encoder")
    assert all(torch.equal(artifact(runs / "denoiser")[key], value) for key, value in encoder.items())


def test_a_run_of_every_stage_has_a_report(alone, tmp_path):
    for name in NAMES:
        page = write_report(alone[0] / name, tmp_path / f"{name}.html").read_text()
        assert all(words in page for words in (f"{name} loss", "step 7 of 7", "finished", "30 in 3 classes"))


def test_the_same_config_gives_the_same_run(alone, images, tmp_path):
    assert train_all(ONE, images, tmp_path) == alone[1]
    assert all(same(artifact(tmp_path / name), artifact(alone[0] / name)) for name in NAMES)


def test_initial_weights_depend_on_the_seed_alone(images, tmp_path):
    config = configs(images, tmp_path)[0]

    def weights(config: StageConfig) -> torch.Tensor:
        torch.rand(3)
        return build(config, tmp_path, ONE).objectives[0].module.get_parameter("encoder.embed.weight")

    assert torch.equal(weights(config), weights(config))
    assert not torch.equal(weights(config), weights(replace(config, train=replace(config.train, seed=5))))


@pytest.fixture(scope="module")
def two(images, run_ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    runs = tmp_path_factory.mktemp("two")
    return runs, run_ranks(in_two, 2, images, runs)


def in_two(world: World, images: str, runs: Path) -> dict[str, dict[str, list[float]]]:
    warnings.simplefilter("error")
    return {
        how: train_all(world, images, runs / how, micro_batch) for how, micro_batch in (("plain", None), ("parts", 2))
    }


@pytest.mark.parametrize("how", ["plain", "parts"])
def test_two_processes_train_every_stage_as_one(two, alone, how):
    runs, ranks = two
    for name in NAMES:
        assert ranks[0][how][name] == ranks[1][how][name]
        assert ranks[0][how][name] == pytest.approx(alone[1][name], rel=1e-5)
        found, expected = artifact(runs / how / name), artifact(alone[0] / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # Adam scales up rounding, and before a norm the gradient of a bias is nothing else. A wrong gradient moves
            # a weight by about the learning rate in each step, together by 4e-3.
            if name == "vae" and key.endswith("bias"):
                continue
            atol = 2e-4 if name == "vae" else 1e-5
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_one_process_accumulates_in_every_stage(alone, images, tmp_path):
    losses = train_all(ONE, images, tmp_path, micro_batch=2)
    for name in NAMES:
        assert losses[name] == pytest.approx(alone[1][name], rel=1e-5)


@pytest.mark.parametrize("stage", range(len(NAMES)), ids=NAMES)
def test_a_stopped_run_goes_on_exactly_within_an_epoch(alone, images, tmp_path, stage):
    """An epoch has 30 images and a step 8, so that steps 2 and 5 lie within the first and the second epoch."""
    name, config = NAMES[stage], configs(images, alone[0])[stage]
    for last in (2, 5, 7):

        def stop(step: int, values: dict[str, float], last: int = last) -> None:
            if step == last < 7:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Stopped) if last < 7 else nullcontext():
            train(config, tmp_path, ONE, stop)
        assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{last:08d}"
        assert same(artifact(tmp_path), artifact(alone[0] / name)) == (last == 7)
    losses = [record[f"{name}/loss"] for record in read_metrics(tmp_path) if f"{name}/loss" in record]
    assert losses == alone[1][name]


def test_a_run_keeps_its_config_and_refuses_another(alone, images, tmp_path):
    config = configs(images, alone[0])[1]
    assert isinstance(config, ReconstructionConfig)
    short = replace(config, train=replace(config.train, steps=1))
    train(short, tmp_path, ONE)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text) == to_dict(short)
    before = artifact(tmp_path)
    changed = replace(short, noise=0.25, optim=replace(short.optim, lr=1.0))
    with pytest.raises(UserError) as error:
        train(changed, tmp_path, ONE)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path}: belongs to a run with a different config:"
    assert lines[1:3] == ["  noise: 0.8 -> 0.25", "  optim.lr: 0.001 -> 1.0 (possible with --change)"]
    assert lines[3].startswith("Choose another --run, or undo these changes.")
    with pytest.raises(UserError, match=r"noise: 0\.8 -> 0\.25\nChoose"):
        train(changed, tmp_path, ONE, change=True)
    assert (tmp_path / "config.json").read_text() == text
    assert same(artifact(tmp_path), before)


def stop_at(last: int) -> Callable[[int, dict[str, float]], None]:
    """Return a report function that stops the training after step `last`."""

    def report(step: int, values: dict[str, float]) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def with_train(config: StageConfig, **values: Any) -> StageConfig:
    return replace(config, train=replace(config.train, **values))


def test_how_a_run_is_operated_may_differ_between_starts_and_is_recorded(alone, images, tmp_path):
    config = configs(images, alone[0])[0]
    with pytest.raises(Stopped):
        train(config, tmp_path, ONE, stop_at(2))
    train(with_train(config, micro_batch=4, keep=1, checkpoint_every=2), tmp_path, ONE)
    losses = [record["encoder/loss"] for record in read_metrics(tmp_path) if "encoder/loss" in record]
    assert losses == pytest.approx(alone[1]["encoder"], rel=1e-5)
    first, second = read_history(tmp_path)
    assert (first["step"], first["config"]) == (0, to_dict(config))
    assert first["inputs"]["data"]["classes"] == {"blue": 10, "green": 10, "red": 10}
    assert second["step"] == 2
    assert second["changes"] == {
        "train.micro_batch": [None, 4],
        "train.checkpoint_every": [3, 2],
        "train.keep": [2, 1],
    }
    assert (second["raekit"], second["processes"]) == (__version__, 1)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["micro_batch"] == 4


def test_what_is_changed_on_purpose_holds_from_the_recorded_step_on(alone, images, tmp_path):
    config = configs(images, alone[0])[0]
    with pytest.raises(Stopped):
        train(config, tmp_path, ONE, stop_at(3))
    lower = replace(config, optim=replace(config.optim, lr=1e-5, final_lr=1e-6))
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 1e-05 \(possible with --change\)"):
        train(lower, tmp_path, ONE)
    rates = {}
    train(lower, tmp_path, ONE, lambda step, values: rates.update({step: values["encoder/lr"]}), change=True)
    assert min(rates) == 4
    assert max(rates.values()) <= 1e-5
    assert read_history(tmp_path)[1]["changes"] == {"optim.lr": [1e-3, 1e-5], "optim.final_lr": [1e-4, 1e-6]}
    with pytest.raises(UserError, match=r"train\.steps: 5, but .* has trained 7 steps"):
        train(with_train(lower, steps=5), tmp_path, ONE, change=True)


def copied(images: str, folder: Path) -> Path:
    return Path(shutil.copytree(images.removeprefix("folder:"), folder))


def from_source(config: StageConfig, source: str) -> StageConfig:
    return replace(config, data=replace(config.data, source=source))


def test_a_dataset_is_the_same_wherever_it_is_and_however_it_is_spelled(alone, images, tmp_path, monkeypatch):
    config, run = configs(images, alone[0])[2], tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, run, ONE, stop_at(2))
    copied(images, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    train(from_source(config, "folder:moved"), run, ONE)
    assert same(artifact(run), artifact(alone[0] / "denoiser"))
    assert read_history(run)[1]["changes"] == {"data.source": [images, f"folder:{tmp_path / 'moved'}"]}


def test_changed_images_are_said_and_need_a_permission(alone, images, tmp_path):
    root = copied(images, tmp_path / "images")
    config, run = from_source(configs(images, alone[0])[0], f"folder:{root}"), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, run, ONE, stop_at(2))
    (root / "note.txt").write_text("not an image")
    victim = next((root / "train" / "red").iterdir())
    content = victim.read_bytes()
    victim.write_bytes(content + b" ")
    with pytest.raises(UserError, match=r"different config:\n  data\.sizes: .*\(possible with --change\)\nChoose"):
        train(config, run, ONE)
    victim.unlink()
    with pytest.raises(UserError, match=r"data\.count: 30 -> 29 .*\n  data\.classes\.red: 10 -> 9 .*\n  data\.names: "):
        train(config, run, ONE)
    train(config, run, ONE, change=True)
    assert read_history(run)[1]["changes"]["data.count"] == [30, 29]


def test_other_classes_or_another_encoder_under_the_same_name_are_another_training(alone, images, tmp_path):
    root, decoder = copied(images, tmp_path / "images"), tmp_path / "decoder"
    shutil.copytree(alone[0] / "decoder" / "artifact", decoder)
    config = from_source(configs(images, alone[0])[2], f"folder:{root}")
    assert isinstance(config, GenerationConfig)
    config, run = replace(config, autoencoder=str(decoder)), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, run, ONE, stop_at(2))
    for split in ("train", "val"):
        (root / split / "red").rename(root / split / "crimson")
    for change in (False, True):
        with pytest.raises(UserError, match=r"was trained on other classes \(new: crimson; missing: red\)"):
            train(config, run, ONE, change=change)
    for split in ("train", "val"):
        (root / split / "crimson").rename(root / split / "red")
    weights = decoder / "encoder" / "model.safetensors"
    state = load_file(weights)
    save_file({key: value + 0.1 for key, value in state.items()}, weights)
    with pytest.raises(UserError, match=r"different config:\n  encoder: \"\w{16}\" -> \"\w{16}\"\nChoose"):
        train(config, run, ONE, change=True)
    save_file(state, weights)
    moved = decoder.rename(tmp_path / "moved")
    train(replace(config, autoencoder=str(moved)), run, ONE)


def test_a_run_without_a_checkpoint_belongs_to_nobody(alone, images, tmp_path):
    config = configs(images, alone[0])[1]
    assert isinstance(config, ReconstructionConfig)
    last = configs(images, alone[0])[2]

    class Lost(Exception):
        pass

    def lose(step: int, values: dict[str, float]) -> None:
        raise Lost

    other = replace(config, data=replace(config.data, flip=False))
    with pytest.raises(Lost):
        train(other, tmp_path, ONE, lose)
    measured = (tmp_path / "statistics.safetensors").read_bytes()
    with pytest.raises(Lost):  # the same training again does not measure the statistics again
        train(with_train(other, micro_batch=4), tmp_path, ONE, lose, no_progress)
    assert (tmp_path / "statistics.safetensors").read_bytes() == measured
    with pytest.raises(Lost):
        train(last, tmp_path, ONE, lose)
    train(config, tmp_path, ONE)
    assert same(artifact(tmp_path), artifact(alone[0] / "decoder"))
    assert [record["config"] for record in read_history(tmp_path)] == [to_dict(config)]
    with pytest.raises(UserError, match="belongs to a training of stage reconstruction, not generation"):
        train(last, tmp_path, ONE)


OLD_CONFIG = Path(__file__).parent / "configs" / "2026-11-26.json"
"""The config.json of a run of emoji_decoder_gan, as it was written on that day. It is never updated."""


def test_the_config_of_an_old_run_is_read_with_todays_defaults(tmp_path):
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    values = json.loads(OLD_CONFIG.read_text())
    del values["train"]["tensorboard"]  # a field that is gone; `track` replaces it
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert to_dict(config).items() >= {key: values[key] for key in ("stage", "encoder", "noise", "output")}.items()
    # A field that a later version adds is missing in the file. It has its default and does not lock the run.
    del values["train"]["max_skipped"], values["adversarial"]["local_weight"], values["noise_law"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == config
    assert config_changes(tmp_path, config) == []


def no_progress(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
    pytest.fail("the statistics are measured again")


def test_the_trial_of_an_automatic_micro_batch_changes_nothing(alone, images, tmp_path, monkeypatch):
    tried = []

    def fitting(share: int, trial: Callable[[int], None], world: World) -> int:
        for size in (1, 4):
            trial(size)
            tried.append((share, size))
        return 4

    config = configs(images, alone[0])[1]
    train(with_train(config, micro_batch=4), tmp_path / "four", ONE)
    train(with_train(config, micro_batch="auto"), tmp_path / "auto", ONE)  # on a CPU the whole batch
    assert same(artifact(tmp_path / "auto"), artifact(alone[0] / "decoder"))
    monkeypatch.setattr("raekit.training.trainer.fitting", fitting)
    train(with_train(config, micro_batch="auto"), tmp_path / "tried", ONE)
    assert tried == [(8, 1), (8, 4)]
    assert same(artifact(tmp_path / "tried"), artifact(tmp_path / "four"))


def test_out_of_memory_names_settings_that_fit(alone, images, tmp_path, monkeypatch):
    """A device on which three images of the denoiser fit by the estimate; with checkpointing, more of them."""
    config = configs(images, alone[0])[2]
    stage = build(config, tmp_path, ONE)
    batch = next(stage.batches(0)).split(2)[0]
    cost = cost_of(stage.objectives[0], batch, config.train, ONE)
    backward = Trainer._backward

    def limited(self: Trainer, objective: Any, part: Any, *rest: Any) -> Any:
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, objective, part, *rest)

    monkeypatch.setattr(Trainer, "_backward", limited)
    monkeypatch.setattr("raekit.stages.cost.capacity", lambda device: cost.state + 3.5 * cost.image)
    with pytest.raises(UserError) as error:
        train(config, tmp_path, ONE)
    message = str(error.value)
    assert message.startswith("out of memory on cpu with train.micro_batch 8: it needs about 0.00 GiB of state")
    assert re.search(
        r"; set train\.micro_batch 2 \(about .*, or set train\.checkpointing and train\.micro_batch \d ", message
    )
    train(with_train(config, micro_batch=2), tmp_path, ONE)


def test_one_of_several_processes_that_runs_out_of_memory_measures_nothing(alone, images, tmp_path, monkeypatch):
    """Another pass would wait for the other processes, or disturb the step that they are in."""
    config = configs(images, alone[0])[2]
    monkeypatch.setattr("raekit.stages.cost.cost_of", None)
    message = memory_advice(build(config, tmp_path, ONE), config.train, 4, World(rank=1, size=2))
    assert message.startswith("out of memory on cpu with train.micro_batch 4; set train.checkpointing or a smaller")


def test_a_run_killed_while_its_config_was_written_begins_anew(alone, images, tmp_path):
    config = configs(images, alone[0])[0]
    (tmp_path / "config.json.raekit-partial").write_text('{"stage": "rep')
    short = replace(config, train=replace(config.train, steps=1))
    train(short, tmp_path, ONE)
    assert not (tmp_path / "config.json.raekit-partial").exists()


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
def test_a_run_without_its_record_is_not_continued(alone, images, tmp_path, name):
    config = configs(images, alone[0])[0]
    short = replace(config, train=replace(config.train, steps=1))
    train(short, tmp_path, ONE)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    history = (tmp_path / "history.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"{tmp_path}: has checkpoints but no {name}"):
        train(short, tmp_path, ONE)
    assert (tmp_path / "history.jsonl").read_bytes() == history
    (tmp_path / name).write_bytes(content)
    train(short, tmp_path, ONE)


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_serves(alone, images, tmp_path):
    config = configs(images, alone[0])[0]
    train(config, tmp_path, ONE)
    newest = tmp_path / "checkpoints" / "step-00000007"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"^{newest}: damaged .* mv "):
        train(config, tmp_path, ONE)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    steps = []
    train(config, tmp_path, ONE, lambda step, values: steps.append(step))
    assert steps == [7]
    assert same(artifact(tmp_path), artifact(alone[0] / "encoder"))


def test_a_model_without_a_checkpoint_is_not_replaced(alone, images, tmp_path):
    config = configs(images, alone[0])[1]
    train(with_train(config, checkpoint_every=7), tmp_path, ONE)
    only = tmp_path / "checkpoints" / "step-00000007"
    index = (only / ".metadata").read_bytes()
    (only / ".metadata").write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"^{only}: damaged .* no earlier checkpoint .* --init-from {tmp_path} [^\n]*$"
    ):
        train(config, tmp_path, ONE)
    (only / ".metadata").write_bytes(index)
    only.rename(f"{only}.damaged")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"^{tmp_path}: has a trained model .*--init-from {tmp_path} [^\n]*$"):
        train(config, tmp_path, ONE)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=r"another --run, or move"):  # a stage that has no init_from
        train(configs(images, alone[0])[0], tmp_path, ONE)


def test_a_full_disk_stops_a_run_that_goes_on_once_there_is_space(alone, images, full_disk):
    config = configs(images, alone[0])[0]
    run, filler = full_disk / "run", full_disk / "filler"

    def fill(step: int, values: dict[str, float]) -> None:
        if step == 4:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(UserError, match=rf"^{run}/.*No space left on device.*"):
        train(config, run, ONE, fill)
    assert [path.name for path in checkpoint.checkpoints(run / "checkpoints")] == ["step-00000003"]
    filler.unlink()
    train(config, run, ONE)
    assert same(artifact(run), artifact(alone[0] / "encoder"))
    losses = [record["encoder/loss"] for record in read_metrics(run) if "encoder/loss" in record]
    assert losses == alone[1]["encoder"]


def test_killed_at_random_moments_a_run_ends_the_same_to_the_bit(images, tmp_path):
    options = ["--kills", KILLS, "--folder", str(tmp_path), "--images", images, "--only", "encoder"]
    command = [sys.executable, str(KILL_RESUME), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"OK: {KILLS} kills, nothing lost\n")


@pytest.mark.parametrize("name", ["checkpoints", "artifact", "milestones", "samples"])
def test_a_folder_that_cannot_be_made_is_found_before_the_training(alone, images, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name}: is a file; give the path of a folder"):
        train(configs(images, alone[0])[0], tmp_path, ONE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_does_not_become_its_own_images(alone, images, tmp_path):
    shutil.copytree(images.removeprefix("folder:"), tmp_path / "photos")
    config = from_source(configs(images, alone[0])[0], f"folder:{tmp_path / 'photos'}")
    with pytest.raises(UserError, match=r"photos/runs/a: lies in the folder of folder:.* elsewhere \(run\)"):
        train(config, tmp_path / "photos" / "runs" / "a", ONE)
    assert not (tmp_path / "photos" / "runs").exists()
