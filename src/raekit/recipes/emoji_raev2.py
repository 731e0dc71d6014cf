"""Stage 2 on the built-in emoji as RAE v2 does it: conditioning in context, predicted data, base output.

Reproduces:     docs/results/raev2.md, beside emoji_dit_dh at equal training compute
Command:        raekit train emoji_raev2 --train.compile
Cost:           192 MFLOPs forward an image, where emoji_dit_dh has 189; as many images
Last verified:  2026-11-23, 2,000 steps, three seeds, 500 samples: fd_vit_tiny 2.91 unguided, 2.65 with
                internal:1.78@0.1-1.0 (emoji_dit_dh 2.50 unguided)

AdamW, not RAE v2's Muon: torch's Muon multiplies in bfloat16, and on CPUs that emulate it 3 images/s are left of 73.
One block less than emoji_dit_dh, and 3 tokens of time and class rather than 12, since an image here has but 16 tokens.
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
        positions=False,
        context=ContextConfig(time_tokens=1, label_tokens=2),
        base_depth=2,
    )
    return replace(base, denoiser=denoiser)
