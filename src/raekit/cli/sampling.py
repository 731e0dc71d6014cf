"""The options of all commands that sample."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from raekit.errors import UserError

if TYPE_CHECKING:
    from raekit.distributed import World
    from raekit.flow.sampling import Sampling
    from raekit.models.denoiser import Denoiser


@dataclass(frozen=True)
class SolverOptions:
    """How to solve.

    Args:
        steps: solver steps; dopri5 takes its own. Default: 50.
        solver: euler takes one evaluation a step; heun takes two and is of second order. ab2 extrapolates from the last
            two evaluations, one a step. abm also corrects each step with the next evaluation, one a step. dopri5
            chooses its steps for the complete batch, so a sample depends on its batch up to the tolerance.
            euler-maruyama solves the SDE. Default: euler.
        grid: of times; full goes down to the data, published is the official sampler's, one step short of them.
            Default: full.
        atol: absolute tolerance of dopri5. Default: 1e-6.
        rtol: relative tolerance of dopri5. Default: 1e-3.
        reuse: run the backbone at every so many steps only, the head at each; below 1, whenever the latents have
            become less similar than that to those that it last saw.
        precision: what denoisers compute in. Default, and that of published scores: fp32.
    """

    steps: int | None = None
    solver: Literal["euler", "heun", "ab2", "abm", "dopri5", "euler-maruyama"] | None = None
    grid: Literal["full", "published"] | None = None
    atol: float | None = None
    rtol: float | None = None
    reuse: int | float | None = None
    precision: Literal["fp32", "bf16"] | None = None

    def given(self) -> list[str]:
        """The names of the options on the command line."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def unguided(self) -> "Sampling":
        from raekit.flow.sampling import Sampling

        unused = ("steps",) if self.solver == "dopri5" else ("atol", "rtol")
        for name in unused:
            if name in self.given():
                raise UserError(f"--{name}: no effect with --solver {self.solver or 'euler'}")
        return Sampling(
            **{
                field.name: getattr(self, field.name)
                for field in fields(SolverOptions)
                if getattr(self, field.name) is not None
            }
        )


@dataclass(frozen=True)
class SamplingOptions(SolverOptions):
    """How to sample.

    Args:
        guidance: METHOD:SCALE or METHOD:SCALE@START-END, as in cfg:2.0@0.1-0.9. Methods: cfg, auto (see WEAK), and
            internal, for models with a base output. Several are joined by +.
        weak: the weaker model of auto guidance, named as the model is.
    """

    guidance: str | None = None
    weak: str | None = None

    def sampling(self, model: str, world: "World") -> "Sampling":
        from dataclasses import replace

        from raekit.flow.guidance import parse_guidance

        rules = parse_guidance(self.guidance) if self.guidance is not None else ()
        return replace(self.unguided(), guidance=rules, weak=load_weaker(self.weak, model, world))


Solver = Annotated[SolverOptions, tyro.conf.arg(name="")]
Options = Annotated[SamplingOptions, tyro.conf.arg(name="")]


def load_weaker(weak: str | None, model: str, world: "World") -> "Denoiser | None":
    from raekit.models.denoiser import Denoiser

    if weak == model:
        raise UserError(f"--weak: {weak} is the model itself, which has no effect")
    return Denoiser.load(weak).to(world.device) if weak else None
