"""Stage 1 on ImageNet 512: ViT-XL decoder for DINOv2-B at 448 pixels, 1024 tokens.

Reproduces:     rFID 0.53 (paper, table 9)
Command:        torchrun --nproc-per-node 8 -m raekit -- train dinov2b_512_direct --data.source folder:imagenet
Size:           415 M parameters
Memory:         7.8 GiB of state, 2.72 GiB an image
Cost:           16 epochs, 2.8 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.
"""

from dataclasses import replace

from raekit.recipes import dinov2b_decoder_xl
from raekit.stages.reconstruction import ReconstructionConfig


def config() -> ReconstructionConfig:
    base = dinov2b_decoder_xl.config()
    return replace(base, encoder_size=448, data=replace(base.data, image_size=512))
