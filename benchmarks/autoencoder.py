"""How fast are encoding and decoding, compared with diffusers' AutoencoderRAE with the same weights?

    python benchmarks/autoencoder.py [--decoder ViT-XL] [--batch 2] [--precisions fp32 bf16] [--repeats 5] [--out DIR]

DINOv2-B with registers at 224 pixels (256 tokens) and a published decoder to 256 pixels, with the same random weights
in both, held in the precision. Needs diffusers. All variants take turns in one process, and each speed-up is to
diffusers, with its range. `rate` is the share of the machine's own matmul rate in that precision, measured here. The
outputs are compared first.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderRAE  # pyright: ignore[reportPrivateImportUsage]
from torch.utils.flop_counter import FlopCounterMode

from harness import interleaved, report
from machine import MatmulRate
from raekit.distributed import prepare_device
from raekit.formats.decoder_keys import DECODERS, decoder_state
from raekit.formats.diffusers_keys import from_diffusers
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.encoders import Encoder
from raekit.models.linear import widen_linear
from raekit.models.registry import REGISTRY

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peer(size: str) -> Any:
    """diffusers' model with random weights."""
    known = DECODERS[size]
    torch.manual_seed(0)
    return AutoencoderRAE(
        decoder_hidden_size=known["width"],
        decoder_num_hidden_layers=known["depth"],
        decoder_num_attention_heads=known["heads"],
        decoder_intermediate_size=known["hidden"],
        latents_mean=torch.zeros(768, 16, 16),
        latents_std=torch.ones(768, 16, 16),
    ).eval()


def ours(theirs: Any, size: str, dtype: torch.dtype) -> Autoencoder:
    """The same model as raekit loads it in `dtype`."""
    encoder = copy.deepcopy(theirs.encoder)  # its own, as it may be compiled in place
    widen_linear(encoder)
    encoder.requires_grad_(False).to(dtype)
    decoder = DecoderConfig(token_dim=768, grid=(16, 16), patch_size=16, **DECODERS[size])
    spec = REGISTRY["dinov2-b"]
    state, _, _ = from_diffusers(theirs.state_dict())
    return Autoencoder.build(
        AutoencoderConfig(encoder="dinov2-b", decoder=decoder),
        Encoder("dinov2-b", spec, encoder),
        decoder_state(state, decoder),
        (None, torch.ones(768, 16, 16)),
        "diffusers",
        dtype,
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@torch.inference_mode()
def compare(size: str, precision: str, batch: int, repeats: int, device: torch.device, out: Path | None) -> None:
    """Print the tables of encoding and of decoding in one precision."""
    dtype = DTYPES[precision]
    theirs = peer(size)
    mine, fast = ours(theirs, size, dtype).to(device), ours(theirs, size, dtype).to(device)
    theirs.to(device, dtype)
    fast.encoder.compile(dynamic=False)
    fast.decoder.compile(dynamic=False)
    images = torch.rand(batch, 3, 224, 224, device=device)
    latents = mine.encode(images)
    narrow = images.to(dtype), latents.to(dtype)
    tasks: dict[str, tuple[Any, Any, Any]] = {
        "encode": (lambda: theirs.encode(narrow[0]).latent, lambda: mine.encode(images), lambda: fast.encode(images)),
        "decode": (lambda: theirs.decode(narrow[1]).sample, lambda: mine.decode(latents), lambda: fast.decode(latents)),
    }
    for task, (reference, eager, compiled) in tasks.items():
        counter = FlopCounterMode(display=False)
        with counter:
            eager()
        clamped = reference().clamp(0, 1) if task == "decode" else reference()
        print(f"\n{task}: relative difference {difference(eager(), clamped):.1e}")
        rate = MatmulRate(dtype, device)
        variants = {"diffusers": reference, "raekit": eager, "raekit, compiled": compiled}
        times = interleaved(variants, repeats, device, rate)
        title = f"{task}, DINOv2-B and a {size} decoder, batch {batch}, {precision}"
        report(title, times, batch, device, out, flops=counter.get_total_flops(), rate=rate)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="ViT-XL", choices=DECODERS)
    parser.add_argument("--batch", type=int, help="default: 2 on a CPU, 64 on a GPU")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    device = prepare_device()
    batch = arguments.batch or (64 if device.type == "cuda" else 2)
    for precision in arguments.precisions:
        compare(arguments.decoder, precision, batch, arguments.repeats, device, arguments.out)


if __name__ == "__main__":
    main()
