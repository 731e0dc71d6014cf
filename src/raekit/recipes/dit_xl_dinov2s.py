"""Stage 2 on ImageNet 256: plain DiT-XL for the latents of DINOv2-S, which are narrow enough for it.

Reproduces:     FID 1.87 unguided, 1.41 guided (paper, table 8); 3.50 unguided after 80 epochs
Prepare:        raekit latents measure dinov2-s --source folder:imagenet --mirror --out dinov2-s.safetensors
                hf download nyu-visionx/RAE-collections decoders/dinov2/wReg_small/ViTXL_n08/model.pt --local-dir .
                raekit convert decoders/dinov2/wReg_small/ViTXL_n08/model.pt runs/rae-dinov2-s --encoder dinov2-s \\
                    --statistics dinov2-s.safetensors
Command:        torchrun --nproc-per-node 8 -m raekit -- train dit_xl_dinov2s --data.source folder:imagenet
Size:           676 M parameters
Memory:         12.6 GiB of state, 0.81 GiB an image (0.04 GiB with train.checkpointing)
Cost:           800 epochs, 24 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.

No latent statistics are published for DINOv2-S. They have to be measured, and differ from the statistics that the paper
used.
"""

from dataclasses import replace

from raekit.recipes import dit_dh_xl_dinov2b_256
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    base = dit_dh_xl_dinov2b_256.config()
    return replace(
        base,
        autoencoder="runs/rae-dinov2-s",
        denoiser=replace(base.denoiser, head=None),
        optim=replace(base.optim, warmup_steps=0, decay="constant"),
        ema=(0.9999,),
    )
