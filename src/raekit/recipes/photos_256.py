"""Stage 2 on your own photos at 256 pixels: fine-tune the published DiT^DH-XL on one GPU.

Reproduces:     nothing yet
Command:        raekit latents cache rae-dinov2-b --source folder:photos --flip --out latents
                raekit train photos_256 --data.source folder:photos --latents latents
Size:           839 M parameters
Memory:         15.6 GiB of state, 0.60 GiB an image in bf16 (far less with train.checkpointing)
Cost:           20,000 steps of 128, 2.5e18 FLOPs: about 2 hours on an H100, 12 on an RTX 4090 (estimated, at 35 %)
Last verified:  never at this scale (no GPU); a test trains it with small sizes.

The training keeps the pretrained encoder and decoder (rae-dinov2-b), and starts from the denoiser that was trained on
ImageNet (dit-dh-xl-256). The classes are the sub-folders of the photos. The learning rate is half of the published
rate, and constant for the first half of the training.
"""

from raekit.data.loader import DataConfig
from raekit.models.denoiser_config import SIZES, wide_head
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

STEPS = 20_000


def config() -> GenerationConfig:
    return GenerationConfig(
        data=DataConfig(source="folder:photos", image_size=256, flip=True, workers=8),
        autoencoder="rae-dinov2-b",
        denoiser=DenoiserSize(backbone=SIZES["XL"], head=wide_head()),
        init_from="dit-dh-xl-256",
        time_law="uniform",
        train=TrainConfig(
            steps=STEPS,
            batch_size=128,
            micro_batch="auto",
            precision="bf16",
            compile=True,
            checkpoint_every=1000,
            ema_warmup=True,
        ),
        optim=OptimConfig(
            lr=1e-4,
            final_lr=1e-5,
            warmup_steps=STEPS // 2,
            decay="linear",
            decay_end=STEPS,
            clip=1.0,
        ),
        ema=(0.999,),
    )
