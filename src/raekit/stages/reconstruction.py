"""Stage 1: a decoder for the tokens of a frozen encoder, and its discriminator (spec 1)."""

from collections.abc import Callable
from functools import cached_property, partial
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
from raekit.evaluation.features import quantize
from raekit.inference import measure_latents
from raekit.models.augment import AugmentConfig, augment
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig, Output
from raekit.models.decoder import DecoderConfig
from raekit.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    load_backbone,
)
from raekit.models.encoders import load_encoder
from raekit.models.layers import patchify, watch_logits
from raekit.models.perceptual import load_perceptual
from raekit.models.registry import LayersConfig, Size
from raekit.progress import Report, counted
from raekit.stages.initial import initialise_decoder
from raekit.stages.selection import SelectionConfig, selector
from raekit.stages.stage import Stage
from raekit.train.checkpoint import checkpoints
from raekit.train.objective import Metrics, Objective, Periodic
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
class PerceptualConfig:
    """LPIPS in the loss, times `weight`, from step `start` on. `weights`: a file for `load_perceptual`."""

    weight: float = 1.0
    start: int = 0
    weights: str | None = None


@configclass
class AdversarialConfig:
    """The discriminator, and its part in the decoder's loss (spec 1.6 to 1.8).

    It trains from step `discriminator_start` on, and the decoder hears it from `start` on: `weight` times the
    adaptive weight, at most `max_weight`, times its loss. `local_weight` takes the adaptive weight of each
    process's own images, as published, instead of that of all. With `train.micro_batch` it is that of each
    micro-batch, of all processes: the whole batch is never in memory at once.

    The schedule of `optim` counts from `discriminator_start`, as the published code has it, so that the rate ends
    above its floor; or, with `schedule` "common", from step 0 like the decoder's.
    """

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: Literal["hinge", "softplus"] = "hinge"
    weight: float = 0.75
    max_weight: float = 1e4
    local_weight: bool = False
    discriminator_start: int = 0
    start: int = 0
    schedule: Literal["published", "common"] = "published"
    optim: OptimConfig

    def __post_init__(self) -> None:
        if self.start < self.discriminator_start:
            raise UserError(
                f"adversarial.start: {self.start} is before discriminator_start = {self.discriminator_start}: "
                "the decoder would learn from an untrained discriminator"
            )


@configclass
class ReconstructionConfig:
    """`noise` is tau of spec 1.4, in units of the un-whitened tokens; `noise_law` how sigma follows from it.

    The latent statistics are measured over the training images, centre-cropped, and mirrored too if the
    training flips them. `encoder_size`, `layers` and `output` are those of the autoencoder; the encoder computes in
    `train.precision`. `init_from` is an autoencoder whose decoder, of the same sizes, is to be fine-tuned.
    """

    stage: Literal["reconstruction"] = "reconstruction"
    data: DataConfig
    encoder: str
    encoder_size: Size | None = None
    layers: LayersConfig = LayersConfig()
    output: Output = "encoder-colours"
    decoder: DecoderSize
    init_from: str | None = None
    noise: float = 0.8
    noise_law: NoiseLaw = "half-normal"
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    selection: SelectionConfig | None = None
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


def noisy(latents: Tensor, config: ReconstructionConfig, positions: Tensor) -> Tensor:
    """Un-whitened latents (B, C, H, W) with the noise of noise-augmented decoding (spec 1.4)."""
    if not config.noise:
        return latents
    seed, device = config.train.seed, latents.device
    sigma = noise_scales(config.noise, config.noise_law, seed, positions, device)
    return latents + sigma.view(-1, 1, 1, 1) * randomness.normal(seed, "noise", positions, latents.shape[1:], device)


class Encoded:
    """Images (B, 3, S, S) in [0, 1], their un-whitened latents (B, C, h, w), and positions (B,) in the stream.

    Encoded when first asked for, and once for all objectives: a split gives the same parts every time.
    """

    def __init__(self, batch: Batch, encode: Callable[[Tensor], Tensor]) -> None:
        self.batch, self.encode = batch, encode
        self.positions = batch.positions
        self.parts: dict[int, list[Encoded]] = {}

    @cached_property
    def images(self) -> Tensor:
        return self.batch.pixels()

    @cached_property
    def latents(self) -> Tensor:
        return self.encode(self.images)

    def __len__(self) -> int:
        return len(self.batch)

    def to(self, device: torch.device) -> "Encoded":
        return Encoded(self.batch.to(device), self.encode)

    def split(self, size: int) -> "list[Encoded]":
        if size not in self.parts:
            self.parts[size] = [Encoded(part, self.encode) for part in self.batch.split(size)]
        return self.parts[size]


def last_layer_norms(gradients: tuple[Tensor, ...], last_input: Tensor, patch_size: int, world: World) -> Tensor:
    """Norms of the gradients that reach the last layer's weight, over the images of all processes.

    `gradients` are those of the decoder's output (B, 3, S, S), `last_input` (B, N, width) is what the layer read.
    """
    with torch.autocast(last_input.device.type, enabled=False):
        inputs = last_input.float().flatten(0, 1)
        weights = [patchify(gradient, patch_size).float().flatten(0, 1).mT @ inputs for gradient in gradients]
    return (world.sum(torch.stack(weights)) / world.size).flatten(1).norm(dim=1)


