"""The linear path between data and noise, and its clock.

THE TIME CONVENTION, here and everywhere: t = 0 is data, t = 1 is noise,
`x_t = (1 - t) x + t noise`, velocity `v = noise - x`; sampling goes from 1 to 0 (spec 2.1).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from raekit.errors import UserError

SHIFT_BASE = 4096
TIME_CAP = 0.999
TimeLaw = Literal["uniform", "logit-normal"]
Prediction = Literal["velocity", "data"]
"""What a network predicts: the velocity (RAE v1), or the data, from which the velocity follows (RAE v2)."""
DATA_PREDICTION_FLOOR = 0.05


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for data and noise (B, ...) and times (B,)."""
    t = _per_sample(t, x)
    return (1 - t) * x + t * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The target of flow matching."""
    return noise - x


def to_velocity(x_t: Tensor, predicted: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """The velocity that a network's output (B, ...) at (x_t, t) stands for.

    From predicted data it is (x_t - data) / max(t, 0.05) (spec II.5): near the data the division would blow up
    the error. The target of training is formed the same way, with the true data.
    """
    if prediction == "velocity":
        return predicted
    return (x_t - predicted) / _per_sample(t, x_t).clamp_min(DATA_PREDICTION_FLOOR)


def to_data(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data that `v` at (x_t, t) points to."""
    return x_t - _per_sample(t, x_t) * v


def similarity(t: float, s: float) -> float:
    """The cosine of x_t and x_s of one path that is to be expected, for whitened data."""
    return ((1 - t) * (1 - s) + t * s) / math.sqrt(((1 - t) ** 2 + t**2) * ((1 - s) ** 2 + s**2))


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


def shift_factor(latent_shape: tuple[int, ...], base: int = SHIFT_BASE) -> float:
    """alpha = sqrt(m / base), m being the number of elements of a latent, channels included (spec 2.2)."""
    if base <= 0:
        raise UserError(f"shift_base: {base} must be positive")
    return math.sqrt(math.prod(latent_shape) / base)


def shift(t: Tensor, alpha: float) -> Tensor:
    """Move times in [0, 1] towards noise (alpha > 1) or data (alpha < 1); 0 and 1 stay."""
    return alpha * t / (1 + (alpha - 1) * t)


def sample_times(u: Tensor, law: TimeLaw, alpha: float) -> Tensor:
    """Turn uniforms on [0, 1) into shifted training times.

    `uniform`: U(0, 0.999). `logit-normal`: sigmoid of a standard normal, truncated to [0, 0.999] by the
    inverse of its distribution function.
    """
    if law == "uniform":
        return shift(u * TIME_CAP, alpha)
    cap = torch.special.ndtr(torch.logit(torch.tensor(TIME_CAP, dtype=torch.float64))).item()
    normal = torch.special.ndtri((u.double() * cap).clamp_min(torch.finfo(torch.float32).tiny))
    return shift(normal.sigmoid(), alpha).to(u.dtype)
