"""How long does a step of stage 1 take, and which part of it takes how long?

    python benchmarks/decoder_step.py [--decoder ViT-B] [--batch 2] [--precision bf16] [--repeats 5] [--out DIR]

DINOv2-B at 224 pixels, a published decoder to 256 pixels, and all losses of the published recipe: L1, LPIPS (VGG16) and
a discriminator on DINO-S/8, with random weights. The parts take turns in one process, each one the step before it and
one part more, so that a part's cost is the difference of two lines; the whole step has the optimizers' updates besides.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from harness import interleaved, report
from machine import MatmulRate
from raekit.data.loader import Batch
from raekit.distributed import World, prepare_device
from raekit.formats.decoder_keys import DECODERS
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.discriminator import Dino, Discriminator
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.perceptual import LPIPS
from raekit.models.registry import REGISTRY
from raekit.recipes import dinov2b_decoder_xl
from raekit.stages.decoder_losses import AdversarialConfig, Encoded, Losses
from raekit.training import ema
from raekit.training.optim import adamw
from raekit.training.precision import autocast, compute_dtype


def networks(decoder: str, dtype: torch.dtype, adversarial: AdversarialConfig) -> tuple[Autoencoder, Discriminator]:
    """Return an autoencoder and a discriminator with random weights: as published, or all tiny."""
    torch.manual_seed(0)
    config = adversarial.discriminator
    if decoder == "tiny":
        encoder = load_encoder("builtin:vit-tiny", dtype=dtype)
        size: dict[str, Any] = {"width": 64, "depth": 1, "heads": 2, "hidden": 128}
        discriminator = Discriminator(replace(config, blocks=(0, 1, 2)), load_encoder("builtin:vit-tiny"))
    else:
        sizes = transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14)
        network: Any = transformers.Dinov2WithRegistersModel(sizes)
        encoder = Encoder("dinov2-b", REGISTRY["dinov2-b"], network.to(dtype))
        size = DECODERS[decoder]
        discriminator = Discriminator(config, Dino(width=384, depth=12, patch_size=8, grid=28))
    shape = DecoderConfig(token_dim=encoder.width, grid=encoder.grid, patch_size=16, **size)
    return Autoencoder(AutoencoderConfig(encoder=encoder.name, decoder=shape), encoder), discriminator


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="ViT-XL", choices=[*DECODERS, "tiny"])
    parser.add_argument("--batch", type=int, help="default: 2 on a CPU, 32 on a GPU")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--compile", action="store_true", help="compile the blocks of encoder and decoder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    device = prepare_device()
    count = arguments.batch or (32 if device.type == "cuda" else 2)
    recipe = dinov2b_decoder_xl.config()
    published = recipe.adversarial
    assert published

    model, discriminator = networks(arguments.decoder, compute_dtype(arguments.precision, device), published)
    model.to(device)
    discriminator.to(device)
    if arguments.compile:
        model.encoder.compile()
        for block in model.decoder.blocks:
            block.compile()
    side = model.image_size
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(count, dtype=torch.int64), torch.arange(count)).to(device)

    def losses(perceptual: bool, adversarial: bool) -> Losses:
        # Without the fields that name files of weights; the networks are put in below.
        bare = Losses(replace(recipe, perceptual=None, adversarial=None), model, 0, World(device=device))
        bare.config = replace(bare.config, perceptual=recipe.perceptual if perceptual else None)
        if perceptual:
            bare.perceptual = LPIPS().to(device)
        if adversarial:
            bare.config = replace(bare.config, adversarial=replace(published, discriminator_start=0, start=0))
            bare.discriminator_network = discriminator
        return bare

    def step(parts: Losses, *, update: bool = False, both: bool = False) -> Callable[[], None]:
        objectives: list[tuple[nn.Module, Callable]] = [(model.decoder, parts.decoder)]
        if both:
            objectives.append((discriminator, parts.discriminator))
        optimizers = [adamw(recipe.optim, module.parameters()) for module, _ in objectives]
        average = copy.deepcopy(model.decoder) if update else None

        def run() -> None:
            encoded = Encoded(batch, model.tokens)
            for (module, loss), optimizer in zip(objectives, optimizers, strict=True):
                with autocast(arguments.precision, device):
                    value, _ = loss(encoded, 0)
                value.backward()
                if update:
                    nn.utils.clip_grad_norm_(module.parameters(), recipe.optim.clip or float("inf"))
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if average is not None:
                ema.update(average, model.decoder, recipe.ema[0])

        return run

    everything = losses(perceptual=True, adversarial=True)
    variants: dict[str, Callable[[], object]] = {
        "whole step": step(everything, both=True, update=True),
        "encoder": lambda: model.tokens(batch.pixels()),
        "+ decoder with L1": step(losses(perceptual=False, adversarial=False)),
        "+ LPIPS": step(losses(perceptual=True, adversarial=False)),
        "+ adversarial loss": step(everything),
        "+ discriminator": step(everything, both=True),
    }
    rate = MatmulRate(compute_dtype(arguments.precision, device), device)
    times = interleaved(variants, arguments.repeats, device, rate)
    mode = "compiled" if arguments.compile else "eager"
    title = f"stage-1 step, {arguments.decoder} decoder, {side} pixels, batch {count}, {arguments.precision}, {mode}"
    report(title, times, count, device, arguments.out, rate=rate)


if __name__ == "__main__":
    main()
