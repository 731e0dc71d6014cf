"""Stage 2 on ImageNet 256: DiT^DH-XL for the latents of DINOv2-B, the published recipe.

Reproduces:     FID 1.51 unguided, 1.13 with auto:1.42 by dit_dh_s_dinov2b_256 after 14 epochs (paper, table 8);
                3.71 and 2.16 unguided after 20 and 80 epochs
Command:        torchrun --nproc-per-node 8 -m raekit -- train dit_dh_xl_dinov2b_256 --data.source folder:imagenet
Size:           839 M parameters
Memory:         15.6 GiB of state, 0.96 GiB an image (0.06 GiB with train.checkpointing)
Cost:           800 epochs, 33 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet); the parts agree with the reference cases. 2026-11-27: 392 images/s in
                bf16 on one H200, 20 compiled steps of 64 made-up images (docs/performance.md).

Where the paper and the released code differ, this recipe follows the code that trained the released denoisers:
uniform times, a constant learning rate for 40 epochs, and float32 with matrix products in TF32. The figures come from
sampling with the grid `published`, whose 50 points make 49 steps, and with balanced classes.
"""

from raekit.data.loader import DataConfig
from raekit.models.denoiser_config import SIZES, wide_head
from raekit.stages.generation import DenoiserSize, GenerationConfig
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

IMAGES, BATCH, EPOCHS = 1_281_167, 1024, 800
EPOCH = IMAGES // BATCH


def config() -> GenerationConfig:
    return GenerationConfig(
        data=DataConfig(source="folder:imagenet", image_size=256, flip=True, workers=8),
        autoencoder="rae-dinov2-b",
        denoiser=DenoiserSize(backbone=SIZES["XL"], head=wide_head()),
        class_dropout=0.1,
        time_law="uniform",
        train=TrainConfig(
            steps=EPOCHS * EPOCH,
            batch_size=BATCH,
            micro_batch="auto",
            precision="tf32",
            compile=True,
            checkpoint_every=EPOCH,
        ),
        optim=OptimConfig(
            lr=2e-4, final_lr=2e-5, warmup_steps=40 * EPOCH, decay="linear", decay_end=EPOCHS * EPOCH, clip=1.0
        ),
        ema=(0.9995,),
    )
