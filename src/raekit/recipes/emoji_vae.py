"""A small VAE on the built-in emoji: 8 x 8 tokens of 16 channels, to compare the latents of an encoder with.

Reproduces:     nothing yet: the paper compares with the VAE of Stable Diffusion (sdvae_dit_xl)
Command:        raekit train emoji_vae --train.compile
                (with LPIPS: --perceptual.weights FILE)
                raekit train emoji_dit_dh --autoencoder runs/emoji_vae --run runs/vae_dit_dh
Size:           3.9 M parameters
Memory:         0.6 GiB
Cost:           not measured yet
Last verified:  a short run only
"""

from raekit.data.loader import DataConfig
from raekit.models.baselines import VAESize
from raekit.stages.compression import CompressionConfig
from raekit.stages.watch import HeldoutConfig, PicturesConfig
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

STEPS = 4000


def config() -> CompressionConfig:
    return CompressionConfig(
        data=DataConfig(source="emoji", image_size=64),
        vae=VAESize(channels=16, widths=(32, 64, 128, 128)),
        train=TrainConfig(steps=STEPS, batch_size=16, checkpoint_every=200, ema_warmup=True),
        optim=OptimConfig(
            lr=5e-4, final_lr=1e-5, warmup_steps=100, warmup_from_zero=True, decay="cosine", decay_end=STEPS
        ),
        samples=PicturesConfig(every=1000),
        heldout=HeldoutConfig(every=500),
    )
