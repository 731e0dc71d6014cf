"""Representation Autoencoders: image generation in the latent space of a frozen, pretrained vision encoder.

Images are float tensors (B, 3, H, W) in [0, 1], latents (B, C, h, w) whitened per element. Time runs from
0 (data) to 1 (noise).
"""

__version__ = "0.1.0"

from raekit.conversion import convert
from raekit.errors import UserError
from raekit.flow.guidance import Guidance
from raekit.inference import Model, Sampling, generate, load, reconstruct
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser import Denoiser
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
    "load",
    "reconstruct",
]
