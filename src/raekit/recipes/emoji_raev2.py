"""Stage 2 of RAE v2 on the built-in emoji: in-context conditioning, data prediction, base output.

Reproduces:     docs/results/raev2.md, compared with emoji_dit_dh at equal training compute
Command:        raekit train emoji_raev2 --train.compile
Cost:           192 MFLOPs per image in the forward pass (emoji_dit_dh: 189), with the same number of images
Last verified:  2026-11-23, 2,000 steps, three seeds, 500 samples: fd_vit_tiny 2.91 unguided, 2.65 with
                internal:1.78@0.1-1.0 (emoji_dit_dh: 2.50 unguided)

The optimizer is AdamW instead of RAE v2's Muon. torch's Muon multiplies in bfloat16, and a CPU that emulates bfloat16
then trains at 3 images/s instead of 73.

The denoiser has one block less than emoji_dit_dh. It has 3 instead of 12 tokens for time and class, because an image
has only 16 tokens here.
"""

from dataclasses import replace

from raekit.models.denoiser_config import ContextConfig
from raekit.recipes import emoji_dit_dh
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    base = emoji_dit_dh.config()
    denoiser = replace(
        base.denoiser,
        backbone=replace(base.denoiser.backbone, depth=base.denoiser.backbone.depth - 1),
        positions="none",
        context=ContextConfig(time_tokens=1, label_tokens=2),
        base_depth=2,
    )
    return replace(base, denoiser=denoiser)
