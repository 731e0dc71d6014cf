"""How fast is everything? Training, encoding and decoding, sampling, and evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

import autoencoder as autoencoder_benchmark
import cached_latents
import decoder_step
import denoiser_step
import sampling as sampling_benchmark
import scaling as scaling_benchmark
from gpu.setting import Setting
from harness import interleaved, named, report
from machine import MatmulRate
from raekit.data.loader import DataConfig, Loader
from raekit.evaluation.features import Images, InceptionFeatures, load_networks
from raekit.evaluation.streaming import reference_moments
from raekit.inference.cache import cache_latents
from raekit.models.autoencoder import load_autoencoder
from raekit.models.inception import Inception
from raekit.recipes import dit_dh_xl_dinov2b_256, emoji_dit_dh
from raekit.stages.generation import GenerationConfig
from raekit.training.precision import compute_dtype
from synthetic import make_autoencoder, make_images


def steps(setting: Setting, sizes: tuple[str, ...], batch: int, grid: int, *only: str) -> None:
    """Time training steps of denoisers of some sizes, in which latents are at hand."""
    for size in setting.pick(("tiny",), sizes):
        count = setting.pick(2, batch)
        options = ["--size", size, "--batch", str(count), "--grid", str(grid), "--out", str(setting.out)]
        options += ["--repeats", str(setting.pick(1, 5)), "--only", *(only or ("eager", "compiled"))]
        setting.attempt(f"training step, {named(size, grid)}, batch {count}", partial(denoiser_step.main, options))


def train_256(setting: Setting) -> None:
    """Training steps at 256 pixels with cached latents: DiT^DH-S, B and XL, eager and compiled"""
    steps(setting, ("XL", "B", "S"), 64, 16)


def train_512(setting: Setting) -> None:
    """Training steps at 512 pixels (1024 tokens): DiT^DH-S, B and XL, eager and compiled"""
    steps(setting, ("XL", "B", "S"), 16, 32)


def train_raev2(setting: Setting) -> None:
    """Training steps of RAE v2 at 256 pixels with AdamW, eager and compiled"""
    steps(setting, ("RAEv2",), 64, 16)


def train_largest(setting: Setting) -> None:
    """Training steps of a compiled DiT^DH-XL with micro-batches as large as fit"""
    for batch in setting.pick((2,), (64, 128, 256, 512, 1024)):
        options = ["--size", setting.pick("tiny", "XL"), "--batch", str(batch), "--out", str(setting.out)]
        options += ["--repeats", str(setting.pick(1, 5)), "--only", "compiled"]
        if not setting.attempt(f"training step with micro-batches of {batch}", partial(denoiser_step.main, options)):
            break


def recipe(setting: Setting) -> GenerationConfig:
    """Return the published recipe for an autoencoder and images that are made here."""
    if setting.tiny:
        base = emoji_dit_dh.config()
        source = make_images(setting.scratch / "images", 40, 72)
        data = replace(base.data, source=source, split="all")
        return replace(base, data=data, train=replace(base.train, batch_size=4, precision="fp32"))
    base = dit_dh_xl_dinov2b_256.config()
    source = make_images(setting.scratch / "images", 2048, 288)
    return replace(
        base,
        data=replace(base.data, source=source, split="all", flip=False),
        autoencoder=make_autoencoder(setting.scratch / "autoencoder"),
        train=replace(base.train, batch_size=64, precision="bf16", compile=True),
    )


def train_data(setting: Setting) -> None:
    """Training with cached latents and with the encoder on the fly, and the loader with numbers of workers"""
    config, count, world = recipe(setting), setting.pick(1, 20), setting.world
    latents = setting.scratch / "latents"
    dtype = compute_dtype(config.train.precision, world.device)
    model = load_autoencoder(config.autoencoder, encoder_dtype=dtype).to(world.device)
    cache_latents(model, config.autoencoder, config.data, latents, dtype="bf16", world=world)
    variants = {"cached latents": replace(config, latents=str(latents)), "encoder on the fly": config}
    turns = {
        name: cached_latents.training(each, count, [], setting.scratch / "runs", world)
        for name, each in variants.items()
    }
    rate = MatmulRate(dtype, world.device)
    images, repeats = count * config.train.batch_size, setting.pick(1, 3)
    title = f"training of the recipe from data, {count} steps of {config.train.batch_size}, {config.train.precision}"
    times = interleaved(turns, repeats, world.device, rate)
    report(title, times, images, world.device, setting.out, rate=rate)

    reads = setting.pick(1, 100)

    def loading(workers: int) -> Callable[[], None]:
        def run() -> None:  # with the start of the workers, which would otherwise read ahead between the turns
            loader = Loader(replace(config.data, workers=workers), seed=0)
            for batch in islice(loader.stream(0, config.train.batch_size, world), reads):
                batch.to(world.device)

        return run

    turns = {f"{workers} workers": loading(workers) for workers in setting.pick((0, 1), (0, 2, 4, 8, 16))}
    rate = MatmulRate(dtype, world.device)
    times = interleaved(turns, repeats, world.device, rate)
    images = reads * config.train.batch_size
    report(f"loading JPEG files, {images} images", times, images, world.device, setting.out, rate=rate)


def stage1(setting: Setting) -> None:
    """Steps of stage 1 and their parts: ViT-B and ViT-XL decoders at 256 pixels"""
    for decoder in setting.pick(("tiny",), ("ViT-B", "ViT-XL")):
        for mode in setting.pick(([],), ([], ["--compile"])):
            options = ["--decoder", decoder, "--batch", str(setting.pick(2, 32)), "--out", str(setting.out), *mode]
            options += ["--precision", setting.pick("fp32", "bf16"), "--repeats", str(setting.pick(1, 3))]
            setting.attempt(f"stage-1 step, {decoder} {' '.join(mode)}", partial(decoder_step.main, options))


def autoencoder(setting: Setting) -> None:
    """Encoding and decoding compared with diffusers: DINOv2-B and a ViT-XL decoder"""
    for batch in setting.pick((1,), (64, 1)):
        options = ["--decoder", setting.pick("ViT-B", "ViT-XL"), "--batch", str(batch), "--out", str(setting.out)]
        options += ["--precisions", *setting.pick(["fp32"], ["bf16", "fp32"]), "--repeats", str(setting.pick(1, 5))]
        setting.attempt(f"encoding and decoding, batch {batch}", partial(autoencoder_benchmark.main, options))


def sampling(setting: Setting, batch: int, steps: int = 50) -> None:
    """Sampling from DiT^DH-XL, 50 steps, unguided and with each guidance; fewer steps are scaled"""
    options = ["--size", setting.pick("tiny", "XL"), "--batch", str(setting.pick(1, batch)), "--out", str(setting.out)]
    options += ["--steps", str(setting.pick(2, steps)), "--repeats", str(setting.pick(1, 3)), "--precision", "bf16"]
    options += ["--methods", "unguided", "CFG", "AutoGuidance", "internal"]
    setting.attempt(f"sampling, batch {batch}", partial(sampling_benchmark.main, options))


def fid(setting: Setting) -> None:
    """FID statistics of 10,000 images of 256 pixels: the network alone, and from JPEG files"""
    device, count = setting.device, setting.pick(2, 10_000)
    torch.manual_seed(0)
    network = InceptionFeatures(Inception().to(device))
    parts = {"Inception": network.pool, **load_networks("builtin:vit-tiny", device)}
    side, batch, files = setting.pick((32, 2, 4), (256, 64, 1024))
    source = make_images(setting.scratch / "jpeg", files, side)
    pixels = torch.rand(batch, 3, side, side, device=device)

    def made() -> Iterator[Images]:
        for first in range(0, count, batch):
            yield Images(pixels, torch.full((batch,), -1, device=device), torch.arange(first, first + batch))

    def read(workers: int) -> Iterator[Images]:
        loader = Loader(DataConfig(source=source, split="all", image_size=side, workers=workers), seed=0)
        for each in islice(loader.stream(0, batch, setting.world), -(-count // batch)):
            yield Images(each.to(device).pixels(), each.labels, each.positions)

    variants: dict[str, Callable[[], object]] = {
        f"{name}, images at hand": lambda part=part: reference_moments(made(), part, setting.world)
        for name, part in parts.items()
    }
    for workers in setting.pick((0,), (8, 16)):
        variants[f"Inception, JPEG files, {workers} workers"] = lambda workers=workers: reference_moments(
            read(workers), network.pool, setting.world
        )
    rate = MatmulRate(torch.float32, device)
    times = interleaved(variants, setting.pick(1, 2), device, rate)
    title = f"statistics of {count:,} images of {side} pixels, fp32"
    report(title, times, count, device, setting.out, rate=rate)


def growth(setting: Setting) -> None:
    """Time and memory against batch, tokens, classes, samples, images and evaluated images"""
    options = ["--size", setting.pick("tiny", "XL"), "--repeats", str(setting.pick(1, 3)), "--out", str(setting.out)]
    scaling_benchmark.main([*options, "--precision", setting.pick("fp32", "bf16")])
