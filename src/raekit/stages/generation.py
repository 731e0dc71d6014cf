"""Stage 2: train a denoiser by flow matching on whitened latents (RAE v1)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from PIL.Image import Image
from torch import Tensor, nn

from raekit import randomness
from raekit.config import OnPurpose, Operation, Place, configclass
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.data.sources import absolute
from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow import path
from raekit.inference.cached_loader import LatentBatch, LatentLoader
from raekit.inference.model import Model
from raekit.inference.shards import encoder_fingerprint, statistics_fingerprint
from raekit.models.autoencoder import load_autoencoder
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig, DenoiserSize
from raekit.models.latent_space import LatentSpace
from raekit.models.layers import watch_logits
from raekit.progress import Progress
from raekit.stages.alignment import Aligned, AlignmentConfig, load_target, similarity
from raekit.stages.evaluation import EvaluationConfig, evaluator
from raekit.stages.initial import initialise_denoiser
from raekit.stages.inputs import Inputs, describe_images, labels_digest
from raekit.stages.stage import Stage
from raekit.stages.watch import HeldoutConfig, SamplesConfig, heldout_loss, samples
from raekit.training.checkpoint import checkpoints
from raekit.training.objective import Metrics, Objective, Periodic
from raekit.training.optim import OptimConfig
from raekit.training.precision import compute_dtype
from raekit.training.trainer import TrainConfig


@configclass
class GenerationConfig:
    """Config of stage 2.

    Attributes:
        stage: Name of the stage in config.json.
        data: The training images.
        autoencoder: Published name, builtin:NAME, a model folder, a run of stage 1, or OWNER/NAME on the Hub. The
            encoder computes in `train.precision`.
        latents: A folder of `raekit latents cache`. Training reads the cached latents instead of the training images.
        denoiser: The sizes of the denoiser.
        init_from: A model whose denoiser is fine-tuned, with the same sizes and latents. Its classes may differ, and
            either of the two may lack a base output.
        conditional: Train with class labels.
        class_dropout: Probability of dropping a label, at least 0 and below 1.
        time_law: Distribution of the training times, before the shift.
        shift_base: The factor of the time shift is sqrt(dimension of the latents / `shift_base`).
        alignment: The term of REPA, which aligns tokens of the denoiser with tokens of an encoder. None: no such term,
            as in RAE.
        residual: Number format of the tokens between the backbone's blocks, if `train.precision` is bf16. The tokens
            between the head's blocks are always bf16 in this case.
        train: Steps, batches, precision, checkpoints and logs.
        optim: Optimizer and learning rate schedule.
        ema: Decays of the weight averages. The first decay gives the average that is used by default.
        evaluation: Scores samples during training.
        samples: Makes pictures of samples during training.
        heldout: Measures the loss on held-out images during training.
    """

    stage: Literal["generation"] = "generation"
    data: DataConfig
    autoencoder: Operation[Place]  # a run compares the encoder and the statistics themselves (`stages.inputs`)
    latents: OnPurpose[Place | None] = None
    denoiser: DenoiserSize
    init_from: Place | None = None
    conditional: bool = True
    class_dropout: float = 0.1
    time_law: path.TimeLaw = "uniform"
    shift_base: int = path.SHIFT_BASE
    alignment: AlignmentConfig | None = None
    residual: OnPurpose[Literal["fp32", "bf16"]] = "fp32"
    train: TrainConfig
    optim: OptimConfig
    ema: tuple[float, ...] = (0.9995,)
    evaluation: Operation[EvaluationConfig | None] = None
    samples: Operation[SamplesConfig | None] = None
    heldout: Operation[HeldoutConfig | None] = None

    def __post_init__(self) -> None:
        if self.evaluation and (others := set(self.evaluation.ema) - set(self.ema)):
            raise UserError(f"evaluation.ema: {min(others)} is not one of the averages {self.ema}; add it to ema")
        if not 0 <= self.class_dropout < 1:
            raise UserError(f"class_dropout: {self.class_dropout} must be at least 0 and below 1")
        if self.alignment and self.latents:
            raise UserError("alignment: needs the training images, which cached latents do not have; leave out latents")


def flow_matching_loss(
    denoiser: Denoiser | Aligned,
    latents: Tensor,
    labels: Tensor | None,
    positions: Tensor,
    *,
    seed: int,
    time_law: path.TimeLaw,
    alpha: float | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the mean squared error of the predicted velocity, in float32, and metrics to log.

    If the denoiser has a base output, the loss is the sum of the errors of both outputs (RAE v2), and the error of
    the base output is logged as `base_loss`.

    Args:
        denoiser: the denoiser.
        latents: whitened latents (B, C, H, W).
        labels: the condition of each image, such as class ids (B,). `denoiser.label.without` replaces the ids below 0
            of images without a class. None: unconditional.
        positions: numbers (B,) of the latents in the training stream. Noise and times are functions of seed and number.
        seed: seed of noise and times.
        time_law: distribution of the times, before the shift.
        alpha: factor of the time shift. Default: the denoiser's `config.shift`, with which it is sampled.
        tokens: the tokens (B, N, D) with which the tokens of an `Aligned` denoiser are aligned. The metric `alignment`
            is their similarity.
    """
    config = denoiser.denoiser.config if isinstance(denoiser, Aligned) else denoiser.config
    u = randomness.uniform(seed, "time", positions, (), latents.device)
    t = path.sample_times(u, time_law, config.shift if alpha is None else alpha)
    noise = randomness.normal(seed, "noise", positions, latents.shape[1:], latents.device)
    x_t = path.interpolate(latents, noise, t)
    prediction = config.prediction
    target = path.to_velocity(x_t, path.exact(latents, noise, prediction), t, prediction)

    def error(predicted: Tensor) -> Tensor:
        return (path.to_velocity(x_t, predicted, t, prediction) - target).square().mean()

    if isinstance(denoiser, Aligned):
        assert tokens is not None
        predicted, projected = denoiser(x_t, t, labels)
        aligned = similarity(projected, tokens)
        return error(predicted) - denoiser.weight * aligned, {"alignment": aligned.detach()}
    if not config.base_depth:
        return error(denoiser(x_t, t, labels)), {}
    full, base = denoiser(x_t, t, labels, with_base=True)
    base_error = error(base)
    return error(full) + base_error, {"base_loss": base_error.detach()}


