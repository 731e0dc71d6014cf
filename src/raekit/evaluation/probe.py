"""Linear probes: how much of the classes a linear map reads from frozen latents."""

import copy
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raekit import artifacts, randomness
from raekit.data.loader import DataConfig, Loader
from raekit.data.sources.base import Split
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.intervals import wilson_interval
from raekit.evaluation.streaming import BATCH, feature_bank, images_of
from raekit.formats import conversion as conversion
from raekit.models.autoencoder import Autoencoder, load_autoencoder
from raekit.models.baselines import BaselineConfig
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.latent_space import LatentSpace
from raekit.models.layers import to_tokens
from raekit.models.registry import REGISTRY
from raekit.progress import Progress, counted, silent

_log = logging.getLogger(__name__)

Tokens = Literal["mean", "all"]

PENALTIES = tuple(10.0**k for k in range(-6, 1))
"""Those that are tried, where none is given."""


@dataclass(frozen=True)
class Probe:
    """`accuracy` on `images` held-out images, from `low` to `high` in its 95 % confidence interval (Wilson, 1927).

    `training` is the accuracy on the training images, `penalty` the factor of half the squared weights in the
    regression's loss, whose other part is the mean cross-entropy.
    """

    accuracy: float
    low: float
    high: float
    images: int
    training: float
    penalty: float


def probe(
    name: str,
    source: str,
    *,
    tokens: Tokens = "mean",
    image_size: int | None = None,
    penalty: float | None = None,
    workers: int = 0,
    world: World | None = None,
    progress: Progress = silent,
) -> dict[str, Probe]:
    """Probe the encoder or autoencoder `name` on the labelled images of `source`, split as `open_source` does.

    Of an autoencoder, the whitened latents; beside them the tokens of its encoder with random weights, which are
    not whitened; a baseline stands alone. Images are centre-cropped to `image_size`, by default the model's. Called by
    all processes, which share the images; the first fits, the others get nothing. The features of all are held in
    memory. UserError without labels, or without scikit-learn.
    """
    world = world or World()
    model = _load(name).to(world.device)
    size = image_size or (max(model.input_size) if isinstance(model, Encoder) else model.image_size)
    networks = {name: _Features(name, _tokens_of(model), _shape(model), tokens)}
    encoder = model.encoder if isinstance(model, Autoencoder) else model
    if isinstance(encoder, Encoder):
        random = untrained(encoder)
        networks["random weights"] = _Features("random weights", random, _shape(random), tokens)
    loaders = {split: _loader(source, split, size, workers) for split in ("train", "heldout")}
    banks: dict[str, list[np.ndarray]] = {row: [] for row in networks}
    for row, network in networks.items():
        for split, loader in loaders.items():
            shown = counted(progress, f"{row}, {split}", len(loader), world.size)
            features, labels = feature_bank(images_of(loader.once(BATCH, world), world), network, world, shown)
            banks[row] += [features.cpu().numpy()[labels.cpu() >= 0], labels.cpu().numpy()[labels.cpu() >= 0]]
    # After all that is done together: the others do not wait for what may take long.
    return {row: linear_probe(*bank, penalty=penalty) for row, bank in banks.items()} if world.is_main else {}


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    heldout_features: np.ndarray,
    heldout_labels: np.ndarray,
    *,
    penalty: float | None = None,
) -> Probe:
    """Logistic regression of `labels` (N,) on `features` (N, D), standardised by their own moments.

    Without `penalty` it is the one of PENALTIES that is best on a tenth of the training images, after fitting on
    the others. UserError for fewer than two classes, and if scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError("a linear probe needs the package scikit-learn: pip install 'raekit[probe]'") from None
    if penalty is not None and not 0 < penalty < math.inf:
        raise UserError(f"penalty: {penalty} must be positive")
    if len(np.unique(labels)) < 2 or not len(heldout_labels):
        raise UserError("a linear probe needs training images of at least two classes, and held-out images")
    mean, std = features.mean(0), features.std(0)
    std[std == 0] = 1
    features, heldout_features = (features - mean) / std, (heldout_features - mean) / std

    def fitted(chosen: np.ndarray, strength: float, search: bool = True) -> LogisticRegression:
        regression = LogisticRegression(C=1 / (strength * len(chosen)), max_iter=1000)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            regression.fit(features[chosen], labels[chosen])
        if not search and any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            _log.warning("linear probe: not converged at penalty %g", strength)
        return regression

    order = randomness.numpy_generator(0, "probe", 0).permutation(len(labels))
    if penalty is None:
        tenth = max(len(labels) // 10, 1)
        chosen, rest = order[:tenth], order[tenth:]
        if len(np.unique(labels[rest])) < 2:
            raise UserError("a linear probe needs more images of each class to choose its penalty; give one")
        penalty = max(PENALTIES, key=lambda strength: fitted(rest, strength).score(features[chosen], labels[chosen]))
    regression = fitted(order, penalty, search=False)
    right = int(np.sum(regression.predict(heldout_features) == heldout_labels))
    low, high = wilson_interval(right, len(heldout_labels))
    return Probe(
        accuracy=right / len(heldout_labels),
        low=low,
        high=high,
        images=len(heldout_labels),
        training=float(regression.score(features, labels)),
        penalty=penalty,
    )


def untrained(encoder: Encoder) -> Encoder:
    """The same encoder with the weights that its architecture starts from, the same at each call."""
    twin = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = type(encoder.model)(encoder.model.config).state_dict()  # type: ignore[call-arg]
    # An encoder keeps a part of what its architecture has: no affine part in the last norm.
    twin.model.load_state_dict({key: fresh[key] for key in twin.model.state_dict()})
    twin.name = "random"
    return twin


def _load(name: str) -> Encoder | LatentSpace:
    if name not in REGISTRY and not BaselineConfig.named(name):
        try:
            artifacts.find(name, "autoencoder")
        except UserError:
            return load_encoder(name)
    return load_encoder(name) if name in REGISTRY else load_autoencoder(name)


def _loader(source: str, split: Split, size: int, workers: int) -> Loader:
    loader = Loader(DataConfig(source=source, split=split, image_size=size, workers=workers), seed=0)
    if not loader.classes:
        raise UserError(f"data source {source!r} has no labels to probe for; use a source with classes")
    return loader


def _tokens_of(model: Encoder | LatentSpace) -> Callable[[Tensor], Tensor]:
    return (lambda images: to_tokens(model.encode(images))) if isinstance(model, LatentSpace) else model


def _shape(model: Encoder | LatentSpace) -> tuple[int, int, int]:
    return model.latent_shape if isinstance(model, LatentSpace) else (model.width, *model.grid)


@dataclass(frozen=True, eq=False)
class _Features:
    """Tokens (B, N, C) of images, their mean or all of them, as a `FeatureNetwork`."""

    name: str
    model: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    tokens: Tokens

    @property
    def width(self) -> int:
        channels, height, width = self.shape
        return channels * (1 if self.tokens == "mean" else height * width)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        tokens = self.model(images).float()
        return tokens.mean(1) if self.tokens == "mean" else tokens.flatten(1)
