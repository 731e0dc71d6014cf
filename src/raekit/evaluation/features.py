"""What evaluation streams, and the networks in whose features images are compared."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from raekit.errors import UserError
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.inception import LOGITS, POOL, SIZE, SPATIAL, Inception, load_inception
from raekit.models.registry import FAMILIES, LayersConfig, sides
from raekit.pictures import quantize
from raekit.weights import fingerprint


class FeatureNetwork(Protocol):
    """A frozen network, images (B, 3, H, W) in [0, 1] -> features (B, width) float32."""

    @property
    def name(self) -> str: ...  # stands in the names of the metrics that use it
    @property
    def width(self) -> int: ...
    def __call__(self, images: Tensor, /) -> Tensor: ...


class ReferenceNetwork(FeatureNetwork, Protocol):
    """A network that a reference can be made with: it tells how it brings images to its own size."""

    @property
    def resize(self) -> str: ...


def weights_of(network: FeatureNetwork) -> str:
    """16 digits that tell the weights of `network` from others of the same name."""
    if isinstance(network, Part):
        return weights_of(network.whole)
    if isinstance(network, InceptionFeatures):
        return fingerprint(network.network.state_dict())
    return fingerprint(network.encoder.state_dict()) if isinstance(network, EncoderFeatures) else ""


def check_width(what: str, width: int, network: FeatureNetwork) -> None:
    """UserError if `what`, features or moments of `width` dimensions, cannot be of `network`."""
    if width != network.width:
        raise UserError(
            f"the {what} has {width} dimensions, the features of {network.name} have {network.width}: "
            f"compute the {what} with {network.name}"
        )


def named(metric: str, network: FeatureNetwork) -> str:
    """`metric` in the features of `network`, as it is reported; in those of FID's network by its own name."""
    return metric if network.name in ("inception", "inception_logits") else f"{metric}_{network.name}"


@dataclass(frozen=True, eq=False)
class Images:
    """A batch to score. Construction rounds its images to 8 bits, the one place where evaluation does so:
    what is streamed from a model scores as it would after saving and reading back.

    images: (B, 3, H, W), float in [0, 1].
    labels: (B,) int64, the intended classes; -1 where there is none.
    originals: what the images are reconstructions of, in the same order and shape.
    indices: (B,) int64, the numbers of the images in the whole stream, from 0; for metrics that depend on the
    order of the images, so that they do not depend on which process had which.
    """

    images: Tensor
    labels: Tensor
    originals: Tensor | None = None
    indices: Tensor | None = None
    _features: "dict[FeatureNetwork | PairScore, Tensor]" = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[1] != 3 or not self.images.is_floating_point():
            raise ValueError(f"images must be float (B, 3, H, W), not {self.images.dtype} {shape}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"{len(self.images)} images with labels of shape {tuple(self.labels.shape)}")
        if self.originals is not None and self.originals.shape != self.images.shape:
            raise ValueError(f"images {shape} with originals {tuple(self.originals.shape)}")
        if self.indices is not None and self.indices.shape != self.labels.shape:
            raise ValueError(f"{len(self.images)} images with indices of shape {tuple(self.indices.shape)}")
        object.__setattr__(self, "images", quantize(self.images))
        if self.originals is not None:
            object.__setattr__(self, "originals", quantize(self.originals))

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def gone(cls, features: "Mapping[FeatureNetwork | PairScore, Tensor]", labels: Tensor, indices: Tensor) -> Self:
        """A batch of which `features` alone are left."""
        batch = cls(torch.empty(len(labels), 3, 0, 0), labels, indices=indices)
        batch._features.update(features)
        return batch

    def features(self, network: "FeatureNetwork | PairScore") -> Tensor:
        """The features (B, width) of the images, computed once for all metrics that share `network`."""
        if network in self._features:
            return self._features[network]
        if isinstance(network, Part):
            return self.features(network.whole)[:, network.columns]
        if not isinstance(network, PairScore):
            self._features[network] = network(self.images)
        elif self.originals is not None:
            self._features[network] = network(self.images, self.originals)
        else:
            raise ValueError(f"{network.name} compares with originals, and the batch has none")
        return self._features[network]


@dataclass(frozen=True, eq=False)
class PairScore:
    """`score(images, originals) -> (B,)`, such as PSNR, as a feature of one dimension (B, 1)."""

    name: str
    score: Callable[[Tensor, Tensor], Tensor]
    width: int = 1

    def __call__(self, images: Tensor, originals: Tensor, /) -> Tensor:
        return self.score(images, originals)[:, None]


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the features of a network, which computes them once for all its parts."""

    name: str
    whole: ReferenceNetwork
    columns: slice

    @property
    def width(self) -> int:
        return len(range(self.whole.width)[self.columns])

    @property
    def resize(self) -> str:
        return self.whole.resize

    def __call__(self, images: Tensor) -> Tensor:
        return self.whole(images)[:, self.columns]


class InceptionFeatures:
    """FID's network and its parts: `pool` for FID, KID, precision and recall, `logits` for the Inception Score,
    `spatial` for sFID. With clean-fid's resize they are called `clean_inception`, because they are others."""

    width = POOL + LOGITS + SPATIAL

    def __init__(self, network: Inception):
        self.network = network
        prefix = {"tf1": "inception", "clean": "clean_inception"}[network.resize]
        self.name = f"{prefix}_all"
        self.resize = f"{network.resize} to {SIZE}"
        self.pool = Part(prefix, self, slice(0, POOL))
        self.logits = Part(f"{prefix}_logits", self, slice(POOL, POOL + LOGITS))
        self.spatial = Part(f"{prefix}_spatial", self, slice(POOL + LOGITS, None))

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images)


