"""Commands that use a trained denoiser."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.sampling import Options, SamplingOptions
from raekit.errors import UserError
from raekit.files import check_file, check_folder
from raekit.progress import Display

if TYPE_CHECKING:
    from raekit.distributed import World
    from raekit.flow.sampling import Sampling
    from raekit.inference.model import Model


Classes = Annotated[tuple[str, ...], tyro.conf.arg(name="class")]
PICTURES = (".png", ".webp")
OTHER_FILES = (
    ".jpg",
    ".jpeg",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".npy",
    ".safetensors",
    ".zip",
    ".tar",
    ".txt",
    ".json",
)
"""What nobody means to be a folder."""


def generate(
    model: Positional[str | None] = None,
    *,
    out: Path,
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
    """Generate images into one picture, a folder, or an .npz file.

    Example: raekit generate builtin:emoji --class flags --count 16 --out grid.png

    Args:
        model: a published name, builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        out: a .png or .webp file for a grid; an .npz file as ADM's evaluation reads; else a folder, one file a sample.
        classes: names, ids, or ranges of ids as 0-9; each class gets COUNT samples. Default: all of them.
        count: samples of each class. In a folder those that are there are kept, and more are added to them.
        seed: sample i is a function of the seed, i and its class, which is i modulo the number of classes.
        ema: the decay of the average to use, of those that were trained (the recipe's `ema`). Default: the first.
        published: a YAML of RAE v1 or v2 that gives model, guidance and solver, in place of MODEL.
        format: of the files of a folder, both without loss. Default: png.
        batch_size: images at once; auto is what fits the GPU's memory, and 64 elsewhere.
        compile: compile the model's blocks; it pays for many images.
        device: default is the best there is.
    """
    from raekit.distributed import world
    from raekit.files import whole
    from raekit.inference.generation import generate as stream
    from raekit.inference.sample_folders import generate_folder, generate_npz
    from raekit.pictures import grid as tile
    from raekit.pictures import save_picture, to_pil

    if count < 1:
        raise UserError(f"--count: {count} must be at least 1")
    suffix = out.suffix.lower()
    single = suffix in PICTURES
    if suffix in OTHER_FILES:
        raise UserError(f"--out: {out} must be a .png, .webp or .npz file, or a folder")
    (check_file if single or suffix == ".npz" else check_folder)(out)
    if format and (single or suffix == ".npz"):
        raise UserError(f"--format: no effect on {out}; it is for the files of a folder")
    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        if single and here.size > 1:
            raise UserError("--out: one grid comes from one process; give a folder or an .npz file under torchrun")
        loaded, sampling = _load(model, ema, published, options, here)
        if compile:
            loaded.compile(sampling.weak)
        labels = class_ids(loaded, classes) or list(range(len(loaded.classes)))
        total = count * max(len(labels), 1)
        passes: Counter[str] = Counter()
        shared: dict[str, Any] = {"seed": seed, "sampling": sampling, "batch_size": batch_size}
        if single:
            tiles = []
            every = labels * count or None  # sample i has class i modulo their number, as in a folder
            for batch in stream(loaded, every, count=None if every else count, **shared):
                tiles += map(to_pil, batch.images)
                passes |= batch.passes
                progress("generate", len(tiles), total)
            rows = [tiles[row :: len(labels)] for row in range(len(labels))] or [tiles]
            sheet = tile([image for row in rows for image in row], columns=count if len(labels) > 1 else None)
            with whole(out) as partial:
                save_picture(sheet, partial, _form(out))
        elif suffix == ".npz":
            shared |= {"total": total, "world": here, "progress": progress}
            passes = generate_npz(loaded, out, labels or None, **shared)
        else:
            shared |= {"total": total, "world": here, "progress": progress, "form": format or "png"}
            passes = generate_folder(loaded, out, labels or None, **shared)
    if here.is_main:
        console.out.print(f"{total} images: {out}{_told(passes)}", markup=False)


def interpolate(
    model: Positional[str],
    out: Path,
    seeds: tuple[int, ...] = (0,),
    classes: Classes = (),
    frames: int = 8,
    ema: float | None = None,
    options: Options = SamplingOptions(),
    batch_size: int | Literal["auto"] = "auto",
    device: Device | None = None,
) -> None:
    """Generate the images on the way between two seeds, two classes, or both, as one row.

    Example: raekit interpolate builtin:emoji --seeds 0 1 --class flags --out row.png

    The noise goes along a great circle, the class in a straight line.

    Args:
        model: a published name, builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        out: the .png or .webp file to write.
        seeds: one for both ends, or one for each; an end is sample 0 of its seed.
        classes: names or ids, one for both ends, or one for each. Default: no class.
        frames: images, both ends among them.
        ema: the decay of the average to use, of those that were trained (the recipe's `ema`). Default: the first.
        batch_size: images at once; auto is what fits the GPU's memory, and 64 elsewhere.
        device: default is the best there is.
    """
    from raekit.distributed import world
    from raekit.inference.generation import interpolate as between
    from raekit.inference.model import load
    from raekit.pictures import to_pil

    form = _form(out)
    with world(device) as here, Display(console.err) as progress:
        if here.size > 1:
            raise UserError("interpolate: works in one process, not under torchrun")
        loaded = load(model, here.device, ema, options.dtype)
        images, passes = [], Counter()
        batches = between(
            loaded,
            seeds=_pair(seeds, "seeds"),
            labels=_pair([loaded.class_id(name) for name in classes], "class") if classes else None,
            frames=frames,
            sampling=options.sampling(model, here),
            batch_size=batch_size,
        )
        for batch in batches:
            images += map(to_pil, batch.images)
            passes |= batch.passes
            progress("interpolate", len(images), frames)
    _write_rows([images], out, form)
    console.out.print(f"{frames} images: {out}{_told(passes)}", markup=False)


def trajectory(
    model: Positional[str],
    out: Path,
    classes: Classes = (),
    count: int = 1,
    frames: int = 8,
    seed: int = 0,
    ema: float | None = None,
    options: Options = SamplingOptions(),
    device: Device | None = None,
) -> None:
    """Show how samples come about: what their noise is taken for, step by step, a row for each.

    Example: raekit trajectory builtin:emoji --class flags --frames 8 --out strip.png

    An image is the data that the (guided) velocity points to; the last is the sample.

    Args:
        model: a published name, builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        out: the .png or .webp file to write.
        classes: names, ids, or ranges of ids as 0-9; each class gets COUNT rows. Default: one row of no class.
        count: samples of each class, numbered as `raekit generate` does.
        frames: images of a row.
        seed: of the samples.
        ema: the decay of the average to use, of those that were trained (the recipe's `ema`). Default: the first.
        device: default is the best there is.
    """
    from raekit.distributed import world
    from raekit.inference.generation import trajectory as follow
    from raekit.inference.model import load
    from raekit.pictures import to_pil

    form = _form(out)
    if count < 1:
        raise UserError(f"--count: {count} must be at least 1")
    with world(device) as here:
        if here.size > 1:
            raise UserError("trajectory: works in one process, not under torchrun")
        loaded = load(model, here.device, ema, options.dtype)
        labels = class_ids(loaded, classes)
        sampling = options.sampling(model, here)
        every = labels * count or None
        times, images = follow(
            loaded, every, count=None if every else count, frames=frames, seed=seed, sampling=sampling
        )
    rows = [[to_pil(image) for image in row] for row in images.transpose(0, 1)]
    _write_rows([row for first in range(max(len(labels), 1)) for row in rows[first :: max(len(labels), 1)]], out, form)
    shown = ", ".join(f"{t:.3f}" for t in times)
    console.out.print(f"{len(rows)} x {frames} images at times {shown}: {out}", markup=False)


def class_ids(model: "Model", classes: Iterable[str]) -> list[int]:
    """The ids of classes given by name, id or range, in their order."""
    return [label for name in classes for label in model.class_ids(name)]


def _load(
    model: str | None, ema: float | None, published: Path | None, options: SamplingOptions, world: "World"
) -> "tuple[Model, Sampling]":
    from dataclasses import replace

    from raekit.inference.model import load, load_published

    if (model is None) == (published is None):
        raise UserError("generate: give either a model or --published FILE.yaml")
    if published is None:
        assert model is not None
        return load(model, world.device, ema, options.dtype), options.sampling(model, world)
    ours = {name: getattr(options, name) for name in options.given() if name == "reuse"}
    theirs = [name for name in options.given() if name not in ("reuse", "precision")] + ["ema"] * (ema is not None)
    if theirs:
        raise UserError(f"--published: {published} gives --{', --'.join(theirs)} itself; leave it out or edit the file")
    loaded, sampling = load_published(published, world.device, options.dtype)
    return loaded, replace(sampling, **ours)


def _form(out: Path) -> Literal["png", "webp"]:
    suffix = out.suffix.lower()
    if suffix not in PICTURES:
        raise UserError(f"--out: {out} must be a .png or .webp file")
    check_file(out)
    return "webp" if suffix == ".webp" else "png"


def _pair(values: Sequence[int], name: str) -> tuple[int, int]:
    if len(values) not in (1, 2):
        raise UserError(f"--{name}: takes one for both ends, or two, not {len(values)}")
    return (values[0], values[-1])


def _write_rows(rows: Sequence[Sequence[Any]], out: Path, form: Literal["png", "webp"]) -> None:
    from raekit.files import whole
    from raekit.pictures import grid as tile
    from raekit.pictures import save_picture

    sheet = tile([image for row in rows for image in row], columns=len(rows[0]))
    with whole(out) as partial:
        save_picture(sheet, partial, form)


def _told(passes: Counter[str]) -> str:
    counts = " + ".join(f"{number} {kind}" for kind, number in passes.items())
    return f" ({counts} passes an image)" if counts else ""
