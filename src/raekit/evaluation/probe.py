"""Linear probes: how well a linear classifier predicts the classes from frozen latents."""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
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
from raekit.moments import Moments
from raekit.progress import Progress, counted, silent

_log = logging.getLogger(__name__)

Tokens = Literal["mean", "all"]

Array = np.ndarray | Tensor
_BLOCK = 65_536
"""Images whose logits are in memory at once."""
_ITERATIONS = 1000
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
        seconds: time of all fits.
    """

    accuracy: float
    low: float
    high: float
    images: int
    training: float
    penalty: float
    seconds: float = field(compare=False)


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
        UserError: the images have no labels.
    """
    _check_penalty(penalty)
    world = world or World()
    model = _load(name).to(world.device)
    size = image_size
    if size is None:
        size = max(model.input_size) if isinstance(model, Encoder) else model.image_size
    networks = {name: _Features(name, _tokens_of(model), _shape(model), tokens)}
    encoder = model.encoder if isinstance(model, Autoencoder) else model
    if isinstance(encoder, Encoder) and hasattr(encoder.model, "config"):  # `untrained` builds the network from it
        random = untrained(encoder)
        networks["random weights"] = _Features("random weights", random, _shape(random), tokens)
    loaders = {split: _loader(source, split, size, workers) for split in ("train", "heldout")}
    loaders["train"].announce(world)
    banks: dict[str, list[Tensor]] = {row: [] for row in networks}
    for row, network in networks.items():
        for split, loader in loaders.items():
            shown = counted(progress, f"{row}, {split}", len(loader), world.size)
            features, labels = feature_bank(images_of(loader.once(BATCH, world), world), network, world, shown)
            banks[row] += [features[labels >= 0], labels[labels >= 0]]
    if not world.is_main:  # the first process fits after the last exchange, so that no other process waits for it
        return {}
    fits = 1 if penalty is not None else len(PENALTIES) + 1
    return {
        row: linear_probe(
            *bank, penalty=penalty, fitted=lambda done, row=row: progress(f"{row}, fits", done, fits, unit=0)
        )
        for row, bank in banks.items()
    }


def _check_penalty(penalty: float | None) -> None:
    if penalty is not None and not 0 < penalty < math.inf:
        raise UserError(f"penalty: {penalty} must be positive and finite")


