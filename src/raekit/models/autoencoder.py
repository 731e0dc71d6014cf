"""The representation autoencoder: frozen encoder, whitening, trained decoder (spec 1.1, 1.3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from raekit import artifacts
from raekit.config import configclass, from_dict
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.encoders import Encoder, LayersConfig, Size, ViT, load_encoder
from raekit.models.layers import to_grid
from raekit.weights import check_fit, load_strict

VARIANCE_EPS = 1e-5

Output = Literal["encoder-colours", "pixels"]


@configclass
class AutoencoderConfig:
    """`encoder` is a name as `load_encoder` takes it, `encoder_size` what it resizes images to, `layers` its latent.

    `output` is what the decoder gives: colours normalised by the encoder's mean and standard deviation (RAE v1),
    or pixels in [0, 1] (RAE v2, spec II.2).
    """

    encoder: str
    encoder_size: Size | None = None
    layers: LayersConfig = LayersConfig()
    decoder: DecoderConfig
    output: Output = "encoder-colours"


class Autoencoder(nn.Module):
    """Images to whitened latents and back.

    The statistics `mean` (None if it is not used: scale-only whitening) and `var`, both (C, H, W), are
    zeros and ones until `set_statistics` is called.
    """

    mean: Tensor | None
    var: Tensor

    def __init__(self, config: AutoencoderConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = Decoder(config.decoder)
        shape = (encoder.spec.width, *encoder.grid)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))

    @classmethod
    def load(cls, name: str, encoder_dtype: torch.dtype = torch.float32) -> Self:
        """Load a published name (`raekit.conversion.releases`), `builtin:NAME`, a model folder, a run, or OWNER/NAME
        on the Hub; UserError if it is not whole.

        The encoder computes in `encoder_dtype`, float32 or bfloat16.
        """
        path, values = artifacts.find(name, "autoencoder")
        config, state = from_dict(AutoencoderConfig, values, path / "config.json"), artifacts.read(path)
        check_fit(lambda: Decoder(config.decoder), state, path)
        own = path.parent / "encoder"
        source = str(own) if own.is_dir() else config.encoder
        encoder = load_encoder(source, config.encoder_size, config.layers, encoder_dtype)
        statistics = artifacts.read_statistics(path / artifacts.STATISTICS, (encoder.spec.width, *encoder.grid))
        return cls.build(config, encoder, state, statistics, path)

    @classmethod
    def build(
        cls,
        config: AutoencoderConfig,
        encoder: Encoder,
        decoder: Mapping[str, Tensor],
        statistics: tuple[Tensor | None, Tensor],
        source: object,
    ) -> Self:
        """The autoencoder with the weights `decoder` and (mean or None, var); UserError, naming the weights' `source`,
        if they do not fit.
        """
        model = cls(config, encoder)
        load_strict(model.decoder, decoder, source)
        model.set_statistics(*statistics)
        return model.eval()

    def save(self, folder: Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/autoencoder (and FOLDER/encoder, for an encoder from a local folder), for `load`."""
        world = world or World()
        statistics = {"var": self.var} | ({} if self.mean is None else {"mean": self.mean})
        target = folder / "autoencoder"
        artifacts.write(target, "autoencoder", self.config, self.decoder, world, dtype=dtype, statistics=statistics)
        if isinstance(self.encoder.model, ViT) and Path(self.encoder.name).is_dir():
            exact = self.encoder.dtype == torch.float32  # else the weights were rounded as they were read
            (self.encoder if exact else load_encoder(self.encoder.name)).save(folder, world, dtype)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.encoder.spec.width, *self.encoder.grid)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the decoded images in pixels."""
        height, width = self.config.decoder.grid
        return (height * self.config.decoder.patch_size, width * self.config.decoder.patch_size)

    @property
    def image_size(self) -> int:
        """Side of the decoded images in pixels; UserError if they are not square."""
        height, width = self.image_shape
        if height != width:
            raise UserError(f"this autoencoder gives images of {height} x {width} pixels; this needs square ones")
        return height

    def set_statistics(self, mean: Tensor | None, var: Tensor) -> None:
        """Whiten by these, each (C, H, W), from now on. A mean of None stays None: nothing is subtracted."""
        self.mean = None if mean is None else mean.to(self.var)
        self.var = var.to(self.var)

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the encoder's latents (B, C, h, w), not whitened."""
        return to_grid(self.encoder(images), self.encoder.grid)

    def whiten(self, latents: Tensor) -> Tensor:
        centred = latents if self.mean is None else latents - self.mean
        return centred / (self.var + VARIANCE_EPS).sqrt()

    def unwhiten(self, latents: Tensor) -> Tensor:
        scaled = latents * (self.var + VARIANCE_EPS).sqrt()
        return scaled if self.mean is None else scaled + self.mean

    def to_pixels(self, decoded: Tensor) -> Tensor:
        """The decoder's output as pixels; about [0, 1], not clamped."""
        if self.config.output == "pixels":
            return decoded.float()
        return decoded.float() * self.encoder.std + self.encoder.mean

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> whitened latents (B, C, h, w). Adds no noise."""
        return self.whiten(self.tokens(images).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Whitened latents (B, C, h, w) -> images (B, 3, *image_shape) in [0, 1]."""
        return self.to_pixels(self.decoder(self.unwhiten(latents))).clamp(0, 1)
