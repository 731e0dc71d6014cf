"""Stage 2 of RAE v2 on the built-in emoji: in-context conditioning, data prediction, base output.

Reproduces:     nothing yet: a comparison with emoji_dit_dh at equal training compute
Command:        raekit train emoji_raev2 --train.compile
Size:           5.6 M parameters
Memory:         0.4 GiB
Cost:           about as long as emoji_dit_dh: 712 MFLOPs per image in the forward pass, against 699
Last verified:  not with these 8 x 8 tokens

The optimizer is AdamW instead of RAE v2's Muon, as in emoji_dit_dh.

The denoiser has 3 instead of 12 tokens for time and class, because an image has only 64 tokens here.
"""

from dataclasses import replace

from raekit.models.denoiser_config import ContextConfig
from raekit.recipes import emoji_dit_dh
from raekit.stages.generation import GenerationConfig


def config() -> GenerationConfig:
    base = emoji_dit_dh.config()
    context = ContextConfig(time_tokens=1, label_tokens=2)
    return replace(base, denoiser=replace(base.denoiser, positions="none", context=context))
