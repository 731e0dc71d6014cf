"""Stage 1 of RAE v2 on ImageNet 256: ViT-XL decoder for DINOv3-L, K = 1, only the last block.

Reproduces:     rFID 0.60, PSNR 18.9 dB, with tau = 0.8 (RAE v2)
Command:        torchrun --nproc-per-node 8 -m raekit -- train dinov3l_k1_decoder_xl --data.source folder:imagenet
Size:           416 M parameters
Memory:         7.8 GiB of state, 0.64 GiB an image
Cost:           16 epochs, 0.8 days on one H100 (estimated from FLOPs, at 35 % in bf16), and the encoder
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.
"""

from dataclasses import replace

from raekit.models.registry import LAYERS
from raekit.recipes import dinov3l_k7_decoder_xl
from raekit.stages.reconstruction import ReconstructionConfig


def config() -> ReconstructionConfig:
    return replace(dinov3l_k7_decoder_xl.config(), layers=LAYERS["k1"])
