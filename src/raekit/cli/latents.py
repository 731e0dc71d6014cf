"""Commands for the latents of data sources and of denoisers."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.sampling import Options, SamplingOptions
from raekit.errors import UserError
from raekit.files import check_file, check_folder
from raekit.progress import Display, counted


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
        batch_size: images at once on each process.
        workers: processes that decode images.
        device: default is the best there is.
    """
    from raekit.artifacts import write_statistics
    from raekit.data.loader import DataConfig, Loader
    from raekit.distributed import world
    from raekit.inference.statistics import measure_latents
    from raekit.models.encoders import load_encoder
    from raekit.models.layers import to_grid
    from raekit.models.registry import LayersConfig

    check_file(out, ".safetensors")
    layers = LayersConfig(blocks=blocks, combine=combine, token_mean=token_mean)

    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        model = load_encoder(encoder, encoder_size, layers).to(here.device)
        size = image_size or max(model.input_size)
        loader = Loader(DataConfig(source=source, split=split, image_size=size, workers=workers), seed=0)
        shape, batches = (model.spec.width, *model.grid), loader.once(batch_size, here)
        shown = counted(progress, "measure", len(loader), here.size)
        mean, var = measure_latents(lambda x: to_grid(model(x), model.grid), batches, shape, here, mirror, shown)
        if here.is_main:
            write_statistics(out, var, mean)
            console.out.print(f"{out}: {shape}, mean variance {var.mean():.4f} ({var.min():.4f} to {var.max():.4f})")


def latents_cache(
    model: Positional[str],
    out: Path,
    source: str = "emoji",
    split: Literal["train", "heldout", "all"] = "train",
    flip: bool = False,
    dtype: Literal["fp32", "bf16", "int8"] = "bf16",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    batch_size: int = 64,
    shard_size: int = 512,
    verify: bool = False,
    workers: int = 0,
    device: Device | None = None,
) -> None:
    """Write the whitened latents of a data source, to train a denoiser from (`--latents`).

    Example: raekit latents cache builtin:emoji --source emoji --flip --out latents
    Shards that are there are kept, so the same command goes on after an interruption; under torchrun, processes share
    them.

    Args:
        model: builtin:NAME, a model folder, a stage-1 run, or OWNER/NAME on the Hub.
        out: the folder to fill.
        source: emoji, folder:DIR, flat:DIR, idx:DIR or hf:DIR. The training has to name it the same.
        split: of the source.
        flip: of each image the mirrored one as well, for a training with data.flip.
        dtype: to store as. int8 has one scale a token.
        precision: that the encoder computes in; auto is bf16 where the hardware multiplies it fast.
        batch_size: images at once.
        shard_size: images in a shard, held in memory until it is written.
        verify: read the shards that are there as well, and make those anew whose checksums are wrong.
        workers: processes that decode images.
        device: default is the best there is.
    """
    from raekit.data.loader import DataConfig
    from raekit.distributed import world
    from raekit.inference.cache import cache_latents, relative_error
    from raekit.models.autoencoder import load_autoencoder
    from raekit.train.precision import compute_dtype

    check_folder(out)
    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        autoencoder = load_autoencoder(model, compute_dtype(precision, here.device)).to(here.device)
        data = DataConfig(source=source, split=split, image_size=autoencoder.image_size, flip=flip, workers=workers)
        infos = cache_latents(
            autoencoder,
            model,
            data,
            out,
            dtype=dtype,
            batch_size=batch_size,
            shard_size=shard_size,
            verify=verify,
            world=here,
            progress=progress,
        )
    if here.is_main:
        images, size = sum(info.images for info in infos), sum(path.stat().st_size for path in out.glob("latents-*"))
        console.out.print(
            f"{out}: {images} images{' in both orientations' if flip else ''} as {dtype}, {size / 2**20:,.1f} MiB in "
            f"{len(infos)} shards; error {relative_error(infos):.2%} of the latents' norm"
        )
        if unreadable := infos[0].items - images:
            console.err.print(f"{unreadable} of {infos[0].items} images could not be read and were left out")


def latents_generate(
    model: Positional[str],
    out: Path,
    count: int = 1000,
    seed: int = 0,
    options: Options = SamplingOptions(),
    ema: float | None = None,
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
        ema: the decay of the average to use, of those that were trained (the recipe's `ema`). Default: the first.
        batch_size: latents at once.
        device: default is the best there is.
    """
    import torch
    from safetensors.torch import save_file

    from raekit.distributed import world
    from raekit.files import whole
    from raekit.flow.sampling import sample_latents
    from raekit.inference.model import load

    check_file(out, ".safetensors")

    for name, value in (("count", count), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name}: {value} must be at least 1")
    with world(device) as here, Display(console.err) as progress:
        if here.size > 1:
            raise UserError("latents generate: works in one process, not under torchrun")
        loaded = load(model, here.device, ema, options.dtype)
        classes, parts, sampling = len(loaded.classes), [], options.sampling(model, here)
        for indices in torch.arange(count).split(batch_size):
            labels = indices.to(here.device) % classes if classes else None
            latents = sample_latents(loaded.denoiser, labels, indices, seed, sampling, here.device)
            parts.append(loaded.autoencoder.unwhiten(latents).cpu())
            progress("generate", int(indices[-1]) + 1, count)
        with whole(out) as partial:
            save_file({"unwhitened": torch.cat(parts)}, partial)
    console.out.print(f"{count} latents: {out}")
