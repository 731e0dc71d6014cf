"""The command line: the only place that parses, prints and exits."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from raekit.errors import UserError
from raekit.progress import Display

if TYPE_CHECKING:
    from raekit.distributed import World
    from raekit.folders import Reconstructions
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

    with Display(_err) as progress:
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
        count: samples of each class. In a folder those that are there are kept, and more are added to them.
        seed: sample i is a function of the seed, i and its class, which is i modulo the number of classes.
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

    from raekit.distributed import world
    from raekit.files import whole
    from raekit.flow.guidance import parse_guidance
    from raekit.folders import generate_folder
    from raekit.inference import Sampling, load
    from raekit.inference import generate as stream
    from raekit.pictures import grid as tile
    from raekit.pictures import to_pil

    if count < 1:
        raise UserError(f"--count: {count} must be at least 1")
    single = out.suffix.lower() == ".png"
    with world(device) as here, Display(_err, quiet=not here.is_main) as progress:
        if single and here.size > 1:
            raise UserError("--out: one grid comes from one process; give a folder under torchrun")
        loaded = load(model, here.device)
        labels = [loaded.class_id(name) for name in classes] or list(range(len(loaded.classes)))
        total = count * max(len(labels), 1)
        sampling = Sampling(
            steps=steps,
            solver=solver,
            grid=grid,
            guidance=parse_guidance(guidance) if guidance is not None else (),
            weak=_weaker(weak, model, here),
            reuse=reuse,
        )
        (out.parent if single else out).mkdir(parents=True, exist_ok=True)  # found out before, not after, the work
        passes: Counter[str] = Counter()
        if single:
            tiles = []
            every = labels * count or None  # sample i has class i modulo their number, as in a folder
            batches = stream(
                loaded, every, count=None if every else count, seed=seed, sampling=sampling, batch_size=batch_size
            )
            for batch in batches:
                tiles += map(to_pil, batch.images)
                passes |= batch.passes
                progress("generate", len(tiles), total)
            rows = [tiles[row :: len(labels)] for row in range(len(labels))] or [tiles]
            with whole(out) as partial:
                sheet = tile([image for row in rows for image in row], columns=count if len(labels) > 1 else None)
                sheet.save(partial, format="PNG")
        else:
            passes = generate_folder(
                loaded,
                out,
                labels or None,
                total=total,
                seed=seed,
                sampling=sampling,
                batch_size=batch_size,
                world=here,
                progress=progress,
            )
    if here.is_main:
        counts = " + ".join(f"{number} {kind}" for kind, number in passes.items())
        _out.print(f"{total} images: {out}" + (f" ({counts} passes an image)" if counts else ""))


def _weaker(weak: str | None, model: str, world: "World") -> "Denoiser | None":
    from raekit.models.denoiser import Denoiser

    if weak == model:
        raise UserError(f"--weak: {weak} is the model itself, which has no effect")
    return Denoiser.load(weak).to(world.device) if weak else None


def reconstruct(
    model: Positional[str],
    paths: Positional[tuple[Path, ...]],
    out: Path,
    fit: Literal["crop", "pad"] = "crop",
    lpips: str | None = None,
    batch_size: int = 32,
    device: Device | None = None,
) -> None:
    """Encode and decode images, and score what comes back: PNGs, scores.csv, scores.json, contact-sheet.png.

    Example: raekit reconstruct builtin:emoji photo.jpg holidays --out reconstructions
    The same command goes on where it stopped: what is there is kept, unless the model, an option or the
    original has changed.

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        paths: image files, and folders with whatever is below them.
        out: folder for the results, another than the originals'.
        fit: to the model's square, cut to the middle, or padded with white.
        lpips: score LPIPS too, with VGG16's weights from this file.
        batch_size: images at once.
        device: default is the best there is.
    """
    from raekit.distributed import world
    from raekit.folders import METRICS, reconstruct_folder
    from raekit.models.autoencoder import Autoencoder
    from raekit.models.perceptual import load_perceptual

    if not paths:
        raise UserError("reconstruct: give at least one image file or folder")
    with world(device) as here, Display(_err) as progress:
        if here.size > 1:
            raise UserError("reconstruct: works in one process, not under torchrun")
        autoencoder = Autoencoder.load(model).to(here.device)
        metrics = METRICS | ({"lpips": load_perceptual(lpips).to(here.device)} if lpips else {})
        results = reconstruct_folder(
            autoencoder, paths, out, fit=fit, batch_size=batch_size, metrics=metrics, progress=progress
        )
    if results.pictures:
        _out.print(_reconstructions_table(results))
        _out.print(f"{len(results.pictures)} images: {out}")
    _fail_for(results.unreadable, len(results.pictures))


def encode(
    model: Positional[str],
    paths: Positional[tuple[Path, ...]],
    out: Path,
    fit: Literal["crop", "pad"] = "crop",
    batch_size: int = 32,
    shard_size: int = 512,
    device: Device | None = None,
) -> None:
    """Write the whitened latents of images as safetensors, with what they are of; raekit.read_latents reads them.

    Example: raekit encode builtin:emoji holidays --out latents
    In a folder, shards that are there and would become the same are kept.

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        paths: image files, and folders with whatever is below them.
        out: a .safetensors file, or a folder for shards.
        fit: to the model's square, cut to the middle, or padded with white.
        batch_size: images at once.
        shard_size: images in a shard, held in memory until it is written.
        device: default is the best there is.
    """
    from raekit.distributed import world
    from raekit.latents import encode_files
    from raekit.models.autoencoder import Autoencoder

    if not paths:
        raise UserError("encode: give at least one image file or folder")
    with world(device) as here, Display(_err) as progress:
        if here.size > 1:
            raise UserError("encode: works in one process, not under torchrun")
        autoencoder = Autoencoder.load(model).to(here.device)
        encoded, unreadable = encode_files(
            autoencoder,
            model,
            paths,
            out,
            fit=fit,
            batch_size=batch_size,
            shard_size=shard_size,
            progress=progress,
        )
    _out.print(f"{encoded} images: {out}")
    _fail_for(unreadable, encoded)


def probe(
    name: Positional[str],
    source: str = "emoji",
    tokens: Literal["mean", "all"] = "mean",
    image_size: int | None = None,
    penalty: float | None = None,
    workers: int = 0,
    out: Path | None = None,
    device: Device | None = None,
) -> None:
    """Classify held-out images by a linear probe of an encoder's or autoencoder's latents, beside random weights.

    Example: raekit probe builtin:vit-tiny --source folder:images

    Args:
        name: a registered encoder, builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        source: labelled images: emoji, folder:DIR, idx:DIR or hf:DIR.
        tokens: the mean of an image's tokens, or all of them.
        image_size: side that the images are centre-cropped to. Default: the model's.
        penalty: L2 penalty of the regression. Default: the best on a tenth of the training images.
        workers: processes that decode images.
        out: a JSON file for the results.
        device: default is the best there is.
    """
    from dataclasses import asdict

    from raekit.config import to_json
    from raekit.distributed import world
    from raekit.evaluation.probe import probe as run_probe
    from raekit.files import whole

    with world(device) as here, Display(_err, quiet=not here.is_main) as progress:
        results = run_probe(
            name,
            source,
            tokens=tokens,
            image_size=image_size,
            penalty=penalty,
            workers=workers,
            world=here,
            progress=progress,
        )
    if not here.is_main:
        return
    table = Table("", "held-out accuracy", "95 % interval", "training accuracy", "penalty")
    for row, result in results.items():
        interval = f"{result.low:.1%} to {result.high:.1%}"
        table.add_row(row, f"{result.accuracy:.1%}", interval, f"{result.training:.1%}", f"{result.penalty:g}")
    _out.print(table)
    if out:
        rows = {row: asdict(result) for row, result in results.items()}
        with whole(out) as partial:
            partial.write_text(to_json({"model": name, "source": source, "tokens": tokens, "results": rows}))


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
            with Display(_err, quiet=not here.is_main) as progress:

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
    encoder_size: int | tuple[int, int] | None = None,
    blocks: tuple[int, ...] = (-1,),
    combine: Literal["mean", "sum"] = "mean",
    token_mean: bool = False,
    mirror: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    device: Device | None = None,
) -> None:
    """Measure the mean and variance of an encoder's latents, exactly, in one pass.

    Example: raekit latents measure builtin:vit-tiny --source folder:images --out statistics.safetensors

    Args:
        encoder: a registered name, builtin:NAME, a folder, or FAMILY:WHERE for a transformers checkpoint.
        out: the .safetensors file to write, `mean` and `var` of shape (C, H, W).
        source: emoji, folder:DIR, flat:DIR, idx:DIR or hf:DIR.
        split: of the source.
        image_size: side that the images are centre-cropped to. Default: the encoder's input.
        encoder_size: side that the encoder resizes to, or height and width. Default: its own.
        blocks: the encoder's blocks that the latent is made of, zero-based; -1 is the last.
        combine: how several blocks are combined.
        token_mean: add the mean over the patches of the last block's output.
        mirror: count each image flipped as well.
        batch_size: images at once.
        workers: processes that decode images.
        device: default is the best there is.
    """
    from raekit.artifacts import write_statistics
    from raekit.data.loader import DataConfig, Loader
    from raekit.distributed import world
    from raekit.inference import measure_latents
    from raekit.models.encoders import LayersConfig, load_encoder
    from raekit.models.layers import to_grid

    layers = LayersConfig(blocks=blocks, combine=combine, token_mean=token_mean)

    with world(device) as here, Display(_err, quiet=not here.is_main) as progress:
        model = load_encoder(encoder, encoder_size, layers).to(here.device)
        size = image_size or max(model.input_size)
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


def latents_generate(
    model: Positional[str],
    out: Path,
    count: int = 1000,
    seed: int = 0,
    steps: int = 50,
    guidance: str | None = None,
    batch_size: int = 64,
    device: Device | None = None,
) -> None:
    """Write generated latents, classes in turn: what a decoder can be chosen by (`--selection.latents`).

    Example: raekit latents generate builtin:emoji --count 1000 --out generated.safetensors
    They are not whitened, so that they serve any decoder of the same encoder.

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        out: the .safetensors file to write, `unwhitened` of shape (COUNT, C, H, W).
        count: latents in all.
        seed: latent i is a function of the seed, i and its class.
        steps: solver steps.
        guidance: cfg:SCALE or cfg:SCALE@START-END, as in cfg:2.0@0.1-0.9.
        batch_size: latents at once.
        device: default is the best there is.
    """
    import torch
    from safetensors.torch import save_file

    from raekit.distributed import world
    from raekit.files import whole
    from raekit.flow.guidance import parse_guidance
    from raekit.inference import Sampling, load, sample_latents

    for name, value in (("count", count), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name}: {value} must be at least 1")
    sampling = Sampling(steps=steps, guidance=parse_guidance(guidance) if guidance is not None else ())
    with world(device) as here, Display(_err) as progress:
        if here.size > 1:
            raise UserError("latents generate: works in one process, not under torchrun")
        loaded = load(model, here.device)
        classes, parts = len(loaded.classes), []
        if guidance and not classes:
            raise UserError(f"--guidance: {model} is unconditional, and classifier-free guidance needs classes")
        for indices in torch.arange(count).split(batch_size):
            labels = indices.to(here.device) % classes if classes else None
            latents = sample_latents(loaded.denoiser, labels, indices, seed, sampling, here.device)
            parts.append(loaded.autoencoder.unwhiten(latents).cpu())
            progress("generate", int(indices[-1]) + 1, count)
        with whole(out) as partial:
            save_file({"unwhitened": torch.cat(parts)}, partial)
    _out.print(f"{count} latents: {out}")


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
    with world(device) as here, Display(_err, quiet=not here.is_main) as progress:
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


def reference(
    source: Positional[str],
    out: Path,
    image_size: int,
    split: Literal["train", "heldout", "all"] = "all",
    features: tuple[str, ...] = ("inception",),
    keep: int = 10_000,
    workers: int = 0,
    device: Device | None = None,
) -> None:
    """Measure what images are compared with: the statistics of real images in the features of networks.

    Example: raekit reference folder:imagenet --split heldout --image-size 256 --out imagenet256.safetensors

    Args:
        source: real images, as of `raekit latents measure`, or npz:FILE, zip:FILE, tar:FILE.
        out: the .safetensors file to write.
        image_size: side that the images are centre-cropped to.
        split: of the source.
        features: inception, inception:WEIGHTS, clean_inception, or encoders.
        keep: images whose own features are kept, for precision, recall and KID.
        workers: processes that decode images.
        device: default is the best there is.
    """
    from raekit.data.loader import DataConfig
    from raekit.distributed import world
    from raekit.evaluation.features import load_networks
    from raekit.evaluation.references import measure_reference

    with world(device) as here, Display(_err, quiet=not here.is_main) as progress:
        networks = {key: network for name in features for key, network in load_networks(name, here.device).items()}
        data = DataConfig(source=source, split=split, image_size=image_size, workers=workers)
        measured = measure_reference(data, networks, here, keep=keep, progress=progress)
        if here.is_main:
            measured.write(out)
            _out.print(f"{out}: {measured.about.count} images, {', '.join(networks)}, hash {measured.about.hash}")


def convert(
    source: Positional[str],
    dest: Positional[Path],
    to: Literal["raekit", "v1", "diffusers"] = "raekit",
    encoder: str | None = None,
    encoder_size: int | tuple[int, int] | None = None,
    layers: Literal["k1", "k7", "k23"] | None = None,
    statistics: Path | None = None,
    decoder_config: Path | None = None,
    output: Literal["encoder-colours", "pixels"] = "encoder-colours",
) -> None:
    """Convert an autoencoder from or to the published formats and diffusers' AutoencoderRAE.

    Example: raekit convert rae-dinov2-b rae-for-diffusers --to diffusers
    A decoder or training checkpoint: raekit convert model.pt out --encoder dinov2-b --statistics stat.pt

    Args:
        source: a published name, a YAML, a decoder or checkpoint file, a diffusers folder, a raekit model, OWNER/NAME.
        dest: the folder to write, new or empty.
        to: raekit; v1, the official files (model.pt, stat.pt, config.yaml); diffusers, an AutoencoderRAE.
        encoder: of a decoder file, a registered name or a folder.
        encoder_size: of a decoder file, side that the encoder resizes to, or height and width. Default: its own.
        layers: of a decoder file, the layers of RAE v2 that its latents are made of. Default: the last alone.
        statistics: of a decoder file, the file of its latents' mean and variance. Default: not whitened.
        decoder_config: of a decoder file of no published size, its config.json or the folder of it.
        output: of a decoder file, what the decoder gives; pixels for RAE v2.
    """
    from raekit import conversion
    from raekit.models.encoders import LAYERS, LayersConfig

    options = conversion.FileOptions(
        encoder=encoder,
        encoder_size=encoder_size,
        layers=LAYERS[layers] if layers else LayersConfig(),
        statistics=statistics,
        decoder_config=decoder_config,
        output=output,
    )
    parts = conversion.convert(source, dest, to, options)
    size = "x".join(map(str, parts.var.shape))
    numbers = sum(value.numel() for value in parts.decoder.values())
    _out.print(f"{dest}: encoder {parts.config.encoder}, latents {size}, a decoder of {numbers:,} parameters")


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
    "encode": encode,
    "probe": probe,
    "recipes": recipes,
    "train": train,
    "latents measure": latents_measure,
    "latents generate": latents_generate,
    "evaluate": evaluate,
    "reference": reference,
    "convert": convert,
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


def _fail_for(unreadable: Sequence[str], done: int) -> None:
    """End with an error that names the images that could not be read, if there are any."""
    if unreadable:
        lines = [f"{len(unreadable)} of {len(unreadable) + done} images could not be read:", *unreadable[:20]]
        more = [f"and {len(unreadable) - 20} more"] if len(unreadable) > 20 else []
        raise UserError("\n  ".join(lines + more))


def _reconstructions_table(results: "Reconstructions") -> Table:
    """A row for each of the first pictures, and the means."""
    means = results.means()
    table = Table("image", *means)
    for picture in results.pictures[:20]:
        table.add_row(str(picture.output), *(f"{picture.scores[name]:.4g}" for name in means))
    if (more := len(results.pictures) - 20) > 0:
        table.add_row(f"and {more} more", *("" for _ in means))
    table.add_row("mean", *(f"{value:.4g}" for value in means.values()))
    return table


def scores_table(scores: dict[str, dict[str, float]]) -> Table:
    """The scores as a table, a row for each stream of images."""
    metrics = list(dict.fromkeys(name for row in scores.values() for name in row))
    table = Table("", *metrics)
    for name, row in scores.items():
        table.add_row(name, *(f"{row[m]:.4g}" if m in row else "" for m in metrics))
    return table
