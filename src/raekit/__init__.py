"""Representation Autoencoders: image generation in the latent space of a frozen, pretrained vision encoder.

Images are float tensors (B, 3, H, W) in [0, 1], latents (B, C, h, w) whitened per element. Time runs from
0 (data) to 1 (noise).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from raekit import hub

__version__ = "0.1.0"

if TYPE_CHECKING:
    from raekit.errors import UserError
    from raekit.evaluation.evaluate import evaluate
    from raekit.flow.guidance import Guidance
    from raekit.flow.sampling import Sampling
    from raekit.formats.conversion import convert
    from raekit.inference.catalogue import list_encoders, list_models
    from raekit.inference.generation import generate, images_to_noise, noise_to_images
    from raekit.inference.latents import read_latents
    from raekit.inference.model import Model, load, reconstruct
    from raekit.inference.pipeline import Pipeline
    from raekit.models.autoencoder import Autoencoder
    from raekit.models.denoiser import Denoiser
    from raekit.recipes import train

__all__ = [
    "Autoencoder",
    "Denoiser",
    "Guidance",
    "Model",
    "Pipeline",
    "Sampling",
    "UserError",
    "__version__",
    "convert",
    "evaluate",
    "generate",
    "images_to_noise",
    "list_encoders",
    "list_models",
    "load",
    "noise_to_images",
    "read_latents",
    "reconstruct",
    "train",
]

# Imported on first use: torch takes seconds to import, and `raekit --help` does not need it.
_HOMES = {
    "Autoencoder": "raekit.models.autoencoder",
    "Denoiser": "raekit.models.denoiser",
    "Guidance": "raekit.flow.guidance",
    "Model": "raekit.inference.model",
    "Pipeline": "raekit.inference.pipeline",
    "Sampling": "raekit.flow.sampling",
    "UserError": "raekit.errors",
    "convert": "raekit.formats.conversion",
    "evaluate": "raekit.evaluation.evaluate",
    "generate": "raekit.inference.generation",
    "images_to_noise": "raekit.inference.generation",
    "list_encoders": "raekit.inference.catalogue",
    "list_models": "raekit.inference.catalogue",
    "load": "raekit.inference.model",
    "noise_to_images": "raekit.inference.generation",
    "read_latents": "raekit.inference.latents",
    "reconstruct": "raekit.inference.model",
    "train": "raekit.recipes",
}


def _published() -> hub.Published:
    from raekit.formats import releases

    return releases


hub.published = _published


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'raekit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
