"""The losses of stage 1: L1, LPIPS and a discriminator, on noisy tokens (spec 1.4, 1.6)."""

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from raekit import randomness
from raekit.config import configclass
from raekit.data.loader import Batch
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.augment import AugmentConfig, augment
from raekit.models.autoencoder import Autoencoder
from raekit.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    load_backbone,
)
from raekit.models.layers import patchify
from raekit.models.perceptual import load_perceptual
from raekit.pictures import quantize
from raekit.train.objective import Metrics
from raekit.train.optim import OptimConfig

NoiseLaw = Literal["half-normal", "uniform"]


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
class DecoderLossConfig:
    """What a decoder minimises, besides L1.

    `noise` is tau of spec 1.4, in units of the un-whitened tokens; `noise_law` says how sigma is drawn from it.
    """

    noise: float = 0.8
    noise_law: NoiseLaw = "half-normal"
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None

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


def noisy(latents: Tensor, config: DecoderLossConfig, seed: int, positions: Tensor) -> Tensor:
    """Un-whitened latents (B, C, H, W) with the noise of noise-augmented decoding (spec 1.4)."""
    if not config.noise:
        return latents
    device = latents.device
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

    def __init__(self, config: DecoderLossConfig, model: Autoencoder, seed: int, world: World) -> None:
        self.config, self.model, self.seed, self.world = config, model, seed, world
        self.perceptual = None
        if config.perceptual:
            self.perceptual = load_perceptual(config.perceptual.weights).to(world.device)
        self.discriminator_network = None
        if config.adversarial:
            name = config.adversarial.discriminator.backbone
            backbone = model.encoder if name == model.config.encoder else load_backbone(name)
            self.discriminator_network = Discriminator(config.adversarial.discriminator, backbone).to(world.device)

    def decoder(self, batch: Encoded, step: int) -> tuple[Tensor, Metrics]:
        """L1 + LPIPS + the adversarial loss, each from its own step on."""
        adversarial, network = self.config.adversarial, self.discriminator_network
        latents = noisy(batch.latents, self.config, self.seed, batch.positions)
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
        norms = last_layer_norms((pull, push), last_input[0], self.model.config.decoder.patch_size, everyone)
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
        return augment(images, adversarial.augment, seed=self.seed, stream=stream, step=step, positions=batch.positions)
