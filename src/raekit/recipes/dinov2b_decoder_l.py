"""Stage 1 on ImageNet 256: ViT-L decoder for DINOv2-B with registers.

Reproduces:     rFID 0.50, without noise (paper, table 1b)
Command:        torchrun --nproc-per-node 8 -m raekit -- train dinov2b_decoder_l --data.source folder:imagenet
Size:           304 M parameters
Memory:         5.8 GiB of state, 0.56 GiB an image
Cost:           16 epochs, 0.7 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.
"""

from dataclasses import replace

from raekit.recipes import dinov2b_decoder_xl
from raekit.stages.reconstruction import ReconstructionConfig


def config() -> ReconstructionConfig:
    base = dinov2b_decoder_xl.config()
    return replace(base, noise=0.0, decoder=replace(base.decoder, width=1024, depth=24, heads=16, hidden=4096))
