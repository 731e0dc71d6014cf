"""Copy the artifacts of finished runs into the package as its built-in models, in float16.

python tools/make_builtin.py encoder runs/emoji_encoder_distilled
python tools/make_builtin.py autoencoder runs/emoji_decoder
python tools/make_builtin.py denoiser runs/emoji_dit_dh
python tools/make_builtin.py classifier runs/emoji_classifier
"""

import sys

import torch

from raekit import artifacts
from raekit.distributed import World
from raekit.hub import ASSETS
from raekit.models.autoencoder import Autoencoder
from raekit.models.classifier import load_classifier
from raekit.models.denoiser import Denoiser
from raekit.models.encoders import load_encoder

kind, run = sys.argv[1:]
match kind:
    case "encoder":
        load_encoder(run).save(ASSETS / "vit-tiny", dtype=torch.float16)
    case "autoencoder":
        Autoencoder.load(run).save(ASSETS / "emoji", dtype=torch.float16)
    case "denoiser":
        Denoiser.load(run).save(ASSETS / "emoji", dtype=torch.float16, ema=artifacts.find(run, "denoiser").ema)
    case "classifier":
        network = load_classifier(run)
        found = artifacts.find(run, "classifier")
        artifacts.write(
            ASSETS / "emoji" / "classifier",
            "classifier",
            network.config,
            network,
            World(),
            dtype=torch.float16,
            ema=found.ema,
            trained_on=found.trained_on,
        )
    case _:
        sys.exit(__doc__)
