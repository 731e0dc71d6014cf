"""How a published YAML samples: its sections `sampler` and `guidance`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raekit.config import configclass, from_dict
from raekit.errors import UserError
from raekit.flow.guidance import Guidance
from raekit.flow.solvers import Grid, SolverName
from raekit.formats.yaml_model import VERSIONS, PublishedStage2, class_name, described_denoiser
from raekit.models.denoiser_config import DenoiserConfig

# Sampling.

SOLVERS: dict[str, SolverName] = {"euler": "euler", "heun2": "heun", "dopri5": "dopri5"}
"""The published names of solvers, those of torchdiffeq, with ours."""


@configclass
class PublishedSolver:
    """`sampler.params` of a YAML."""

    sampling_method: Literal["euler", "heun2", "dopri5"] = "euler"
    num_steps: int = 50
    atol: float = 1e-6
    rtol: float = 1e-3
    reverse: Literal[False] = False


@configclass
class PublishedSampler:
    """`sampler` of a YAML. Of its SDE the published steps do not run as they are shipped (spec 8)."""

    mode: Literal["ODE"] = "ODE"
    params: PublishedSolver = PublishedSolver()


@configclass
class PublishedSamplerV2:
    """`sampler` of a YAML of version 2, which has Euler steps alone."""

    num_steps: int = 50


@configclass
class PublishedInterval:
    """`guidance.cfg` and `guidance.ig` of a YAML of version 2."""

    scale: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0


@configclass
class PublishedGuidance(PublishedInterval):
    """`guidance` of a YAML. The shipped ones write t-min and t-max, which the published sampler does not read."""

    method: Literal["cfg", "autoguidance"] = "cfg"
    guidance_model: dict[str, Any] | None = None


@configclass
class PublishedGuidanceV2:
    """`guidance` of a YAML of version 2."""

    cfg: PublishedInterval = PublishedInterval()
    ig: PublishedInterval = PublishedInterval()


@dataclass(frozen=True, kw_only=True)
class PublishedSampling:
    """How a published YAML samples. `weak` is the weaker denoiser of its guidance, with its file."""

    steps: int
    solver: SolverName
    grid: Grid
    atol: float = 1e-6
    rtol: float = 1e-3
    guidance: tuple[Guidance, ...] = ()
    weak: tuple[DenoiserConfig, str] | None = None


def published_sampling(values: Mapping[str, Any], source: str | Path) -> PublishedSampling:
    """How a published YAML samples; UserError if it does not say, or in a way that we do not have."""
    if not isinstance(values.get("sampler"), Mapping):
        raise UserError(f"{source}: does not tell how to sample, as it has no section sampler")
    stage = from_dict(PublishedStage2, values.get("stage_2"), f"{source}: stage_2")
    where, given = f"{source}: guidance", values.get("guidance") or {}
    if VERSIONS.get(class_name(stage.target)) == 2:
        steps = from_dict(PublishedSamplerV2, values["sampler"], f"{source}: sampler").num_steps
        guidance = from_dict(PublishedGuidanceV2, given, where)
        rules = [*_rule("cfg", guidance.cfg, where), *_rule("internal", guidance.ig, where)]
        return PublishedSampling(steps=steps, solver="euler", grid="full", guidance=tuple(rules))
    solver = from_dict(PublishedSampler, values["sampler"], f"{source}: sampler").params
    if isinstance(given, Mapping):
        spelled = {str(key).replace("t-m", "t_m"): value for key, value in given.items()}
        if len(spelled) < len(given):
            raise UserError(f"{where}: gives one time in two spellings, as t-min and t_min")
        given = spelled
    guidance = from_dict(PublishedGuidance, given, where)
    rules = _rule("auto" if guidance.method == "autoguidance" else "cfg", guidance, where)
    weak = None
    if rules and guidance.method == "autoguidance":
        if guidance.guidance_model is None:
            raise UserError(f"{where}.guidance_model: missing; it is what autoguidance leads away from")
        config, file = described_denoiser(values, guidance.guidance_model, f"{where}.guidance_model", source)
        if not file:
            raise UserError(f"{where}.guidance_model.ckpt: missing")
        weak = (config, file)
    return PublishedSampling(
        steps=solver.num_steps,
        solver=SOLVERS[solver.sampling_method],
        grid="published",
        atol=solver.atol,
        rtol=solver.rtol,
        guidance=tuple(rules),
        weak=weak,
    )


def _rule(method: Literal["cfg", "auto", "internal"], given: PublishedInterval, where: str) -> list[Guidance]:
    """A scale of 1 is no guidance, as the published files write it."""
    if given.scale == 1:
        return []
    try:
        return [Guidance(method=method, scale=given.scale, start=given.t_min, end=given.t_max)]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
