"""Stage 2 on the built-in emoji as RAE v2 does it: conditioning in context, predicted data, base output.

Reproduces:     nothing yet; to be compared with emoji_dit_dh at equal training compute
Command:        raekit train emoji_raev2 --train.compile
Cost:           192 MFLOPs forward an image, where emoji_dit_dh has 189; as many images
Last verified:  never

AdamW, not RAE v2's Muon: torch's Muon multiplies in bfloat16, and on CPUs that emulate it 3 images/s are left of 73.
One block less than emoji_dit_dh, and 3 tokens of time and class rather than 12, since an image here has but 16 tokens.
"""

from dataclasses import replace

from raekit.models.denoiser import ContextConfig
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