def build(config: GenerationConfig, run: Path, world: World) -> Stage:
    """Return stage 2 for a run. The artifact is a model folder with the autoencoder and every average.

    Raises:
        UserError: the config does not fit the autoencoder, the images, the cache or the denoiser to fine-tune.
    """
    seed, dtype = config.train.seed, compute_dtype(config.train.precision, world.device)
    autoencoder = load_autoencoder(config.autoencoder, encoder_dtype=dtype)
    if config.latents:
        loader = LatentLoader(Path(config.latents), config.data, seed, autoencoder)
    else:
        loader = Loader(config.data, seed)
        autoencoder.encoder_to(world.device)
    loader.announce(world)
    model = _new_denoiser(config, autoencoder, loader.classes)
    if config.init_from and not checkpoints(run / "checkpoints"):  # a resumed run has weights
        initialise_denoiser(model, config.init_from)

    network, encoder = model, None
    if config.alignment:
        encoder = load_target(config.alignment, model.config.token_grid, dtype).to(world.device)
        network = Aligned(model, config.alignment, encoder.width)

    def error(network: Denoiser | Aligned, batch: Batch | LatentBatch, dropout: float) -> tuple[Tensor, Metrics]:
        if isinstance(batch, LatentBatch):
            images, latents = None, batch.latents
        else:
            images = batch.pixels()
            latents = autoencoder.encode(images)
        labels = None
        if config.conditional:
            dropped = randomness.uniform(seed, "class dropout", batch.positions, (), world.device) < dropout
            assert model.label
            labels = model.label.without(batch.labels, dropped)
        tokens = encoder(images) if encoder and isinstance(network, Aligned) else None
        return flow_matching_loss(
            network,
            latents,
            labels,
            batch.positions,
            seed=seed,
            time_law=config.time_law,
            tokens=tokens,
        )

    def loss(batch: Batch | LatentBatch, step: int) -> tuple[Tensor, Metrics]:
        return error(network, batch, config.class_dropout)

    objective = Objective(
        name="denoiser",
        module=network,
        loss=loss,
        optim=config.optim,
        blocks=[*model.blocks, *(model.head_blocks if model.config.head else [])],
        convolutions=[model.embed, *([model.head_embed] if model.config.head else [])],
        ema=config.ema,
        monitor=partial(watch_logits, model),
    )

    def prepare(progress: Progress) -> None:
        if config.train.compile and not config.latents:
            autoencoder.compile_encoder()

    def denoiser_of(module: nn.Module) -> Denoiser:
        found = module.denoiser if isinstance(module, Aligned) else module
        assert isinstance(found, Denoiser)
        return found

    def averaged() -> Denoiser:
        return denoiser_of(objective.averaged)

    exported: set[Path] = set()

    def export(folder: Path) -> None:
        for decay, average in (objective.averages or {None: network}).items():
            finished = denoiser_of(average)
            finished.ema = decay
            finished.save(folder, world, beside=average is not objective.averaged)
        if folder not in exported:  # it does not change
            autoencoder.save(folder, world)
            exported.add(folder)

    def models() -> dict[str, Model]:
        chosen = config.evaluation.ema if config.evaluation else ()
        averages = {f"ema_{decay}/": denoiser_of(objective.averages[decay]) for decay in chosen} or {"": averaged()}
        return {name: Model(autoencoder, average) for name, average in averages.items()}

    periodics = []
    if config.heldout:
        losses = {"loss": lambda batch, step: error(model.eval(), batch, 0.0)[0]}
        if config.ema:
            losses["ema_loss"] = lambda batch, step: error(averaged(), batch, 0.0)[0]
        periodics.append(heldout_loss(config.heldout, config.data, losses, config.train.precision, world))
    if config.samples:
        periodics.append(
            samples(config.samples, model, lambda: Model(autoencoder, averaged().eval()), config.train.precision, world)
        )
    if chosen := config.evaluation:
        periodics.append(Periodic(every=chosen.every, call=evaluator(chosen, config.data, model, models, world)))

    def lent(call: Callable[[int], Mapping[str, float | Image]]) -> Callable[[int], Mapping[str, float | Image]]:
        """Return `call` with the complete autoencoder on the device for its time. Training does not need all of it."""

        def lending(step: int) -> Mapping[str, float | Image]:
            autoencoder.to(world.device)
            try:
                return call(step)
            finally:
                autoencoder.decoder.to("cpu")
                if config.latents:
                    autoencoder.encoder_to("cpu")

        return lending

    def inputs() -> Inputs:
        return Inputs(
            data=describe_images(config.data, loader),
            labels=labels_digest(loader.classes) if config.conditional else None,
            encoder=encoder_fingerprint(autoencoder),
            statistics=statistics_fingerprint(autoencoder),
        )

    return Stage(
        objectives=[objective],
        inputs=inputs,
        batches=lambda start: loader.stream(start, config.train.batch_size, world),
        prepare=prepare,
        export=export,
        periodics=[replace(periodic, call=lent(periodic.call)) for periodic in periodics],
    )


def _new_denoiser(config: GenerationConfig, autoencoder: LatentSpace, classes: tuple[str, ...]) -> Denoiser:
    """Return a denoiser with random weights; UserError if autoencoder, images and settings do not fit each other."""
    if autoencoder.image_size != config.data.image_size:
        raise UserError(
            f"data.image_size: {config.data.image_size}, but {config.autoencoder} needs {autoencoder.image_size}"
        )
    if config.conditional and not classes:
        raise UserError(
            f"data.source: {config.data.source} has no classes; set --no-conditional to train without classes"
        )
    channels, *grid = autoencoder.latent_shape
    model = Denoiser(
        DenoiserConfig(
            **vars(config.denoiser),
            channels=channels,
            grid=(grid[0], grid[1]),
            num_classes=len(classes) if config.conditional else 0,
            shift=path.shift_factor(autoencoder.latent_shape, config.shift_base),
            class_names=classes if config.conditional else (),
        )
    )
    model.trained_on = absolute(config.data.address)
    model.narrow_residual = config.residual == "bf16"
    return model
