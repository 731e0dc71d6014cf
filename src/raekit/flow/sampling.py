"""Sampling latents from a denoiser: the solver, guidance, and the forward passes that they cost."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from raekit import randomness
from raekit.errors import UserError, check_choice, real_number, whole_number
from raekit.flow.guidance import (
    Guidance,
    Method,
    Velocity,
    as_rules,
    check_guidance,
    guided,
    pieces,
    with_interval_ends,
)
from raekit.flow.path import similarity, to_velocity
from raekit.flow.solvers import (
    MULTISTEP,
    SOLVERS,
    Grid,
    SolverName,
    dopri5,
    euler_maruyama,
    evaluated,
    time_grid,
)
from raekit.models.conditioning import same_classes
from raekit.models.denoiser import Denoiser, Features

START = "sample"
"""The stream of random numbers for the noise that samples start from."""
MAX_STEPS = 100_000
"""The largest number of solver steps. A typing error would fill the memory with times."""
LEAST_TOLERANCE = 1e-7
"""The least tolerance of dopri5. The state is float32, whose relative precision is 1.2e-7: below it, dopri5 measures
rounding instead of its error, and takes ever shorter steps."""
ONE_PASS_ON_CPU = 2
"""The largest batch whose two predictions for classifier-free guidance a CPU makes in one pass."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        steps: solver steps. A `published` grid has one step fewer.
        solver: a solver of `flow.solvers`. dopri5 chooses its own steps.
        grid: `full` ends at time 0; `few` is the same with more times near both ends; `published` is the grid of the
            official sampler (RAE v1); `diffusers` is the grid of diffusers' RAEDiTPipeline.
        guidance: the rules, at most one of each method. Any other form that `as_rules` reads, such as a scale or the
            text `cfg:2.0@0.1-0.9`, becomes a tuple.
        weak: the weaker denoiser of `auto` guidance.
        reuse: k > 1 runs the backbone of a denoiser with a head only at every k-th step. k < 1 runs it again when the
            latents have changed enough: when their expected cosine similarity to the latents at its last run
            (`flow.path.similarity`, a function of the times) is below k. 1 runs it at each step.
        atol: absolute tolerance of dopri5.
        rtol: relative tolerance of dopri5.

    Raises:
        UserError: a setting has another value, or has no effect with the others.
    """

    steps: int = 50
    solver: SolverName = "euler"
    grid: Grid = "full"
    guidance: tuple[Guidance, ...] = ()
    weak: Denoiser | None = None
    reuse: float = 1
    atol: float = 1e-6
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", as_rules(self.guidance))
        object.__setattr__(self, "steps", whole_number("steps", self.steps, 1, MAX_STEPS))
        for name, choices in (("solver", SolverName), ("grid", Grid)):
            check_choice(name, getattr(self, name), get_args(choices))
        for name in ("reuse", "atol", "rtol"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        if not (self.atol > 0 and self.rtol > 0):
            raise UserError(f"atol, rtol: {self.atol} and {self.rtol} must be positive")
        if max(self.atol, self.rtol) < LEAST_TOLERANCE:
            raise UserError(
                f"atol, rtol: {self.atol:g} and {self.rtol:g} are both too small for float32; give at least "
                f"{LEAST_TOLERANCE:g} for one of them"
            )
        if not self.reuse > 0 or (self.reuse > 1 and self.reuse % 1):
            raise UserError(f"reuse: {self.reuse} must be a number of steps, or a similarity between 0 and 1")
        self._check_effects()
        if isinstance(self.weak, str | Path):
            raise UserError(f"weak: {self.weak} is a name; give the loaded model, raekit.Denoiser.load({self.weak!r})")
        if self.weak is not None and not hasattr(self.weak, "config"):
            raise UserError(f"weak: {type(self.weak).__name__} is no denoiser; give the field `denoiser` of the model")

    def _check_effects(self) -> None:
        """Raise UserError if a setting has no effect, whatever the denoiser is."""
        if self.solver == "dopri5" and self.grid not in ("full", "published"):
            raise UserError(f"grid: {self.grid} has no effect with solver dopri5, which uses only the ends of a grid")
        if self.solver == "dopri5" and self.steps != Sampling.steps:
            raise UserError("steps: no effect with solver dopri5, which chooses its own steps; leave steps out")
        for name in ("atol", "rtol"):
            if self.solver != "dopri5" and getattr(self, name) != getattr(Sampling, name):
                raise UserError(f"{name}: no effect with solver {self.solver}; use dopri5, or leave {name} out")
        if self.reuse != 1:
            if self.solver not in ("euler", "euler-maruyama"):
                raise UserError(f"reuse: it needs solver euler or euler-maruyama, not {self.solver}")
            if self.steps - (self.grid == "published") < 2:
                raise UserError(f"reuse: {self.reuse} has no effect on a single step; take more steps")


def as_sampling(sampling: Sampling | None) -> Sampling:
    """Return `sampling`, or `Sampling()` for None; UserError for anything else."""
    if not isinstance(sampling, Sampling | None):
        raise UserError(f"sampling: {sampling!r} is no `Sampling`; give raekit.Sampling(steps=50), for example")
    return sampling or Sampling()


Watch = Callable[[Tensor, Tensor, float], object]
"""A function that each evaluation calls with the latents, the guided velocity and the time."""


def sample_latents(
    denoiser: Denoiser,
    labels: Tensor | None,
    indices: Tensor,
    seed: int,
    sampling: Sampling,
    device: torch.device | str,
    watch: Watch | None = None,
) -> Tensor:
    """Return the whitened latents (B, C, H, W) of the samples `indices`, over the time grid shifted as in training.

    The noise that the samples start from does not depend on the device.

    Args:
        denoiser: the denoiser to sample from.
        labels: the condition of each image, such as class ids (B,). None: unconditional.
        indices: (B,) numbers of the samples. Each sample has its own noise.
        seed: of the noise.
        sampling: the settings.
        device: of the denoiser.
        watch: called at each evaluation.

    Raises:
        UserError: a sample has values that are not finite, or the denoiser does not allow the settings.
    """

    def noise(stream: str) -> Tensor:
        return sample_noise(denoiser, seed, stream, indices, device)

    latents = denoise(denoiser, noise, labels, sampling, watch=watch)
    check_finite(latents, indices.tolist(), sampling)
    return latents


def finite(samples: Tensor) -> Tensor:
    """Return for each of the samples (B, ...) whether all its values are finite: bool (B,), on the CPU."""
    return samples.flatten(1).isfinite().all(1).cpu()


def check_finite(
    samples: Tensor, names: Sequence[object], sampling: Sampling | None = None, what: str = "sample"
) -> None:
    """Check that all samples are finite. The host waits for the device, so call this function once for each batch.

    Args:
        samples: latents or images (B, ...).
        names: the numbers or names (B) of the samples, for the error message.
        sampling: the settings that made the samples, for the error message. None if the images were not sampled.
        what: what they are, for the error message.

    Raises:
        UserError: a sample has values that are not finite. The message names the first one.
    """
    wrong = [name for name, good in zip(names, finite(samples).tolist(), strict=True) if not good]
    if wrong:
        rules = "+".join(map(str, sampling.guidance)) if sampling else ""
        remedy = f"lower the scale of guidance {rules}" if rules else "load the model in float32, or use another model"
        raise UserError(f"{what} {wrong[0]}: its values are not finite; {remedy}")


def sample_noise(
    denoiser: Denoiser, seed: int, stream: str, indices: Sequence[int] | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the standard normals (B, C, H, W) of the samples `indices`.

    The noise that a sample starts from is drawn on the CPU, so it does not depend on the device. The noise of the steps
    of euler-maruyama is drawn on `device`: on the CPU, 50,000 samples of 50 steps would take an hour.
    """
    drawn = "cpu" if stream == START else device
    return randomness.normal(seed, stream, indices, denoiser.config.latent_shape, drawn).to(device)


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    noise: Callable[[str], Tensor],
    labels: Tensor | None,
    sampling: Sampling,
    passes: Counter[str] | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return the whitened latents (B, C, H, W) that the flow makes from noise.

    Args:
        denoiser: the denoiser to sample from.
        noise: gives the noise (B, C, H, W) of a stream: "sample", and with euler-maruyama one stream for each step.
        labels: the condition of each image, such as class ids (B,). None: unconditional.
        sampling: the settings.
        passes: a counter to which the forward passes are added.
        watch: called at each evaluation.
    """
    check_sampling(sampling, denoiser, labels is not None)
    passes = Counter() if passes is None else passes
    times = time_grid(sampling.steps, denoiser.config.shift, sampling.grid)
    if sampling.solver in MULTISTEP:
        return _in_pieces(denoiser, noise(START), labels, sampling, times, passes, watch)
    field = _velocity(denoiser, labels, sampling, passes, watch)
    if sampling.solver == "euler-maruyama":
        return euler_maruyama(field, noise(START), times, lambda step: noise(f"{START}, step {step}"))
    return _follow(sampling, field, noise(START), times)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Return the points (B, ...) on the great circle from `a` to `b` (...), at `weights` (B,) in [0, 1]."""
    x, y, w = a.double(), b.double(), weights.double().view(-1, *[1] * a.ndim)
    angle = ((x * y).sum() / (x.norm() * y.norm())).clamp(-1, 1).acos()
    if angle.sin() < 1e-6:  # equal or opposite points have no great circle
        return ((1 - w) * x + w * y).to(a.dtype)
    return ((((1 - w) * angle).sin() * x + (w * angle).sin() * y) / angle.sin()).to(a.dtype)


