"""The demo: shows the built-in models, trains for a given number of minutes, and writes a report.

On the built-in images, the demo trains a decoder from random weights (stage 1, shown next to the built-in decoder) and
a denoiser from random weights on the latents of the built-in autoencoder (stage 2). On a folder of your own, both
trainings start from the built-in models, and the denoiser is trained on the latents of the new decoder's autoencoder.
"""

import io
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raekit import __version__
from raekit.config import configclass, from_dict, read_json, to_dict, to_json
from raekit.data.images import EXTENSIONS
from raekit.data.loader import DataConfig, Loader
from raekit.data.sources import open_source
from raekit.distributed import World
from raekit.distributed import world as enter_world
from raekit.distributed.locks import lock
from raekit.distributed.threads import fit_threads
from raekit.errors import UserError
from raekit.evaluation.evaluate import evaluate
from raekit.evaluation.pages import write_page
from raekit.evaluation.pairs import METRICS
from raekit.evaluation.reports import Report, read_report
from raekit.files import whole
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling
from raekit.inference.cache import cache_latents
from raekit.inference.generation import generate
from raekit.inference.model import Model, load, reconstruct
from raekit.models.autoencoder import load_autoencoder
from raekit.models.denoiser_config import TransformerConfig
from raekit.models.latent_space import LatentSpace
from raekit.pictures import embed, save_grid, to_pil
from raekit.progress import Progress
from raekit.recipes import find
from raekit.stages.generation import GenerationConfig
from raekit.stages.reconstruction import ReconstructionConfig
from raekit.stages.run import train
from raekit.stages.scaling import for_steps
from raekit.training.checkpoint import checkpoints
from raekit.training.tracking import read_metrics

BUILTIN = "builtin:emoji"
SAMPLING = Sampling(steps=15, solver="abm", grid="few")
GUIDANCE = (Guidance(scale=3.0, start=0.1),)
GUIDANCE_WITH_BASE = (*GUIDANCE, Guidance(method="internal", scale=1.5))
"""The guidance of a denoiser with a base output, such as the built-in one."""
PER_CLASS = 8
DECODER_SHARE = 0.15
"""The fraction of the minutes that the decoder trains."""
FIRST_LEG = 8
"""Steps of a training before its speed is known."""
SHORTEST_LEG = 6.0
"""Seconds of training between two plans, at least."""
SCORING_SHARE = 0.3
"""The fraction of the minutes that pictures and scores of samples may take. On a slower machine, nothing is scored."""


@configclass
class Options:
    """The options of a demo. A restart must give the same ones."""

    minutes: float
    quick: bool
    images: str | None


