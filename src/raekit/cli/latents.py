"""Commands that measure, cache and generate latents."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.launch import processes
from raekit.cli.sampling import Options, SamplingOptions
from raekit.errors import MAX_COUNT, whole_number
from raekit.files import check_file, check_folder
from raekit.progress import Display, SamplingProgress, counted


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
    """Measure the mean and the variance of an encoder's latents.

    Example: raekit latents measure builtin:vit-tiny --source folder:images --out statistics.safetensors

    Args:
        encoder: Encoder: a registered name, builtin:NAME, a folder, or FAMILY:WHERE for a transformers checkpoint.
        out: Output file (.safetensors) for `mean` and `var`, each of shape (C, H, W).
        source: Images: emoji, folder:DIR, hf:OWNER/NAME, tar:FILES and others (docs/data.md).
        split: Split of the data source.
        image_size: Side in pixels to which images are centre-cropped. None: the input size of the encoder.
        encoder_size: Side in pixels to which the encoder resizes its input, or height and width. None: its own size.
        blocks: Encoder blocks whose outputs form the latents, counted from 0; -1 is the last block.
        combine: How to combine several blocks.
        token_mean: Add the mean over all patches of the last block's output.
        mirror: Count each image a second time, flipped left to right.
        batch_size: Number of images to encode at once in each process.
        workers: Number of processes that decode images. 0: decode in the main process.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.artifacts import write_statistics
    from raekit.data.loader import DataConfig, Loader
    from raekit.inference.statistics import measure_latents
    from raekit.models.encoders import load_encoder
    from raekit.models.layers import to_grid
    from raekit.models.registry import LayersConfig

    check_file(out, ".safetensors")
    layers = LayersConfig(blocks=blocks, combine=combine, token_mean=token_mean)

    with processes(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        model = load_encoder(encoder, encoder_size, layers).to(here.device)
        size = max(model.input_size) if image_size is None else image_size
        loader = Loader(DataConfig(source=source, split=split, image_size=size, workers=workers), seed=0)
        loader.announce(here)
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
    resize: Literal["fast", "exact"] = "fast",
    dtype: Literal["fp32", "bf16", "int8"] = "bf16",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    batch_size: int = 64,
    shard_size: int = 512,
    verify: bool = False,
    workers: int = 0,
    device: Device | None = None,
) -> None:
    """Cache the latents of a dataset, to train a denoiser without the encoder.

    Example: raekit latents cache builtin:emoji --source emoji --flip --out latents

    To train from the cache, give its folder to `raekit train` with --latents, and set --data.source to the same images.
    Existing shards are kept, so the same command resumes after an interruption. Under torchrun the processes divide the
    shards among them.

    Args:
        model: Autoencoder to use: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        out: Output folder for the shards.
        source: Images: emoji, folder:DIR, hf:OWNER/NAME, tar:FILES and others (docs/data.md).
        split: Split of the data source.
        flip: Also cache the latents of each mirrored image. Training with --data.flip needs them.
        resize: How to scale images. exact: the pixels of ADM's crop; fast: faster, with slightly different pixels.
            Training from the cache needs the same --data.resize, which is fast by default.
        dtype: Format in which to store the latents. int8 has one scale for each token.
        precision: Precision of the encoder. auto: bf16 if the hardware is fast at it, else fp32.
        batch_size: Number of images to encode at once.
        shard_size: Number of images in a shard. One shard is held in memory until it is written.
        verify: Also read the existing shards, and write those with wrong checksums again.
        workers: Number of processes that decode images. 0: decode in the main process.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.data.loader import DataConfig
    from raekit.distributed.locks import lock
    from raekit.inference.cache import cache_latents, relative_error
    from raekit.models.autoencoder import load_autoencoder
    from raekit.training.precision import compute_dtype

    check_folder(out)
    with (
        processes(device, resumable=True) as here,
        lock(out, here),
        Display(console.err, quiet=not here.is_main) as progress,
    ):
        autoencoder = load_autoencoder(model, compute_dtype(precision, here.device)).to(here.device)
        data = DataConfig(
            source=source,
            split=split,
            image_size=autoencoder.image_size,
            flip=flip,
            resize=resize,
            workers=workers,
        )
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
    """Generate latents, which can select the best checkpoint of a decoder's training.

    Example: raekit latents generate builtin:emoji --count 1000 --out generated.safetensors

    Give the file to `raekit train` with --selection.latents. The classes take turns. The latents are not whitened, so
    they fit every decoder of the same encoder.

    Args:
        model: Model to sample from: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        out: Output file (.safetensors) for `unwhitened` of shape (COUNT, C, H, W).
        count: Number of latents over all classes. They are held in memory until the end: 1.5 GiB for 1,000 latents of
            DINOv2-B at 256 pixels.
        seed: Seed of the noise. Latent i depends only on the seed, i and its class.
        ema: EMA decay of the weights to use, one of the recipe's `ema` values. None: the first of them.
        batch_size: Number of latents to generate at once.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    import torch
    from safetensors.torch import save_file

    from raekit.files import whole
    from raekit.flow.sampling import sample_latents
    from raekit.inference.model import load

    check_file(out, ".safetensors")

    for name, value in (("count", count), ("batch-size", batch_size)):
        whole_number(f"--{name}", value, 1, MAX_COUNT)
    with processes(device, "latents generate") as here, Display(console.err) as progress:
        loaded = load(model, here.device, ema, options.dtype)
        classes, parts, sampling = len(loaded.classes), [], options.sampling(model, here)
        shown = SamplingProgress(progress, "generate", 0, count)
        for indices in torch.arange(count).split(batch_size):
            labels = indices.to(here.device) % classes if classes else None
            latents = sample_latents(loaded.denoiser, labels, indices, seed, sampling, here.device, watch=shown.watch)
            parts.append(loaded.autoencoder.unwhiten(latents).cpu())
            shown.finish(len(indices))
        with whole(out) as partial:
            save_file({"unwhitened": torch.cat(parts)}, partial)
    console.out.print(f"{count} latents: {out}")
