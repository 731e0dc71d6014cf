"""A page in the browser for a model, made with Gradio: generate, interpolate, trajectory, reconstruct, variations."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]  # the tests of the page have it, see the Makefile
from PIL import Image

from raekit.cli import console
from raekit.config import to_json
from raekit.data.images import UnreadableImage, decode
from raekit.errors import UserError, whole_number
from raekit.evaluation.pairs import psnr, ssim
from raekit.files import whole
from raekit.flow.guidance import Guidance, Method
from raekit.flow.solvers import SolverName
from raekit.hub import is_repository
from raekit.inference.gallery import Pictures
from raekit.inference.pipeline import Callback, Pipeline

RANDOM, NONE = "random", "none"
PREVIEW_SECONDS = 0.7
"""The time between two previews. A preview costs a pass of the decoder."""
SOLVERS: tuple[SolverName, ...] = ("euler", "heun", "ab2", "abm")
LARGEST_UPLOAD = "30mb"
MOST_FRAMES = 16
CSS = """
.grid-wrap.fixed-height { min-height: 0; max-height: none; }
@media (max-width: 640px) { .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; } }
"""
Gallery = list[tuple[Image.Image, str]]


class _Stopped(Exception):
    """The visitor stopped the request, or left."""


def build(pipeline: Pipeline, title: str | None = None) -> gr.Blocks:
    """Return the page of a model.

    Args:
        pipeline: the model. Without a denoiser, the page only reconstructs.
        title: the heading. Default: the name of the model.
    """
    page = _Page(pipeline)
    with gr.Blocks(title=title or f"raekit: {pipeline.name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title or pipeline.name}\n{_facts(pipeline)}")
        if pipeline.denoiser:
            page.generate_tab()
            page.interpolate_tab()
            page.trajectory_tab()
        page.reconstruct_tab()
        if pipeline.denoiser:
            page.variations_tab()
    return blocks.queue(default_concurrency_limit=2)


def style(pipeline: Pipeline) -> str:
    """Return the style sheet of a page: two images in a row on phones, and sharp pixels of small images."""
    return CSS + ("img { image-rendering: pixelated }" if max(pipeline.autoencoder.image_shape) < 128 else "")


def launch(pipeline: Pipeline, *, port: int | None = None, share: bool = False) -> None:
    """Serve the page on this machine only, until Ctrl-C.

    Args:
        pipeline: the model.
        port: the port. Default: the first free port from 7860 on.
        share: also open a public address, through Gradio's relay.

    Raises:
        UserError: the port is not free.
    """
    page = build(pipeline)
    try:
        _, address, public = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            max_file_size=LARGEST_UPLOAD,
            css=style(pipeline),
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port: {port} is not free ({error}); choose another port") from None
    console.out.print(f"page: {address}   (Ctrl-C ends it)")
    if public:
        console.out.print(f"public address: {public}")
    sys.stdout.flush()  # also into a file or a pipe
    page.block_thread()


def write_space(model: str, repository: str, folder: Path) -> None:
    """Write the files of a hosted demo, a Space on the Hub.

    Args:
        model: the model, by a name that also loads elsewhere.
        repository: OWNER/NAME of the Space.
        folder: the folder to write, new or empty.

    Raises:
        UserError: the model is a local folder, `repository` is not OWNER/NAME, or the folder is not empty.
    """
    if Path(model).exists():
        raise UserError(f"{model}: a hosted demo cannot load a local folder; publish it first: raekit push {model} ...")
    if not is_repository(repository):
        raise UserError(f"--space: {repository} is not of the form OWNER/NAME")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: already exists and is not empty; move it away")
    about = {
        "title": repository.partition("/")[2],
        "sdk": "gradio",
        "sdk_version": gr.__version__,
        "app_file": "app.py",
        "models": [model] if is_repository(model) else [],
    }
    header = "".join(f"{name}: {to_json(value).strip()}\n" for name, value in about.items())
    code = (
        "from raekit import Pipeline\nfrom raekit.cli.browser import build, style\n\n"
        f"pipeline = Pipeline.from_pretrained({model!r})\nbuild(pipeline).launch(css=style(pipeline))\n"
    )
    with whole(folder, folder=True) as partial:
        partial.mkdir()
        (partial / "README.md").write_text(f"---\n{header}---\n\nImages of {model}, made with raekit.\n", "utf-8")
        (partial / "requirements.txt").write_text("raekit[app] @ git+https://github.com/raekit/raekit\n", "utf-8")
        (partial / "app.py").write_text(code, "utf-8")


class _Page:
    """The tabs. Nothing is kept between requests but in the visitor's own session."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def generate_tab(self) -> None:
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1):
                kind = self.class_menu("Class")
                seed = gr.Number(0, label="Seed", precision=0)
                count = gr.Slider(1, 16, 4, step=1, label="Images")
                settings = self.settings()
                start, stop = self.buttons("Generate")
            with gr.Column(scale=2):
                images = _gallery("Images", "generated")
                status = gr.Markdown()

        def work(kind: str | None, seed: int, count: int, *settings: Any) -> Iterator:
            classes = None if kind in (None, RANDOM) else kind
            options = self.options(*settings)
            yield from _stream(
                lambda callback: self.pipeline(classes, count=count, seed=seed, callback=callback, **options)
            )

        self.connect(start, stop, work, [kind, seed, count, *settings], [images, status])

    def interpolate_tab(self) -> None:
        with gr.Tab("Interpolate"), gr.Row():
            with gr.Column(scale=1):
                with gr.Row():
                    first, last = self.class_menu("First class", ()), self.class_menu("Last class", ())
                with gr.Row():
                    start_seed = gr.Number(0, label="First seed", precision=0)
                    end_seed = gr.Number(1, label="Last seed", precision=0)
                frames = gr.Slider(2, MOST_FRAMES, 8, step=1, label="Images")
                settings = self.settings()
                start, stop = self.buttons("Interpolate")
            with gr.Column(scale=2):
                images = _gallery("From first to last", "row")
                status = gr.Markdown()

        def work(a: str | None, b: str | None, s: int, e: int, n: int, *settings: Any) -> Iterator:
            classes = None if a is None or b is None else (a, b)
            options = self.options(*settings)
            yield from _stream(
                lambda callback: self.pipeline.interpolate((s, e), classes, frames=n, callback=callback, **options)
            )

        self.connect(start, stop, work, [first, last, start_seed, end_seed, frames, *settings], [images, status])

    def trajectory_tab(self) -> None:
        with gr.Tab("Trajectory"), gr.Row():
            with gr.Column(scale=1):
                kind = self.class_menu("Class")
                seed = gr.Number(0, label="Seed", precision=0)
                settings = self.settings()
                start, stop = self.buttons("Show")
            with gr.Column(scale=2):
                frame = gr.Slider(1, MOST_FRAMES, MOST_FRAMES, step=1, label="From noise to image")
                image = gr.Image(label="What the model predicts", interactive=False, elem_id="frame", format="png")
                status = gr.Markdown()
                kept = gr.State([])

        def work(kind: str | None, seed: int, *settings: Any) -> Iterator:
            classes = None if kind in (None, RANDOM) else kind
            options = self.options(*settings)
            frames = min(MOST_FRAMES, options["steps"] + 1)
            for pictures, text in _stream(
                lambda callback: self.pipeline.trajectory(
                    classes, seed=seed, frames=frames, callback=callback, **options
                )
            ):
                done = [_enlarged(each) for each, _ in pictures]
                yield done[-1] if done else None, text, done, gr.Slider(maximum=frames, value=frames)

        def show(number: int, frames: list[Image.Image]) -> Image.Image | None:
            return frames[min(int(number), len(frames)) - 1] if frames else None

        self.connect(start, stop, work, [kind, seed, *settings], [image, status, kept, frame])
        frame.input(show, [frame, kept], image, show_progress="hidden", api_visibility="private")

    def reconstruct_tab(self) -> None:
        with gr.Tab("Reconstruct"), gr.Row():
            with gr.Column():
                given = _upload("original")
                start = gr.Button("Reconstruct", variant="primary")
            with gr.Column():
                image = gr.Image(label="Reconstruction", interactive=False, elem_id="reconstruction", format="png")
                scores = gr.Markdown()

        def work(path: str | None) -> tuple[Image.Image, str]:
            with _shown_errors():
                pipe = self.pipeline
                original = pipe.tensor(_given(path))
                made = pipe.reconstruct(original, output="pt")
                decoded = made.images.to(original)
                values = psnr(decoded, original).item(), ssim(decoded, original).item()
                return _enlarged(made.pil()[0]), f"PSNR {values[0]:.2f} dB, SSIM {values[1]:.3f}, of the central square"

        start.click(work, given, [image, scores], api_visibility="private")

    def variations_tab(self) -> None:
        with gr.Tab("Variations"), gr.Row():
            with gr.Column(scale=1):
                given = _upload("varied")
                strength = gr.Slider(0, 1, 0.3, step=0.05, label="Strength")
                kind = self.class_menu("Class", (NONE,))
                count = gr.Slider(1, 16, 4, step=1, label="Images")
                settings = self.settings()
                start, stop = self.buttons("Vary")
            with gr.Column(scale=2):
                images = _gallery("Variations", "variations")
                status = gr.Markdown()

        def work(path: str | None, strength: float, kind: str | None, count: int, *settings: Any) -> Iterator:
            image = _given(path)
            classes = None if kind in (None, NONE) else kind
            options = self.options(*settings, labelled=classes is not None)
            yield from _stream(
                lambda callback: self.pipeline.variations(
                    image, strength, classes, count=count, callback=callback, **options
                )
            )

        self.connect(start, stop, work, [given, strength, kind, count, *settings], [images, status])

    def class_menu(self, label: str, extra: Sequence[str] = (RANDOM,)) -> gr.Dropdown:
        """Return a menu of classes, after the `extra` choices. Without classes, it is hidden and gives None."""
        names = list(self.pipeline.classes)
        choices = [*extra, *names] if names else []
        return gr.Dropdown(choices, value=choices[0] if choices else None, label=label, visible=bool(choices))

    def settings(self) -> list[Any]:
        """Return the components of guidance, steps and solver, in the order of `options`."""
        classes, base = bool(self.pipeline.classes), self.has_base
        scale = gr.Slider(1, 8, 2 if base else 3, step=0.1, label="Guidance by class (1: off)", visible=classes)
        internal = gr.Slider(1, 4, 1.5, step=0.1, label="Internal guidance (1: off)", visible=base)
        with gr.Accordion("Solver", open=False):
            steps = gr.Slider(2, 250, 50, step=1, label="Steps")
            solver = gr.Dropdown(list(SOLVERS), value=SOLVERS[0], label="Solver")
        return [scale, internal, steps, solver]

    @property
    def has_base(self) -> bool:
        """Whether the denoiser has a base output, which internal guidance needs."""
        return bool(self.pipeline.denoiser and self.pipeline.denoiser.config.base_depth)

    def options(
        self, scale: float, internal: float, steps: int, solver: SolverName, labelled: bool = True
    ) -> dict[str, Any]:
        """Return the arguments of a pipeline for the settings of a visitor, for images with or without a class."""
        scales: dict[Method, float] = {
            "cfg": scale if labelled and self.pipeline.classes else 1,
            "internal": internal if self.has_base else 1,
        }
        guidance = [Guidance(method=method, scale=value) for method, value in scales.items() if value != 1]
        return {"guidance": guidance, "steps": whole_number("steps", steps, 1), "solver": solver}

    def buttons(self, text: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            return gr.Button(text, variant="primary"), gr.Button("Stop")

    def connect(
        self, start: gr.Button, stop: gr.Button, work: Callable[..., Iterator], inputs: list[Any], outputs: list[Any]
    ) -> None:
        """Run `work` with the start button, and end it with the stop button."""

        def shown(*given: Any) -> Iterator:
            with _shown_errors():
                yield from work(*given)

        running = start.click(shown, inputs, outputs, show_progress="minimal", api_visibility="private")
        stop.click(None, cancels=[running])


def _gallery(label: str, name: str) -> gr.Gallery:
    # A label would hide a corner of the first image.
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=4,
        height="auto",
        object_fit="contain",
        format="png",
        elem_id=name,
    )


