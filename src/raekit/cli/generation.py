"""Commands that use a trained denoiser."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.errors import UserError
from raekit.progress import Display

if TYPE_CHECKING:
    from raekit.distributed import World
    from raekit.models.denoiser import Denoiser


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
    ema: float | None = None,
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
        ema: the decay of the average to use, of those that were trained (the recipe's `ema`). Default: the first.
        batch_size: images at once.
        device: default is the best there is.
    """

    from raekit.distributed import world
    from raekit.files import whole
    from raekit.flow.guidance import parse_guidance
    from raekit.folders import generate_folder
    from raekit.inference import generate as stream
    from raekit.inference import load
    from raekit.pictures import grid as tile
    from raekit.pictures import to_pil
    from raekit.sampling import Sampling

    if count < 1:
        raise UserError(f"--count: {count} must be at least 1")
    single = out.suffix.lower() == ".png"
    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        if single and here.size > 1:
            raise UserError("--out: one grid comes from one process; give a folder under torchrun")
        loaded = load(model, here.device, ema)
        labels = [loaded.class_id(name) for name in classes] or list(range(len(loaded.classes)))
        total = count * max(len(labels), 1)
        sampling = Sampling(
            steps=steps,
            solver=solver,
            grid=grid,
            guidance=parse_guidance(guidance) if guidance is not None else (),
            weak=load_weaker(weak, model, here),
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
        console.out.print(f"{total} images: {out}" + (f" ({counts} passes an image)" if counts else ""))


def load_weaker(weak: str | None, model: str, world: "World") -> "Denoiser | None":
    from raekit.models.denoiser import Denoiser

    if weak == model:
        raise UserError(f"--weak: {weak} is the model itself, which has no effect")
    return Denoiser.load(weak).to(world.device) if weak else None