def linear_probe(
    features: Array,
    labels: Array,
    heldout_features: Array,
    heldout_labels: Array,
    *,
    penalty: float | None = None,
    fitted: Callable[[int], None] = lambda fits: None,
) -> Probe:
    """Fit a logistic regression on training images, and score it on held-out images.

    The regression is fitted on the device of the features, in blocks of images, by L-BFGS. An evaluation of its loss
    costs 4 N D C FLOPs for N images, D features and C classes: 4 TFLOP for ImageNet and a width of 768. A fit takes
    tens to hundreds of evaluations, so all fits take minutes on a GPU.

    Args:
        features: features (N, D) of the training images. All features are standardised by their mean and deviation.
        labels: labels (N,) of the training images.
        heldout_features: features (M, D) of the held-out images.
        heldout_labels: labels (M,) of the held-out images.
        penalty: weight decay of the regression. Default: each of PENALTIES is fitted on nine tenths of the training
            images, and the penalty with the best accuracy on the last tenth is used.
        fitted: called after each fit with the number of fits so far.

    Raises:
        UserError: fewer than two classes, or no held-out images.
    """
    _check_penalty(penalty)
    began = time.perf_counter()
    training = torch.as_tensor(features), torch.as_tensor(labels)
    heldout = torch.as_tensor(heldout_features), torch.as_tensor(heldout_labels)
    classes = training[1].unique()
    if len(classes) < 2 or not len(heldout[1]):
        raise UserError("a linear probe needs training images of at least two classes, and held-out images")
    regression = _Regression(training[0], classes)
    order = torch.from_numpy(randomness.numpy_generator(0, "probe", 0).permutation(len(labels)))
    done = 0
    if penalty is None:
        tenth = max(len(labels) // 10, 1)
        chosen, rest = order[:tenth], order[tenth:]
        if len(training[1][rest].unique()) < 2:
            raise UserError("a linear probe needs more images of each class to choose its penalty; give a penalty")
        scores = {}
        for done, each in enumerate(sorted(PENALTIES, reverse=True), 1):  # each fit starts from a more even one
            regression.fit(*training, rest, each)
            scores[each] = regression.hits(*training, chosen)
            fitted(done)
        penalty = max(PENALTIES, key=scores.__getitem__)
        regression = _Regression(training[0], classes)
    if not regression.fit(*training, order, penalty):
        _log.warning("linear probe: the regression did not converge at penalty %g", penalty)
    fitted(done + 1)
    right = regression.hits(*heldout)
    low, high = wilson_interval(right, len(heldout[1]))
    return Probe(
        accuracy=right / len(heldout[1]),
        low=low,
        high=high,
        images=len(heldout[1]),
        training=regression.hits(*training) / len(training[1]),
        penalty=penalty,
        seconds=time.perf_counter() - began,
    )


class _Regression:
    """A multinomial logistic regression of standardised features.

    Args:
        features: the features (N, D) whose mean and deviation standardise all features.
        classes: the labels (C,) that occur. Two classes have one vector of weights, as usual.
    """

    def __init__(self, features: Tensor, classes: Tensor) -> None:
        moments = Moments(features.shape[1], diagonal=True)
        for block in features.split(_BLOCK):
            moments.update(block)
        device, mean, std = features.device, moments.mean, moments.variance.sqrt()
        constant = std <= 1e-7 * mean.abs()  # up to the rounding of float32
        self.mean, self.std = mean.to(device), torch.where(constant, 1.0, std).to(device)
        self.classes = classes.to(device)
        outputs = len(classes) if len(classes) > 2 else 1
        self.weights = torch.zeros(features.shape[1] + 1, outputs, dtype=torch.float64, device=device)

    def fit(self, features: Tensor, labels: Tensor, rows: Tensor, penalty: float) -> bool:
        """Minimise the loss over `rows`, starting from the present weights. Return whether this converged."""
        targets = torch.searchsorted(self.classes, labels.to(self.classes.device))
        optimizer = torch.optim.LBFGS(
            [self.weights],
            max_iter=_ITERATIONS,
            max_eval=2 * _ITERATIONS,
            tolerance_grad=1e-5,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            weights, gradient = self.weights[:-1], torch.zeros_like(self.weights)
            total = penalty / 2 * weights.square().sum()
            gradient[:-1] = penalty * weights
            for part in rows.split(_BLOCK):
                x, logits = self._logits(features[part.to(features.device)])
                right = targets[part.to(targets.device)]
                total = total + F.cross_entropy(logits, right, reduction="sum").double() / len(rows)
                slope = logits.softmax(1)
                slope[torch.arange(len(right), device=right.device), right] -= 1
                slope = slope[:, -gradient.shape[1] :] / len(rows)
                gradient[:-1] += x.T @ slope
                gradient[-1] += slope.sum(0)
            self.weights.grad = gradient
            return total

        optimizer.step(loss)  # type: ignore[arg-type]  # torch's stub wants a float
        assert self.weights.grad is not None
        return optimizer.state[self.weights]["n_iter"] < _ITERATIONS

    def hits(self, features: Tensor, labels: Tensor, rows: Tensor | None = None) -> int:
        """Return how many images of `rows` get their label."""
        right = 0
        for part in (torch.arange(len(labels)) if rows is None else rows).split(_BLOCK):
            guesses = self._logits(features[part.to(features.device)])[1].argmax(1)
            right += int((self.classes[guesses] == labels[part.to(labels.device)].to(guesses.device)).sum())
        return right

    def _logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised features (B, D) and the logits (B, C)."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        x = ((features.to(self.mean.device) - self.mean) / self.std).to(dtype)
        logits = x @ self.weights[:-1].to(dtype) + self.weights[-1].to(dtype)
        return x, logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], 1)


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
