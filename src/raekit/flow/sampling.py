"""Sampling latents from a denoiser: solver, guidance and the passes they cost."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from raekit import randomness
from raekit.errors import UserError
from raekit.flow.guidance import (
    Guidance,
    Reference,
    Velocity,
    check_guidance,
    guided,
    pieces,
    with_interval_ends,
)
from raekit.flow.path import similarity, to_velocity
from raekit.flow.solvers import (
    MULTISTEP,
    Grid,
    SolverName,
    dopri5,
    euler,
    euler_maruyama,
    evaluated,
    heun,
    time_grid,
)
from raekit.models.denoiser import Denoiser


@dataclass(frozen=True)
class Sampling:
    """How to sample. `steps` on a `full` grid are so many solver steps; `published` is the official grid (spec 3).

    `weak` is the weaker denoiser of `auto` guidance. With `reuse` k the backbone of a network with a head runs
    at every k-th step only; with `reuse` below 1, once the latents' expected cosine similarity to those that it last
    saw (`flow.path.similarity`, a function of the times) falls below that. `atol` and `rtol` belong to dopri5.
    In `bf16` the denoisers run under autocast; the state stays float32, and so does decoding.
    """

    steps: int = 50
    solver: SolverName = "euler"
    grid: Grid = "full"
    guidance: tuple[Guidance, ...] = ()
    weak: Denoiser | None = None
    reuse: float = 1
    atol: float = 1e-6
    rtol: float = 1e-3
    precision: Literal["fp32", "bf16"] = "fp32"


Watch = Callable[[Tensor, Tensor, float], object]
"""Called with the latents, the guided velocity and the time of each evaluation."""


def sample_latents(
    denoiser: Denoiser,
    labels: Tensor | None,
    indices: Tensor,
    seed: int,
    sampling: Sampling,
    device: torch.device | str,
    passes: Counter[str] | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Whitened latents (B, C, H, W) of samples number `indices`, over the time grid shifted as in training.

    The noise is drawn on the CPU, so that it does not depend on the device. Forward passes are added to `passes`.
    """

    def noise(stream: str) -> Tensor:
        return sample_noise(denoiser, seed, stream, indices).to(device)

    return denoise(denoiser, noise, labels, sampling, passes, watch)


def sample_noise(denoiser: Denoiser, seed: int, stream: str, indices: Sequence[int] | Tensor) -> Tensor:
    """Standard normals (B, C, H, W) of samples number `indices`, on the CPU."""
    return randomness.normal(seed, stream, indices, denoiser.config.latent_shape)


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    noise: Callable[[str], Tensor],
    labels: Tensor | None,
    sampling: Sampling,
    passes: Counter[str] | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Whitened latents that come of `noise(stream)` (B, C, H, W): of stream "sample", and with Euler-Maruyama of each
    step's own. `labels` as the denoiser takes them.
    """
    check_sampling(sampling, denoiser, labels is not None)
    passes = Counter() if passes is None else passes
    times = time_grid(sampling.steps, denoiser.config.shift, sampling.grid)
    if sampling.solver in MULTISTEP:
        return _in_pieces(denoiser, noise("sample"), labels, sampling, times, passes, watch)
    field = _velocity(denoiser, labels, sampling, passes, watch)
    if sampling.solver == "euler-maruyama":
        return euler_maruyama(field, noise("sample"), times, lambda step: noise(f"sample, step {step}"))
    return _follow(sampling, field, noise("sample"), times)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Points (B, ...) on the great circle from `a` to `b` (...), at `weights` (B,) in [0, 1]: noise between noises."""
    x, y, w = a.double(), b.double(), weights.double().view(-1, *[1] * a.ndim)
    angle = ((x * y).sum() / (x.norm() * y.norm())).clamp(-1, 1).acos()
    if angle.sin() < 1e-6:  # the same, or opposite
        return ((1 - w) * x + w * y).to(a.dtype)
    return ((((1 - w) * angle).sin() * x + (w * angle).sin() * y) / angle.sin()).to(a.dtype)


