"""Commands that generate images."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.launch import processes
from raekit.cli.sampling import Options, SamplingOptions
from raekit.errors import MAX_COUNT, UserError, whole_number
from raekit.files import FILE_ENDINGS, check_file, check_folder
from raekit.progress import Display, SamplingProgress

if TYPE_CHECKING:
    from raekit.distributed import World
    from raekit.flow.sampling import Sampling
    from raekit.inference.model import Model


Classes = Annotated[tuple[str, ...], tyro.conf.arg(name="class")]
PICTURES = (".png", ".webp")
MANY_CLASSES = 16
"""A grid without --class has a row for each class up to this number of classes, and random classes above it."""


def generate(
    model: Positional[str | None] = None,
    *,
    out: Path | None = None,
    classes: Classes = (),
    count: int = 16,
    seed: int = 0,
    options: Options = SamplingOptions(),
    ema: float | None = None,
    published: Path | None = None,
    format: Literal["png", "webp"] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    compile: bool = False,
    device: Device | None = None,
) -> None:
    """Generate images and write them to a grid, a folder or an .npz file.

    Example: raekit generate builtin:emoji --class flags --count 16 --out grid.png

    The same command resumes after an interruption if the output is a folder or an .npz file.

    Args:
        model: Model to sample from: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        out: A .png or .webp file for one grid (of several classes, a row for each), an .npz file in ADM's format, or a
            folder for one picture per sample. An existing file is replaced. In a folder, a file that has the name of a
            sample, but was not written by raekit, is an error. None: a grid in the working folder, named after the
            model, the classes and the seed.
        classes: Classes to generate: names, parts of names, numbers, or ranges of numbers such as 0-9. A number is a
            name if any class is named by a number, and an id if not. If not given, all classes; in a grid of a model
            with more than 16 classes, a random class for each sample.
        count: Number of samples for each class; with random classes, in total. In a folder, a larger number keeps the
            existing samples and adds more.
        seed: Seed of the noise. Sample i depends only on the seed, i and its class; the classes take turns.
        ema: EMA decay of the weights to use, one of the recipe's `ema` values. None: the first of them.
        published: Sampling config (YAML) of RAE v1 or v2, to use instead of a model. Also sets guidance and solver.
        format: Format of the pictures in a folder; both are lossless. None: png.
        batch_size: Number of images to generate at once. auto: as many as fit into the GPU's memory, or 64 on the CPU.
        compile: Compile the blocks of the model. This saves time only for many images.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.distributed.locks import lock
    from raekit.inference.generation import generate as stream
    from raekit.inference.generation import random_labels
    from raekit.inference.sample_folders import generate_folder, generate_npz, parts_of
    from raekit.pictures import check_grid, save_grid, to_pil

    whole_number("--count", count, 1, MAX_COUNT)
    model, classes = _model_and_classes(model, classes, published)
    if format and (out is None or out.suffix.lower() in (*PICTURES, ".npz")):
        raise UserError(f"--format: no effect on {out or 'a grid'}; it applies only to a folder")
    reserved = None if out else _reserve(Path(published or model or ""), classes, seed)
    out = out or reserved
    assert out
    suffix = out.suffix.lower()
    single = suffix in PICTURES
    file = single or suffix == ".npz"
    if suffix in FILE_ENDINGS and not file:
        raise UserError(f"--out: {out} must be a .png, .webp or .npz file, or a folder")
    (check_file if file else check_folder)(out)
    filled = parts_of(out) if suffix == ".npz" else out
    with (
        _given_back(reserved),
        processes(device, resumable=not single) as here,
        nullcontext() if single else lock(filled, here),
        Display(console.err, quiet=not here.is_main) as progress,
    ):
        if single and here.size > 1:
            raise UserError(
                "--out: only a single process can write a grid; under torchrun give a folder or an .npz file"
            )
        loaded, sampling = _load(model, ema, published, options, here)
        if compile:
            loaded.compile(sampling.weak)
        labels = class_ids(loaded, classes) or list(range(len(loaded.classes)))
        mixed = single and not classes and len(labels) > MANY_CLASSES
        total = count if mixed else count * max(len(labels), 1)
        several = len(labels) > 1 and not mixed
        columns = count if several else None
        if single:
            check_grid(out, total, loaded.autoencoder.image_shape, columns)
        passes: Counter[str] = Counter()
        shared: dict[str, Any] = {"seed": seed, "sampling": sampling, "batch_size": batch_size}
        if single:
            tiles = []
            # The classes take turns, as in a folder.
            every = (random_labels(loaded, seed, count) if mixed else labels * count) or None
            try:
                shown = SamplingProgress(progress, "generate", 0, total)
                for batch in stream(loaded, every, count=None if every else count, watch=shown.watch, **shared):
                    tiles += map(to_pil, batch.images)
                    passes |= batch.passes
                    shown.finish(len(batch))
            except KeyboardInterrupt:
                console.err.print("stopped; a grid cannot be resumed, so give a folder as --out for many images")
                raise
            if several:  # a row for each class
                tiles = [tile for row in range(len(labels)) for tile in tiles[row :: len(labels)]]
            save_grid(tiles, out, columns)
        elif suffix == ".npz":
            shared |= {"total": total, "world": here, "progress": progress}
            passes = generate_npz(loaded, out, labels or None, **shared)
        else:
            shared |= {"total": total, "world": here, "progress": progress, "form": format or "png"}
            passes = generate_folder(loaded, out, labels or None, **shared)
    if here.is_main:
        console.out.print(f"{total} images: {out}{_cost(passes)}")


