"""Guidance: functions that move a predicted velocity away from a worse prediction for the same input."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from raekit.config import configclass
from raekit.errors import UserError

Velocity = Callable[[Tensor, float], Tensor]
"""A velocity field: latents (B, C, H, W) and one time for the batch -> velocities (B, C, H, W)."""
Method = Literal["cfg", "auto", "internal"]
"""The worse prediction that a method moves away from is the prediction without a class (`cfg`), the prediction of a
weaker model (`auto`), or the denoiser's own base output (`internal`)."""
METHODS: tuple[Method, ...] = get_args(Method)
Predict = Callable[[Tensor, float, Collection[Method]], tuple[Tensor, Mapping[Method, Tensor]]]
"""Latents, a time and methods -> the velocity, and the worse velocity of each method."""


@configclass
class Guidance:
    """One guidance method and the interval of shifted times in which the method acts (RAE v1 and v2).

    Attributes:
        method: `cfg`, `auto` or `internal`.
        scale: the strength; 1 has no effect and is an error.
        start: lower end of the interval, included.
        end: upper end of the interval, included.
    """

    method: Method = "cfg"
    scale: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise UserError(f"guidance: the interval {self.start}-{self.end} must lie in 0-1, start before end")
        if self.scale == 1:
            raise UserError("guidance: a scale of 1 has no effect; leave guidance out")

    def __str__(self) -> str:
        """Return the rule in the form that `parse_guidance` reads."""
        return f"{self.method}:{self.scale}" + ("" if self._always else f"@{self.start}-{self.end}")

    @property
    def _always(self) -> bool:
        return (self.start, self.end) == (0, 1)

    def holds(self, t: float) -> bool:
        """Return whether the rule acts at time `t`.

        The comparison is in float32, as in the published samplers, so the last digit decides at an end: the shift may
        round the first time to 1.0000001, which lies outside an interval that ends at 1. The default interval 0-1
        always acts, also at such a time.
        """
        start, time, end = torch.tensor([self.start, t, self.end], dtype=torch.float32, device="cpu").tolist()
        return self._always or start <= time <= end


def as_rules(guidance: float | str | Guidance | Sequence[Guidance] | None) -> tuple[Guidance, ...]:
    """Return guidance, given in any form, as rules.

    Args:
        guidance: the scale of classifier-free guidance, a text that `parse_guidance` reads, one rule, or several. None
            and a scale of 1 mean no guidance.

    Raises:
        UserError: guidance has another form, or a rule is impossible.
    """
    match guidance:
        case None:
            return ()
        case str():
            return parse_guidance(guidance)
        case Guidance():
            return (guidance,)
        case Real() if not isinstance(guidance, bool):
            return () if guidance == 1 else (Guidance(scale=guidance),)
        case [*rules] if all(isinstance(rule, Guidance) for rule in rules):
            return tuple(rules)
    raise UserError(f"guidance: {guidance!r} must be a scale, a text such as 'cfg:2.0@0.1-0.9', or rules (`Guidance`)")


def parse_guidance(text: str) -> tuple[Guidance, ...]:
    """Read METHOD:SCALE or METHOD:SCALE@START-END, for example `cfg:2.0@0.1-0.9`; several rules are joined by `+`.

    Without `METHOD:` the method is `cfg`.

    Raises:
        UserError: the text has another form, or a rule is impossible.
    """
    rules = []
    for part in text.split("+"):
        try:
            method, rest = part.split(":") if ":" in part else ("cfg", part)
            scale, _, interval = rest.partition("@")
            start, end = map(float, re.split(r"(?<!e)-", interval)) if interval else (0.0, 1.0)
            if method not in METHODS:
                raise ValueError
            value = float(scale)
        except ValueError:
            raise UserError(
                f"guidance: {text!r} is not of the form METHOD:SCALE or METHOD:SCALE@START-END with METHOD one of "
                f"{', '.join(METHODS)}, as in cfg:2.0@0.1-0.9; several are joined by +"
            ) from None
        rules.append(Guidance(method=method, scale=value, start=start, end=end))
    return tuple(rules)


