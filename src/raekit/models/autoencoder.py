"""The representation autoencoder: frozen encoder, whitening, trained decoder (spec 1.1, 1.3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from raekit import artifacts
from raekit.config import configclass, from_dict, to_dict
from raekit.distributed import World
from raekit.models.baselines import Baseline, BaselineConfig
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.latent_space import LatentSpace
from raekit.models.layers import to_grid
from raekit.models.registry import LayersConfig, Size
from raekit.models.vit import ViT
from raekit.weights import check_fit, load_strict

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


class Autoencoder(LatentSpace):
    """Images to whitened latents and back, by a frozen encoder and a trained decoder."""

    config: AutoencoderConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: AutoencoderConfig, encoder: Encoder) -> None:
        super().__init__((encoder.spec.width, *encoder.grid))
        self.config = config
        self.encoder = encoder
        self.encoder_dtype = encoder.dtype
        self.decoder = Decoder(config.decoder)

    @classmethod
    def load(cls, name: str, encoder_dtype: torch.dtype = torch.float32) -> Self:
        """Load a published name (`raekit.formats.releases`), `builtin:NAME`, a model folder, a run, or OWNER/NAME
        on the Hub; UserError if it is not whole.

        The encoder computes in `encoder_dtype`, float32 or bfloat16.
        """
        found = artifacts.find(name, "autoencoder")
        path = found.path
        config, state = from_dict(AutoencoderConfig, found.config, path / "config.json"), artifacts.read(path)
        check_fit(lambda: Decoder(config.decoder), state, path)
        own = path.parent / "encoder"
        source = str(own) if own.is_dir() else config.encoder
        encoder = load_encoder(source, config.encoder_size, config.layers, encoder_dtype)
        statistics = artifacts.read_statistics(path / artifacts.STATISTICS, (encoder.spec.width, *encoder.grid))
        model = cls.build(config, encoder, state, statistics, path)
        model.trained_on = found.trained_on
        return model

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
        artifacts.write(
            target,
            "autoencoder",
            self.config,
            self.decoder,
            world,
            dtype=dtype,
            trained_on=self.trained_on,
            statistics=statistics,
        )
        if isinstance(self.encoder.model, ViT) and Path(self.encoder.name).is_dir():
            exact = self.encoder.dtype == torch.float32  # else the weights were rounded as they were read
            (self.encoder if exact else load_encoder(self.encoder.name)).save(folder, world, dtype)

    @property
    def image_shape(self) -> tuple[int, int]:
        height, width = self.config.decoder.grid
        return (height * self.config.decoder.patch_size, width * self.config.decoder.patch_size)

    @property
    def encoder_facts(self) -> tuple[object, ...]:
        encoder = self.encoder
        return (encoder.input_size, encoder.spec.mean, encoder.spec.std, to_dict(encoder.layers))

    def compile_encoder(self) -> None:
        self.encoder.compile()

    def tokens(self, images: Tensor) -> Tensor:
        return to_grid(self.encoder(images), self.encoder.grid)

    def pixels(self, tokens: Tensor) -> Tensor:
        return self.to_pixels(self.decoder(tokens))

    def to_pixels(self, decoded: Tensor) -> Tensor:
        """The decoder's output as pixels; about [0, 1], not clamped."""
        if self.config.output == "pixels":
            return decoded.float()
        return decoded.float() * self.encoder.std + self.encoder.mean


def load_autoencoder(name: str, encoder_dtype: torch.dtype = torch.float32) -> LatentSpace:
    """As `Autoencoder.load`, and the baselines `pixels` and `vae:WHERE`, @SIZE after them for another size than 256."""
    if config := BaselineConfig.named(name):
        return Baseline.load(config, encoder_dtype)
    found = artifacts.find(name, "autoencoder")
    if "baseline" in found.config:
        return Baseline.load(from_dict(BaselineConfig, found.config, found.path / "config.json"), encoder_dtype)
    return Autoencoder.load(name, encoder_dtype)
