"""Stage 2 of RAE v2 on ImageNet 256: seven layers of DINOv3-L, in-context conditioning, data prediction, base output.

Reproduces:     FID 1.65 unguided, 1.06 with internal:1.78@0.1-1 (RAE v2, ImageNet 256, 80 epochs)
Command:        torchrun --nproc-per-node 8 -m raekit -- train raev2_k7_256 --data.source folder:imagenet
Size:           875 M parameters
Memory:         13.1 GiB of state, 0.85 GiB an image
Cost:           80 epochs, 4.9 days on one H100 (estimated from FLOPs, at 35 % in bf16), and the encoder
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.

The model has 875 M parameters and a backbone of width 1440, as released. The paper gives a width of 1152 and 839 M
parameters; this implementation has 620 M at that width. The figures come from sampling with 100 Euler steps.

Muon treats the query, key and value matrices as one matrix, and the two input matrices of SwiGLU as another. The
published optimizer treats them as five separate matrices.
"""

from dataclasses import replace

from raekit.models.denoiser_config import ContextConfig, TransformerConfig
from raekit.recipes import dit_dh_xl_dinov2b_256
from raekit.recipes.dit_dh_xl_dinov2b_256 import EPOCH
from raekit.stages.generation import GenerationConfig
from raekit.training.optim import OptimConfig

EPOCHS = 80


def config() -> GenerationConfig:
    base = dit_dh_xl_dinov2b_256.config()
    return replace(
        base,
        autoencoder="raev2-dinov3-l-k7",
        denoiser=replace(
            base.denoiser,
            backbone=TransformerConfig(width=1440, depth=28, heads=20),
            qk_norm=True,
            positions="none",
            context=ContextConfig(),
            base_depth=8,
            prediction="data",
        ),
        time_law="logit-normal",
        train=replace(base.train, steps=EPOCHS * EPOCH, precision="bf16"),
        optim=OptimConfig(
            method="muon",
            momentum=0.95,
            lr=2e-4,
            final_lr=2e-5,
            warmup_steps=25 * EPOCH,
            decay="linear",
            decay_end=50 * EPOCH,
            clip=1.0,
        ),
    )