def guided(predict: Predict, rules: Sequence[Guidance]) -> Velocity:
    """Return the guided velocity v + sum of (scale - 1) (v - reference) over the rules that act at the time.

    With one rule, this is reference + scale (v - reference). A reference is computed only where its rule acts. The
    publications do not say how two methods combine; in a sum, neither scales the other.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        active = [rule for rule in rules if rule.holds(t)]
        v, worse = predict(x, t, [rule.method for rule in active])
        out = v
        for rule in active:
            out = out + (rule.scale - 1) * (v - worse[rule.method])
        return out

    return velocity


def with_interval_ends(times: Sequence[float], rules: Sequence[Guidance]) -> list[float]:
    """Return the grid `times` with the ends of all guidance intervals among its times.

    Each end inside the grid takes the place of the nearest inner time, so the number of steps stays the same. A rising
    grid gets the same times as a falling one.

    Raises:
        UserError: the grid has fewer inner times than there are ends.
    """
    if times[0] < times[-1]:
        return with_interval_ends(times[::-1], rules)[::-1]
    every = {end for rule in rules for end in (rule.start, rule.end) if 0 < end < 1}
    inside = sorted((end for end in every if times[-1] < end < times[0]), reverse=True)
    if len(inside) > len(times) - 2:
        ends = ", ".join(f"{end:g}" for end in inside)
        raise UserError(
            f"steps: {len(times) - 1} is too few for guidance that changes at {ends}; take at least {len(inside) + 1}"
        )
    out, first = list(times), 1
    for number, end in enumerate(inside, 1):
        free = range(first, len(times) - 1 - (len(inside) - number))
        place = min(free, key=lambda i: abs(times[i] - end))
        out[place], first = end, place + 1
    return out


def pieces(times: Sequence[float], rules: Sequence[Guidance]) -> list[tuple[list[float], tuple[Guidance, ...]]]:
    """Split a grid at the ends of guidance intervals, for solvers that combine several evaluations.

    The guided velocity jumps at an end. A multistep solver loses its order if it extrapolates across the jump, so it
    solves each piece on its own.

    Args:
        times: a grid in which the ends are, from `with_interval_ends`.
        rules: all rules.

    Returns:
        For each piece its times and the rules that act in the piece, now without an interval.
    """
    ends = {end for rule in rules for end in (rule.start, rule.end)}
    cuts = [0, *(i for i in range(1, len(times) - 1) if times[i] in ends), len(times) - 1]
    out = []
    for first, last in pairwise(cuts):
        middle = (times[first] + times[last]) / 2
        acting = tuple(replace(rule, start=0.0, end=1.0) for rule in rules if rule.holds(middle))
        out.append((list(times[first : last + 1]), acting))
    return out


def check_guidance(rules: Sequence[Guidance], missing: Mapping[Method, str], times: Sequence[float]) -> None:
    """Check that each rule can be applied and has an effect.

    Args:
        missing: for each reference that is not available, the reason.
        times: the times at which the solver evaluates the field.

    Raises:
        UserError: a method is given twice, its reference is missing, or its interval has none of `times`.
    """
    methods = [rule.method for rule in rules]
    for rule in rules:
        if methods.count(rule.method) > 1:
            raise UserError(f"guidance: {rule.method} is given twice; give each method once")
        if reason := missing.get(rule.method):
            raise UserError(f"guidance: {rule.method} {reason}")
        if not any(map(rule.holds, times)):
            near = min(times, key=lambda t: max(rule.start - t, t - rule.end))
            raise UserError(
                f"guidance: {rule.method} would have no effect, because none of the sampler's times falls into "
                f"{rule.start:g}-{rule.end:g} (the nearest is {near:.4g}); widen the interval or take more steps"
            )