class Losses:
    """What the decoder and the discriminator minimise (spec 1.6)."""

    def __init__(self, config: ReconstructionConfig, model: Autoencoder, world: World) -> None:
        self.config, self.model, self.world = config, model, world
        self.perceptual = None
        if config.perceptual:
            self.perceptual = load_perceptual(config.perceptual.weights).to(world.device)
        self.discriminator_network = None
        if config.adversarial:
            name = config.adversarial.discriminator.backbone
            backbone = model.encoder if name == config.encoder else load_backbone(name)
            self.discriminator_network = Discriminator(config.adversarial.discriminator, backbone).to(world.device)

    def decoder(self, batch: Encoded, step: int) -> tuple[Tensor, Metrics]:
        """L1 + LPIPS + the adversarial loss, each from its own step on."""
        adversarial, network = self.config.adversarial, self.discriminator_network
        latents = noisy(batch.latents, self.config, batch.positions)
        last_input: list[Tensor] = []
        decoded = self.model.decoder(latents, last_input)
        if adversarial is None or network is None or step < adversarial.start:
            return self._reconstruction(self.model.to_pixels(decoded), batch.images, step)
        # Both losses are pulled back to the decoder's output alone, and from there on as one: the weight between
        # them, a ratio of gradients, costs no second pass through the decoder.
        output = decoded.detach().requires_grad_()
        reconstruction, metrics = self._reconstruction(self.model.to_pixels(output), batch.images, step)
        (pull,) = torch.autograd.grad(reconstruction, output)
        network.eval()  # no power iterations
        seen = self._augment(self.model.to_pixels(output), "generator", batch, step, adversarial)
        gan = generator_loss(network(seen))
        (push,) = torch.autograd.grad(gan, output)
        everyone = World(device=self.world.device) if adversarial.local_weight else self.world
        norms = last_layer_norms((pull, push), last_input[0], self.config.decoder.patch_size, everyone)
        balance = adaptive_weight(norms[0], norms[1], adversarial.max_weight)
        weight = adversarial.weight * balance
        through = (decoded * (pull + weight * push)).sum()
        loss = (reconstruction + weight * gan).detach() + (through - through.detach())
        return loss, metrics | {"gan": gan, "adaptive_weight": balance}

    def discriminator(self, batch: Encoded, step: int) -> tuple[Tensor, Metrics]:
        """Real images against fresh reconstructions, without noise, rounded to 8 bits as the real ones are."""
        adversarial, network = self.config.adversarial, self.discriminator_network
        assert adversarial is not None
        assert network is not None
        with torch.no_grad():
            decoded = quantize(self.model.to_pixels(self.model.decoder(batch.latents)))
        pair = [
            self._augment(decoded, "decoded", batch, step, adversarial),
            self._augment(batch.images, "real", batch, step, adversarial),
        ]
        fake, real = network(torch.cat(pair)).chunk(2)
        return discriminator_loss(real, fake, adversarial.loss), {"real": real.mean(), "fake": fake.mean()}

    def _reconstruction(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Metrics]:
        l1 = (images - targets).abs().mean()
        settings = self.config.perceptual
        if settings is None or self.perceptual is None or step < settings.start:
            return l1, {"l1": l1}
        lpips = self.perceptual(images, targets).mean()
        return l1 + settings.weight * lpips, {"l1": l1, "lpips": lpips}

    def _augment(
        self, images: Tensor, stream: str, batch: Encoded, step: int, adversarial: AdversarialConfig
    ) -> Tensor:
        seed = self.config.train.seed
        return augment(images, adversarial.augment, seed=seed, stream=stream, step=step, positions=batch.positions)


def build(config: ReconstructionConfig, run: Path, world: World) -> Stage:
    """The decoder's objective and the discriminator's; the artifact is an autoencoder with the averaged decoder."""
    loader = Loader(config.data, config.train.seed)
    dtype = compute_dtype(config.train.precision, world.device)
    encoder = load_encoder(config.encoder, config.encoder_size, config.layers, dtype)
    size = config.decoder
    model = Autoencoder(
        AutoencoderConfig(
            encoder=config.encoder,
            encoder_size=config.encoder_size,
            layers=config.layers,
            output=config.output,
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
    if config.init_from and not checkpoints(run / "checkpoints"):  # a run that goes on has weights
        initialise_decoder(model.decoder, config.init_from)
    losses = Losses(config, model, world)
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
    averaged = Autoencoder(model.config, encoder)
    averaged.decoder = model.decoder  # in the place of its own, until the average is asked for
    averaged.to(world.device)

    def prepare(progress: Report) -> None:
        if config.train.compile:
            encoder.compile()
        # Measured once, kept beside the run: the pass over the data is the same for every restart.
        path = run / STATISTICS
        if path.is_file():
            mean, var = read_statistics(path, model.latent_shape)
        else:
            batches = loader.once(max(config.train.batch_size // world.size, 1), world)
            shown = counted(progress, "measure latents", len(loader), world.size)
            mean, var = measure_latents(
                model.tokens, batches, model.latent_shape, world, mirror=config.data.flip, shown=shown
            )
            if world.is_main:
                write_statistics(path, var, mean)
        averaged.set_statistics(mean, var)

    def current() -> Autoencoder:
        averaged.decoder = objectives[0].averaged  # type: ignore[assignment]
        return averaged.eval()

    def export(folder: Path) -> None:
        # A selection exports by itself; without one yet, or at all, the present decoder is the best there is.
        if not (config.selection and (run / "selected.json").is_file()):
            current().save(folder, world)

    return Stage(
        objectives=objectives,
        batches=lambda start: (
            Encoded(batch, model.tokens) for batch in loader.stream(start, config.train.batch_size, world)
        ),
        prepare=prepare,
        export=export,
        periodics=[
            Periodic(every=chosen.every, call=selector(chosen, config.data, model.latent_shape, run, current, world))
            for chosen in (config.selection,)
            if chosen
        ],
    )
