"""Guidance as functions over velocity predictions: a velocity field in, a velocity field out."""

import math
from collections.abc import Callable

from torch import Tensor

from raekit.config import configclass
from raekit.errors import UserError

Velocity = Callable[[Tensor, float], Tensor]
"""A velocity field: latents (B, C, H, W) and one time for all -> velocities (B, C, H, W)."""


@configclass
class Guidance:
    """Classifier-free guidance with strength `scale` for shifted times within [start, end] (spec 3)."""

    scale: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise UserError(f"guidance: the interval {self.start}-{self.end} must lie in 0-1, start before end")
        if not math.isfinite(self.scale):
            raise UserError(f"guidance: a scale of {self.scale} is no number to guide by")
        if self.scale == 1:
            raise UserError("guidance: a scale of 1 has no effect; leave guidance out")


def parse_guidance(text: str) -> Guidance:
    """Read `cfg:SCALE` or `cfg:SCALE@START-END`, as in `cfg:2.0@0.1-0.9`."""
    try:
        method, rest = text.split(":")
        scale, _, interval = rest.partition("@")
        start, end = map(float, interval.split("-")) if interval else (0.0, 1.0)
        if method == "cfg":
            return Guidance(scale=float(scale), start=start, end=end)
    except ValueError:
        pass
    raise UserError(f"guidance: {text!r} is not of the form cfg:SCALE or cfg:SCALE@START-END, as in cfg:2.0@0.1-0.9")


def classifier_free(conditional: Velocity, unconditional: Velocity, guidance: Guidance) -> Velocity:
    """v_u + scale (v_c - v_u) inside the interval, v_c outside, where `unconditional` is not evaluated."""

    def guided(x: Tensor, t: float) -> Tensor:
        v = conditional(x, t)
        if guidance.start <= t <= guidance.end:
            v = unconditional(x, t).lerp(v, guidance.scale)
        return v

    return guided