def interpolate(
    model: Positional[str | None] = None,
    *,
    out: Path,
    seeds: tuple[int, ...] = (0,),
    classes: Classes = (),
    frames: int = 8,
    ema: float | None = None,
    options: Options = SamplingOptions(),
    batch_size: int | Literal["auto"] = "auto",
    device: Device | None = None,
) -> None:
    """Generate a row of images that leads from one seed or class to another.

    Example: raekit interpolate builtin:emoji --seeds 0 1 --class flags --out row.png

    The noise is interpolated along a great circle, the class embedding linearly.

    Args:
        model: Model to sample from: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        out: Output file, .png or .webp.
        seeds: Seeds of the first and the last image, or one seed for both. Each of the two is sample 0 of its seed.
        classes: Classes (names, parts of names, or numbers) of the first and the last image, or one class for both. If
            not given, no class.
        frames: Number of images, including the first and the last.
        ema: EMA decay of the weights to use, one of the recipe's `ema` values. None: the first of them.
        batch_size: Number of images to generate at once. auto: as many as fit into the GPU's memory, or 64 on the CPU.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.inference.generation import interpolate as between
    from raekit.inference.model import load
    from raekit.pictures import check_grid, save_grid, to_pil

    _check_picture(out)
    whole_number("--frames", frames, 2, MAX_COUNT)
    model, classes = _model_and_classes(model, classes)
    assert model is not None
    with processes(device, "interpolate") as here, Display(console.err) as progress:
        loaded = load(model, here.device, ema, options.dtype)
        check_grid(out, frames, loaded.autoencoder.image_shape, frames)
        images, passes, shown = [], Counter(), SamplingProgress(progress, "interpolate", 0, frames)
        batches = between(
            loaded,
            seeds=_pair(seeds, "seeds"),
            labels=_pair([loaded.class_id(name) for name in classes], "class") if classes else None,
            frames=frames,
            sampling=options.sampling(model, here),
            batch_size=batch_size,
            watch=shown.watch,
        )
        for batch in batches:
            images += map(to_pil, batch.images)
            passes |= batch.passes
            shown.finish(len(batch))
    save_grid(images, out, columns=len(images))
    console.out.print(f"{frames} images: {out}{_cost(passes)}")


def trajectory(
    model: Positional[str | None] = None,
    *,
    out: Path,
    classes: Classes = (),
    count: int = 1,
    frames: int = 8,
    seed: int = 0,
    ema: float | None = None,
    options: Options = SamplingOptions(),
    device: Device | None = None,
) -> None:
    """Show how samples form from noise, as a row of images for each sample.

    Example: raekit trajectory builtin:emoji --class flags --frames 8 --out strip.png

    Each image shows the finished image that the guided model predicts at one solver time. The last image of a row is
    the finished sample.

    Args:
        model: Model to sample from: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        out: Output file, .png or .webp.
        classes: Classes to generate: names, parts of names, numbers, or ranges of numbers such as 0-9. If not given,
            samples without a class.
        count: Number of samples for each class. `raekit generate` makes the same samples of the same classes.
        frames: Number of images in a row.
        seed: Seed of the noise.
        ema: EMA decay of the weights to use, one of the recipe's `ema` values. None: the first of them.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.inference.generation import trajectory as follow
    from raekit.inference.model import load
    from raekit.pictures import check_grid, save_grid, to_pil

    _check_picture(out)
    model, classes = _model_and_classes(model, classes)
    assert model is not None
    whole_number("--count", count, 1, MAX_COUNT)
    whole_number("--frames", frames, 2, MAX_COUNT)
    with processes(device, "trajectory") as here, Display(console.err) as progress:
        loaded = load(model, here.device, ema, options.dtype)
        labels = class_ids(loaded, classes)
        sampling = options.sampling(model, here)
        check_grid(out, frames * (len(labels) * count or count), loaded.autoencoder.image_shape, frames)
        every = labels * count or None
        shown = SamplingProgress(progress, "trajectory", 0, len(labels) * count or count)
        times, images = follow(
            loaded,
            every,
            count=None if every else count,
            frames=frames,
            seed=seed,
            sampling=sampling,
            watch=shown.watch,
        )
        shown.finish(shown.total)
    rows = [[to_pil(image) for image in row] for row in images.transpose(0, 1)]
    classes_first = [row for first in range(max(len(labels), 1)) for row in rows[first :: max(len(labels), 1)]]
    save_grid([image for row in classes_first for image in row], out, columns=frames)
    at = ", ".join(f"{t:.3f}" for t in times)
    console.out.print(f"{len(rows)} x {frames} images at times {at}: {out}")


