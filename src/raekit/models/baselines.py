"""The latent spaces that the paper compares with RAE: a VAE's latents and raw pixels (tables 10 and 11)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from raekit import artifacts
from raekit.config import check_sizes, configclass
from raekit.distributed import World
from raekit.errors import UserError
from raekit.hub import download, how_to_fetch
from raekit.models.checks import check_images
from raekit.models.latent_space import LatentSpace
from raekit.models.precision import check_dtype
from raekit.models.registry import absolute
from raekit.weights import fingerprint, rounded

MAX_SIDE = 4096
"""The largest image of a baseline in pixels. Statistics of pixels take 24 bytes for each pixel."""


@configclass
class BaselineConfig:
    """A latent space without a representation encoder.

    Attributes:
        baseline: "pixels", or "vae:WHERE". WHERE is the folder or the Hub repository OWNER/NAME of a diffusers
            AutoencoderKL.
        image_size: Side of the square images in pixels.
        weights: A fingerprint of the VAE's weights. Loading fails for other weights. None: not known.
    """

    baseline: str
    image_size: int = 256
    weights: str | None = None

    def __post_init__(self) -> None:
        kind, _, where = self.baseline.partition(":")
        if self.baseline != "pixels" and kind != "vae":
            raise UserError(f"autoencoder.baseline: {self.baseline!r} is unknown; use pixels or vae:WHERE")
        if kind == "vae" and not where:
            raise UserError("autoencoder vae: no weights are named; write for example vae:stabilityai/sd-vae-ft-ema")
        check_sizes("autoencoder", limit=MAX_SIDE, image_size=self.image_size)

    @classmethod
    def named(cls, name: str) -> Self | None:
        """Return the config for a name `pixels[@SIZE]` or `vae:WHERE[@SIZE]`, and None for any other name."""
        place, _, size = name.rpartition("@")
        if not (place and size.isdecimal()):
            place, size = name, "256"
        if place != "pixels" and not place.startswith("vae:"):
            return None
        # Python converts at most 4,300 digits.
        return cls(baseline=place, image_size=int(size) if len(size) < 10 else 10**9)


@configclass
class VAESize:
    """The size of a VAE.

    Attributes:
        channels: Channels of the latent.
        widths: Channels of each level, multiples of 32. Each level has half the resolution of the level before it, so
            the first has the image's, and the last has the latent's.
        layers: Residual blocks of a level in the encoder. The decoder has one more.
    """

    channels: int = 16
    widths: tuple[int, ...] = (64, 128, 256, 256)
    layers: int = 1

    def __post_init__(self) -> None:
        check_sizes("vae", channels=self.channels, layers=self.layers)
        if not self.widths or any(width < 32 or width % 32 for width in self.widths):
            raise UserError(f"vae.widths: {self.widths} must be multiples of 32")


class VAE(nn.Module):
    """A VAE to train: diffusers' AutoencoderKL, with the noise of the posterior as an input."""

    def __init__(self, size: VAESize, image_size: int) -> None:
        """Build a VAE with random weights.

        Raises:
            UserError: If diffusers is not installed, or the image size does not fit.
        """
        super().__init__()
        levels = len(size.widths)
        factor = 2 ** (levels - 1)
        if image_size % factor:
            raise UserError(
                f"data.image_size: {image_size} must be a multiple of {factor}, for vae.widths {size.widths}"
            )
        self.size, self.image_size = size, image_size
        self.latent_shape = (size.channels, image_size // factor, image_size // factor)
        self.vae = _autoencoder_kl("a VAE")(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=size.widths,
            layers_per_block=size.layers,
            latent_channels=size.channels,
            sample_size=image_size,
            scaling_factor=1.0,
        )

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images, sample from their posterior, and decode the sample.

        Args:
            images: Images (B, 3, S, S) in [0, 1].
            noise: Standard normal noise (B, C, h, w).

        Returns:
            The decoded images (B, 3, S, S), not clamped, and the Kullback-Leibler divergence (B,) of each posterior
            from a standard normal, in nats.
        """
        posterior = self.vae.encode(2 * images - 1).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return (decoded.float() + 1) / 2, posterior.kl().float()

    def baseline(self) -> "Baseline":
        """Return a frozen copy as a latent space. If the VAE is sharded, call this inside `gathered`."""
        state = dict(self.named_parameters()) | dict(self.named_buffers())  # `state_dict` would shard them again
        copy = self._copy(state).to(next(self.parameters()).device)
        return Baseline(BaselineConfig(baseline="vae:in memory", image_size=self.image_size), copy.vae)

    def complete(self) -> "VAE":
        """Return a frozen copy on the CPU with the complete weights, also of a sharded VAE. All processes call this."""
        from raekit.distributed.sharding import full_state

        return self._copy(full_state(self))

    def finished(self, images: Iterable[Tensor]) -> Any:
        """Return the AutoencoderKL, with the shift and the scale of the latents of `images` in its config.

        Args:
            images: Batches of images (B, 3, S, S) in [0, 1], on the device of the VAE.
        """
        latents = torch.cat([self.vae.encode(2 * batch - 1).latent_dist.mean for batch in images])
        self.vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
        return self.vae

    def _copy(self, state: Mapping[str, Tensor]) -> "VAE":
        """Return a frozen VAE on the CPU with the weights `state`."""
        copy = VAE(self.size, self.image_size).eval().requires_grad_(False)
        copy.load_state_dict(state)
        return copy


class Baseline(LatentSpace):
    """Raw pixels or a VAE as a latent space.

    The latents of pixels are the pixels themselves in [-1, 1], (3, H, W). The latents of a VAE are the mean of its
    posterior, shifted and scaled as its config.json says. All weights are frozen, and encoding draws no samples.
    """

    config: BaselineConfig
    encoder: nn.Module
    decoder: nn.Module

    def __init__(
        self,
        config: BaselineConfig,
        vae: Any = None,
        dtype: torch.dtype = torch.float32,
        encoder_dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap `vae`, a diffusers AutoencoderKL; without a VAE the latents are the pixels."""
        check_dtype(dtype)
        channels, factor = 3, 1
        if vae:
            channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
        if config.image_size % factor:
            raise UserError(f"{config.baseline}: the image size {config.image_size} must be a multiple of {factor}")
        super().__init__((channels, config.image_size // factor, config.image_size // factor))
        self.config = config
        self.dtype, self.encoder_dtype = dtype, encoder_dtype or dtype
        self.encoder = _sequence(vae and vae.encoder, vae and vae.quant_conv).to(self.encoder_dtype)
        self.decoder = _sequence(vae and vae.post_quant_conv, vae and vae.decoder).to(dtype)
        if vae:
            shift = vae.config.shift_factor
            ones = torch.ones(self.latent_shape)
            self.set_statistics(shift * ones if shift else None, ones / vae.config.scaling_factor**2)
        self.requires_grad_(False).eval()

    @classmethod
    def load(
        cls, config: BaselineConfig, dtype: torch.dtype = torch.float32, encoder_dtype: torch.dtype | None = None
    ) -> Self:
        """Load the baseline of `config`.

        Raises:
            UserError: If weights are missing or damaged, or if diffusers is not installed.
        """
        vae = None if config.baseline == "pixels" else _read_vae(config.baseline.removeprefix("vae:"))
        model = cls(config, vae, dtype, encoder_dtype)
        if config.weights and config.weights != model.weights:
            raise UserError(
                f"{config.baseline}: its weights are not the weights that the model was made with; put the original "
                "weights back, or name them as `baseline` in autoencoder/config.json of the model"
            )
        return model

    def save(self, folder: str | Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/autoencoder. The artifact names the weights and does not contain them."""
        config = replace(self.config, baseline=absolute(self.config.baseline), weights=self.weights)
        target = Path(folder) / "autoencoder"
        artifacts.write(
            target,
            "autoencoder",
            config,
            nn.Module(),
            world or World(),
            dtype=dtype,
            trained_on=self.trained_on,
        )

    @cached_property
    def weights(self) -> str | None:
        """A fingerprint of the VAE's weights, the same in float32 and in bfloat16; None for pixels."""
        return None if self.config.baseline == "pixels" else fingerprint(rounded(self.state_dict()))

    @property
    def image_shape(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    @property
    def encoder_facts(self) -> tuple[object, ...]:
        return (self.config.image_size,)

    def compile_encoder(self) -> None:
        self.encoder.compile()

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            moments = self.encoder((2 * images - 1).to(self.encoder_dtype))
        return moments[:, : self.latent_shape[0]]  # a VAE returns the mean, then the log-variance

    def pixels(self, tokens: Tensor) -> Tensor:
        return (self.decoder(tokens.to(self.dtype)).float() + 1) / 2


def _sequence(*modules: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(*(module for module in modules if module is not None))


def _autoencoder_kl(what: str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(f"{what}: diffusers is not installed; pip install 'raekit[vae]'") from None
    return AutoencoderKL


def _read_vae(where: str) -> Any:
    cls = _autoencoder_kl(f"vae:{where}")
    if Path(where).is_absolute() and not Path(where).is_dir():
        raise UserError(
            f"vae:{where}: no such folder; if the VAE of a model was moved, write its new folder as `baseline` into "
            "autoencoder/config.json of the model"
        )
    advice = how_to_fetch(where, f"vae:{where}")
    folder = (
        where if Path(where).is_dir() else download(where, ["config.json", "diffusion_pytorch_model*.safetensors*"])
    )
    try:
        loaded: Any = cls.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # otherwise it logs that accelerate is missing
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises many types for missing, truncated or foreign files
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0][:200]}"
        raise UserError(f"vae:{where}: could not be loaded ({reason}); {advice}") from error
    vae, found = loaded
    if missing := sorted(found["missing_keys"]):  # diffusers fills missing tensors with random numbers
        raise UserError(f"vae:{where}: missing {', '.join(missing[:8])}; {advice}")
    if vae.config.latents_mean or vae.config.latents_std:
        raise UserError(
            f"vae:{where}: its config.json sets latents_mean or latents_std, which are not supported; use another VAE"
        )
    return vae
