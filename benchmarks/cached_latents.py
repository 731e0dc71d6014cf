"""What does a cache of latents bring to the training of a denoiser? Images/s and losses, beside encoding on the fly.

    python benchmarks/cached_latents.py [--autoencoder builtin:emoji] [--source emoji] [--steps 10] [--out DIR]

The caches (float32, bfloat16, 8 bits) are written first, to a folder that is removed afterwards; then four trainings of
the same seed take turns of so many steps in one process. The denoiser is that of `emoji_dit_dh`, widened to the
channels of the latents where they need it. Losses are compared with those on the fly, step by step.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from harness import interleaved, report
from machine import MatmulRate, synchronise
from raekit.distributed import World, prepare_device
from raekit.inference.cache import Storage, cache_latents, relative_error
from raekit.models.autoencoder import load_autoencoder
from raekit.progress import silent
from raekit.recipes import emoji_dit_dh
from raekit.stages.generation import GenerationConfig
from raekit.stages.run import build
from raekit.training.optim import build_optimizer
from raekit.training.precision import autocast, compute_dtype

BYTES = 2**20


def training(
    config: GenerationConfig, steps: int, losses: list[Tensor], folder: Path, world: World
) -> Callable[[], None]:
    """Return a call that trains by `steps` more steps and adds their `losses`, and waits for no step."""
    stage = build(config, folder, world)
    objective, stream = stage.objectives[0], stage.batches(0)
    module = objective.module.to(world.device)
    if config.train.compile:
        stage.prepare(silent)
        for block in objective.blocks:
            block.compile()
    optimizer = build_optimizer(replace(config.optim, warmup_steps=0, decay="constant"), module, objective.blocks)

    def turn() -> None:
        for _ in range(steps):
            batch = next(stream).to(world.device)
            with autocast(config.train.precision, world.device):
                loss, _ = objective.loss(batch, len(losses))
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())

    return turn


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", default="builtin:emoji")
    parser.add_argument("--source", default="emoji")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    device = prepare_device()
    world = World(device=device)
    dtype = compute_dtype(arguments.precision, device)
    autoencoder = load_autoencoder(arguments.autoencoder, encoder_dtype=dtype).to(device)
    base = emoji_dit_dh.config()
    channels = autoencoder.latent_shape[0]
    size = base.denoiser
    assert size.head
    config = replace(
        base,
        data=replace(base.data, source=arguments.source, image_size=autoencoder.image_size),
        autoencoder=arguments.autoencoder,
        denoiser=replace(size, head=replace(size.head, width=max(size.head.width, -(-channels // 16) * 16))),
        train=replace(base.train, batch_size=arguments.batch, precision=arguments.precision),
    )
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        losses: dict[str, list[Tensor]] = {"on the fly": []}
        turns = {"on the fly": training(config, arguments.steps, losses["on the fly"], place, world)}
        for storage in get_args(Storage):
            infos = cache_latents(
                autoencoder, arguments.autoencoder, config.data, place / storage, dtype=storage, world=world
            )
            stored = sum(path.stat().st_size for path in (place / storage).iterdir())
            images = sum(info.images for info in infos)
            print(f"{storage}: {stored / BYTES:.2f} MiB for {images} images, error {relative_error(infos):.2%}")
            losses[storage] = []
            cached = replace(config, latents=str(place / storage))
            turns[storage] = training(cached, arguments.steps, losses[storage], place, world)
        synchronise(device)
        rate = MatmulRate(dtype, device)
        times = interleaved(turns, arguments.repeats, device, rate)
    title = f"training on {arguments.autoencoder}, {arguments.steps} steps of {arguments.batch}, {arguments.precision}"
    report(title, times, arguments.steps * arguments.batch, device, arguments.out, rate=rate)
    exact = torch.stack(losses.pop("on the fly"))
    for storage, found in losses.items():
        off = (torch.stack(found) / exact - 1).abs()
        print(
            f"{storage}: losses of {len(found)} steps within {off.max():.1e} of those on the fly, mean {off.mean():.1e}"
        )


if __name__ == "__main__":
    main()
