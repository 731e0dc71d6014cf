"""The representation autoencoder: frozen encoder, whitening, trained decoder (RAE v1)."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from raekit import artifacts
from raekit.config import configclass, from_dict, to_dict
from raekit.distributed import World, plain_tensors
from raekit.errors import UserError
from raekit.models.baselines import Baseline, BaselineConfig
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.latent_space import LatentSpace
from raekit.models.layers import to_grid
from raekit.models.precision import set_dtype
from raekit.models.registry import LayersConfig, Size, absolute
from raekit.models.vit import ViT
from raekit.weights import NoRandomWeights, check_fit, fingerprint, load_strict, rounded

Output = Literal["encoder-colours", "pixels"]


@configclass
class AutoencoderConfig:
    """Configuration of an autoencoder.

    Attributes:
        encoder: a name that `load_encoder` takes.
        encoder_weights: a fingerprint of the encoder's weights. Loading fails for other weights. None: the weights are
            stored with the autoencoder, or nothing is known, as in a converted model.
        encoder_size: the size that the encoder resizes images to. Default: the encoder's own.
        layers: the encoder blocks whose outputs make the latents.
        decoder: the sizes of the decoder.
        output: the decoder's output: colours normalised by the encoder's mean and standard deviation (RAE v1), or
            pixels in [0, 1] (RAE v2).
    """

    encoder: str
    encoder_weights: str | None = None
    encoder_size: Size | None = None
    layers: LayersConfig = LayersConfig()
    decoder: DecoderConfig
    output: Output = "encoder-colours"


class Autoencoder(LatentSpace):
    """Autoencoder of a frozen encoder and a trained decoder."""

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
    @plain_tensors()
    def load(
        cls, name: str | Path, dtype: torch.dtype = torch.float32, encoder_dtype: torch.dtype | None = None
    ) -> Self:
        """Load an autoencoder.

        Args:
            name: a published name (`raekit.formats.releases`), `builtin:NAME`, a model folder, a run, or OWNER/NAME on
                the Hub.
            dtype: float32 or bfloat16, the type that the weights are held and used in. Latents, statistics and images
                are always float32.
            encoder_dtype: the encoder's type. Default: `dtype`.

        Raises:
            UserError: if a file is missing or damaged.
        """
        found = artifacts.find(name, "autoencoder")
        path = found.path
        config, state = from_dict(AutoencoderConfig, found.config, path / "config.json"), artifacts.read(path)
        check_fit(lambda: Decoder(config.decoder), state, path)
        own = path.parent / "encoder"
        source = str(own) if own.is_dir() else config.encoder
        encoder = load_encoder(source, config.encoder_size, config.layers, encoder_dtype or dtype)
        statistics = artifacts.read_statistics(path / artifacts.STATISTICS, (encoder.spec.width, *encoder.grid))
        model = cls.build(config, encoder, state, statistics, path, dtype)
        if config.encoder_weights and config.encoder_weights != model.encoder_weights:
            raise UserError(
                f"{path}: was made with another encoder: the weights of {source} are not those that it was made with; "
                "put the original weights back, or name them as `encoder` in its config.json"
            )
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
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Return a frozen autoencoder of the weights `decoder`, held in `dtype`, and `statistics` (mean or None, var).

        Raises:
            UserError: if the weights do not fit; it names their `source`.
        """
        with NoRandomWeights():
            model = cls(config, encoder)
        load_strict(model.decoder, decoder, source)
        set_dtype(model.decoder, dtype)
        model.set_statistics(*statistics)
        return model.requires_grad_(False).eval()

    def save(self, folder: str | Path, world: World | None = None, dtype: torch.dtype | None = None) -> None:
        """Write FOLDER/autoencoder, for `load`; also FOLDER/encoder, if raekit trained the encoder."""
        world = world or World()
        complete = isinstance(self.encoder.model, ViT) and Path(self.encoder.name).is_dir()
        known = None if complete else self.encoder_weights
        config = replace(self.config, encoder=absolute(self.config.encoder), encoder_weights=known)
        statistics = {"var": self.var} | ({} if self.mean is None else {"mean": self.mean})
        folder = Path(folder)
        target = folder / "autoencoder"
        artifacts.write(
            target,
            "autoencoder",
            config,
            self.decoder,
            world,
            dtype=dtype,
            trained_on=self.trained_on,
            statistics=statistics,
        )
        if complete:
            exact = self.encoder.dtype == torch.float32  # loading in bf16 rounded the weights
            (self.encoder if exact else load_encoder(self.encoder.name)).save(folder, world, dtype)

    @cached_property
    def encoder_weights(self) -> str:
        """A fingerprint of the encoder's weights, the same in float32 and in bfloat16."""
        return fingerprint(rounded(self.encoder.state_dict()))

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
        """Return the decoder's output as pixels, not clamped to [0, 1]."""
        if self.config.output == "pixels":
            return decoded.float()
        return decoded.float() * self.encoder.std + self.encoder.mean


@plain_tensors()
def load_autoencoder(
    name: str | Path, dtype: torch.dtype = torch.float32, encoder_dtype: torch.dtype | None = None
) -> LatentSpace:
    """Load an autoencoder or a baseline.

    Args:
        name: a name that `Autoencoder.load` takes, `pixels`, or `vae:WHERE`. Both baselines are for 256 pixels, or for
            SIZE pixels with `@SIZE` after the name.
        dtype: float32 or bfloat16, as in `Autoencoder.load`.
        encoder_dtype: the encoder's type. Default: `dtype`.

    Raises:
        UserError: if a file is missing or damaged.
    """
    if config := BaselineConfig.named(str(name)):
        return Baseline.load(config, dtype, encoder_dtype)
    found = artifacts.find(name, "autoencoder")
    if "baseline" in found.config:
        config = from_dict(BaselineConfig, found.config, found.path / "config.json")
        own = found.path.parent / "vae"  # of a VAE that raekit trained; the path in the config may be out of date
        here = replace(config, baseline=f"vae:{own}") if own.is_dir() else config
        baseline = Baseline.load(here, dtype, encoder_dtype)
        baseline.trained_on = found.trained_on
        return baseline
    return Autoencoder.load(name, dtype, encoder_dtype)