def encoder_name(encoder: str) -> str:
    """What the features of an encoder that `load_encoder` takes are called."""
    name = re.sub(f"^({'|'.join(FAMILIES)}|builtin):", "", encoder)
    if Path(name).is_absolute() or Path(name).is_dir():
        name = Path(name).resolve().name
    return _plain(name)


def _plain(name: str) -> str:
    return re.sub("[^0-9A-Za-z]+", "_", name).strip("_")


class EncoderFeatures:
    """The mean over an encoder's patch tokens, of images resized (bicubic, antialiased) to its input size.

    `name` is the encoder's with underscores for what is no letter or digit: "vit-tiny" and "builtin:vit-tiny"
    are `vit_tiny`, so that their Frechet distance is reported as `fd_vit_tiny`. An encoder from a local
    folder is named by the folder; one used at another input size than its own, or with other layers than the
    last, has them in its name.
    """

    def __init__(self, encoder: Encoder):
        self.encoder, self.width = encoder, encoder.spec.width
        name = encoder_name(encoder.name)
        if encoder.input_size != sides(encoder.spec.image_size):
            name = "_".join([name, *map(str, dict.fromkeys(encoder.input_size))])
        if encoder.layers != LayersConfig():
            name = f"{name}_{encoder.layers}"
        self.name = _plain(name)
        self.resize = f"bicubic, antialiased, to {' x '.join(map(str, encoder.input_size))}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        size = self.encoder.input_size
        # A stream that samples under autocast leaves it on between its batches: features stay float32.
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            if images.shape[2:] != size:
                images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
            return self.encoder(images).mean(1)


def load_networks(name: str, device: torch.device) -> dict[str, ReferenceNetwork]:
    """The networks {name: network} whose features `name` stands for.

    `inception` is FID's network with the published weights, `inception:PLACE` with those at PLACE (as
    `load_inception` takes it), `clean_inception` the same with clean-fid's resize; each has a second network,
    sFID's. Any other name is a registered encoder, `builtin:NAME` or a folder.
    """
    kind, _, place = name.partition(":")
    if kind in ("inception", "clean_inception"):
        network = load_inception(place or None, "tf1" if kind == "inception" else "clean").to(device)
        features = InceptionFeatures(network)
        return {part.name: part for part in (features.pool, features.spatial)}
    encoder = EncoderFeatures(load_encoder(name).to(device))
    return {encoder.name: encoder}


def default_features(source: str) -> tuple[str, ...]:
    """Return the networks in which images of `source` are compared by default: only the built-in images have any.

    Raises:
        UserError: another source. Its images need a network that knows such images.
    """
    if source == "emoji":
        return ("builtin:vit-tiny",)
    raise UserError(
        f"features: name the networks to compare images of {source} in, as in inception or dinov2-b; only the "
        "built-in images have a default"
    )
