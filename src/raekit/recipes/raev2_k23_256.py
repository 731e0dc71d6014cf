"""Stage 2 of RAE v2 on ImageNet 256: 23 layers of DINOv3-L, and all else as in raev2_k7_256.

Reproduces:     FID 3.01 unguided (RAE v2, ImageNet 256, 80 epochs)
Command:        torchrun --nproc-per-node 8 -m raekit -- train raev2_k23_256 --data.source folder:imagenet
Size:           875 M parameters
Memory:         13.1 GiB of state, 0.85 GiB an image
Cost:           80 epochs, 4.9 days on one H100 (estimated from FLOPs, at 35 % in bf16), and the encoder
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.
"""

from dataclasses import replace

from raekit.recipes import raev2_k7_256
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    return replace(raev2_k7_256.config(), autoencoder="raev2-dinov3-l-k23")
