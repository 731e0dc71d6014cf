"""The demo: trains a decoder and a denoiser on the built-in images, samples, scores the samples and writes a report."""

import io
import platform
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raekit import __version__
from raekit.config import configclass, from_dict, read_json, to_dict, to_json
from raekit.data.loader import Loader
from raekit.distributed import World
from raekit.distributed import world as enter_world
from raekit.errors import UserError
from raekit.evaluation.evaluate import evaluate
from raekit.files import whole
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling
from raekit.inference.generation import generate
from raekit.inference.model import Model, load, reconstruct
from raekit.locks import lock
from raekit.pages import embed, write_page
from raekit.pictures import grid, to_pil
from raekit.progress import Progress
from raekit.recipes import find
from raekit.stages.generation import GenerationConfig
from raekit.stages.reconstruction import ReconstructionConfig
from raekit.stages.run import StageConfig, train
from raekit.stages.scaling import for_steps
from raekit.train.tracking import read_metrics

GUIDANCE = Guidance(scale=3.0, start=0.1)
CALIBRATION_STEPS = 16
PER_CLASS = 8


@configclass
class Plan:
    """The plan of a demo. It is fixed when the demo starts, so that a restart resumes the same work."""

    minutes: float
    quick: bool
    decoder_steps: int
    denoiser_steps: int
    samples: int
    sampling_steps: int


def run_demo(run: Path, minutes: float, quick: bool, progress: Progress) -> None:
    """Run the demo in the folder `run`, or resume it.

    The demo writes RUN/decoder and RUN/denoiser (runs), RUN/pictures, RUN/evaluation and RUN/report.html.

    Args:
        run: folder of the demo.
        minutes: how long the demo takes on this machine, about.
        quick: train for a few steps only, without measuring the speed of the machine.
        progress: called after each step and batch.

    Raises:
        Stopped: a signal stopped a training.
        UserError: `run` was started with other options, or `minutes` is not positive.
    """
    if minutes <= 0:
        raise UserError(f"--minutes: {minutes} must be positive")
    decoder, denoiser = _recipes(run)
    with ExitStack() as held, enter_world() as world:
        if world.size > 1:
            raise UserError("demo: runs in one process only; start it without torchrun")
        held.enter_context(lock(run, world))
        plan = _plan(run, minutes, quick, decoder, denoiser, world, progress)
        stages = (("decoder", decoder, plan.decoder_steps), ("denoiser", denoiser, plan.denoiser_steps))
        for name, config, steps in stages:
            _train(name, _for_steps(config, steps), run / name, world, progress)
        model = load(str(run / "denoiser"), world.device)
        _pictures(run, model, plan, decoder, world, progress)
        _report(run, plan, _scores(run, model, plan, world, progress))


