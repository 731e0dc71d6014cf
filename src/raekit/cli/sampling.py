"""The options of all commands that sample."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from raekit.errors import UserError

if TYPE_CHECKING:
    import torch

    from raekit.distributed import World
    from raekit.flow.sampling import Sampling
    from raekit.models.denoiser import Denoiser


@dataclass(frozen=True)
class SolverOptions:
    """How to solve.

    Args:
        steps: solver steps; dopri5 takes its own. Default: 50.
        solver: euler; heun, with two evaluations a step; dopri5, whose steps are fit to the whole batch, so that a
            sample depends on its batch up to the tolerance; or the SDE's euler-maruyama. Default: euler.
        grid: of times; full goes down to the data, published is the official sampler's, one step short of them.
            Default: full.
        atol: absolute tolerance of dopri5. Default: 1e-6.
        rtol: relative tolerance of dopri5. Default: 1e-3.
        reuse: run the backbone at every so many steps only, the head at each; below 1, whenever the latents have
            become less similar than that to those that it last saw.
        precision: the type that the model is loaded and computes in. Default: fp32, as for published scores.
    """

    steps: int | None = None
    solver: Literal["euler", "heun", "dopri5", "euler-maruyama"] | None = None
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
                if field.name != "precision" and getattr(self, field.name) is not None
            }
        )

    @property
    def dtype(self) -> "torch.dtype":
        """The type to load models in."""
        return dtype_of(self.precision)


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
        return replace(self.unguided(), guidance=rules, weak=load_weaker(self.weak, model, world, self.dtype))


Solver = Annotated[SolverOptions, tyro.conf.arg(name="")]
Options = Annotated[SamplingOptions, tyro.conf.arg(name="")]


def load_weaker(weak: str | None, model: str, world: "World", dtype: "torch.dtype") -> "Denoiser | None":
    from raekit.models.denoiser import Denoiser

    if weak == model:
        raise UserError(f"--weak: {weak} is the model itself, which has no effect")
    return Denoiser.load(weak, dtype=dtype).to(world.device) if weak else None


def dtype_of(precision: Literal["fp32", "bf16"] | None) -> "torch.dtype":
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32
