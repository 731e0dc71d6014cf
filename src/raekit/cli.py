"""The command line: the only place that parses, prints and exits."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from raekit.errors import UserError

if TYPE_CHECKING:
    from raekit.distributed import World
    from raekit.models.denoiser import Denoiser

_out = Console(soft_wrap=True, highlight=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)

Device = Literal["cpu", "cuda"]


def demo(run: Path = Path("runs/demo"), minutes: float = 12, quick: bool = False) -> None:
    """Train the whole pipeline on built-in images, sample, score, and write RUN/report.html.

    Example: raekit demo --minutes 12
    Ctrl-C stops it; the same command goes on where it stopped.

    Args:
        run: folder of the results.
        minutes: time to train and score in, on this machine.
        quick: all of it in under two minutes, at poor quality.
    """
    from raekit.demo import run_demo

    with _Progress() as progress:
        finished = run_demo(run, minutes, quick, progress)
    if not finished:
        _stopped()
    _out.print(f"report: {run / 'report.html'}")


def generate(
    model: Positional[str],
    out: Path,
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = (),
    count: int = 16,
    seed: int = 0,
    steps: int = 50,
    solver: Literal["euler", "heun", "dopri5", "euler-maruyama"] = "euler",
    grid: Literal["full", "published"] = "full",
    guidance: str | None = None,
    weak: str | None = None,
    reuse: int = 1,
    batch_size: int = 64,
    device: Device | None = None,
) -> None:
    """Generate images into one PNG grid, or into a folder.

    Example: raekit generate builtin:emoji --class flags --count 16 --out grid.png

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        out: a .png file for a grid, else a folder for one PNG a sample.
        classes: names or ids; each gets COUNT samples. Default: all of them.
        count: samples of each class.
        seed: sample i is a function of the seed and i.
        steps: solver steps.
        solver: euler; heun, with two evaluations a step; dopri5, with steps of its own; or the SDE's euler-maruyama.
        grid: of times; published is the official sampler's, one step short of the data.
        guidance: METHOD:SCALE or METHOD:SCALE@START-END, as in cfg:2.0@0.1-0.9. Methods: cfg, auto (see WEAK), and
            internal, for models with a base output. Several are joined by +.
        weak: the weaker model of auto guidance, named as the model is.
        reuse: run the backbone at every so many steps only, the head at each.
        batch_size: images at once.
        device: default is the best there is.
    """
    from collections import Counter

    from raekit.distributed import world
    from raekit.files import whole
    from raekit.flow.guidance import parse_guidance
    from raekit.inference import Sampling, load
    from raekit.inference import generate as stream
    from raekit.pictures import grid as tile
    from raekit.pictures import to_pil

    if count < 1:
        raise UserError(f"--count: {count} must be at least 1")
    with world(device) as here, _Progress() as progress:
        loaded = load(model, here.device)
        chosen = [loaded.class_id(name) for name in classes] or list(range(len(loaded.classes)))
        labels = [label for label in chosen for _ in range(count)] or None
        total = len(labels) if labels else count
        sampling = Sampling(
            steps=steps,
            solver=solver,
            grid=grid,
            guidance=parse_guidance(guidance) if guidance is not None else (),
            weak=_weaker(weak, model, here),
            reuse=reuse,
        )
        single = out.suffix.lower() == ".png"
        (out.parent if single else out).mkdir(parents=True, exist_ok=True)  # found out before, not after, the work
        if single and here.size > 1:
            raise UserError("--out: one grid comes from one process; give a folder under torchrun")
        tiles, passes = [], Counter()
        batches = stream(
            loaded,
            labels,
            count=None if labels else count,
            seed=seed,
            sampling=sampling,
            batch_size=batch_size,
            world=here,
        )
        for batch in batches:
            for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
                if single:
                    tiles.append(to_pil(image))
                else:
                    with whole(out / f"{index:06d}.png") as partial:
                        to_pil(image).save(partial, format="PNG")
            passes |= batch.passes
            progress("generate", int(batch.indices[-1]) + 1, total)
        if single:
            with whole(out) as partial:
                tile(tiles, columns=count if len(chosen) > 1 else None).save(partial, format="PNG")
    counts = ", ".join(f"{count} {kind}" for kind, count in passes.items())
    _out.print(f"{total} images: {out}  (forward passes for an image: {counts})")


def _weaker(weak: str | None, model: str, world: "World") -> "Denoiser | None":
    from raekit.models.denoiser import Denoiser

    if weak == model:
        raise UserError(f"--weak: {weak} is the model itself, which has no effect")
    return Denoiser.load(weak).to(world.device) if weak else None


def reconstruct(
    model: Positional[str], paths: Positional[tuple[Path, ...]], out: Path, device: Device | None = None
) -> None:
    """Encode and decode pictures; write each beside its original as OUT/NAME.png, and tell its PSNR.

    Example: raekit reconstruct builtin:emoji photo.jpg --out reconstructions

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        paths: image files, centre-cropped to the model's size.
        out: folder for the side-by-side pictures, another than the originals'.
        device: default is the best there is.
    """
    from collections import Counter

    from raekit.distributed import world
    from raekit.evaluation.metrics import psnr
    from raekit.files import whole
    from raekit.inference import read_image
    from raekit.inference import reconstruct as decode_encoded
    from raekit.models.autoencoder import Autoencoder
    from raekit.pictures import from_pil, grid, to_pil

    if not paths:
        raise UserError("reconstruct: give at least one image file")
    if any(path.parent.resolve() == out.resolve() for path in paths):
        raise UserError(f"--out: {out} holds the originals; give another folder")
    names = Counter(path.stem for path in paths)
    table, failed = Table("image", "PSNR (dB)"), []
    with world(device) as here:
        autoencoder = Autoencoder.load(model).to(here.device)
        for number, path in enumerate(paths):
            try:
                original = from_pil(read_image(path, autoencoder.image_size))
            except UserError as error:
                failed.append(str(error))
                continue
            decoded = decode_encoded(autoencoder, original.to(here.device)[None]).cpu()
            value = psnr(decoded, original[None]).item()
            target = out / (f"{path.stem}.png" if names[path.stem] == 1 else f"{path.stem}-{number}.png")
            with whole(target) as partial:
                grid([to_pil(original), to_pil(decoded[0])], columns=2).save(partial, format="PNG")
            table.add_row(str(target), f"{value:.2f}")
    if table.row_count:
        _out.print(table)
    if failed:
        raise UserError("\n".join(failed))


def recipes() -> None:
    """List the recipes.

    Example: raekit recipes
    """
    from raekit.recipes import find, names

    table = Table("recipe", "what it is", box=None)
    for name in names():
        table.add_row(name, find(name).summary)
    _out.print(table)


def train(arguments: list[str]) -> None:
    """Train a recipe, or go on with its run.

    Example: raekit train emoji_decoder --run runs/decoder --train.steps 500
    `raekit train RECIPE --help` lists all that can be overridden; --dry-run shows what would run.
    Under torchrun: torchrun --nproc-per-node 8 -m raekit -- train RECIPE
    """
    from raekit.recipes import find, names

    if not arguments or arguments[0].startswith("-"):
        _out.print(f"usage: raekit train RECIPE [--run DIR] [--dry-run] [--FIELD VALUE ...]\n\n{_doc(train)}\n")
        _out.print("recipes: " + ", ".join(names()))
        if arguments not in (["--help"], ["-h"]):
            sys.exit(2)
        return
    recipe = find(arguments[0])

    def command(
        run: Path = Path("runs") / recipe.name, dry_run: bool = False, device: Device | None = None, config: Any = None
    ) -> None:
        from raekit.distributed import world
        from raekit.inspection import describe_config
        from raekit.stages.run import train as fit

        with world(device) as here:
            if dry_run:
                _out.print(describe_config(config, run, here), markup=False)
                return
            total, batch = config.train.steps, config.train.batch_size
            with _Progress(quiet=not here.is_main) as progress:

                def report(step: int, values: dict[str, float]) -> None:
                    progress(recipe.name, step, total, _headline(values), batch)

                finished = fit(config, run, here, report)
            if not finished:
                _stopped()
            if here.is_main:
                _out.print(f"artifact: {run / 'artifact'}")

    # tyro derives the options from the recipe's own type and values.
    command.__annotations__["config"] = Annotated[type(recipe.config), tyro.conf.arg(name="")]
    command.__defaults__ = (*(command.__defaults__ or ())[:-1], recipe.config)
    command.__doc__ = recipe.about
    # An optional part, such as a head, is overridden field by field like the others; else tyro asks for subcommands.
    tyro.cli(command, prog=f"raekit train {recipe.name}", args=arguments[1:], config=(tyro.conf.AvoidSubcommands,))


def latents_measure(
    encoder: Positional[str],
    out: Path,
    source: str = "emoji",
    split: Literal["train", "heldout", "all"] = "train",
    image_size: int | None = None,
    encoder_size: int | None = None,
    mirror: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    device: Device | None = None,
) -> None:
    """Measure the mean and variance of an encoder's latents, exactly, in one pass.

    Example: raekit latents measure builtin:vit-tiny --source folder:images --out statistics.safetensors

    Args:
        encoder: a registered name, builtin:NAME, or a folder.
        out: the .safetensors file to write, `mean` and `var` of shape (C, H, W).
        source: emoji, folder:DIR, flat:DIR, idx:DIR or hf:DIR.
        split: of the source.
        image_size: side that the images are centre-cropped to. Default: the encoder's input.
        encoder_size: side that the encoder resizes to. Default: its own.
        mirror: count each image flipped as well.
        batch_size: images at once.
        workers: processes that decode images.
        device: default is the best there is.
    """
    from raekit.artifacts import write_statistics
    from raekit.data.loader import DataConfig, Loader
    from raekit.distributed import world
    from raekit.inference import measure_latents
    from raekit.models.encoders import load_encoder
    from raekit.models.layers import to_grid

    with world(device) as here, _Progress(quiet=not here.is_main) as progress:
        model = load_encoder(encoder, encoder_size).to(here.device)
        size = image_size or model.input_size
        loader = Loader(DataConfig(source=source, split=split, image_size=size, workers=workers), seed=0)

        def counted() -> Iterator[Any]:
            done = 0
            for batch in loader.once(batch_size, here):
                yield batch
                done += len(batch) * here.size
                progress("measure", min(done, len(loader)), len(loader))

        shape = (model.spec.width, *model.grid)
        mean, var = measure_latents(lambda x: to_grid(model(x), model.grid), counted(), shape, here, mirror)
        if here.is_main:
            write_statistics(out, var, mean)
            _out.print(f"{out}: {shape}, mean variance {var.mean():.4f} ({var.min():.4f} to {var.max():.4f})")


def evaluate(
    model: Positional[str],
    count: int = 1000,
    guidance: tuple[str, ...] = (),
    weak: str | None = None,
    steps: int = 50,
    seed: int = 0,
    source: str = "emoji",
    features: str = "builtin:vit-tiny",
    out: Path | None = None,
    device: Device | None = None,
) -> None:
    """Score a model's samples and reconstructions beside baselines.

    Example: raekit evaluate builtin:emoji --count 1000 --guidance cfg:2.0

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        count: samples for each setting.
        guidance: settings to score beside unguided sampling, as in cfg:2.0@0.1-0.9 or auto:1.4.
        weak: the weaker model of auto guidance, named as the model is.
        steps: solver steps.
        seed: of the samples.
        source: real images, split into train and held-out.
        features: the encoder in whose features images are compared.
        out: a JSON file for the scores.
        device: default is the best there is.
    """
    from raekit.config import to_json
    from raekit.data.loader import DataConfig
    from raekit.distributed import world
    from raekit.files import whole
    from raekit.flow.guidance import parse_guidance
    from raekit.inference import Sampling, load
    from raekit.scoring import score

    rules = {text: parse_guidance(text) for text in guidance}
    if weak and not any(rule.method == "auto" for chosen in rules.values() for rule in chosen):
        raise UserError("--weak: no effect without --guidance auto:SCALE")
    with world(device) as here, _Progress(quiet=not here.is_main) as progress:
        loaded, weaker = load(model, here.device), _weaker(weak, model, here)
        samplings = {"samples": Sampling(steps=steps)}
        for text, chosen in rules.items():
            needed = weaker if any(rule.method == "auto" for rule in chosen) else None
            samplings[f"samples, {text}"] = Sampling(steps=steps, guidance=chosen, weak=needed)
        data = DataConfig(source=source, image_size=loaded.autoencoder.image_size)
        scores = score(
            loaded, data, samplings, count=count, seed=seed, features=features, world=here, progress=progress
        )
    if here.is_main:
        _out.print(scores_table(scores))
        if out:
            with whole(out) as partial:
                partial.write_text(
                    to_json({"model": model, "count": count, "seed": seed, "steps": steps, "scores": scores})
                )


def info(name: Positional[str]) -> None:
    """Tell what a model, an artifact or a run is.

    Example: raekit info builtin:emoji

    Args:
        name: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
    """
    from raekit.inspection import describe_folder

    _out.print(describe_folder(name), markup=False)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "generate": generate,
    "reconstruct": reconstruct,
    "recipes": recipes,
    "train": train,
    "latents measure": latents_measure,
    "evaluate": evaluate,
    "info": info,
}


def main() -> None:
    """Run the command in sys.argv. Exits with 2 for a wrong command line, 1 for any other error, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = sys.argv[1:]
    if arguments in (["--version"], ["-V"]):
        from raekit import __version__

        _out.print(f"raekit {__version__}")
        return
    name = next((n for n in COMMANDS if arguments[: len(n.split())] == n.split()), None)
    if name is None:
        _usage(wrong=bool(arguments) and arguments not in (["--help"], ["-h"]), given=arguments)
        return
    rest, command = arguments[len(name.split()) :], COMMANDS[name]
    try:
        if command is train:
            train(rest)
        else:
            tyro.cli(command, prog=f"raekit {name}", args=rest)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _usage(wrong: bool, given: list[str]) -> None:
    console = _err if wrong else _out
    if wrong:
        console.print(f"error: {' '.join(given[:2])!r} is no command", markup=False)
    console.print("usage: raekit COMMAND ...      (raekit COMMAND --help; raekit --version)\n", markup=False)
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        console.print(f"  {name:{width}}  {_doc(command).splitlines()[0]}", markup=False)
    if wrong:
        sys.exit(2)


