"""Commands that score."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.sampling import Solver, SolverOptions, dtype_of, load_weaker
from raekit.errors import UserError
from raekit.files import check_file, check_folder
from raekit.progress import Display

if TYPE_CHECKING:
    import torch

    from raekit.distributed import World
    from raekit.evaluation.assessment import Reconstructions
    from raekit.evaluation.references import Reference
    from raekit.flow.sampling import Sampling
    from raekit.progress import Report


def evaluate(
    model: Positional[str],
    reference: tuple[Path, ...] = (),
    count: int | None = None,
    reconstruct: bool = False,
    lpips: str | None = None,
    seed: int = 0,
    labels: Literal["balanced", "random", "reference"] = "balanced",
    guidance: tuple[str, ...] = (),
    weak: str | None = None,
    options: Solver = SolverOptions(),
    ema: float | None = None,
    source: str = "emoji",
    features: tuple[str, ...] = (),
    baseline: tuple[Path, ...] = (),
    intervals: bool = False,
    batch_size: int = 64,
    compile: bool = False,
    workers: int = 0,
    out: Path | None = None,
    device: Device | None = None,
) -> None:
    """Compare a model's samples, or saved images, with a reference, and write a report.

    Example: raekit evaluate builtin:emoji --reference emoji.safetensors --labels reference --count 5000
    Stopped, the same command goes on. Several processes: torchrun --nproc-per-node 8 -m raekit -- evaluate MODEL ...
    With --reconstruct it scores reconstructions of the reference's own images (rFID, PSNR, SSIM), as in
    raekit evaluate builtin:emoji --reference emoji.safetensors --reconstruct
    Without a reference it scores samples and reconstructions beside baselines, as in
    raekit evaluate builtin:emoji --guidance cfg:2.0

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub; or saved images: flat:DIR, folder:DIR,
            npz:FILE, zip:FILE or tar:FILE.
        reference: .safetensors of `raekit reference`, ADM's .npz, or statistics of other projects.
        count: samples. Default: 50,000, or 1,000 for each setting without a reference.
        reconstruct: the images that the reference was made of, in place of generating any.
        lpips: score reconstructions by LPIPS too; a file, or auto, as of `raekit reconstruct`.
        seed: of the samples.
        labels: each class equally often; each drawn uniformly; or in the proportions of the reference's images.
        guidance: as in cfg:2.0@0.1-0.9 or auto:1.4. Without a reference, settings to score beside unguided sampling.
        weak: the weaker model of auto guidance, named as the model is.
        ema: the decay of the average to use, of those that were trained (the recipe's `ema`). Default: the first.
        source: without a reference, real images, split into train and held-out.
        features: networks to compare in: inception, inception:WEIGHTS, clean_inception, or encoders. Default: all that
            the reference has statistics of, or builtin:vit-tiny without one.
        baseline: references of other real images, to whose distance that of the images is given as a ratio.
        intervals: 95 % intervals of distances and accuracies, and the distances' bias.
        batch_size: images at once.
        compile: compile the model's blocks; it pays for many images.
        workers: processes that decode saved images.
        out: the folder of the report, by default reports/HASH; without a reference a JSON file for the scores.
        device: default is the best there is.
    """
    from raekit.data.sources import is_address
    from raekit.distributed import world
    from raekit.flow.guidance import parse_guidance
    from raekit.inference.model import load

    saved = is_address(model)
    sampled = {
        "ema": ema is not None,
        "seed": seed != 0,
        "labels": labels != "balanced",
        "guidance": bool(guidance),
        "weak": weak is not None,
        **dict.fromkeys(options.given(), True),
        "count": count is not None,
        "compile": compile,
    }
    if reference:
        _no_effect("with --reference", source=source != "emoji")
        _no_effect(
            "on saved images, which are taken as they are",
            **sampled if saved else {},
            reconstruct=reconstruct and saved,
        )
        sampled.pop("precision", None)  # it is of the autoencoder, too
        _no_effect("with --reconstruct", **sampled if reconstruct else {}, baseline=reconstruct and bool(baseline))
        _no_effect("without --reconstruct", lpips=lpips is not None and not reconstruct)
        if len(guidance) > 1:
            raise UserError("--guidance: one setting for one report; run the others too, and see raekit compare")
    else:
        if saved:
            raise UserError(f"--reference: saved images need one to be compared with, as of raekit reference {model}")
        others = {
            "reconstruct": reconstruct,
            "lpips": lpips is not None,
            "baseline": bool(baseline),
            "workers": workers != 0,
            "batch-size": batch_size != 64,
        }
        _no_effect("without --reference", labels=labels != "balanced", **others)
    if count is not None and count < 1:
        raise UserError(f"--count: {count} must be at least 1")
    if out:
        (check_folder if reference else check_file)(out)
    rules = {text: parse_guidance(text) for text in guidance}
    if weak and not any(rule.method == "auto" for chosen in rules.values() for rule in chosen):
        raise UserError("--weak: no effect without --guidance auto:SCALE")
    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        plain = options.unguided()
        weaker = load_weaker(weak, model, here, options.dtype)
        guided = {
            text: replace(plain, guidance=chosen, weak=weaker if any(r.method == "auto" for r in chosen) else None)
            for text, chosen in rules.items()
        }
        if not reference:
            if len(features) > 1:
                raise UserError("--features: without --reference, one encoder")
            _score(
                model,
                {"samples": plain} | {f"samples, {text}": each for text, each in guided.items()},
                source,
                out,
                count=count or 1000,
                seed=seed,
                features=features[0] if features else "builtin:vit-tiny",
                ema=ema,
                precision=options.precision or "fp32",
                compile=compile,
                intervals=intervals,
                world=here,
                progress=progress,
            )
            return
        from raekit.evaluation.against import Against, find_networks
        from raekit.evaluation.assessment import Samples, assess, exported_average
        from raekit.evaluation.evaluate import StoredImages
        from raekit.evaluation.references import read_reference

        references, baselines = ([read_reference(path) for path in group] for group in (reference, baseline))
        if saved:
            stream = StoredImages(model, batch_size, workers)
        elif reconstruct:
            stream = _reconstructions(model, references[0], lpips, batch_size, workers, here, options.dtype)
        else:
            sampling = guided[guidance[0]] if guidance else plain
            loaded = load(model, here.device, ema, options.dtype)
            if compile:
                loaded.compile(sampling.weak)
            stream = Samples(
                loaded,
                count or 50_000,
                sampling,
                seed=seed,
                labels=labels,
                of_reference=references[0].about.classes,
                batch_size=batch_size,
            )
        names = {
            "model": model,
            "ema": None if saved or reconstruct else exported_average(model) if ema is None else ema,
            "weak": weak,
            "reference": [*map(str, reference)],
            "baseline": [*map(str, baseline)],
        }
        report, folder = assess(
            stream,
            Against(references, find_networks(references, features, here.device), here.device, baselines),
            names,
            out,
            intervals=intervals,
            world=here,
            progress=progress,
        )
    if here.is_main:
        from raekit.evaluation.reports import score_rows

        table = Table("metric", "value", "95 % interval", "")
        for row in score_rows(report):
            table.add_row(*row)
        console.out.print(table)
        for note in report.notes:
            console.out.print(note, markup=False)
        console.out.print(f"report: {folder / 'report.html'}, settings {report.hash}", markup=False)


def _no_effect(why: str, **given: bool) -> None:
    for option, was in given.items():
        if was:
            raise UserError(f"--{option}: no effect {why}")


def _reconstructions(
    model: str,
    reference: "Reference",
    lpips: str | None,
    batch_size: int,
    workers: int,
    world: "World",
    dtype: "torch.dtype",
) -> "Reconstructions":
    """Of the images that `reference` is of, by the autoencoder `model`."""
    from raekit.evaluation.assessment import Reconstructions
    from raekit.evaluation.pairs import reconstruction_metrics
    from raekit.models.autoencoder import load_autoencoder

    source, split = reference.about.source, reference.about.split
    if source is None or split is None:
        raise UserError(
            f"{reference.place}: does not tell what images it is of, and reconstructions are compared with their own "
            "originals; make one by raekit reference"
        )
    scores = reconstruction_metrics(lpips, world.device)
    autoencoder = load_autoencoder(model, dtype).to(world.device)
    return Reconstructions(autoencoder, source, split, scores, batch_size=batch_size, workers=workers)


def _score(
    model: str,
    samplings: "dict[str, Sampling]",
    source: str,
    out: Path | None,
    *,
    count: int,
    seed: int,
    features: str,
    ema: float | None,
    precision: Literal["fp32", "bf16"],
    compile: bool,
    intervals: bool,
    world: "World",
    progress: "Report",
) -> None:
    """Score `samplings` beside baselines."""
    from raekit.config import to_json
    from raekit.data.loader import DataConfig
    from raekit.evaluation.scoring import score
    from raekit.files import whole
    from raekit.inference.model import load

    loaded = load(model, world.device, ema, dtype_of(precision))
    if compile:
        loaded.compile(next((each.weak for each in samplings.values() if each.weak), None))
    data = DataConfig(source=source, image_size=loaded.autoencoder.image_size)
    scores = score(
        loaded,
        data,
        samplings,
        count=count,
        seed=seed,
        features=features,
        intervals=intervals,
        world=world,
        progress=progress,
    )
    if world.is_main:
        console.out.print(scores_table(scores))
        if out:
            plain = next(iter(samplings.values()))
            protocol = {name: getattr(plain, name) for name in ("steps", "solver", "grid", "reuse")}
            protocol["precision"] = precision
            with whole(out) as partial:
                partial.write_text(
                    to_json({"model": model, "ema": ema, "count": count, "seed": seed, **protocol, "scores": scores})
                )


def compare(reports: Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Put reports of `raekit evaluate --reference` side by side, and say which settings differ.

    Example: raekit compare reports/plain reports/guided --out guidance.png

    Args:
        reports: folders of reports, or their report.json.
        out: a .png, .md or .html to write it to.
    """
    from raekit.evaluation.reports import Comparison

    comparison = Comparison(reports)
    table = Table("", *comparison.labels)
    for row in comparison.rows():
        table.add_row(*row)
    console.out.print(table)
    for note in comparison.notes():
        console.out.print(note, markup=False)
    if out:
        comparison.write(out)
        console.out.print(f"written: {out}", markup=False)


def reference(
    source: Positional[str],
    out: Path,
    image_size: int,
    split: Literal["train", "heldout", "all"] = "all",
    features: tuple[str, ...] = ("inception",),
    keep: int = 10_000,
    workers: int = 0,
    device: Device | None = None,
) -> None:
    """Measure what images are compared with: the statistics of real images in the features of networks.

    Example: raekit reference folder:imagenet --split heldout --image-size 256 --out imagenet256.safetensors

    Args:
        source: real images, as of `raekit latents measure`, or npz:FILE, zip:FILE, tar:FILE.
        out: the .safetensors file to write.
        image_size: side that the images are centre-cropped to.
        split: of the source.
        features: inception, inception:WEIGHTS, clean_inception, or encoders.
        keep: images whose own features are kept, for precision, recall and KID.
        workers: processes that decode images.
        device: default is the best there is.
    """
    from raekit.data.loader import DataConfig
    from raekit.distributed import world
    from raekit.evaluation.features import load_networks
    from raekit.evaluation.references import measure_reference

    check_file(out, ".safetensors")
    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        networks = {key: network for name in features for key, network in load_networks(name, here.device).items()}
        data = DataConfig(source=source, split=split, image_size=image_size, workers=workers)
        measured = measure_reference(data, networks, here, keep=keep, progress=progress)
        if here.is_main:
            measured.write(out)
            console.out.print(
                f"{out}: {measured.about.count} images, {', '.join(networks)}, hash {measured.about.hash}"
            )


def probe(
    name: Positional[str],
    source: str = "emoji",
    tokens: Literal["mean", "all"] = "mean",
    image_size: int | None = None,
    penalty: float | None = None,
    workers: int = 0,
    out: Path | None = None,
    device: Device | None = None,
) -> None:
    """Classify held-out images by a linear probe of an encoder's or autoencoder's latents, beside random weights.

    Example: raekit probe builtin:vit-tiny --source folder:images

    Args:
        name: a registered encoder, builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        source: labelled images: emoji, folder:DIR, idx:DIR or hf:DIR.
        tokens: the mean of an image's tokens, or all of them.
        image_size: side that the images are centre-cropped to. Default: the model's.
        penalty: L2 penalty of the regression. Default: the best on a tenth of the training images.
        workers: processes that decode images.
        out: a JSON file for the results.
        device: default is the best there is.
    """
    from dataclasses import asdict

    from raekit.config import to_json
    from raekit.distributed import world
    from raekit.evaluation.probe import probe as run_probe
    from raekit.files import whole

    if out:
        check_file(out)
    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        results = run_probe(
            name,
            source,
            tokens=tokens,
            image_size=image_size,
            penalty=penalty,
            workers=workers,
            world=here,
            progress=progress,
        )
    if not here.is_main:
        return
    table = Table("", "held-out accuracy", "95 % interval", "training accuracy", "penalty")
    for row, result in results.items():
        interval = f"{result.low:.1%} to {result.high:.1%}"
        table.add_row(row, f"{result.accuracy:.1%}", interval, f"{result.training:.1%}", f"{result.penalty:g}")
    console.out.print(table)
    if out:
        rows = {row: asdict(result) for row, result in results.items()}
        with whole(out) as partial:
            partial.write_text(to_json({"model": name, "source": source, "tokens": tokens, "results": rows}))


def scores_table(scores: dict[str, dict[str, float]]) -> Table:
    """The scores as a table, a row for each stream of images."""
    metrics = list(dict.fromkeys(name for row in scores.values() for name in row))
    table = Table("", *metrics)
    for name, row in scores.items():
        table.add_row(name, *(f"{row[m]:.4g}" if m in row else "" for m in metrics))
    return table
