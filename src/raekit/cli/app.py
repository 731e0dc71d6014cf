"""The command `raekit app`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.errors import UserError


def app(
    model: Positional[str],
    port: int | None = None,
    share: bool = False,
    space: str | None = None,
    ema: float | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Device | None = None,
) -> None:
    """Serve a page for the browser that generates, reconstructs and varies images.

    Example: raekit app builtin:emoji

    The command prints the address of the page, which is served on this machine only. Ctrl-C ends it.

    Args:
        model: Model to show: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        port: Port of the page. None: the first free port from 7860 on.
        share: Also open a public address for a week, through Gradio's relay.
        space: Name OWNER/NAME of a Space, a demo that the Hub hosts. Write its files to the folder NAME, and exit.
        ema: EMA decay of the weights to use, one of the recipe's `ema` values. None: the first of them.
        precision: Precision that the model is loaded and computes in.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    if find_spec("gradio") is None:
        raise UserError("app: Gradio is not installed; pip install 'raekit[app]'")
    from raekit.cli.browser import launch, write_space
    from raekit.cli.sampling import dtype_of
    from raekit.distributed import prepare_device
    from raekit.inference.pipeline import Pipeline

    if space is not None:
        folder = Path(space.rpartition("/")[2])
        write_space(model, space, folder)
        console.out.print(f"{folder}: upload with `hf upload {space} {folder} . --repo-type space`")
        return
    pipeline = Pipeline.from_pretrained(model, ema=ema, dtype=dtype_of(precision)).to(prepare_device(device))
    launch(pipeline, port=port, share=share)
