"""Commands for the latents of data sources and of denoisers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.errors import UserError
from raekit.progress import Display


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

    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
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
            console.out.print(f"{out}: {shape}, mean variance {var.mean():.4f} ({var.min():.4f} to {var.max():.4f})")


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
    from raekit.inference import load
    from raekit.sampling import Sampling, sample_latents

    for name, value in (("count", count), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name}: {value} must be at least 1")
    sampling = Sampling(steps=steps, guidance=parse_guidance(guidance) if guidance is not None else ())
    with world(device) as here, Display(console.err) as progress:
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
    console.out.print(f"{count} latents: {out}")