@torch.no_grad()
def latents_to_noise(denoiser: Denoiser, latents: Tensor, labels: Tensor | None, sampling: Sampling) -> Tensor:
    """The noise (B, C, H, W) from which sampling arrives at `latents`, as far as its steps are exact.

    The same grid the other way: a `published` one takes `latents` for those of its last time.
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
    solve = MULTISTEP[sampling.solver]
    for piece, rules in pieces(with_interval_ends(times, sampling.guidance), sampling.guidance):
        x = solve(_velocity(denoiser, labels, replace(sampling, guidance=rules), passes, watch), x, piece)
    return x


def _follow(sampling: Sampling, field: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    if sampling.solver == "dopri5":
        return dopri5(field, x, times, sampling.atol, sampling.rtol)
    return (heun if sampling.solver == "heun" else euler)(field, x, times)


def check_sampling(sampling: Sampling, denoiser: Denoiser, labelled: bool, reverse: bool = False) -> None:
    """UserError if `denoiser` cannot be sampled so, or if a setting would have no effect."""
    weak, config = sampling.weak, denoiser.config
    missing: dict[Reference, str] = {}
    if not labelled:
        missing["unconditional"] = "needs labels, and none are given"
    if not config.base_depth:
        missing["base"] = "needs a base output, which this denoiser was trained without (denoiser.base_depth is 0)"
    if weak is None:
        missing["weak"] = "needs a weaker model (--weak, Sampling.weak)"
    elif not any(rule.method == "auto" for rule in sampling.guidance):
        raise UserError("weak: no effect without guidance auto:SCALE")
    elif weak is denoiser:
        raise UserError("weak: the same model as the one to guide, which has no effect")
    elif (weak.config.latent_shape, weak.config.num_classes) != (config.latent_shape, config.num_classes):
        raise UserError(
            f"weak: it is for latents {weak.config.latent_shape} of {weak.config.num_classes} classes, "
            f"the model for {config.latent_shape} of {config.num_classes}"
        )
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
    if not reuse > 0 or (reuse > 1 and reuse != int(reuse)):
        raise UserError(f"reuse: {reuse} must be a whole number of steps from 1, or a similarity between 0 and 1")
    if not denoiser.config.head or sampling.solver not in ("euler", "euler-maruyama"):
        raise UserError("reuse: only for a denoiser with a head, and the solvers euler and euler-maruyama")
    nearest = max((similarity(t, s) for t, s in pairwise(times)), default=0.0)
    if nearest < reuse < 1:
        raise UserError(f"reuse: {reuse} would have no effect, as neighbouring steps are at most {nearest:.4f} alike")


def _velocity(
    denoiser: Denoiser, labels: Tensor | None, sampling: Sampling, passes: Counter[str], watch: Watch | None = None
) -> Velocity:
    """The guided velocity, which counts the forward passes that it makes and shows what it gives to `watch`."""
    conditional = _reusing(denoiser, sampling.reuse, "model", passes)
    unconditional = _reusing(denoiser, sampling.reuse, "unconditional", passes)

    def predict(x: Tensor, t: float, references: Collection[Reference]) -> tuple[Tensor, dict[Reference, Tensor]]:
        times = torch.full((len(x),), t, device=x.device)
        outputs: dict[Reference, Tensor] = {}
        weak: Tensor | None = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=sampling.precision == "bf16"):
            if "base" in references:
                full, outputs["base"] = conditional(t, x, times, labels, with_base=True)
            else:
                full = conditional(t, x, times, labels)
            if "unconditional" in references:
                outputs["unconditional"] = unconditional(t, x, times, None)
            if "weak" in references:
                assert sampling.weak
                passes["weak"] += 1
                weak = sampling.weak(x, times, labels)
        prediction = denoiser.config.prediction
        for name, output in outputs.items():
            outputs[name] = to_velocity(x, output.to(x.dtype), times, prediction)
        if weak is not None and sampling.weak:
            outputs["weak"] = to_velocity(x, weak.to(x.dtype), times, sampling.weak.config.prediction)
        return to_velocity(x, full.to(x.dtype), times, prediction), outputs

    field = guided(predict, sampling.guidance)
    if watch is None:
        return field

    def watched(x: Tensor, t: float) -> Tensor:
        v = field(x, t)
        watch(x, v, t)
        return v

    return watched


def _reusing(denoiser: Denoiser, reuse: float, kind: str, passes: Counter[str]) -> Callable[..., Any]:
    """`denoiser` at a time, counted in `passes`, whose backbone runs only as often as `Sampling.reuse` says."""
    features, seen, since = None, 0.0, 0

    def forward(now: float, x: Tensor, t: Tensor, labels: Tensor | None, **options: Any) -> Any:
        nonlocal features, seen, since
        if reuse == 1:
            passes[kind] += 1
            return denoiser(x, t, labels, **options)
        since += 1
        if features is None or (since == reuse if reuse > 1 else similarity(now, seen) < reuse):
            features, seen, since = denoiser.features(x, t, labels), now, 0
            passes[kind] += 1
        else:
            passes["head"] += 1
        return denoiser(x, t, labels, features=features, **options)

    return forward
