"""Representation Autoencoders: image generation in the latent space of a frozen, pretrained vision encoder.

Images are float tensors (B, 3, H, W) in [0, 1], latents (B, C, h, w) whitened per element. Time runs from
0 (data) to 1 (noise).
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from raekit.conversion import convert
    from raekit.errors import UserError
    from raekit.flow.guidance import Guidance
    from raekit.inference import Model, generate, images_to_noise, load, noise_to_images, reconstruct
    from raekit.latents import read_latents
    from raekit.models.autoencoder import Autoencoder
    from raekit.models.denoiser import Denoiser
    from raekit.sampling import Sampling
    from raekit.scoring import score as evaluate

__all__ = [
    "Autoencoder",
    "Denoiser",
    "Guidance",
    "Model",
    "Sampling",
    "UserError",
    "__version__",
    "convert",
    "evaluate",
    "generate",
    "images_to_noise",
    "load",
    "noise_to_images",
    "read_latents",
    "reconstruct",
]

# Imported when they are asked for: torch takes seconds, and `raekit --help` needs none of it.
_HOMES = {
    "Autoencoder": "raekit.models.autoencoder",
    "Denoiser": "raekit.models.denoiser",
    "Guidance": "raekit.flow.guidance",
    "Model": "raekit.inference",
    "Sampling": "raekit.sampling",
    "UserError": "raekit.errors",
    "convert": "raekit.conversion",
    "evaluate": "raekit.scoring:score",
    "generate": "raekit.inference",
    "images_to_noise": "raekit.inference",
    "load": "raekit.inference",
    "noise_to_images": "raekit.inference",
    "read_latents": "raekit.latents",
    "reconstruct": "raekit.inference",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'raekit' has no attribute {name!r}")
    if name != "UserError":
        import_module("raekit.conversion")  # enters the published names, for everything that loads by name
    module, _, other = _HOMES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), other or name)
    return value


def __dir__() -> list[str]:
    return __all__
