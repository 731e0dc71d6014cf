"""Stage 1: a decoder for the tokens of a frozen encoder, and its discriminator (RAE v1)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from raekit.artifacts import STATISTICS, read_statistics, write_statistics
from raekit.config import Operation, Place, configclass
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.data.sources import absolute
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.streaming import BATCH
from raekit.inference.shards import encoder_fingerprint
from raekit.inference.statistics import measure_latents
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig, Output, load_autoencoder
from raekit.models.decoder import Decoder, DecoderConfig, DecoderPositions
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.layers import watch_logits
from raekit.models.registry import LayersConfig, Size
from raekit.progress import Progress, counted
from raekit.stages.decoder_losses import (
    DecoderLossConfig,
    Encoded,
    Losses,
)
from raekit.stages.initial import initialise_decoder
from raekit.stages.inputs import Inputs, describe_images
from raekit.stages.selection import SelectionConfig, selector
from raekit.stages.stage import Stage
from raekit.stages.watch import HeldoutConfig, PicturesConfig, heldout_loss, reconstructions
from raekit.training.checkpoint import checkpoints
from raekit.training.objective import Objective, Periodic
from raekit.training.optim import OptimConfig
from raekit.training.precision import compute_dtype
from raekit.training.trainer import TrainConfig
from raekit.weights import NoRandomWeights


@configclass
class DecoderSize:
    """The size of the decoder. Its token dimension and its grid follow from the encoder.

    Attributes:
        width: Channels of a token inside the decoder, a multiple of 4 and of `heads`.
        depth: Number of transformer blocks.
        heads: Number of attention heads.
        hidden: Hidden width of the MLPs.
        patch_size: Side in pixels of the patch that the decoder predicts from each token.
        positions: Positions of the tokens. sincos: the fixed sine-cosine table. learned: a weight that starts from the
            table, as in the published code for GPUs.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    patch_size: int
    positions: DecoderPositions = "sincos"


@configclass
class ReconstructionConfig(DecoderLossConfig):
    """The config of stage 1, which trains a decoder for a frozen encoder.

    The statistics of the latents are measured over the centre-cropped training images, and over their mirror images too
    if `data.flip` is set. A decoder that is fine-tuned (`init_from`) for the same encoder keeps the statistics of its
    autoencoder, so that cached latents and denoisers stay valid.

    Attributes:
        stage: Name of the stage in config.json.
        data: Training images. `data.image_size` must equal the size that the decoder gives.
        encoder: Name of the frozen encoder, as in `raekit.models.encoders.load_encoder`. The encoder computes in
            `train.precision`.
        encoder_size: Size in pixels to which the encoder resizes images. None: the encoder's default size.
        layers: Encoder blocks whose outputs form the latent.
        output: Output of the decoder: `encoder-colours`, normalised by the encoder's mean and standard deviation
            (RAE v1), or `pixels` in [0, 1] (RAE v2).
        decoder: Size of the decoder.
        init_from: Name of an autoencoder whose decoder is fine-tuned, with the same sizes. None: start from random
            weights.
        selection: Keeps the decoder with the best score. None: export the last decoder.
        samples: Makes pictures of held-out images and their reconstructions during training.
        heldout: Measures the reconstruction loss on held-out images during training, without the adversarial term.
        train: Settings of the training loop.
        optim: Optimizer and learning rate schedule of the decoder.
        ema: Decays of the averages of the decoder's weights. The artifact holds the average of the first decay.
    """

    stage: Literal["reconstruction"] = "reconstruction"
    data: DataConfig
    encoder: Operation[Place]  # a run compares the encoder itself (`stages.inputs`)
    encoder_size: Size | None = None
    layers: LayersConfig = LayersConfig()
    output: Output = "encoder-colours"
    decoder: DecoderSize
    init_from: Place | None = None
    selection: Operation[SelectionConfig | None] = None
    samples: Operation[PicturesConfig | None] = None
    heldout: Operation[HeldoutConfig | None] = None
    train: TrainConfig
    optim: OptimConfig
    ema: tuple[float, ...] = (0.9978,)


