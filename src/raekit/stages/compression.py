"""Train a VAE, the latent space that the paper compares RAE with: L1, LPIPS and a weak Kullback-Leibler term."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import Tensor

from raekit import randomness
from raekit.config import Operation, configclass
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.data.sources import absolute
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.streaming import BATCH
from raekit.files import whole
from raekit.models.baselines import VAE, Baseline, BaselineConfig, VAESize
from raekit.models.perceptual import load_perceptual
from raekit.stages.decoder_losses import PerceptualConfig
from raekit.stages.inputs import Inputs, describe_images
from raekit.stages.stage import Stage
from raekit.stages.watch import HeldoutConfig, PicturesConfig, heldout_loss, reconstructions
from raekit.training.objective import Metrics, Objective
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

MEASURED = 256
"""Training images from which the scale of the latents is measured."""


@configclass
class CompressionConfig:
    """The config of a VAE, to compare RAE with.

    Attributes:
        stage: Name of the stage in config.json.
        data: Training images.
        vae: Size of the VAE.
        kl_weight: Factor of the Kullback-Leibler divergence between the posterior and a standard normal. The divergence
            is summed over the latent, and divided by the number of pixel values like L1, as in latent diffusion.
        perceptual: The LPIPS term; None leaves it out.
        train: Settings of the training loop.
        optim: Optimizer and learning rate schedule.
        ema: Decays of the weight averages. The artifact holds the average of the first decay.
        samples: Makes pictures of held-out images and their reconstructions during training.
        heldout: Measures the loss on held-out images during training.
    """

    stage: Literal["compression"] = "compression"
    data: DataConfig
    vae: VAESize = VAESize()
    kl_weight: float = 1e-6
    perceptual: PerceptualConfig | None = None
    train: TrainConfig
    optim: OptimConfig
    ema: tuple[float, ...] = (0.99,)
    samples: Operation[PicturesConfig | None] = None
    heldout: Operation[HeldoutConfig | None] = None

    def __post_init__(self) -> None:
        if not self.kl_weight >= 0:
            raise UserError(f"kl_weight: {self.kl_weight} must not be negative")


def build(config: CompressionConfig, run: Path, world: World) -> Stage:
    """Build the stage. Its artifact is the averaged VAE in the layout of diffusers, as a baseline of raekit.

    Raises:
        UserError: If diffusers is not installed, or the image size does not fit the VAE.
    """
    loader = Loader(config.data, config.train.seed)
    loader.announce(world)
    model = VAE(config.vae, config.data.image_size)
    lpips = load_perceptual(config.perceptual.weights).to(world.device) if config.perceptual else None

    def error(vae: VAE, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = batch.pixels()
        noise = randomness.normal(config.train.seed, "noise", batch.positions, vae.latent_shape, images.device)
        decoded, divergence = vae(images, noise)
        l1, kl = (decoded - images).abs().mean(), divergence.mean() / images[0].numel()
        loss, metrics = l1 + config.kl_weight * kl, {"l1": l1, "kl": kl}
        if config.perceptual and lpips and step >= config.perceptual.start:
            distance = lpips(decoded, images).mean()
            loss, metrics = loss + config.perceptual.weight * distance, metrics | {"lpips": distance}
        return loss, metrics

    objective = Objective(
        name="vae",
        module=model,
        loss=lambda batch, step: error(model, batch, step),
        optim=config.optim,
        blocks=[*model.vae.encoder.down_blocks, *model.vae.decoder.up_blocks],
        ema=config.ema,
    )

    def averaged() -> VAE:
        assert isinstance(objective.averaged, VAE)
        return objective.averaged

    def current() -> Baseline:
        return averaged().baseline()

    def export(folder: Path) -> None:
        complete = averaged().complete()
        if not world.is_main:
            return
        batches = (batch.to(world.device).pixels() for batch in loader.once(BATCH, World(), MEASURED))
        vae = complete.to(world.device).finished(batches).cpu()
        with whole(folder / "vae", folder=True) as partial:
            vae.save_pretrained(partial)
        name = f"vae:{folder / 'vae'}"
        trained = Baseline(BaselineConfig(baseline=name, image_size=config.data.image_size), vae)
        trained.trained_on = absolute(config.data.address)
        trained.save(folder)

    def loss_of(vae: Callable[[], VAE]) -> Callable[[Batch, int], Tensor]:
        return lambda batch, step: error(vae(), batch, step)[0]

    periodics = []
    if config.heldout:
        losses = {"loss": loss_of(lambda: model)} | ({"ema_loss": loss_of(averaged)} if config.ema else {})
        periodics.append(heldout_loss(config.heldout, config.data, losses, config.train.precision, world))
    if config.samples:
        periodics.append(reconstructions(config.samples, config.data, current, world))
    return Stage(
        objectives=[objective],
        inputs=lambda: Inputs(data=describe_images(config.data, loader)),
        batches=lambda start: loader.stream(start, config.train.batch_size, world),
        export=export,
        periodics=periodics,
    )
