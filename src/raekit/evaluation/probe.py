"""Linear probes: how well a linear classifier predicts the classes from frozen latents."""

import copy
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
"""The penalties that are tried by default."""


@dataclass(frozen=True)
class Probe:
    """The result of a linear probe.

    Attributes:
        accuracy: accuracy on the held-out images.
        low: lower bound of its 95 % confidence interval (Wilson, 1927).
        high: upper bound of the interval.
        images: number of held-out images.
        training: accuracy on the training images.
        penalty: weight decay of the regression. Its loss is the mean cross-entropy + penalty / 2 * |weights|^2.
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
    """Fit a linear probe on the training images of a dataset, and score it on the held-out images.

    The probe of an encoder reads its tokens, the probe of an autoencoder its whitened latents. Both come with the probe
    of the same encoder with random weights, whose tokens are not whitened; a baseline has no encoder to compare with.
    All processes call this function and share the images. The features of all images are held in memory.

    Args:
        name: an encoder or autoencoder.
        source: address of a dataset with labels.
        tokens: "mean" reads the mean token, "all" reads all tokens.
        image_size: images are centre-cropped to this size. Default: the model's.
        penalty: weight decay of the regression. Default: chosen from PENALTIES.
        workers: processes that decode images.
        world: the processes and their device. Default: this process.
        progress: called after each batch.

    Returns:
        {`name` or "random weights": result} in the first process; {} in the other processes.

    Raises:
        UserError: the images have no labels, or scikit-learn is not installed.
    """
    _regression()
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
    # The first process fits after the last exchange, so that no other process waits for it.
    return {row: linear_probe(*bank, penalty=penalty) for row, bank in banks.items()} if world.is_main else {}


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    heldout_features: np.ndarray,
    heldout_labels: np.ndarray,
    *,
    penalty: float | None = None,
) -> Probe:
    """Fit a logistic regression on training images, and score it on held-out images.

    Args:
        features: features (N, D) of the training images. All features are standardised by their mean and deviation.
        labels: labels (N,) of the training images.
        heldout_features: features (M, D) of the held-out images.
        heldout_labels: labels (M,) of the held-out images.
        penalty: weight decay of the regression. Default: each of PENALTIES is fitted on nine tenths of the training
            images, and the penalty with the best accuracy on the last tenth is used.

    Raises:
        UserError: fewer than two classes, no held-out images, or scikit-learn is not installed.
    """
    logistic_regression, convergence_warning = _regression()
    if penalty is not None and not 0 < penalty < math.inf:
        raise UserError(f"penalty: {penalty} must be positive")
    if len(np.unique(labels)) < 2 or not len(heldout_labels):
        raise UserError("a linear probe needs training images of at least two classes, and held-out images")
    mean, std = features.mean(0), features.std(0)
    std[std == 0] = 1
    features, heldout_features = (features - mean) / std, (heldout_features - mean) / std

    def fitted(chosen: np.ndarray, strength: float, search: bool = True) -> Any:
        regression = logistic_regression(C=1 / (strength * len(chosen)), max_iter=1000)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", convergence_warning)
            regression.fit(features[chosen], labels[chosen])
        if not search and any(issubclass(warning.category, convergence_warning) for warning in caught):
            _log.warning("linear probe: the regression did not converge at penalty %g", strength)
        return regression

    order = randomness.numpy_generator(0, "probe", 0).permutation(len(labels))
    if penalty is None:
        tenth = max(len(labels) // 10, 1)
        chosen, rest = order[:tenth], order[tenth:]
        if len(np.unique(labels[rest])) < 2:
            raise UserError("a linear probe needs more images of each class to choose its penalty; give a penalty")
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


def _regression() -> tuple[Any, Any]:
    """Return scikit-learn's logistic regression, and the warning that it did not converge."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError("a linear probe needs the package scikit-learn: pip install 'raekit[probe]'") from None
    return LogisticRegression, ConvergenceWarning


def untrained(encoder: Encoder) -> Encoder:
    """Return a copy of the encoder with freshly initialised weights, which are the same at each call."""
    twin = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = type(encoder.model)(encoder.model.config).state_dict()  # type: ignore[call-arg]
    # The encoder has only some of the weights of its architecture: its last norm has no affine part.
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
    """A `FeatureNetwork`: the mean of the tokens (B, N, C) of images, or all tokens."""

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
