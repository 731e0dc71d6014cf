"""Commands about models: convert, describe and list them."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from tyro.conf import Positional

from raekit.cli import console
from raekit.errors import UserError

if TYPE_CHECKING:
    from raekit.evaluation.reports import Report


def convert(
    source: Positional[str],
    dest: Positional[Path],
    to: Literal["raekit", "v1", "diffusers"] = "raekit",
    encoder: str | None = None,
    encoder_size: int | tuple[int, int] | None = None,
    layers: Literal["k1", "k7", "k23"] | None = None,
    statistics: Path | None = None,
    decoder_config: Path | None = None,
    output: Literal["encoder-colours", "pixels"] = "encoder-colours",
    denoiser_config: Path | None = None,
    prediction: Literal["velocity", "data"] | None = None,
    autoencoder: str | None = None,
) -> None:
    """Convert a model between raekit, RAE v1, RAE v2 and diffusers.

    Example: raekit convert rae-dinov2-b rae-for-diffusers --to diffusers

    A decoder file or training checkpoint: raekit convert model.pt out --encoder dinov2-b --statistics stat.pt

    A denoiser with its autoencoder: raekit convert stage2_model.pt out --autoencoder rae-dinov2-b

    Args:
        source: Published name, published YAML, file of weights, diffusers folder, raekit model, or OWNER/NAME on the
            Hub.
        dest: Folder to write, new or empty.
        to: The format to write: raekit, v1 (the official files, only the autoencoder) or diffusers (a pipeline if the
            source has a denoiser, and an AutoencoderRAE otherwise).
        encoder: For a decoder file, its encoder: a registered name, builtin:NAME, a folder, or FAMILY:WHERE for a
            transformers checkpoint.
        encoder_size: For a decoder file, the size to which the encoder resizes images, in pixels: the side of a
            square, or height and width. Default: the encoder's own size.
        layers: For a decoder file, the encoder layers that form the latents, as in RAE v2. Default: only the last.
        statistics: For a decoder file, the file with the mean and variance of the latents. Default: no whitening.
        decoder_config: For a decoder file of an unpublished size, the decoder's config.json or its folder.
        output: For a decoder file, the colours that the decoder produces. encoder-colours: normalised by the mean
            and standard deviation of the encoder, as in RAE v1. pixels: from 0 to 1, as in RAE v2.
        denoiser_config: For a denoiser file whose shapes do not determine the architecture, a YAML with a stage_2
            section.
        prediction: For a denoiser file, the quantity that it predicts. Default: velocity for v1, data for v2.
        autoencoder: For a denoiser file, the autoencoder to include, in any form that SOURCE accepts.
    """
    from raekit.formats import conversion
    from raekit.models.registry import LAYERS, LayersConfig

    options = conversion.FileOptions(
        encoder=encoder,
        encoder_size=encoder_size,
        layers=LAYERS[layers] if layers else LayersConfig(),
        statistics=statistics,
        decoder_config=decoder_config,
        output=output,
        denoiser_config=denoiser_config,
        prediction=prediction,
        autoencoder=autoencoder,
    )
    parts = conversion.convert(source, dest, to, options)
    if found := parts.autoencoder:
        size, numbers = "x".join(map(str, found.var.shape)), sum(value.numel() for value in found.decoder.values())
        line = f"{dest}: encoder {found.config.encoder}, latents {size}, a decoder of {numbers:,} parameters"
        console.out.print(line)
    if made := parts.denoiser:
        size, numbers = (
            "x".join(map(str, made.config.latent_shape)),
            sum(value.numel() for value in made.state.values()),
        )
        classes = made.config.num_classes
        line = f"{dest}: a denoiser of {numbers:,} parameters for latents {size}, {classes} classes"
        console.out.print(line)


def info(name: Positional[str], reach: tuple[str, float] | None = None) -> None:
    """Describe a model, an artifact or a run.

    Example: raekit info builtin:emoji

    Args:
        name: Published name, builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        reach: For a run, a metric and a value, for example evaluation/fid 2. Also print after how many epochs the
            metric first fell to this value.
    """
    from raekit.stages.inspection import describe_folder

    console.out.print(describe_folder(name, reach))


def push(
    model: Positional[str],
    repository: Positional[str],
    private: bool = False,
    dtype: Literal["fp32", "bf16"] | None = None,
    reports: tuple[Path, ...] = (),
    ema: float | None = None,
    dry_run: bool = False,
) -> None:
    """Publish a model on the Hub, with a model card and a grid of samples.

    Example: raekit push runs/emoji_dit_dh OWNER/NAME --dtype bf16 --dry-run

    Log in first: hf auth login. Others can then load the model by its name: raekit generate OWNER/NAME

    Args:
        model: Model to publish: published name, builtin:NAME, model folder, run folder, or OWNER/NAME on the Hub.
        repository: The repository OWNER/NAME. It is created if it does not exist.
        private: Make a new repository private.
        dtype: Type to store the weights in. None: their present type.
        reports: Report folders of `raekit evaluate`, whose scores are added to the model card.
        ema: EMA decay of the weights to publish, one of the recipe's `ema` values. None: the first of them.
        dry_run: Show the files and the model card, and upload nothing.
    """
    from raekit.cli.sampling import dtype_of
    from raekit.evaluation.reports import read_report
    from raekit.hub import find_folder
    from raekit.inference import publish
    from raekit.inference.pipeline import Pipeline

    publish.check_name(repository)
    scores = [
        publish.Score(name, report.results[name], _compared_with(report))
        for report in map(read_report, reports)
        for name in report.metrics
    ]
    pipeline = Pipeline.from_pretrained(model, ema=ema)
    run = find_folder(model)
    run = run if (run / "checkpoints").is_dir() else None
    stored = dtype_of(dtype) if dtype else None
    with publish.prepared(pipeline, repository, run=run, scores=scores, dtype=stored) as folder:
        if not dry_run:
            console.out.print(f"published: {publish.push(folder, repository, private=private)}")
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            console.out.print(f"{path.stat().st_size:>13,} bytes  {path.relative_to(folder)}")
        console.out.print(f"\n{(folder / 'README.md').read_text('utf-8')}")


def _compared_with(report: "Report") -> str:
    """Return the name of the real images of a report, without a local path."""
    return ", ".join(Path(str(name)).name for name in report.names["reference"])


def models(pattern: Positional[str] = "", encoders: bool = False) -> None:
    """List the models that can be loaded by name.

    Example: raekit models 512

    The number of parameters counts the decoder and the denoiser, without the frozen encoder. A model that is not in the
    cache is downloaded from the Hub at its first use.

    Args:
        pattern: A text that the listed names contain. If not given, all names.
        encoders: List the registered encoders instead.
    """
    from raekit.inference.catalogue import list_encoders, list_models

    if encoders:
        table = Table("encoder", "width", "input", "patch", "tokens", "licence", "in cache", "weights", box=None)
        for each in list_encoders(pattern):
            size = "x".join(map(str, each.input_size))
            numbers = (str(each.width), size, str(each.patch_size), str(each.tokens))
            table.add_row(each.name, *numbers, each.licence, _yes(each.cached), each.hub_id)
    else:
        head = ("model", "makes", "pixels", "parameters", "classes", "encoder", "encoder's licence", "in cache")
        table = Table(*head, box=None)
        for each in list_models(pattern):
            makes = "images" if "denoiser" in each.parts else "reconstructions"
            numbers = (str(each.image_size), f"{each.parameters / 1e6:,.0f} M", str(each.classes or ""))
            table.add_row(each.name, makes, *numbers, each.encoder, each.licence, _yes(each.cached))
    if not table.row_count:
        raise UserError(f"{pattern}: occurs in no name; leave it out to list all")
    console.out.print(table)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
