"""Stage 1 on ImageNet 512: ViT-XL decoder with 32-pixel patches, from the same 256 tokens as for 256 pixels.

Reproduces:     rFID 0.97 (paper, table 9); a denoiser for 256 pixels works without changes
Command:        torchrun --nproc-per-node 8 -m raekit -- train dinov2b_512_upsample --data.source folder:imagenet
Size:           418 M parameters
Memory:         7.9 GiB of state, 1.31 GiB an image
Cost:           16 epochs, 1.2 days on one H100 (estimated from FLOPs, at 35 % in bf16)
Last verified:  never at this scale (no ImageNet, no GPUs); the parts agree with the reference cases.
"""

from dataclasses import replace

from raekit.recipes import dinov2b_decoder_xl
from raekit.stages.reconstruction import ReconstructionConfig


def config() -> ReconstructionConfig:
    base = dinov2b_decoder_xl.config()
    return replace(base, data=replace(base.data, image_size=512), decoder=replace(base.decoder, patch_size=32))
