"""What the steps share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from harness import Table, publish
from raekit.distributed import World

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Where and how large a step runs.

    Attributes:
        device: The device to measure.
        tiny: Whether all sizes are small, so that every step runs on a CPU within seconds.
        out: The folder for the step's results.json and results.md.
        scratch: A folder for files that nobody keeps.
    """

    device: torch.device
    tiny: bool
    out: Path
    scratch: Path

    @property
    def world(self) -> World:
        return World(device=self.device)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions whose results differ on this device."""
        return ("fp32", "tf32", "bf16") if self.device.type == "cuda" else ("fp32", "bf16")

    @property
    def modes(self) -> tuple[str, ...]:
        """Compilation takes minutes on a CPU."""
        return ("eager",) if self.tiny else ("eager", "compiled")

    def pick(self, tiny: T, full: T) -> T:
        return tiny if self.tiny else full

    def attempt(self, what: str, run: Callable[[], object]) -> bool:
        """Run a measurement, and note in the results if it does not fit into memory or lacks a package.

        Return whether it ran.
        """
        try:
            run()
            return True
        except (torch.OutOfMemoryError, ImportError) as error:
            reason = "does not fit into memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
        if self.device.type == "cuda":  # outside of the handler, whose traceback keeps tensors alive
            torch.cuda.empty_cache()
        publish(Table(what, ["", "result"], [["", f"not measured: {reason}"]]), self.device, self.out)
        return False


@dataclass
class Checks:
    """A table of differences from the results that the CPU gives in float32, each with the largest one allowed."""

    title: str
    setting: Setting
    rows: list[list[str]] = field(default_factory=list)
    failures: int = 0

    def compare(self, what: str, made: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        """Add ||made - expected|| / ||expected||."""
        made, expected = made.detach().double().cpu(), expected.detach().double().cpu()
        error = ((made - expected).norm() / expected.norm()).item() if made.shape == expected.shape else float("nan")
        self.add(what, f"{error:.1e}", f"{tolerance:.0e}", error <= tolerance)

    def add(self, what: str, found: str, allowed: str, good: bool) -> None:
        self.failures += not good
        self.rows.append([what, found, allowed, "ok" if good else "FAIL"])

    def publish(self) -> bool:
        """Write the table, and return whether all rows are good."""
        columns = ["", "found", "allowed", "verdict"]
        notes = ["relative differences from the CPU's results in float32"]
        publish(Table(self.title, columns, self.rows, notes), self.setting.device, self.setting.out)
        return not self.failures
