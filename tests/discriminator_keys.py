"""Map the tensor names of the published discriminator's heads (RAE v1), for comparisons with the published code.

The published files hold only the backbone. The heads are only in checkpoints of trainings with the published code,
which raekit does not resume.
"""

from torch import Tensor

from raekit.formats.states import State, rename

_DISCRIMINATOR = {
    "0.0": "first.0",
    "0.1": "first.1",
    "1.fn.0": "residual.0",
    "1.fn.1": "residual.1",
    "2": "out",
}
_SPECTRAL = {"weight_orig": "weight", "weight_u": "u", "weight_v": "v"}


def discriminator_state(state: State) -> dict[str, Tensor]:
    """Convert the published discriminator's state dict to raekit's. The prefix `heads.` is optional in the names."""
    ours = {}
    for key, value in state.items():
        head, _, rest = key.removeprefix("heads.").partition(".")
        layer, _, tensor = rename(rest, _DISCRIMINATOR).rpartition(".")
        ours[f"heads.{head}.{layer}.{_SPECTRAL.get(tensor, tensor)}"] = value
    return ours