def _stream(work: Callable[[Callback], Pictures]) -> Iterator[tuple[Gallery, str]]:
    """Run `work` in a thread, and yield previews while it runs and the pictures at the end, each with a remark.

    The work stops at its next step when the generator is closed, which Gradio does when a request is cancelled.
    """
    events: queue.Queue[tuple[Gallery, str] | Exception | None] = queue.Queue()
    stopped = threading.Event()
    began = last = time.monotonic()

    def callback(step: int, total: int, preview: Callable[[], list[Image.Image]]) -> None:
        nonlocal last
        if stopped.is_set():
            raise _Stopped
        if time.monotonic() - last > PREVIEW_SECONDS:
            events.put(([(image, "") for image in preview()], f"step {step} of {total}"))
            last = time.monotonic()

    def run() -> None:
        try:
            made = work(callback)
            captions = [_caption(*each) for each in zip(made.labels, made.seeds, strict=True)]
            gallery = list(zip(made.pil(), captions, strict=True))
            events.put((gallery, f"{len(made)} images in {time.monotonic() - began:.1f} s"))
            events.put(None)
        except _Stopped:
            events.put(None)
        except Exception as error:
            events.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stopped.set()


def _caption(label: str | None, seed: int | None) -> str:
    return ", ".join([*([label] if label is not None else []), *([f"seed {seed}"] if seed is not None else [])])


def _enlarged(image: Image.Image) -> Image.Image:
    """Return an image at least 256 pixels wide, because a browser shows one large image in its own size."""
    factor = max(256 // image.width, 1)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _given(path: str | None) -> Image.Image:
    """Return the uploaded image."""
    if path is None:
        raise UserError("no image is given; upload one")
    try:
        return decode(path, Path(path).name)
    except UnreadableImage as error:
        raise UserError(f"{error.path}: not a readable image ({error.reason})") from None


def _upload(place: str) -> gr.Image:
    """Return an image to upload. It is decoded by raekit, whose limits and messages apply, and not by Gradio."""
    image = gr.Image(label="Image", sources=["upload", "clipboard"], elem_id=place)
    image.preprocess = lambda payload: payload.path if payload else None
    return image


class _shown_errors:
    """Show a UserError of the block to the visitor."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            raise gr.Error(str(error), print_exception=False) from None


def _facts(pipeline: Pipeline) -> str:
    size = " x ".join(map(str, pipeline.autoencoder.image_shape))
    classes = f", {len(pipeline.classes)} classes" if pipeline.classes else ""
    return f"Images of {size} pixels{classes}, on {pipeline.device}."
