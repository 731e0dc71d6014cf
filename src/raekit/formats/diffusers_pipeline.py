"""Read and write the folder of diffusers' RAEDiTPipeline: an autoencoder, a DiT^DH and a scheduler.

model_index.json    the classes of the parts, and the names of the image classes
vae/                an AutoencoderRAE (`diffusers_files`)
transformer/        a RAEDiT2DModel: a DiT^DH of RAE v1
scheduler/          a FlowMatchEulerDiscreteScheduler, which holds the time shift
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from raekit.config import configclass, from_dict, to_dict, to_json
from raekit.errors import UserError
from raekit.files import whole
from raekit.formats.denoiser_files import read_denoiser
from raekit.formats.denoiser_keys import denoiser_config, published_denoiser, published_denoiser_state
from raekit.formats.diffusers_files import (
    DIFFUSERS_VERSION,
    DIFFUSERS_WEIGHTS,
    fields_of,
    read_diffusers,
    write_diffusers,
)
from raekit.formats.parts import DenoiserParts, Parts, about
from raekit.formats.states import State, rename
from raekit.models.denoiser_config import DenoiserConfig
from raekit.weights import read_weights

INDEX = "model_index.json"
PIPELINE = "RAEDiTPipeline"
_PARTS = {
    "vae": ["diffusers", "AutoencoderRAE"],
    "transformer": ["diffusers", "RAEDiT2DModel"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}


@configclass
class DiffusersScheduler:
    """The arguments of diffusers' FlowMatchEulerDiscreteScheduler, with its defaults.

    `shift` is the time shift of the denoiser. The other values change the times and are not supported, except the four
    sizes and `time_shift_type`, which only dynamic shifting uses.
    """

    num_train_timesteps: Literal[1000] = 1000
    shift: float = 1.0
    use_dynamic_shifting: Literal[False] = False
    base_shift: Any = 0.5
    max_shift: Any = 1.15
    base_image_seq_len: Any = 256
    max_image_seq_len: Any = 4096
    invert_sigmas: Literal[False] = False
    shift_terminal: None = None
    use_karras_sigmas: Literal[False] = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False
    time_shift_type: Any = "exponential"
    stochastic_sampling: Literal[False] = False

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise UserError(f"shift: {self.shift} must be positive")


def read_pipeline(folder: Path, denoiser: bool = True) -> Parts:
    """Read the folder of a RAEDiTPipeline.

    Args:
        folder: the folder, with `model_index.json`.
        denoiser: if False, read only the autoencoder.

    Raises:
        UserError: a file is missing or does not fit, or the pipeline has other parts.
    """
    path = folder / INDEX
    index = fields_of(path, PIPELINE)
    for name, expected in _PARTS.items():
        if index.get(name) != expected:
            raise UserError(f"{path}: {name} is {index.get(name)}; only diffusers' {expected[1]} is supported")
    transformer = _read_transformer(folder, index.get("id2label")) if denoiser else None
    return Parts(read_diffusers(folder / "vae"), transformer)


def _read_transformer(folder: Path, id2label: Any) -> DenoiserParts:
    path, scheduler = folder / "transformer" / "config.json", folder / "scheduler" / "scheduler_config.json"
    values = fields_of(path, "RAEDiT2DModel")
    with about(scheduler):
        fields = fields_of(scheduler, "FlowMatchEulerDiscreteScheduler")
        shift = from_dict(DiffusersScheduler, fields, "scheduler").shift
    with about(path):
        config = denoiser_config(
            {"input_size" if key == "sample_size" else key: value for key, value in values.items()}
        )
        if config.head is None:
            raise UserError("hidden_size: RAEDiT2DModel has a backbone and a head; give two numbers")
    with about(folder / INDEX):
        config = replace(config, shift=shift, class_names=_class_names(id2label, config.num_classes))
    source = folder / "transformer" / DIFFUSERS_WEIGHTS
    state = {key: value.float() for key, value in read_weights(source).items()}
    return read_denoiser(source, config, weights=from_diffusers_transformer(state, config))


def _class_names(id2label: Any, classes: int) -> tuple[str, ...]:
    if id2label is None:
        return ()
    wanted = [str(number) for number in range(classes)]
    if not isinstance(id2label, dict) or id2label.keys() != set(wanted):
        raise UserError(f"id2label: must be null or have a name for each of the {classes} classes 0 to {classes - 1}")
    if not all(isinstance(name, str) for name in id2label.values()):
        raise UserError("id2label: the names must be text")
    return tuple(id2label[number] for number in wanted)


def write_pipeline(parts: Parts, folder: Path) -> None:
    """Write an autoencoder and a denoiser as a folder for `RAEDiTPipeline.from_pretrained`.

    Raises:
        UserError: the autoencoder is missing, or diffusers does not support one of the parts.
    """
    if not (parts.autoencoder and parts.denoiser):
        raise UserError("diffusers: a pipeline needs an autoencoder and a denoiser; add --autoencoder")
    config = parts.denoiser.config
    remedy = "write raekit files, or convert only the autoencoder (give its folder)"
    try:
        values = to_dict(published_denoiser(config))
    except UserError as error:
        raise UserError(f"diffusers: RAEDiT2DModel {error}; {remedy}") from None
    if config.head is None:
        raise UserError(f"diffusers: RAEDiT2DModel cannot hold a DiT without a head; {remedy}")
    values = {"sample_size" if key == "input_size" else key: value for key, value in values.items()}
    for unused in ("learn_sigma", "use_gembed"):
        del values[unused]
    state = published_denoiser_state(parts.denoiser.state, config)
    header: dict[str, Any] = {"_diffusers_version": DIFFUSERS_VERSION}
    labels = {str(number): name for number, name in enumerate(config.class_names)}
    with whole(folder, folder=True) as partial:
        partial.mkdir()
        write_diffusers(parts.autoencoder, partial / "vae")
        files = {
            INDEX: {"_class_name": PIPELINE} | header | {"id2label": labels or None} | _PARTS,
            "transformer/config.json": {"_class_name": "RAEDiT2DModel"} | header | values,
            "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler"}
            | header
            | to_dict(DiffusersScheduler(shift=config.shift)),
        }
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(to_json(content))
        tensors = to_diffusers_transformer(state, config)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, partial / "transformer" / DIFFUSERS_WEIGHTS
        )


_GATED = {"mlp.w12": "mlp.net.0.proj", "mlp.w3": "mlp.net.2", "attn.proj": "attn.to_out.0"}
_PLAIN = {"mlp.fc1": "mlp.net.0.proj", "mlp.fc2": "mlp.net.2", "attn.proj": "attn.to_out.0"}


def from_diffusers_transformer(state: State, config: DenoiserConfig) -> dict[str, Tensor]:
    """Convert the state dict of a RAEDiT2DModel to the names of RAE v1.

    Missing tensors stay missing, for the reader to report.
    """
    names = {theirs: v1 for v1, theirs in (_GATED if config.mlp == "swiglu" else _PLAIN).items()}
    v1 = {}
    for key, value in state.items():
        block, name = _split(key)
        if config.mlp == "swiglu" and name.startswith("mlp.net.0.proj."):
            value = _swapped(value)
        if name.startswith("attn.to_q."):
            whole = [state.get(f"{block}{name.replace('to_q', part)}") for part in ("to_q", "to_k", "to_v")]
            present = [each for each in whole if each is not None]
            v1[f"{block}{name.replace('to_q', 'qkv')}"] = torch.cat(present)
        elif not name.startswith(("attn.to_k.", "attn.to_v.")):
            v1[block + rename(name, names)] = value
    return v1


def to_diffusers_transformer(v1: State, config: DenoiserConfig) -> dict[str, Tensor]:
    """Convert the state dict of a published v1 denoiser to the state dict of a RAEDiT2DModel."""
    names = _GATED if config.mlp == "swiglu" else _PLAIN
    state = {}
    for key, value in v1.items():
        block, name = _split(key)
        if name.startswith("attn.qkv."):
            for part, rows in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
                state[f"{block}{name.replace('qkv', part)}"] = rows
            continue
        state[block + rename(name, names)] = _swapped(value) if name.startswith("mlp.w12.") else value
    return state


def _split(key: str) -> tuple[str, str]:
    """Return the `blocks.N.` in front of a name, or nothing, and the rest of the name."""
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", key)
    return (match[1], match[2]) if match else ("", key)


def _swapped(rows: Tensor) -> Tensor:
    """Swap the halves of SwiGLU's input layer: RAE v1 has the gate first, diffusers has it last."""
    return torch.cat(rows.chunk(2)[::-1])
