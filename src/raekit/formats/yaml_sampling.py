"""The schema of published YAML files of RAE v1 and v2: the sections that describe sampling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from raekit.config import configclass, from_dict
from raekit.errors import UserError
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling
from raekit.flow.solvers import SolverName
from raekit.formats.yaml_model import VERSIONS, PublishedStage2, class_name, described_denoiser
from raekit.models.denoiser_config import DenoiserConfig

SOLVERS: dict[str, SolverName] = {"euler": "euler", "heun2": "heun", "dopri5": "dopri5"}
"""raekit's name for each published solver. The published names come from torchdiffeq."""


@configclass
class PublishedSolver:
    """`sampler.params` of a v1 YAML."""

    sampling_method: Literal["euler", "heun2", "dopri5"] = "euler"
    num_steps: int = 50
    atol: float = 1e-6
    rtol: float = 1e-3
    reverse: Literal[False] = False


@configclass
class PublishedSampler:
    """`sampler` of a v1 YAML. `mode: SDE` is not supported: the published SDE steps crash (RAE v1's code)."""

    mode: Literal["ODE"] = "ODE"
    params: PublishedSolver = PublishedSolver()


@configclass
class PublishedSamplerV2:
    """`sampler` of a v2 YAML. v2 has only Euler steps."""

    num_steps: int = 50


@configclass
class PublishedInterval:
    """`guidance.cfg` or `guidance.ig` of a v2 YAML: a scale, and the interval of time in which it applies."""

    scale: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0


@configclass
class PublishedGuidance(PublishedInterval):
    """`guidance` of a v1 YAML.

    The published files write `t-min` and `t-max`, which the published sampler ignores. raekit applies both spellings.
    """

    method: Literal["cfg", "autoguidance"] = "cfg"
    guidance_model: dict[str, Any] | None = None


@configclass
class PublishedGuidanceV2:
    """`guidance` of a v2 YAML: classifier-free and internal guidance."""

    cfg: PublishedInterval = PublishedInterval()
    ig: PublishedInterval = PublishedInterval()


def published_sampling(
    values: Mapping[str, Any], source: str | Path
) -> tuple[Sampling, tuple[DenoiserConfig, str] | None]:
    """Return the sampling settings of a published YAML.

    Args:
        values: the contents of the YAML.
        source: the file's name for error messages.

    Returns:
        The settings, and for autoguidance the weaker denoiser and its file, which is not read here.

    Raises:
        UserError: a section or field is missing, unknown or not supported.
    """
    if not isinstance(values.get("sampler"), Mapping):
        raise UserError(f"{source}: has no section sampler, so it does not say how to sample")
    stage = from_dict(PublishedStage2, values.get("stage_2"), f"{source}: stage_2")
    where, given = f"{source}: guidance", values.get("guidance") or {}
    if VERSIONS.get(class_name(stage.target)) == 2:
        steps = from_dict(PublishedSamplerV2, values["sampler"], f"{source}: sampler").num_steps
        guidance = from_dict(PublishedGuidanceV2, given, where)
        rules = [*_rule("cfg", guidance.cfg, where), *_rule("internal", guidance.ig, where)]
        return Sampling(steps=steps, guidance=tuple(rules)), None
    solver = from_dict(PublishedSampler, values["sampler"], f"{source}: sampler").params
    if isinstance(given, Mapping):
        spelled = {str(key).replace("t-m", "t_m"): value for key, value in given.items()}
        if len(spelled) < len(given):
            raise UserError(f"{where}: gives the same time in two spellings, such as t-min and t_min; keep one")
        given = spelled
    guidance = from_dict(PublishedGuidance, given, where)
    rules = _rule("auto" if guidance.method == "autoguidance" else "cfg", guidance, where)
    weak = None
    if rules and guidance.method == "autoguidance":
        if guidance.guidance_model is None:
            raise UserError(f"{where}.guidance_model: missing; autoguidance needs a weaker model")
        config, file = described_denoiser(values, guidance.guidance_model, f"{where}.guidance_model", source)
        if not file:
            raise UserError(f"{where}.guidance_model.ckpt: missing; give the weaker model's file")
        weak = (config, file)
    options: dict[str, Any] = {"steps": solver.num_steps}
    if solver.sampling_method == "dopri5":  # chooses its own steps
        options = {"atol": solver.atol, "rtol": solver.rtol}
    name = SOLVERS[solver.sampling_method]
    return Sampling(solver=name, grid="published", guidance=tuple(rules), **options), weak


def _rule(method: Literal["cfg", "auto", "internal"], given: PublishedInterval, where: str) -> list[Guidance]:
    """Return at most one rule. In the published files, a scale of 1 means no guidance."""
    if given.scale == 1:
        return []
    try:
        return [Guidance(method=method, scale=given.scale, start=given.t_min, end=given.t_max)]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