@torch.no_grad()
def latents_to_noise(denoiser: Denoiser, latents: Tensor, labels: Tensor | None, sampling: Sampling) -> Tensor:
    """Return the noise (B, C, H, W) from which sampling arrives at `latents`, up to the solver's error.

    The solver follows the same grid backwards. A `published` grid takes `latents` for the latents of its last time.
    """
    check_sampling(sampling, denoiser, labels is not None, reverse=True)
    times = time_grid(sampling.steps, denoiser.config.shift, sampling.grid)[::-1]
    if sampling.solver in MULTISTEP:
        return _in_pieces(denoiser, latents, labels, sampling, times, Counter())
    return _follow(sampling, _velocity(denoiser, labels, sampling, Counter()), latents, times)


def _in_pieces(
    denoiser: Denoiser,
    x: Tensor,
    labels: Tensor | None,
    sampling: Sampling,
    times: Sequence[float],
    passes: Counter[str],
    watch: Watch | None = None,
) -> Tensor:
    """Solve with a multistep solver, which starts afresh at each end of a guidance interval."""
    solve = SOLVERS[sampling.solver]
    for piece, rules in pieces(with_interval_ends(times, sampling.guidance), sampling.guidance):
        x = solve(_velocity(denoiser, labels, replace(sampling, guidance=rules), passes, watch), x, piece)
    return x


