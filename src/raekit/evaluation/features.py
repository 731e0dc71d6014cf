"""Batches of images to score, and the networks that compute their features."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from raekit.errors import UserError
from raekit.models.classifier import Classifier, load_classifier
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.inception import LOGITS, POOL, SIZE, SPATIAL, Inception, load_inception
from raekit.models.perceptual import LPIPS, load_perceptual
from raekit.models.pooled import POOLED, PooledNetwork, load_pooled
from raekit.models.registry import FAMILIES, LayersConfig, sides
from raekit.pictures import quantize
from raekit.weights import fingerprint


class FeatureNetwork(Protocol):
    """A frozen network that maps images (B, 3, H, W) in [0, 1] to features (B, width), float32."""

    @property
    def name(self) -> str: ...  # part of the names of the metrics that use the network
    @property
    def width(self) -> int: ...
    def __call__(self, images: Tensor, /) -> Tensor: ...


class ReferenceNetwork(FeatureNetwork, Protocol):
    """A network that can measure a reference. `resize` describes how the network resizes its images."""

    @property
    def resize(self) -> str: ...


def weights_of(network: FeatureNetwork) -> str:
    """Return 16 hexadecimal digits that identify the weights of `network`; empty for other kinds of networks."""
    if isinstance(network, Part):
        return weights_of(network.whole)
    if isinstance(network, PooledNetwork):
        return fingerprint(network.model.state_dict())
    if isinstance(network, InceptionFeatures | VGGFeatures | ClassifierFeatures):
        return fingerprint(network.network.state_dict())
    return fingerprint(network.encoder.state_dict()) if isinstance(network, EncoderFeatures) else ""


def check_width(what: str, width: int, network: FeatureNetwork) -> None:
    """Raise UserError if `width` is not the number of features of `network`; `what` names the data in the message."""
    if width != network.width:
        raise UserError(
            f"the {what} has {width} dimensions, but the features of {network.name} have {network.width}; "
            f"compute the {what} with {network.name}"
        )


def named(metric: str, network: FeatureNetwork) -> str:
    """Return the reported name of `metric` in the features of `network`: Inception adds no suffix."""
    return metric if network.name in ("inception", "inception_logits") else f"{metric}_{network.name}"


@dataclass(frozen=True, eq=False)
class Images:
    """A batch to score.

    The constructor rounds images and originals to 8 bits, so that images from a model get the same scores as the same
    images after saving and reading. Evaluation rounds images nowhere else.

    Args:
        images: (B, 3, H, W), float in [0, 1].
        labels: (B,) int64, the intended classes; -1 for an image without a class.
        indices: (B,) int64, the positions of the images in the complete stream, from 0. With them, no score depends on
            the number of processes.
        originals: for reconstructions, the images that were reconstructed, in the same order and shape.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    originals: Tensor | None = None
    _features: "dict[FeatureNetwork | PairScore, Tensor]" = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[1] != 3 or not self.images.is_floating_point():
            raise ValueError(f"images must be float (B, 3, H, W), not {self.images.dtype} {shape}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"{len(self.images)} images with labels of shape {tuple(self.labels.shape)}")
        if self.originals is not None and self.originals.shape != self.images.shape:
            raise ValueError(f"images {shape} with originals {tuple(self.originals.shape)}")
        if self.indices.shape != self.labels.shape:
            raise ValueError(f"{len(self.images)} images with indices of shape {tuple(self.indices.shape)}")
        object.__setattr__(self, "images", quantize(self.images))
        if self.originals is not None:
            object.__setattr__(self, "originals", quantize(self.originals))

    def __len__(self) -> int:
        return len(self.labels)

    def __getattr__(self, name: str) -> Any:
        """Explain the missing images of a batch of stored features."""
        if name == "images":
            raise ValueError("this batch has stored features and no images; compute what you need in a FeatureNetwork")
        raise AttributeError(name)

    @classmethod
    def gone(cls, features: "Mapping[FeatureNetwork | PairScore, Tensor]", labels: Tensor, indices: Tensor) -> Self:
        """Return a batch that holds features, but no images."""
        batch = cls.__new__(cls)
        for name, value in {"labels": labels, "indices": indices, "_features": dict(features)}.items():
            object.__setattr__(batch, name, value)
        return batch

    def features(self, network: "FeatureNetwork | PairScore") -> Tensor:
        """Return the features (B, width) of the images. They are computed once for all metrics that use `network`."""
        if network in self._features:
            return self._features[network]
        if isinstance(network, Part):
            return self.features(network.whole)[:, network.columns]
        if not isinstance(network, PairScore):
            self._features[network] = network(self.images)
        elif self.originals is not None:
            self._features[network] = network(self.images, self.originals)
        else:
            raise ValueError(f"{network.name} needs originals, and the batch has none")
        return self._features[network]


@dataclass(frozen=True, eq=False)
class PairScore:
    """A score of images and their originals, such as PSNR, as a feature (B, 1). `score` returns (B,)."""

    name: str
    score: Callable[[Tensor, Tensor], Tensor]
    width: int = 1

    def __call__(self, images: Tensor, originals: Tensor, /) -> Tensor:
        return self.score(images, originals)[:, None]


@dataclass(frozen=True, eq=False)
class Part:
    """A slice of the features of a network, which runs once for all its parts."""

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
    """All features of FID's Inception network, in three parts.

    With clean-fid's resize, the names of the parts begin with `clean_inception`, because the features differ.

    Attributes:
        pool: features for FID, KID, precision and recall.
        logits: class logits for the Inception Score.
        spatial: features for sFID.
    """

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
    """Return the name of the features of an encoder, for a name that `load_encoder` accepts."""
    name = re.sub(f"^({'|'.join(FAMILIES)}|builtin):", "", encoder)
    if Path(name).is_absolute() or Path(name).is_dir():
        name = Path(name).resolve().name
    return _plain(name)


def _plain(name: str) -> str:
    return re.sub("[^0-9A-Za-z]+", "_", name).strip("_")


class EncoderFeatures:
    """The mean of an encoder's patch tokens. Images are resized (bicubic, antialiased) to the encoder's input size.

    `name` is the encoder's name, with an underscore for every other character than letters and digits: "vit-tiny" and
    "builtin:vit-tiny" become `vit_tiny`, and their Frechet distance is reported as `fd_vit_tiny`. An encoder from a
    local folder has the folder's name. A different input size than the encoder's default, and other layers than the
    last, are added to the name.
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
        # Features are float32, also if the caller computes in bf16.
        with torch.autocast(images.device.type, enabled=False):
            return self.encoder(_resized(images, self.encoder.input_size)).mean(1)


class VGGFeatures:
    """VGG16's features, averaged over the image: the last layers of its stages 3 and 5 (conv3_3 and conv5_3).

    Images are resized to 128 pixels (bicubic, antialiased). The network of LPIPS is used, so a decoder that was trained
    with LPIPS has seen these features, and its distances in them are too small.
    """

    name = "vgg16"
    width = 256 + 512
    size = 128
    resize = f"bicubic, antialiased, to {size} x {size}"

    def __init__(self, network: LPIPS):
        self.network = network

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            stages = self.network.stages(_resized(images, (self.size, self.size)))
            return torch.cat([stages[2].mean((2, 3)), stages[4].mean((2, 3))], 1)


class ClassifierFeatures:
    """The features and the class logits of a classifier that raekit trained, in two parts.

    Attributes:
        pool: features before the last layer, averaged over the image.
        logits: class logits for the class accuracy.
    """

    def __init__(self, name: str, network: Classifier):
        self.network = network
        config = network.config
        self.name = f"{name}_all"
        self.width = config.widths[-1] + config.num_classes
        self.resize = f"bicubic, antialiased, to {config.image_size} x {config.image_size}"
        self.pool = Part(name, self, slice(0, config.widths[-1]))
        self.logits = Part(f"{name}_logits", self, slice(config.widths[-1], None))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            size = self.network.config.image_size
            features = self.network.features(_resized(images, (size, size)))
            return torch.cat([features, self.network.head(features)], 1)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return float32 images of `size`, resized with a bicubic, antialiased filter if they have another size."""
    images = images.float()
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


def load_networks(name: str, device: torch.device) -> dict[str, ReferenceNetwork]:
    """Load the networks that `name` stands for.

    Args:
        name: `inception` for FID's network with the published weights, `inception:PLACE` for weights at PLACE
            (`load_inception`), `clean_inception` or `clean_inception:PLACE` for clean-fid's resize. Both give two
            networks: FID's and sFID's. `vgg16` or `vgg16:FILE`, with weights as for LPIPS (`load_perceptual`), gives
            one network, and so does `classifier:NAME` for a classifier that raekit trained. `fdr6` gives the six
            networks of FDr6, from the Hub or its cache, and `fdr6:DIR` the same networks from the folders DIR/NAME for
            NAME in `POOLED` and DIR/inception. Any other name is an encoder as `load_encoder` takes it, or ENCODER@SIZE
            for images of SIZE pixels instead of the encoder's own size, and gives one network.
        device: where to load the networks.

    Returns:
        {name of the features: network}.

    Raises:
        UserError: the network is not known, or its weights are missing or damaged.
    """
    kind, _, place = name.partition(":")
    if kind in ("inception", "clean_inception"):
        network = load_inception(place or None, "tf1" if kind == "inception" else "clean").to(device)
        features = InceptionFeatures(network)
        return {part.name: part for part in (features.pool, features.spatial)}
    if kind == "fdr6":
        folders = {part: Path(place, part) if place else None for part in ("inception", *POOLED)}
        own = folders.pop("inception")
        inception = load_inception(str(own) if own and own.exists() else None, "tf1")
        networks: list[ReferenceNetwork] = [InceptionFeatures(inception.to(device)).pool]
        networks += [load_pooled(part, folder).to(device) for part, folder in folders.items()]
        return {network.name: network for network in networks}
    if kind == "vgg16":
        return {VGGFeatures.name: VGGFeatures(load_perceptual(place or None).to(device))}
    if kind == "classifier":
        classifier = ClassifierFeatures(f"{encoder_name(place)}_classifier", load_classifier(place).to(device))
        return {classifier.pool.name: classifier.pool}
    place, _, size = name.rpartition("@")
    if place and size.isdecimal() and len(size) < 6:
        encoder = EncoderFeatures(load_encoder(place, int(size)).to(device))
    else:
        encoder = EncoderFeatures(load_encoder(name).to(device))
    return {encoder.name: encoder}


def default_features(source: str) -> tuple[str, ...]:
    """Return the default networks for images of `source`. Only the built-in images have a default.

    Raises:
        UserError: `source` is not the built-in images.
    """
    if source == "emoji":
        return ("classifier:builtin:emoji",)
    raise UserError(
        f"features: images of {source} have no default network; name the networks to compare them in, such as "
        "inception or dinov2-b"
    )
