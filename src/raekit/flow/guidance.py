"""Guidance as functions over velocity predictions: away from a worse prediction of the same thing."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from raekit.config import configclass
from raekit.errors import UserError

Velocity = Callable[[Tensor, float], Tensor]
"""A velocity field: latents (B, C, H, W) and one time for all -> velocities (B, C, H, W)."""
Method = Literal["cfg", "auto", "internal"]
Reference = Literal["unconditional", "weak", "base"]
REFERENCES: dict[Method, Reference] = {"cfg": "unconditional", "auto": "weak", "internal": "base"}
"""What each method leads away from: the prediction without class, a weaker model's, the denoiser's own base output."""
Predict = Callable[[Tensor, float, Collection[Reference]], tuple[Tensor, Mapping[Reference, Tensor]]]
"""The velocity at (x, t), and those of the references asked for."""


@configclass
class Guidance:
    """One method with strength `scale` for shifted times within [start, end] (spec 3, II.6)."""

    method: Method = "cfg"
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

    def __str__(self) -> str:
        """As `parse_guidance` reads it."""
        return f"{self.method}:{self.scale}" + ("" if self._always else f"@{self.start}-{self.end}")

    @property
    def _always(self) -> bool:
        return (self.start, self.end) == (0, 1)

    def holds(self, t: float) -> bool:
        """Whether it acts at time `t`: within the interval in float32, as the published samplers compare them.

        So the last digit decides at an end: a first time that the shift's rounding puts at 1.0000001 is past an
        interval that ends at 1. The whole of 0-1, in which nothing is left out, holds that as well.
        """
        start, time, end = torch.tensor([self.start, t, self.end], dtype=torch.float32).tolist()
        return self._always or start <= time <= end


def parse_guidance(text: str) -> tuple[Guidance, ...]:
    """Read METHOD:SCALE or METHOD:SCALE@START-END, as in `cfg:2.0@0.1-0.9`; several are joined by `+`."""
    rules = []
    for part in text.split("+"):
        try:
            method, rest = part.split(":")
            scale, _, interval = rest.partition("@")
            start, end = map(float, interval.split("-")) if interval else (0.0, 1.0)
            if method not in REFERENCES:
                raise ValueError
            value = float(scale)
        except ValueError:
            raise UserError(
                f"guidance: {text!r} is not of the form METHOD:SCALE or METHOD:SCALE@START-END with METHOD one of "
                f"{', '.join(REFERENCES)}, as in cfg:2.0@0.1-0.9; several are joined by +"
            ) from None
        rules.append(Guidance(method=method, scale=value, start=start, end=end))
    return tuple(rules)


def guided(predict: Predict, rules: Sequence[Guidance]) -> Velocity:
    """The velocity v + sum of (scale - 1) (v - reference) over the rules whose interval holds the time.

    With one rule, that is reference + scale (v - reference). Outside its interval its reference is not asked
    for. The publications do not say how two are combined; as a sum, none scales the other.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        active = [rule for rule in rules if rule.holds(t)]
        v, references = predict(x, t, [REFERENCES[rule.method] for rule in active])
        out = v
        for rule in active:
            out = out + (rule.scale - 1) * (v - references[REFERENCES[rule.method]])
        return out

    return velocity


def check_guidance(rules: Sequence[Guidance], missing: Mapping[Reference, str], times: Sequence[float]) -> None:
    """UserError for a rule that cannot be followed, or has no effect.

    `missing` says of each reference that is not there why not; the field is evaluated at `times`.
    """
    methods = [rule.method for rule in rules]
    for rule in rules:
        if methods.count(rule.method) > 1:
            raise UserError(f"guidance: {rule.method} is given twice; give each method once")
        if reason := missing.get(REFERENCES[rule.method]):
            raise UserError(f"guidance: {rule.method} {reason}")
        if not any(map(rule.holds, times)):
            near = min(times, key=lambda t: max(rule.start - t, t - rule.end))
            raise UserError(
                f"guidance: {rule.method} would have no effect, as none of the sampler's times falls into "
                f"{rule.start:g}-{rule.end:g} (the nearest is {near:.4g}); widen the interval or take more steps"
            )