def _doc(command: Callable[..., None]) -> str:
    return "\n".join(line.strip() for line in (command.__doc__ or "").strip().splitlines())


def _fail(message: str) -> None:
    _err.print(Text(f"error: {message}"))
    sys.exit(1)


def _stopped() -> None:
    _err.print("stopped; the same command goes on from here")
    sys.exit(130)


def _headline(values: dict[str, float]) -> str:
    """The losses among a step's metrics."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("/loss"))


def scores_table(scores: dict[str, dict[str, float]]) -> Table:
    """The scores as a table, a row for each stream of images."""
    metrics = list(dict.fromkeys(name for row in scores.values() for name in row))
    table = Table("", *metrics)
    for name, row in scores.items():
        table.add_row(name, *(f"{row[m]:.4g}" if m in row else "" for m in metrics))
    return table


class _Progress:
    """Live bars with rate and time left on a terminal; elsewhere, a line now and then."""

    def __init__(self, quiet: bool = False) -> None:
        self.live = not quiet and _err.is_terminal
        self.quiet = quiet
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.printed = 0.0
        self.bars = Progress(
            TextColumn("{task.description:22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=_err,
        )

    def __enter__(self) -> "_Progress":
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.bars.stop()

    def __call__(self, what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        """`done` of `total` of the work `what`; the rate is given in `unit`s, images for one step."""
        if self.quiet:
            return
        now = time.monotonic()
        first, start = self.began.setdefault(what, (now, done))
        speed = (done - start) / (now - first) if now > first else 0.0
        rate = f"{speed * unit:.1f} images/s" if speed else ""
        if self.live:
            if what not in self.tasks:
                self.tasks[what] = self.bars.add_task(what, total=total, completed=done, rate="", text="")
            self.bars.update(self.tasks[what], completed=done, total=total, rate=rate, text=text)
        elif now - self.printed > 10 or done == total:
            self.printed = now
            left = f", {(total - done) / speed:.0f} s left" if speed and done < total else ""
            _err.print(Text(f"{what}: {done}/{total}  {rate}{left}  {text}".rstrip()))
