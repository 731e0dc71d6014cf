"""Stage 1: a decoder for the tokens of a frozen encoder (spec 1)."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from raekit import randomness
from raekit.artifacts import STATISTICS, read_statistics, write_statistics
from raekit.config import configclass
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.inference import measure_latents
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.encoders import LayersConfig, Size, load_encoder
from raekit.stages.stage import Stage
from raekit.train.objective import Metrics, Objective
from raekit.train.optim import OptimConfig
from raekit.train.trainer import TrainConfig, compute_dtype

NoiseLaw = Literal["half-normal", "uniform"]


@configclass
class DecoderSize:
    """The decoder's transformer; its token dimension and grid follow from the encoder."""

    width: int
    depth: int
    heads: int
    hidden: int
    patch_size: int


@configclass
class ReconstructionConfig:
    """`noise` is tau of spec 1.4, in units of the un-whitened tokens; `noise_law` how sigma follows from it.

    The latent statistics are measured over the training images, centre-cropped, and mirrored too if the
    training flips them. `encoder_size` and `layers` are those of the autoencoder; the encoder computes in
    `train.precision`.
    """

    stage: Literal["reconstruction"] = "reconstruction"
    data: DataConfig
    encoder: str
    encoder_size: Size | None = None
    layers: LayersConfig = LayersConfig()
    decoder: DecoderSize
    noise: float = 0.8
    noise_law: NoiseLaw = "half-normal"
    train: TrainConfig
    optim: OptimConfig
    ema: tuple[float, ...] = (0.9978,)

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise UserError(f"noise: {self.noise} is negative")


def noise_scales(tau: float, law: NoiseLaw, seed: int, positions: Tensor, device: torch.device) -> Tensor:
    """sigma (B,) of the noise that each sample's tokens get.

    `half-normal`: |N(0, tau^2)|, the paper's. `uniform`: tau * U(0, 1), the published code's (spec 1.4).
    """
    if law == "uniform":
        return tau * randomness.uniform(seed, "noise scale", positions, (), device)
    return tau * randomness.normal(seed, "noise scale", positions, (1,), device)[:, 0].abs()


def build(config: ReconstructionConfig, run: Path, world: World) -> Stage:
    """The decoder's objective; the artifact is an autoencoder with the averaged decoder."""
    loader = Loader(config.data, config.train.seed)
    dtype = compute_dtype(config.train.precision, world.device)
    encoder = load_encoder(config.encoder, config.encoder_size, config.layers, dtype)
    size = config.decoder
    model = Autoencoder(
        AutoencoderConfig(
            encoder=config.encoder,
            encoder_size=config.encoder_size,
            layers=config.layers,
            decoder=DecoderConfig(
                token_dim=encoder.spec.width,
                grid=encoder.grid,
                patch_size=size.patch_size,
                width=size.width,
                depth=size.depth,
                heads=size.heads,
                hidden=size.hidden,
            ),
        ),
        encoder,
    ).to(world.device)
    if model.image_shape != (config.data.image_size, config.data.image_size):
        raise UserError(
            f"decoder.patch_size: {size.patch_size} over a grid of {encoder.grid} gives images of "
            f"{' x '.join(map(str, model.image_shape))} pixels, but data.image_size is {config.data.image_size}"
        )
    seed, tau = config.train.seed, config.noise

    def loss(batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = batch.pixels()
        latents = model.tokens(images)
        if tau:
            sigma = noise_scales(tau, config.noise_law, seed, batch.positions, world.device)
            noise = randomness.normal(seed, "noise", batch.positions, latents.shape[1:], world.device)
            latents = latents + sigma.view(-1, 1, 1, 1) * noise
        l1 = (model.to_pixels(model.decoder(latents)) - images).abs().mean()
        return l1, {}

    objective = Objective(
        name="decoder",
        module=model.decoder,
        loss=loss,
        optim=config.optim,
        blocks=list(model.decoder.blocks),
        ema=config.ema,
    )
    averaged = Autoencoder(model.config, encoder).to(world.device)

    def prepare() -> None:
        if config.train.compile:
            encoder.compile()
        # Measured once, kept beside the run: the pass over the data is the same for every restart.
        path = run / STATISTICS
        if path.is_file():
            mean, var = read_statistics(path, model.latent_shape)
        else:
            batches = loader.once(config.train.batch_size, world)
            mean, var = measure_latents(model.tokens, batches, model.latent_shape, world, mirror=config.data.flip)
            if world.is_main:
                write_statistics(path, var, mean)
        averaged.set_statistics(mean, var)

    def export(folder: Path) -> None:
        averaged.decoder = objective.averaged  # type: ignore[assignment]
        averaged.save(folder, world)

    return Stage(
        objectives=[objective],
        batches=lambda start: loader.stream(start, config.train.batch_size, world),
        prepare=prepare,
        export=export,
    )