def _follow(sampling: Sampling, field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    if sampling.solver == "dopri5":
        return dopri5(field, x, times, sampling.atol, sampling.rtol)
    return SOLVERS[sampling.solver](field, x, times)


def check_sampling(sampling: Sampling, denoiser: Denoiser, labelled: bool, reverse: bool = False) -> None:
    """Raise UserError if `denoiser` does not allow these settings, or if a setting would have no effect.

    Args:
        sampling: the settings.
        denoiser: the denoiser to sample from.
        labelled: whether labels are given.
        reverse: whether the flow is followed from data to noise.
    """
    weak, config = sampling.weak, denoiser.config
    missing: dict[Method, str] = {}
    if not labelled:
        missing["cfg"] = "needs labels, and none are given"
    if not config.base_depth:
        missing["internal"] = "needs a base output, which this denoiser was trained without (denoiser.base_depth is 0)"
    if weak is None:
        missing["auto"] = "needs a weaker model (--weak, Sampling.weak)"
    elif not any(rule.method == "auto" for rule in sampling.guidance):
        raise UserError("weak: no effect without guidance auto:SCALE")
    elif weak is denoiser:
        raise UserError("weak: it is the guided model itself, which has no effect; give another model")
    elif (weak.config.latent_shape, weak.config.num_classes) != (config.latent_shape, config.num_classes):
        raise UserError(
            f"weak: it is for latents {weak.config.latent_shape} and {weak.config.num_classes} classes, the model for "
            f"{config.latent_shape} and {config.num_classes}; give a weaker model of the same latents and classes"
        )
    elif not same_classes(weak.config.class_names, config.class_names):
        raise UserError("weak: its classes have other names than the model's classes; give a model of the same classes")
    times = time_grid(sampling.steps, config.shift, sampling.grid)
    if sampling.solver in MULTISTEP:
        times = with_interval_ends(times, sampling.guidance)
    points = evaluated(sampling.solver, times[::-1] if reverse else times)
    check_guidance(sampling.guidance, missing, points)
    _check_reuse(sampling, denoiser, points)
    if reverse and sampling.solver == "euler-maruyama":
        raise UserError("solver euler-maruyama: goes from noise to data only; take another solver")


def _check_reuse(sampling: Sampling, denoiser: Denoiser, times: Sequence[float]) -> None:
    reuse = sampling.reuse
    if reuse == 1:
        return
    if not denoiser.config.head:
        raise UserError("reuse: it needs a denoiser with a head; leave it out")
    nearest = max(similarity(t, s) for t, s in pairwise(times))
    if nearest < reuse < 1:
        raise UserError(f"reuse: {reuse} would have no effect, as neighbouring steps are at most {nearest:.4f} alike")


def _velocity(
    denoiser: Denoiser, labels: Tensor | None, sampling: Sampling, passes: Counter[str], watch: Watch | None = None
) -> Velocity:
    """Return the guided velocity field. It counts its forward passes in `passes` and reports to `watch`."""
    conditional = _Predictor("model", labels)
    unconditional = _Predictor("unconditional", None)
    if any(rule.method == "cfg" for rule in sampling.guidance) and labels is not None and denoiser.label:
        unconditional.labels = denoiser.label.without(
            labels, torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        )

    def predict(x: Tensor, t: float, methods: Collection[Method]) -> tuple[Tensor, dict[Method, Tensor]]:
        wanted = [conditional] + [unconditional] * ("cfg" in methods)
        groups = [wanted] if one_pass_is_faster(x) else [[each] for each in wanted]
        for group in groups:
            base = "internal" in methods and group[0] is conditional
            _predict(group, denoiser, x, t, sampling.reuse, passes, base)
        times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)

        def velocity(output: Tensor | None, of: Denoiser = denoiser) -> Tensor:
            assert output is not None
            return to_velocity(x, output.to(x.dtype), times, of.config.prediction)

        found: dict[Method, Tensor] = {}
        if "internal" in methods:
            found["internal"] = velocity(conditional.base)
        if "cfg" in methods:
            found["cfg"] = velocity(unconditional.output)
        if "auto" in methods:
            assert sampling.weak
            passes["weak"] += 1
            found["auto"] = velocity(sampling.weak(x, times, labels), sampling.weak)
        return velocity(conditional.output), found

    field = guided(predict, sampling.guidance)
    if watch is None:
        return field

    def watched(x: Tensor, t: float) -> Tensor:
        v = field(x, t)
        watch(x, v, t)
        return v

    return watched


