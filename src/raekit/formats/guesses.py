"""Describe what a state dict looks like, for error messages about a wrong file."""

from raekit.errors import UserError
from raekit.formats.decoder_keys import DECODERS, decoder_part, decoder_sizes
from raekit.formats.denoiser_shapes import denoiser_arguments
from raekit.formats.states import State
from raekit.models.denoiser_config import SIZES


def guess(state: State) -> str:
    """Return a phrase for what a state dict looks like, such as "an encoder". Empty if nothing known matches."""
    state = decoder_part(state)
    if denoiser := _denoiser(state):
        return denoiser
    for key, kind in _KINDS.items():
        if key in state:
            return kind
    if not (sizes := decoder_sizes(state)):
        return ""
    named = (name for name, size in DECODERS.items() if all(sizes.get(k, v) == v for k, v in size.items()))
    size = next(named, f"width-{sizes['width']}, {sizes['depth']}-layer")
    tokens = f", {sizes['tokens']} tokens" if "tokens" in sizes else ""
    return f"a {size} decoder for {sizes['token_dim']} channels{tokens}, patches of {sizes['patch_size']} pixels"


_KINDS = {
    "decoder_layers.0.attention.to_q.weight": "the weights of diffusers' AutoencoderRAE: give their folder",
    "x_embedder.proj.weight": "a denoiser (stage 2)",
    "blocks.0.attention.qkv.weight": "raekit weights: give their folder",
    "blocks.0.attn.qkv.weight": "a vision transformer, such as the discriminator's backbone",
    "embeddings.cls_token": "an encoder",
    "var": "latent statistics",
}


def _denoiser(state: State) -> str:
    try:
        values = denoiser_arguments(state)
    except UserError:
        return ""
    if not values:
        return ""
    widths, depths = ((v if isinstance(v, tuple) else (v,)) for v in (values["hidden_size"], values["depth"]))
    size = next((name for name, s in SIZES.items() if (s.width, s.depth) == (widths[0], depths[0])), "")
    kind = ("denoiser of RAE v2" if "num_t_tokens" in values else "DiT^DH") if len(widths) == 2 else "DiT"
    parts = ", head ".join(f"{depth} x {width}" for width, depth in zip(widths, depths, strict=True))
    latent = f"{values['in_channels']}x{values['input_size']}x{values['input_size']}"
    return f"a {kind}{f'-{size}' if size else ''} ({parts}) for latents {latent} of {values['num_classes']} classes"