class Clock:
    """The seconds that a demo has run, over all its starts.

    Args:
        path: The file that keeps the seconds between two starts.
        now: Returns the present time in seconds.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now, self._start = path, now, now()
        self._before: float = read_json(path)["seconds"] if path.is_file() else 0.0

    def seconds(self) -> float:
        """Return the seconds that the demo has run."""
        return self._before + self._now() - self._start

    def keep(self) -> None:
        """Write the seconds to the file."""
        with whole(self._path) as partial:
            partial.write_text(to_json({"seconds": self.seconds()}), "utf-8")


def next_leg(done: int, remaining: float, per_step: float) -> tuple[int, int]:
    """Plan a training that must end in `remaining` seconds, at its present speed.

    Returns:
        The number of steps of the complete training, and the step at which to plan again. The two are equal for the
        last leg. A leg takes a third of the remaining time, so that a machine that slows down is noticed early.
    """
    possible = max(int(remaining / per_step), 1)  # one last step, at the end of the schedule
    leg = max(possible // 3, int(SHORTEST_LEG / per_step), 1)
    return done + possible, done + min(leg, possible)


def has_time_for_scores(sampling: float, seconds: float) -> bool:
    """Return whether a demo of `seconds` has time for scores, if a picture of samples takes `sampling` seconds.

    Two pictures are made. The built-in samples and the trained samples are scored with twice as many images each.
    """
    return (2 + 2 + 2) * sampling <= SCORING_SHARE * seconds


def run_demo(run: Path, minutes: float, quick: bool, progress: Progress, images: Path | None = None) -> None:
    """Run the demo in the folder `run`, or resume it.

    The demo writes RUN/report.html, and the folders decoder and denoiser (runs), latents, pictures and evaluation.

    Args:
        run: Folder of the demo.
        minutes: How long the demo takes. It plans again while it runs, so that it ends in time on a busy machine too.
        quick: Train for a few steps only.
        progress: Called after each step and batch.
        images: A folder with images, in a sub-folder for each class or without classes. Default: the built-in images.

    Raises:
        Stopped: A signal stopped a training.
        UserError: `run` was started with other options, `minutes` is not positive, or `images` has no training images
            or no held-out images.
    """
    if not minutes > 0:
        raise UserError(f"--minutes: {minutes} must be positive")
    source = source_of(images) if images else "emoji"
    try:
        open_source(source, "heldout")  # the pictures at the end show held-out images
    except UserError as error:
        raise UserError(f"--images: {error}. The demo needs held-out images; give more images") from None
    with enter_world() as world:
        if world.size > 1:
            raise UserError("demo: runs in one process only; start it without torchrun")
        with lock(run, world):
            options = Options(minutes=minutes, quick=quick, images=source if images else None)
            Demo(run, options, source, world, progress).run_all()


def source_of(folder: Path) -> str:
    """Return the address of a folder of images: with classes if it has sub-folders, otherwise without.

    Raises:
        UserError: There is no such folder, or it has neither images nor sub-folders.
    """
    if not folder.is_dir():
        raise UserError(f"--images: {folder} is not a folder")
    entries = list(folder.iterdir())
    if any(entry.suffix.lower() in EXTENSIONS for entry in entries):
        return f"flat:{folder.resolve()}"
    if not any(entry.is_dir() for entry in entries):
        raise UserError(f"--images: {folder} has no images ({', '.join(EXTENSIONS)})")
    return f"folder:{folder.resolve()}"


class Demo:
    """One demo: its parts run in the order of the methods, and each keeps what it made for a restart."""

    def __init__(self, run: Path, options: Options, source: str, world: World, progress: Progress) -> None:
        self.run, self.options, self.world, self.progress = run, options, world, progress
        self.own = options.images is not None
        path = run / "options.json"
        if path.is_file() and (before := from_dict(Options, read_json(path), path)) != options:
            raise UserError(f"{run}: was started with other options ({_spelled(before)}); give these, or another --run")
        with whole(path) as partial:
            partial.write_text(to_json(to_dict(options)), "utf-8")
        self.steps = 4 if options.quick else SAMPLING.steps
        self.scored_samples = 72 if options.quick else 144
        self.clock = Clock(run / "clock.json")
        self.builtin = load(BUILTIN, world.device)
        self.data = DataConfig(source=source, image_size=self.builtin.image_size)
        (run / "pictures").mkdir(exist_ok=True)

    def run_all(self) -> None:
        """Run all parts."""
        seconds = 60 * self.options.minutes
        fit_threads()
        sampling = self.sampling_seconds()
        self.scored = not self.own and (self.options.quick or has_time_for_scores(sampling, seconds))
        # What follows the training: a picture, and three times as much work with scores.
        reserve = max((4 if self.scored else 1.3) * sampling, 0.05 * seconds)
        scores = self.score_builtin() if self.scored else {}
        decoder, denoiser = recipes(self.run, self.data, self.own)
        self.train("decoder", decoder, self.clock.seconds() + DECODER_SHARE * seconds, 0.0)
        if not self.own:
            self.cache(denoiser)
        self.train("denoiser", denoiser, seconds, reserve)
        scores |= self.show_trained()
        self.report(scores)

    def sampling_seconds(self) -> float:
        """Make the picture of built-in samples, and return the seconds that it took, also after a restart."""
        path = self.run / "sampling.json"
        if not path.is_file():
            began = self.clock.seconds()
            (self.run / "pictures" / "built-in samples.png").unlink(missing_ok=True)
            self.samples("built-in samples", self.builtin)
            with whole(path) as partial:
                partial.write_text(to_json({"seconds": self.clock.seconds() - began}), "utf-8")
        return read_json(path)["seconds"]

    def score_builtin(self) -> "Scores":
        """Score samples of the built-in model next to real images."""
        report = self.evaluate("built-in", self.builtin, baselines=True)
        return {**report.baselines, "samples of the built-in model": report.results}

    def show_trained(self) -> "Scores":
        """Make the pictures of the trained models, and score them."""
        fit_threads()
        model = load(str(self.run / "denoiser"), self.world.device)
        decoder = load_autoencoder(str(self.run / "decoder")).to(self.world.device)
        scores: Scores = {}
        for name, autoencoder in (("built-in", self.builtin.autoencoder), ("trained", decoder)):
            scores[f"decoded by the {name} decoder"] = self.reconstructions(name, autoencoder)
        self.samples("samples", model)
        if self.scored:
            report = self.evaluate("trained", model, baselines=False)
            scores["samples of the denoiser trained here"] = report.results
        return scores

    def train(self, name: str, config: Any, until: float, reserve: float) -> None:
        """Train `config` in RUN/NAME, in legs that are planned one after the other from the measured speed.

        Args:
            name: "decoder" or "denoiser".
            config: The config, whose number of steps does not matter.
            until: The second of the demo at which the training ends.
            reserve: Seconds before `until` that are kept for what follows. A machine that slows down needs more.
        """
        end = self.run / f"{name}.json"
        if end.is_file():
            return
        newest = checkpoints(self.run / name / "checkpoints")
        done = int(newest[-1].name.rpartition("-")[2]) if newest else 0
        if self.options.quick:
            config = replace(config, train=replace(config.train, batch_size=8))
        total, leg = (40, 40) if self.options.quick else (config.train.steps, done + FIRST_LEG)
        fastest = float("inf")
        while done < leg:
            per_step = self.leg(name, config, total, leg)
            fastest, done = min(fastest, per_step), leg
            remaining = until - reserve * per_step / fastest - self.clock.seconds()
            total, leg = (done, done) if self.options.quick or total == leg else next_leg(done, remaining, per_step)
        with whole(end) as partial:
            partial.write_text(to_json({"steps": done}), "utf-8")

    def leg(self, name: str, config: Any, total: int, leg: int) -> float:
        """Train up to step `leg` of `total`, and return the seconds of a step."""
        fit_threads()
        stamps = [self.clock.seconds()]

        def report(step: int, values: dict[str, float]) -> None:
            stamps.append(self.clock.seconds())
            self.progress(name, step, max(total, step), f"loss {values[f'{name}/loss']:.4f}", config.train.batch_size)

        planned = for_steps(config, max(total, leg))
        warmup = min(config.optim.warmup_steps, max(total // 10, 1))
        planned = replace(
            planned,
            optim=replace(planned.optim, warmup_steps=warmup),
            train=replace(planned.train, steps=leg, checkpoint_every=10**9, log_every=1),
        )
        train(planned, self.run / name, self.world, report, self.progress, change=True)
        self.clock.keep()
        # The first step of a leg also loads the model.
        steps = stamps[1:] if len(stamps) > 2 else stamps
        return (steps[-1] - steps[0]) / max(len(steps) - 1, 1)

    def cache(self, config: GenerationConfig) -> None:
        """Encode the training images once."""
        assert config.latents
        cache_latents(
            self.builtin.autoencoder,
            BUILTIN,
            self.data,
            Path(config.latents),
            dtype="fp32",
            world=self.world,
            progress=self.progress,
        )

    def samples(self, name: str, model: Model) -> None:
        """Save RUN/pictures/NAME.png, with a row of samples for each class."""
        path = self.run / "pictures" / f"{name}.png"
        if path.is_file():
            return
        labels = [label for label in range(len(model.classes)) for _ in range(PER_CLASS)] or None
        sampling = self.sampling(model)
        images = []
        count = None if labels else 3 * PER_CLASS
        stream = generate(model, labels, count=count, seed=1, sampling=sampling, batch_size=24, world=self.world)
        for batch in stream:
            images += [to_pil(image) for image in batch.images]
            self.progress(f"{name}, picture", len(images), len(labels or range(3 * PER_CLASS)))
        save_grid(images, path, columns=PER_CLASS)

    def sampling(self, model: Model) -> Sampling:
        """Return how to sample from `model`. CFG needs classes, and internal guidance needs a base output."""
        rules = GUIDANCE_WITH_BASE if model.denoiser.config.base_depth else GUIDANCE
        guidance = tuple(rule for rule in rules if model.classes or rule.method != "cfg")
        return replace(SAMPLING, guidance=guidance, steps=self.steps)

    def evaluate(self, name: str, model: Model, baselines: bool) -> Report:
        """Score samples of `model`, and the baselines."""
        out = self.run / "evaluation" / name
        if (out / "report.json").is_file():
            return read_report(out)
        shutil.rmtree(out, ignore_errors=True)  # of a killed demo
        report, _ = evaluate(
            model,
            count=self.scored_samples,
            sampling=self.sampling(model),
            baselines=baselines,
            out=out,
            world=self.world,
            progress=self.progress,
        )
        return report

    def reconstructions(self, name: str, autoencoder: LatentSpace) -> dict[str, float]:
        """Save a picture of held-out images, each left of its reconstruction, and return the scores of both."""
        loader = Loader(replace(self.data, split="heldout"), seed=0)
        batch = next(iter(loader.once(min(2 * PER_CLASS, len(loader)), World()))).to(self.world.device)
        images = reconstruct(autoencoder, batch.pixels())
        pairs = [to_pil(image) for pair in zip(batch.pixels(), images, strict=True) for image in pair]
        save_grid(pairs, self.run / "pictures" / f"reconstructions, {name}.png", columns=PER_CLASS)
        return {metric: float(score(images, batch.pixels()).mean()) for metric, score in METRICS.items()}

    def report(self, scores: "Scores") -> None:
        """Write RUN/report.html, a page that needs no other file."""
        run, model = self.run, load(str(self.run / "denoiser"))
        records = {name: read_metrics(run / name) for name in ("decoder", "denoiser")}
        write_page(
            run / "report.html",
            "report.html",
            version=__version__,
            options=to_dict(self.options),
            classes=model.classes,
            builtin_classes=self.builtin.classes,
            scores=scores,
            scored=self.scored,
            metrics=list(dict.fromkeys(metric for row in scores.values() for metric in row)),
            pictures={path.stem: embed(path.read_bytes()) for path in sorted((run / "pictures").glob("*.png"))},
            curves={name: embed(_curve(name, rows)) for name, rows in records.items()},
            timings={name: _seconds(rows, run / name) for name, rows in records.items()},
            steps={name: read_json(run / f"{name}.json")["steps"] for name in records},
            minutes=self.clock.seconds() / 60,
            parameters={
                "encoder": _count(model.autoencoder.encoder),
                "decoder": _count(model.autoencoder.decoder),
                "denoiser": _count(model.denoiser),
            },
            machine=f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
            + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
            settings={name: to_json(read_json(run / name / "config.json")) for name in records},
            samples=self.scored_samples,
            evaluations=self.steps,
        )


Scores = dict[str, dict[str, float]]
"""{images: {metric: value}}."""


def recipes(run: Path, data: DataConfig, own: bool) -> tuple[ReconstructionConfig, GenerationConfig]:
    """Return the configs of the decoder and of the denoiser, for the built-in images or a folder of your own.

    The batch of the denoiser for the built-in images was chosen by trials (2026-11-27). Each trial trained on 14,000
    images, on one core of an Intel Xeon with AVX-512. For batches of 32, 16 and 8, all with AdamW at a rate of 1e-3:

    - the loss, averaged over the last 1,500 images, is 0.454, 0.413 and 0.400;
    - the Frechet distance of 216 samples with CFG 3 is 143, 136 and 127 in VGG16, and 2.5, 1.6 and 2.0 in the
      classifier (the built-in decoder of that day);
    - two idle cores train on 82, 69 and 69 images per second.

    A rate of 2e-3 with a batch of 16 was not better after 7,000 images. CFG scales of 2, 3 and 4 have the same distance
    in VGG16, and 2.12, 2.02 and 1.88 in the classifier. A step with Muon takes 45 % more time than a step with AdamW,
    and at a rate of 1e-3 its loss falls more slowly (4.0 after 30 steps, 1.5 with AdamW). Other rates of Muon have not
    been tried.

    A base output after the first block, for internal guidance, made no difference here: after 2,146 steps, 360 samples
    with CFG 3 have a distance of 99.0 in VGG16, and with CFG 2 and internal guidance 1.5 of 100.9.
    """
    decoder, denoiser = find("emoji_decoder").config, find("emoji_dit_dh").config
    assert isinstance(decoder, ReconstructionConfig)
    assert isinstance(denoiser, GenerationConfig)
    # The demo makes its own pictures, and its time is planned.
    decoder = replace(decoder, data=data, ema=(0.99,), samples=None, heldout=None)
    denoiser = replace(denoiser, samples=None, heldout=None)
    if own:
        classes = len(Loader(data, seed=0).classes)
        return replace(decoder, init_from=BUILTIN), replace(
            denoiser,
            data=data,
            autoencoder=str(run / "decoder"),
            init_from=BUILTIN,
            conditional=classes > 1,
            optim=replace(denoiser.optim, lr=denoiser.optim.lr / 3),
            ema=(0.99,),
        )
    # Smaller than the built-in denoiser, which learns more in hours but less in minutes.
    size = replace(denoiser.denoiser, backbone=TransformerConfig(width=192, depth=3, heads=4), base_depth=0)
    return decoder, replace(
        denoiser,
        data=data,
        autoencoder=BUILTIN,
        latents=str(run / "latents"),
        denoiser=size,
        train=replace(denoiser.train, batch_size=8),
        ema=(0.99,),
    )


def _spelled(options: Options) -> str:
    own = f" --images {options.images.partition(':')[2]}" if options.images else ""
    return f"--minutes {options.minutes:g}{' --quick' if options.quick else ''}{own}"


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
    """Return a plot of the loss, averaged over a fiftieth of the steps, as a PNG."""
    from matplotlib.figure import Figure  # imported here because the import is slow

    points = [(r["step"], r[f"{name}/loss"]) for r in records if f"{name}/loss" in r]
    window = max(len(points) // 50, 1)
    means = [
        tuple(sum(column) / len(part) for column in zip(*part, strict=True))
        for part in (points[i : i + window] for i in range(0, len(points), window))
    ]
    figure = Figure(figsize=(5, 2.6), dpi=160, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="L1" if name == "decoder" else "velocity MSE", title=name)
    axes.plot(*zip(*means, strict=True), linewidth=1.2)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