def _recipes(run: Path) -> tuple[ReconstructionConfig, GenerationConfig]:
    decoder, denoiser = find("emoji_decoder_gan").config, find("emoji_dit_dh").config
    assert isinstance(decoder, ReconstructionConfig)
    assert isinstance(denoiser, GenerationConfig)
    assert decoder.adversarial
    # LPIPS is left out because it would need a download of VGG16. The discriminator starts later than in the recipe:
    # its steps take twice as long, and in a short training more steps without it give a better decoder.
    steps = decoder.train.steps
    adversarial = replace(decoder.adversarial, discriminator_start=12 * steps // 16, start=13 * steps // 16)
    decoder = replace(decoder, perceptual=None, adversarial=adversarial)
    return decoder, replace(denoiser, autoencoder=str(run / "decoder"))


def _for_steps(config: Any, steps: int) -> Any:
    """Return a recipe shortened to `steps`, with warm-up, averages, checkpoints and log records to match."""
    warmup = min(config.optim.warmup_steps, steps // 10)
    config = for_steps(config, steps)
    return replace(
        config,
        train=replace(config.train, checkpoint_every=max(steps // 10, 10), log_every=max(steps // 100, 1)),
        optim=replace(config.optim, warmup_steps=warmup),
        ema=tuple(min(decay, 1 - 20 / max(steps, 40)) for decay in config.ema),
    )


def _plan(
    run: Path,
    minutes: float,
    quick: bool,
    decoder: ReconstructionConfig,
    denoiser: GenerationConfig,
    world: World,
    progress: Progress,
) -> Plan:
    """Read RUN/plan.json, or write it: the numbers of steps that this machine can do in `minutes`."""
    path = run / "plan.json"
    if path.is_file():
        plan = from_dict(Plan, read_json(path), path)
        if (plan.minutes, plan.quick) != (minutes, quick):
            raise UserError(
                f"{run}: was started with --minutes {plan.minutes:g}{' --quick' if plan.quick else ''}; "
                "give the same options, or another --run"
            )
        return plan
    if quick:
        plan = Plan(minutes=minutes, quick=True, decoder_steps=40, denoiser_steps=40, samples=200, sampling_steps=6)
    else:
        with TemporaryDirectory() as scratch:
            first = Path(scratch) / "decoder"
            trial = _seconds_per_step("time the decoder", decoder, first, world, progress)
            denoiser = replace(denoiser, autoencoder=str(first))
            second = _seconds_per_step("time the denoiser", denoiser, Path(scratch) / "denoiser", world, progress)
        seconds = 60 * minutes
        plan = Plan(
            minutes=minutes,
            quick=False,
            decoder_steps=max(int(0.2 * seconds / trial), 20),
            denoiser_steps=max(int(0.55 * seconds / second), 20),
            samples=256,
            sampling_steps=25,
        )
    with whole(path) as partial:
        partial.write_text(to_json(to_dict(plan)))
    return plan


def _seconds_per_step(name: str, config: Any, run: Path, world: World, progress: Progress) -> float:
    """Train for a few steps, and return the mean time of a step."""
    times: list[float] = []

    def report(step: int, values: dict[str, float]) -> None:
        times.append(time.perf_counter())
        progress(name, step, CALIBRATION_STEPS, unit=config.train.batch_size)

    trial = _for_steps(config, CALIBRATION_STEPS)
    train(replace(trial, train=replace(trial.train, checkpoint_every=10**9)), run, world, report)
    gaps = [b - a for a, b in pairwise(times)]
    adversarial = getattr(trial, "adversarial", None)
    late = adversarial.discriminator_start if adversarial else CALIBRATION_STEPS
    parts = gaps[: late - 1], gaps[late - 1 :]  # the discriminator trains in the second part
    # A quartile leaves out slow first steps, and steps during which the machine was busy.
    return sum(len(part) * sorted(part)[len(part) // 4] for part in parts if part) / len(gaps)


def _train(name: str, config: StageConfig, run: Path, world: World, progress: Progress) -> None:
    def report(step: int, values: dict[str, float]) -> None:
        progress(name, step, config.train.steps, f"loss {values[f'{name}/loss']:.4f}", config.train.batch_size)

    train(config, run, world, report, progress)


def _pictures(run: Path, model: Model, plan: Plan, config: StageConfig, world: World, progress: Progress) -> None:
    """Save a picture of reconstructions next to their originals, and pictures of samples without and with guidance."""
    folder = run / "pictures"
    folder.mkdir(exist_ok=True)
    held_out = Loader(replace(config.data, split="heldout"), seed=0)
    batch = next(iter(held_out.stream(0, 2 * PER_CLASS, World()))).to(world.device)
    pairs = zip(batch.pixels(), reconstruct(model.autoencoder, batch.pixels()), strict=True)
    _save(grid([to_pil(image) for pair in pairs for image in pair], columns=PER_CLASS), folder / "reconstructions.png")
    labels = [label for label in range(len(model.classes)) for _ in range(PER_CLASS)]
    for name, guidance in (("samples", ()), ("guided", (GUIDANCE,))):
        if (folder / f"{name}.png").is_file():
            continue
        images = []
        sampling = Sampling(steps=plan.sampling_steps, guidance=guidance)
        for samples in generate(model, labels, seed=1, sampling=sampling, batch_size=24, world=world):
            images += [to_pil(image) for image in samples.images]
            progress(f"{name} picture", len(images), len(labels))
        _save(grid(images, columns=PER_CLASS), folder / f"{name}.png")


def _save(picture: Any, path: Path) -> None:
    with whole(path) as partial:
        picture.save(partial, format="PNG")


Scores = dict[str, dict[str, float]]
"""{images: {metric: value}}."""


def _scores(run: Path, model: Model, plan: Plan, world: World, progress: Progress) -> Scores:
    """Evaluate unguided and guided samples, and the baselines."""
    plain = Sampling(steps=plan.sampling_steps)
    guided = replace(plain, guidance=(GUIDANCE,))
    folder = run / "evaluation"
    first, second = (
        evaluate(
            model,
            count=plan.samples,
            sampling=sampling,
            baselines=True,  # of guided samples too: the nearest training images are searched among them
            out=folder / place,
            world=world,
            progress=progress,
        )[0]
        for place, sampling in (("samples", plain), ("guided", guided))
    )
    name = f"samples, CFG {GUIDANCE.scale:g} in {GUIDANCE.start:g}-{GUIDANCE.end:g}"
    return {**first.baselines, "samples": first.results, name: second.results}


def _report(run: Path, plan: Plan, scores: Scores) -> None:
    """Write RUN/report.html, a page that needs no other file."""
    model = load(str(run / "denoiser"))
    records = {name: read_metrics(run / name) for name in ("decoder", "denoiser")}
    write_page(
        run / "report.html",
        "report.html",
        version=__version__,
        plan=to_dict(plan),
        classes=model.classes,
        scores=scores,
        metrics=list(dict.fromkeys(metric for row in scores.values() for metric in row)),
        pictures={path.stem: embed(path.read_bytes()) for path in sorted((run / "pictures").glob("*.png"))},
        curves={name: embed(_curve(name, rows)) for name, rows in records.items()},
        timings={name: _seconds(rows, run / name) for name, rows in records.items()},
        parameters={
            "encoder": _count(model.autoencoder.encoder),
            "decoder": _count(model.autoencoder.decoder),
            "denoiser": _count(model.denoiser),
        },
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        settings={name: to_json(read_json(run / name / "config.json")) for name in records},
        per_class=PER_CLASS,
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _seconds(records: list[dict[str, float]], run: Path) -> float:
    """Return the time of all training steps. Restarts and pauses are not counted."""
    batch = read_json(run / "config.json")["train"]["batch_size"]
    total, before = 0.0, 0.0
    for record in records:
        if "images_per_second" in record:
            total += (record["step"] - before) * batch / record["images_per_second"]
            before = record["step"]
    return total


def _curve(name: str, records: list[dict[str, float]]) -> bytes:
    """Return a plot of the loss as a PNG."""
    from matplotlib.figure import Figure  # imported here because the import is slow

    points = [(r["step"], r[f"{name}/loss"]) for r in records if f"{name}/loss" in r]
    figure = Figure(figsize=(5, 2.6), dpi=160, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="L1" if name == "decoder" else "velocity MSE", title=name)
    axes.plot(*zip(*points, strict=True), linewidth=1.2)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
