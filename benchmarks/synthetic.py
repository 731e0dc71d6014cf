"""Images and an autoencoder of published sizes with random content, for benchmarks without a network."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raekit.formats.decoder_keys import DECODERS
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.encoders import load_encoder

CLASSES = 10


def make_images(folder: Path, count: int, side: int) -> str:
    """Write `count` JPEG files of smooth noise in CLASSES classes, and return the address of the source."""
    for name in range(CLASSES):
        (folder / f"{name}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(_write, folder, side), range(count)))
    return f"folder:{folder}"


def _write(folder: Path, side: int, number: int) -> None:
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side * 5 // 4, side), Image.Resampling.BICUBIC)
    image.save(folder / f"{number % CLASSES}" / f"{number:06}.jpg", quality=90)


def make_autoencoder(folder: Path, encoder_side: int = 224, decoder: str = "ViT-B") -> str:
    """Write an autoencoder of random weights, DINOv2-B with registers at `encoder_side` pixels, and return its name.

    The decoder makes images of 16 pixels for each token: 256 for 224 pixels, 512 for 448.
    """
    import transformers

    torch.manual_seed(0)
    sizes = transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14)
    network: Any = transformers.Dinov2WithRegistersModel(sizes)
    network.save_pretrained(folder / "dinov2")
    name = f"dinov2_with_registers:{folder / 'dinov2'}"
    encoder = load_encoder(name, encoder_side)
    config = DecoderConfig(token_dim=encoder.width, grid=encoder.grid, patch_size=16, **DECODERS[decoder])
    config = AutoencoderConfig(encoder=name, encoder_size=encoder_side, decoder=config)
    Autoencoder(config, encoder).save(folder)
    return str(folder)
