"""The linear path between data and noise, and its times.

THE TIME CONVENTION, here and everywhere: t = 0 is data, t = 1 is noise,
`x_t = (1 - t) x + t noise`, velocity `v = noise - x`; sampling goes from 1 to 0 (RAE v1).
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from raekit.errors import UserError, check_choice

SHIFT_BASE = 4096
TIME_CAP = 0.999
TimeLaw = Literal["uniform", "logit-normal"]
Prediction = Literal["velocity", "data"]
"""What a network predicts: the velocity (RAE v1), or the data, from which the velocity is computed (RAE v2)."""
DATA_PREDICTION_FLOOR = 0.05


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t (B, ...) for data and noise (B, ...) and times (B,)."""
    t = _per_sample(t, x)
    return (1 - t) * x + t * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity noise - x, the target of flow matching."""
    return noise - x


def to_velocity(x_t: Tensor, predicted: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """Return the velocity (B, ...) for a network's output `predicted` (B, ...) at (x_t, t).

    From predicted data, the velocity is (x_t - data) / max(t, 0.05) (RAE v2). The floor limits the error that the
    division would amplify near t = 0. The training target uses the same formula with the true data.
    """
    check_choice("prediction", prediction, get_args(Prediction))
    if prediction == "velocity":
        return predicted
    return (x_t - predicted) / _per_sample(t, x_t).clamp_min(DATA_PREDICTION_FLOOR)


def exact(x: Tensor, noise: Tensor, prediction: Prediction) -> Tensor:
    """Return the output (B, ...) of a network without error, for data and noise (B, ...)."""
    check_choice("prediction", prediction, get_args(Prediction))
    return velocity(x, noise) if prediction == "velocity" else x


def to_data(x_t: Tensor, v: Tensor, t: float) -> Tensor:
    """Return the data (B, ...) that the velocity `v` at (x_t, t) points to."""
    return x_t - t * v


def similarity(t: float, s: float) -> float:
    """Return the expected cosine between x_t and x_s of one path, for whitened data."""
    return ((1 - t) * (1 - s) + t * s) / math.sqrt(((1 - t) ** 2 + t**2) * ((1 - s) ** 2 + s**2))


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


def shift_factor(latent_shape: tuple[int, ...], base: int = SHIFT_BASE) -> float:
    """Return alpha = sqrt(m / base) for latents of m elements, channels included (RAE v1).

    Raises:
        UserError: `base` is not positive, or the shape includes a batch.
    """
    if base <= 0:
        raise UserError(f"shift_base: {base} must be positive")
    if len(latent_shape) > 3:
        raise UserError(
            f"latent_shape: {tuple(latent_shape)} has too many dimensions; give (C, H, W), without the batch"
        )
    return math.sqrt(math.prod(latent_shape) / base)


def shift(t: Tensor, alpha: float) -> Tensor:
    """Move times in [0, 1] towards noise (alpha > 1) or data (alpha < 1). 0 and 1 stay in place."""
    return alpha * t / (1 + (alpha - 1) * t)


def sample_times(u: Tensor, law: TimeLaw, alpha: float) -> Tensor:
    """Turn uniform numbers on [0, 1) into shifted training times.

    Args:
        u: uniform numbers on [0, 1).
        law: `uniform` is U(0, 0.999). `logit-normal` is the sigmoid of a standard normal, given that it is at most
            0.999: the numbers go through the inverse of the normal's distribution function.
        alpha: the shift factor, above 0.

    Raises:
        UserError: there is no such law, or `alpha` is not positive.
    """
    if not alpha > 0:
        raise UserError(f"alpha: {alpha} must be positive")
    check_choice("time_law", law, get_args(TimeLaw))
    if law == "uniform":
        return shift(u * TIME_CAP, alpha)
    cap = torch.special.ndtr(torch.logit(torch.tensor(TIME_CAP, dtype=torch.float64))).item()
    normal = torch.special.ndtri((u.double() * cap).clamp_min(torch.finfo(torch.float32).tiny))
    return shift(normal.sigmoid(), alpha).to(u.dtype)
