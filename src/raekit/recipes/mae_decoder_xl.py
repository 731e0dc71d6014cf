"""Stage 1 on ImageNet 256: ViT-XL decoder for MAE-B.

Reproduces:     rFID 0.16, without noise (paper, table 1a); the released decoder has tau = 0.8, as here
Command:        torchrun --nproc-per-node 8 -m raekit -- train mae_decoder_xl --data.source folder:imagenet
Cost:           16 epochs, 107 GFLOPs forward an image
Last verified:  never at this scale, for want of ImageNet and GPUs; the parts agree with the reference cases.
"""

from dataclasses import replace

from raekit.recipes import dinov2b_decoder_xl
from raekit.stages.reconstruction import ReconstructionConfig


def config() -> ReconstructionConfig:
    base = dinov2b_decoder_xl.config()
    return replace(base, encoder="mae-b")