def build(config: ReconstructionConfig, run: Path, world: World) -> Stage:
    """Build the stage. Its artifact is the autoencoder with the averaged decoder.

    The objectives are the decoder and, if `config.adversarial` is set, the discriminator.
    """
    loader = Loader(config.data, config.train.seed)
    loader.announce(world)
    dtype = compute_dtype(config.train.precision, world.device)
    encoder = load_encoder(config.encoder, config.encoder_size, config.layers, dtype)
    model = _new_autoencoder(config, encoder).to(world.device)
    if config.init_from and not checkpoints(run / "checkpoints"):  # a resumed run has its own weights
        initialise_decoder(model.decoder, config.init_from)
    losses = Losses(config, model, config.train.seed, world)
    objectives = [
        Objective(
            name="decoder",
            module=model.decoder,
            loss=losses.decoder,
            optim=config.optim,
            blocks=list(model.decoder.blocks),
            ema=config.ema,
            monitor=partial(watch_logits, model.decoder),
        )
    ]
    if (adversarial := config.adversarial) and losses.discriminator_network:
        objectives.append(
            Objective(
                name="discriminator",
                module=losses.discriminator_network,
                loss=losses.discriminator,
                optim=adversarial.optim,
                start=adversarial.discriminator_start,
                schedule_start=0 if adversarial.schedule == "common" else None,
            )
        )
    with NoRandomWeights():
        averaged = Autoencoder(model.config, encoder)
    averaged.decoder = model.decoder  # shared, to save memory; `current` replaces it by the average
    averaged.to(world.device)
    averaged.trained_on = absolute(config.data.address)

    def prepare(progress: Progress) -> None:
        if config.train.compile:
            encoder.compile()
        # Measured once and kept in the run folder, because the result is the same after every restart.
        path = run / STATISTICS
        if path.is_file():
            mean, var = read_statistics(path, model.latent_shape)
        else:
            kept = _statistics_of(config.init_from, model) if config.init_from else None
            batches = loader.once(BATCH, world)
            shown = counted(progress, "measure latents", len(loader), world.size)
            mean, var = kept or measure_latents(
                model.tokens, batches, model.latent_shape, world, mirror=config.data.flip, shown=shown
            )
            if world.is_main:
                write_statistics(path, var, mean)
        averaged.set_statistics(mean, var)

    def current() -> Autoencoder:
        averaged.decoder = objectives[0].averaged  # type: ignore[assignment]
        return averaged.eval()

    def export(folder: Path) -> None:
        # A selection writes RUN/artifact itself. Without a selected decoder, export the present decoder.
        selected = run / "selected.json"
        if folder == run / "artifact":
            if config.selection and selected.is_file():
                return
            if world.is_main:  # it describes the artifact that is replaced now, if the selection is switched off
                selected.unlink(missing_ok=True)
        current().save(folder, world)

    def heldout(decoder: Callable[[], Decoder]) -> Callable[[Batch, int], Tensor]:
        return lambda batch, step: losses.reconstruction(decoder(), Encoded(batch, model.tokens), step)

    periodics = []
    if config.heldout:
        parts = {"loss": heldout(model.decoder.eval)}
        if config.ema:
            parts["ema_loss"] = heldout(lambda: current().decoder)
        periodics.append(heldout_loss(config.heldout, config.data, parts, config.train.precision, world))
    if config.samples:
        periodics.append(reconstructions(config.samples, config.data, current, world))
    if chosen := config.selection:
        periodics.append(
            Periodic(every=chosen.every, call=selector(chosen, config.data, model.latent_shape, run, current, world))
        )

    return Stage(
        objectives=objectives,
        inputs=lambda: Inputs(data=describe_images(config.data, loader), encoder=encoder_fingerprint(model)),
        batches=lambda start: (
            Encoded(batch, model.tokens) for batch in loader.stream(start, config.train.batch_size, world)
        ),
        prepare=prepare,
        export=export,
        periodics=periodics,
    )


def _new_autoencoder(config: ReconstructionConfig, encoder: Encoder) -> Autoencoder:
    """Return an autoencoder whose decoder has random weights; UserError if it does not fit the size of the images."""
    model = Autoencoder(
        AutoencoderConfig(
            encoder=config.encoder,
            encoder_size=config.encoder_size,
            layers=config.layers,
            output=config.output,
            decoder=DecoderConfig(token_dim=encoder.spec.width, grid=encoder.grid, **vars(config.decoder)),
        ),
        encoder,
    )
    if model.image_shape != (config.data.image_size, config.data.image_size):
        raise UserError(
            f"decoder.patch_size: {config.decoder.patch_size} on a grid of {encoder.grid} gives images of "
            f"{' x '.join(map(str, model.image_shape))} pixels, but data.image_size is {config.data.image_size}; "
            "change one of the two"
        )
    return model


def _statistics_of(source: str, model: Autoencoder) -> tuple[Tensor | None, Tensor] | None:
    """Return the mean and variance of the latents of `source`; None for another encoder or without whitening."""
    pretrained = load_autoencoder(source)
    whitens = bool(pretrained.var.min() < pretrained.var.max())  # equal values leave the latents as they are
    if not whitens or encoder_fingerprint(pretrained) != encoder_fingerprint(model):
        return None
    return pretrained.mean, pretrained.var