def class_ids(model: "Model", classes: Iterable[str]) -> list[int]:
    """Return the ids of classes that are given by name, id or range, in the given order."""
    return [label for name in classes for label in model.class_ids(name)]


def _model_and_classes(
    model: str | None, classes: tuple[str, ...], published: Path | None = None
) -> tuple[str | None, tuple[str, ...]]:
    """Return the model and the classes of a command line.

    In `--class A B MODEL` the parser takes the model for a class, so without a model the last of several is the model.

    Raises:
        UserError: there is no model.
    """
    if model is not None and published is not None:
        raise UserError("generate: give either a model or --published FILE.yaml")
    if model is None and published is None:
        if len(classes) < 2:
            raise UserError("no model is given; name it first, as in: raekit generate builtin:emoji")
        return classes[-1], classes[:-1]
    return model, classes


def _reserve(model: Path, classes: Iterable[str], seed: int) -> Path:
    """Create an empty PNG file in the working folder, so that another command chooses another name, and return it."""
    name = (model if model.stem.strip(".") else model.resolve()).stem.split(":")[-1]  # "." and ".." are no names
    name = re.sub(r"[^\w.-]+", "_", "-".join([name, *classes])).lstrip("-")
    name = f"{name.encode()[:200].decode(errors='ignore')}-seed{seed}"  # a file name has at most 255 bytes
    check_folder(Path.cwd())
    paths = (Path(f"{name}{f'-{number}' if number > 1 else ''}.png") for number in count_from(1))
    return next(path for path in paths if _created(path))


def _created(path: Path) -> bool:
    """Create an empty file, and return whether there was none."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@contextmanager
def _given_back(reserved: Path | None) -> Iterator[None]:
    """Remove a reserved file that is still empty at the end of the block, because the command failed."""
    try:
        yield
    finally:
        if reserved and reserved.is_file() and not reserved.stat().st_size:
            reserved.unlink()


def _load(
    model: str | None, ema: float | None, published: Path | None, options: SamplingOptions, world: "World"
) -> "tuple[Model, Sampling]":
    from dataclasses import replace

    from raekit.inference.model import load, load_published

    if published is None:
        assert model is not None
        return load(model, world.device, ema, options.dtype), options.sampling(model, world)
    ours = {name: getattr(options, name) for name in options.given() if name == "reuse"}
    theirs = [name for name in options.given() if name not in ("reuse", "precision")] + ["ema"] * (ema is not None)
    if theirs:
        raise UserError(
            f"--published: {published} sets --{', --'.join(theirs)}; leave out the options or edit the file"
        )
    loaded, sampling = load_published(published, world.device, options.dtype)
    return loaded, replace(sampling, **ours)


def _check_picture(out: Path) -> None:
    """Check, before any work starts, that a grid can be written to `out`."""
    if out.suffix.lower() not in PICTURES:
        raise UserError(f"--out: {out} must be a .png or .webp file")
    check_file(out)


def _pair(values: Sequence[int], name: str) -> tuple[int, int]:
    """Return the values for both ends of an interpolation."""
    if len(values) not in (1, 2):
        raise UserError(f"--{name}: takes one value for both ends, or two values, not {len(values)}")
    return (values[0], values[-1])


def _cost(passes: Counter[str]) -> str:
    counts = " + ".join(f"{number} {kind}" for kind, number in passes.items())
    return f" ({counts} passes per image)" if counts else ""