def one_pass_is_faster(x: Tensor) -> bool:
    """Return whether guidance of `x` (B, C, H, W) makes both predictions in one pass of 2 B, or in two passes of B.

    A GPU is never slower with the larger batch. A CPU gains while B is so small that reading the weights takes a large
    part of the time: measured on two cores, one pass is 1.3 times as fast for B = 1 and 1.1 times for B = 2.
    """
    return x.device.type != "cpu" or len(x) <= ONE_PASS_ON_CPU


class _Predictor:
    """One kind of prediction of a denoiser, with what it last gave.

    Attributes:
        kind: the name that its passes are counted under.
        labels: the condition of each image.
        output: the last prediction.
        base: the last base output, if it was asked for.
        features: the backbone's last output, if `Sampling.reuse` needs it; `seen` is its time, `since` counts the
            evaluations since then.
    """

    def __init__(self, kind: str, labels: Tensor | None) -> None:
        self.kind, self.labels = kind, labels
        self.output: Tensor | None = None
        self.base: Tensor | None = None
        self.features: Features | None = None
        self.seen, self.since = 0.0, 0

    def is_stale(self, now: float, reuse: float) -> bool:
        """Return whether the backbone must run at the time `now`. To be called once for each evaluation."""
        self.since += 1
        if self.features is None:
            return True
        return self.since == reuse if reuse > 1 else similarity(now, self.seen) < reuse


def _predict(
    predictors: Sequence[_Predictor],
    denoiser: Denoiser,
    x: Tensor,
    t: float,
    reuse: float,
    passes: Counter[str],
    base: bool,
) -> None:
    """Make the predictions of all `predictors` for `x` at the time `t` in one pass."""

    def arguments(chosen: Sequence[_Predictor]) -> tuple[Tensor, Tensor, Tensor | None]:
        many = _joined([x] * len(chosen))
        assert many is not None
        return (
            many,
            torch.full((len(many),), t, dtype=torch.float32, device=x.device),
            _joined([each.labels for each in chosen]),
        )

    options: dict[str, Any] = {"with_base": True} if base else {}
    stale = [each for each in predictors if reuse == 1 or each.is_stale(t, reuse)]
    passes.update(each.kind if each in stale else "head" for each in predictors)
    if reuse != 1:
        if stale:
            made = denoiser.features(*arguments(stale))
            for each, *parts in zip(stale, *(_parts(part, len(stale)) for part in made), strict=True):
                each.features, each.seen, each.since = Features(*parts), t, 0
        known = [each.features for each in predictors if each.features]
        options["features"] = Features(torch.cat([f.tokens for f in known]), _joined([f.base for f in known]))
    made = denoiser(*arguments(predictors), **options)
    full, bases = made if base else (made, None)
    for each, output, base_output in zip(
        predictors, _parts(full, len(predictors)), _parts(bases, len(predictors)), strict=True
    ):
        each.output, each.base = output, base_output


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the parts one after another along the batch; None if there are none."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) > 1 else present[0] if present else None


def _parts(joined: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """Return the `count` parts of what `_joined` joined."""
    return [None] * count if joined is None else joined.chunk(count)
