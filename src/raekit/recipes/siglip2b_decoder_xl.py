"""Stage 1 on ImageNet 256: ViT-XL decoder for SigLIP2-B.

Reproduces:     no figure is published for tau = 0.8, which the released decoder uses; rFID 0.53 without noise
                (--noise 0; paper, table 1a)
Command:        torchrun --nproc-per-node 8 -m raekit -- train siglip2b_decoder_xl --data.source folder:imagenet
Size:           415 M parameters
Memory:         7.8 GiB of state, 0.64 GiB an image
Cost:           16 epochs, 0.8 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.
"""

from dataclasses import replace

from raekit.recipes import dinov2b_decoder_xl
from raekit.stages.reconstruction import ReconstructionConfig


def config() -> ReconstructionConfig:
    base = dinov2b_decoder_xl.config()
    return replace(base, encoder="siglip2-b")
