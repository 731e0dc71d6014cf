"""The losses of stage 1: L1, LPIPS and an adversarial loss, on noisy tokens (RAE v1)."""

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from raekit import randomness
from raekit.config import OnPurpose, Place, Steps, configclass
from raekit.data.loader import Batch
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.augment import AugmentConfig, augment
from raekit.models.autoencoder import Autoencoder
from raekit.models.decoder import Decoder
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
from raekit.training.objective import Metrics
from raekit.training.optim import OptimConfig

NoiseLaw = Literal["half-normal", "uniform"]


@configclass
class PerceptualConfig:
    """The LPIPS term of the decoder's loss.

    Attributes:
        weight: Factor of LPIPS in the loss.
        start: First training step with LPIPS in the loss.
        weights: File with the weights of VGG16. None: torchvision's cache, or a download from the Hub.
    """

    weight: float = 1.0
    start: OnPurpose[Steps] = 0
    weights: OnPurpose[Place | None] = None


@configclass
class AdversarialConfig:
    """The discriminator and the adversarial term of the decoder's loss (RAE v1).

    The adversarial term is `weight` times the adaptive weight times the generator's loss. The adaptive weight balances
    the gradients of the reconstruction and of the generator's loss at the decoder's last layer. It is computed over
    the images of all processes, separately for each micro-batch, because the full batch is never in memory at once.

    Attributes:
        discriminator: Backbone and heads of the discriminator.
        augment: Augmentation of all images that the discriminator sees.
        loss: Loss of the discriminator.
        weight: Constant factor of the adversarial term.
        max_weight: Upper limit of the adaptive weight.
        local_weight: Computes the adaptive weight in each process over its own images, as the published code does.
        discriminator_start: First training step in which the discriminator is trained.
        start: First training step with the adversarial term in the decoder's loss, at least `discriminator_start`.
        schedule: Step 0 of the discriminator's learning rate schedule. `published` counts from `discriminator_start`,
            as the published code does; a training that ends at `optim.decay_end` then stops above `optim.final_lr`.
            `common` counts from the first training step, like the decoder's schedule.
        optim: Optimizer and learning rate schedule of the discriminator.
    """

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: Literal["hinge", "softplus"] = "hinge"
    weight: float = 0.75
    max_weight: float = 1e4
    local_weight: bool = False
    discriminator_start: OnPurpose[Steps] = 0
    start: OnPurpose[Steps] = 0
    schedule: OnPurpose[Literal["published", "common"]] = "published"
    optim: OptimConfig

    def __post_init__(self) -> None:
        if self.start < self.discriminator_start:
            raise UserError(
                f"adversarial.start: {self.start} is before discriminator_start = {self.discriminator_start}: "
                "the decoder would learn from an untrained discriminator; start at step "
                f"{self.discriminator_start} or later"
            )


@configclass
class DecoderLossConfig:
    """The decoder's loss: L1 on noisy tokens, and optional further terms.

    Attributes:
        noise: Scale tau of the noise on the tokens (RAE v1), in units of the un-whitened tokens; 0 adds no noise.
        noise_law: Distribution of each sample's noise level sigma. `half-normal` is |N(0, tau^2)|, as in the paper;
            `uniform` is tau * U(0, 1), as in the published code.
        perceptual: The LPIPS term; None leaves it out.
        adversarial: The discriminator and the adversarial term; None leaves them out.
    """

    noise: float = 0.8
    noise_law: NoiseLaw = "half-normal"
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise UserError(f"noise: {self.noise} must not be negative")


def noise_scales(tau: float, law: NoiseLaw, seed: int, positions: Tensor, device: torch.device) -> Tensor:
    """Draw the noise levels sigma (B,) of the samples at `positions`, by the distribution `law` (RAE v1)."""
    if law == "uniform":
        return tau * randomness.uniform(seed, "noise scale", positions, (), device)
    return tau * randomness.normal(seed, "noise scale", positions, (1,), device)[:, 0].abs()


def noisy(latents: Tensor, config: DecoderLossConfig, seed: int, positions: Tensor) -> Tensor:
    """Add the noise of noise-augmented decoding to un-whitened latents (B, C, H, W) (RAE v1)."""
    if not config.noise:
        return latents
    device = latents.device
    sigma = noise_scales(config.noise, config.noise_law, seed, positions, device)
    return latents + sigma.view(-1, 1, 1, 1) * randomness.normal(seed, "noise", positions, latents.shape[1:], device)


class Encoded:
    """A batch that is encoded on first use, once for all objectives.

    Repeated splits of the same size return the same parts, so that each part is encoded only once too.

    Attributes:
        images: Images (B, 3, S, S) in [0, 1].
        latents: Un-whitened latents (B, C, h, w) of the images.
        positions: Positions (B,) of the images in the data stream.
        parts: The micro-batches of earlier splits, by size.
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
    """Return the norms of the gradients at the weight of the decoder's last layer.

    Args:
        gradients: Gradients of several losses with respect to the decoder's output (B, 3, S, S).
        last_input: Input (B, N, width) of the last layer.
        patch_size: Side of the decoder's patches in pixels.
        world: The processes whose images count.

    Returns:
        One norm per gradient.
    """
    with torch.autocast(last_input.device.type, enabled=False):
        inputs = last_input.float().flatten(0, 1)
        weights = [patchify(gradient, patch_size).float().flatten(0, 1).mT @ inputs for gradient in gradients]
    return (world.sum(torch.stack(weights)) / world.size).flatten(1).norm(dim=1)


class Losses:
    """The losses of the decoder and of the discriminator (RAE v1).

    A discriminator whose backbone is the autoencoder's encoder shares the encoder's weights.
    """

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
        """Return L1 + LPIPS + the adversarial term, each from its start step on, and the metrics to log."""
        adversarial, network = self.config.adversarial, self.discriminator_network
        latents = noisy(batch.latents, self.config, self.seed, batch.positions)
        last_input: list[Tensor] = []
        decoded = self.model.decoder(latents, last_input)
        if adversarial is None or network is None or step < adversarial.start:
            return self._reconstruction(self.model.to_pixels(decoded), batch.images, step)
        # Backpropagate both losses to the decoder's output first. The adaptive weight follows from the two gradients
        # there, and a single backward pass through the decoder then serves the weighted sum.
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
        """Return the discriminator's loss on real images and reconstructions, and the metrics to log.

        The reconstructions have no noise, and are rounded to 8 bits like the real images.
        """
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

    def reconstruction(self, decoder: Decoder, batch: Encoded, step: int) -> Tensor:
        """Return L1 + LPIPS of any decoder on noisy tokens, without the adversarial term."""
        latents = noisy(batch.latents, self.config, self.seed, batch.positions)
        return self._reconstruction(self.model.to_pixels(decoder(latents)), batch.images, step)[0]

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
