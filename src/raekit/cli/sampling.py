"""Options shared by all commands that sample."""

import os
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
class SamplingOptions:
    """Options of the solver and of guidance.

    Args:
        steps: Number of solver steps. dopri5 chooses its own. None: 50.
        solver: Solver. euler: one evaluation per step; heun: two evaluations per step, order 2; ab2: one evaluation
            per step, extrapolates from the last two evaluations, order 2; abm: as ab2, and corrects each step with the
            next evaluation, order 3; dopri5: adaptive steps, so that a sample depends on its batch within the
            tolerance; euler-maruyama: the SDE. None: euler.
        grid: Time grid. full: from noise to the data; few: as full, with more times near noise and data, for ab2 or
            abm with few steps; published: the grid of the official sampler, with one step fewer, which stops shortly
            before the data; diffusers: the grid of diffusers' RAEDiTPipeline, with a long last step. None: full.
        atol: Absolute tolerance of dopri5. None: 1e-6.
        rtol: Relative tolerance of dopri5. None: 1e-3.
        reuse: How long to reuse the output of the backbone. A whole number k: run the backbone at every k-th step and
            the head at every step. A number below 1: run the backbone again when the expected cosine similarity to
            the latents of its last run falls below this number. Only for a DiT^DH, with euler or euler-maruyama. None:
            run the backbone at every step.
        precision: Precision of the weights and of the computation. None: fp32, as for published scores.
        guidance: Guidance METHOD:SCALE or METHOD:SCALE@START-END, such as cfg:2.0@0.1-0.9. START and END are
            shifted times: 0 is data, 1 is noise. Methods: cfg, for which a plain scale is
            enough, such as 2.0; auto, which needs --weak; internal, for models with a base output. Join several
            methods with +. None: no guidance.
        weak: Weaker model for auto guidance, in the same form as MODEL.
    """

    steps: int | None = None
    solver: Literal["euler", "heun", "ab2", "abm", "dopri5", "euler-maruyama"] | None = None
    grid: Literal["full", "few", "published", "diffusers"] | None = None
    atol: float | None = None
    rtol: float | None = None
    reuse: int | float | None = None
    precision: Literal["fp32", "bf16"] | None = None
    guidance: str | None = None
    weak: str | None = None

    def given(self) -> list[str]:
        """Return the names of the options that were given on the command line."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def sampling(self, model: str, world: "World") -> "Sampling":
        """Return the sampling settings for `model`, with the weaker model loaded to the device.

        Raises:
            UserError: if an option has no effect with the chosen solver.
        """
        from raekit.flow.guidance import parse_guidance
        from raekit.flow.sampling import Sampling

        unused = ("steps",) if self.solver == "dopri5" else ("atol", "rtol")
        for name in unused:
            if name in self.given():
                raise UserError(f"--{name}: no effect with --solver {self.solver or 'euler'}")
        solver = {name: getattr(self, name) for name in self.given() if name not in ("precision", "guidance", "weak")}
        rules = parse_guidance(self.guidance) if self.guidance is not None else ()
        return Sampling(**solver, guidance=rules, weak=load_weaker(self.weak, model, world, self.dtype))

    @property
    def dtype(self) -> "torch.dtype":
        """The type to load models in."""
        return dtype_of(self.precision)


Options = Annotated[SamplingOptions, tyro.conf.arg(name="")]


def load_weaker(weak: str | None, model: str, world: "World", dtype: "torch.dtype") -> "Denoiser | None":
    """Load the weaker model of auto guidance, if one is given."""
    from raekit.models.denoiser import Denoiser

    if weak and os.path.realpath(weak) == os.path.realpath(model):  # names of models on the Hub are compared as text
        raise UserError(f"--weak: {weak} is the model itself, so guidance has no effect; give a weaker model")
    return Denoiser.load(weak, dtype=dtype).to(world.device) if weak else None


def dtype_of(precision: Literal["fp32", "bf16"] | None) -> "torch.dtype":
    """Return the type to load models in."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32
