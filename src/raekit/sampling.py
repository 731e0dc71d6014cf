"""Sampling latents from a denoiser: solver, guidance and the passes they cost."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from raekit import randomness
from raekit.errors import UserError
from raekit.flow.guidance import Guidance, Reference, Velocity, check_guidance, guided
from raekit.flow.path import to_velocity
from raekit.flow.solvers import Grid, SolverName, dopri5, euler, euler_maruyama, evaluated, heun, time_grid
from raekit.models.denoiser import Denoiser


@dataclass(frozen=True)
class Sampling:
    """How to sample. `steps` on a `full` grid are so many solver steps; `published` is the official grid (spec 3).

    `weak` is the weaker denoiser of `auto` guidance. With `reuse` k the backbone of a network with a head runs
    at every k-th step only. `atol` and `rtol` belong to dopri5. In `bf16` the denoisers run under
    autocast; the state stays float32, and so does decoding.
    """

    steps: int = 50
    solver: SolverName = "euler"
    grid: Grid = "full"
    guidance: tuple[Guidance, ...] = ()
    weak: Denoiser | None = None
    reuse: int = 1
    atol: float = 1e-6
    rtol: float = 1e-3
    precision: Literal["fp32", "bf16"] = "fp32"


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    labels: Tensor | None,
    indices: Tensor,
    seed: int,
    sampling: Sampling,
    device: torch.device | str,
    passes: Counter[str] | None = None,
) -> Tensor:
    """Whitened latents (B, C, H, W) of samples number `indices`, over the time grid shifted as in training.

    The noise is drawn on the CPU, so that it does not depend on the device. Forward passes are added to `passes`.
    """

    def normal(stream: str) -> Tensor:
        return randomness.normal(seed, stream, indices, denoiser.config.latent_shape).to(device)

    check_sampling(sampling, denoiser, labels is not None)
    field = _velocity(denoiser, labels, sampling, Counter() if passes is None else passes)
    times = time_grid(sampling.steps, denoiser.config.shift, sampling.grid)
    if sampling.solver == "euler-maruyama":
        return euler_maruyama(field, normal("sample"), times, lambda step: normal(f"sample, step {step}"))
    return _follow(sampling, field, normal("sample"), times)


@torch.no_grad()
def latents_to_noise(denoiser: Denoiser, latents: Tensor, labels: Tensor | None, sampling: Sampling) -> Tensor:
    """The noise (B, C, H, W) from which sampling arrives at `latents`, as far as its steps are exact.

    The same grid the other way: a `published` one takes `latents` for those of its last time.
    """
    check_sampling(sampling, denoiser, labels is not None, reverse=True)
    field = _velocity(denoiser, labels, sampling, Counter())
    return _follow(sampling, field, latents, time_grid(sampling.steps, denoiser.config.shift, sampling.grid)[::-1])


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
        missing["weak"] = "needs a weaker model; give it with --weak"
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
    check_guidance(sampling.guidance, missing, evaluated(sampling.solver, times[::-1] if reverse else times))
    if sampling.reuse < 1:
        raise UserError(f"reuse: {sampling.reuse} must be at least 1")
    if sampling.reuse > 1 and (not config.head or sampling.solver not in ("euler", "euler-maruyama")):
        raise UserError("reuse: only for a denoiser with a head, and the solvers euler and euler-maruyama")
    if reverse and sampling.solver == "euler-maruyama":
        raise UserError("solver euler-maruyama: goes from noise to data only; take euler, heun or dopri5")


def _velocity(denoiser: Denoiser, labels: Tensor | None, sampling: Sampling, passes: Counter[str]) -> Velocity:
    """The guided velocity, which counts the forward passes that it makes."""
    conditional = _reusing(denoiser, sampling.reuse, "model", passes)
    unconditional = _reusing(denoiser, sampling.reuse, "unconditional", passes)

    def predict(x: Tensor, t: float, references: Collection[Reference]) -> tuple[Tensor, dict[Reference, Tensor]]:
        times = torch.full((len(x),), t, device=x.device)
        outputs: dict[Reference, Tensor] = {}
        weak: Tensor | None = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=sampling.precision == "bf16"):
            if "base" in references:
                full, outputs["base"] = conditional(x, times, labels, with_base=True)
            else:
                full = conditional(x, times, labels)
            if "unconditional" in references:
                outputs["unconditional"] = unconditional(x, times, None)
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

    return guided(predict, sampling.guidance)


def _reusing(denoiser: Denoiser, every: int, kind: str, passes: Counter[str]) -> Callable[..., Any]:
    """`denoiser`, counted in `passes`, whose backbone runs at every `every`-th call only."""
    calls, features = 0, None

    def forward(x: Tensor, t: Tensor, labels: Tensor | None, **options: Any) -> Any:
        nonlocal calls, features
        fresh = calls % every == 0
        calls += 1
        passes[kind if fresh else "head"] += 1
        if every == 1:
            return denoiser(x, t, labels, **options)
        if fresh:
            features = denoiser.features(x, t, labels)
        return denoiser(x, t, labels, features=features, **options)

    return forward
