"""Commands that measure how good images and encoders are."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.launch import processes
from raekit.cli.sampling import Options, SamplingOptions
from raekit.files import check_file
from raekit.progress import Display


def evaluate(
    model: Positional[str],
    reference: tuple[Path, ...] = (),
    source: str | None = None,
    features: tuple[str, ...] = (),
    count: int | None = None,
    reconstruct: bool = False,
    lpips: str | None = None,
    interpolate: bool = False,
    baselines: bool = False,
    relative_to: tuple[Path, ...] = (),
    seed: int = 0,
    labels: Literal["balanced", "random", "reference"] | None = None,
    options: Options = SamplingOptions(),
    ema: float | None = None,
    intervals: bool = False,
    batch_size: int = 64,
    compile: bool = False,
    workers: int = 0,
    out: Path | None = None,
    device: Device | None = None,
) -> None:
    """Compare samples, or saved images, with real images, and write a report.

    Example: raekit evaluate builtin:emoji --baselines

    Without --reference the images are compared with the held-out images of the dataset that the model was trained on.
    Saved images need --reference or --source. A stopped evaluation resumes with the same command.

    Reconstructions (rFID, PSNR, SSIM): raekit evaluate builtin:emoji --reconstruct

    Several processes: torchrun --nproc-per-node 8 -m raekit -- evaluate MODEL ...

    Args:
        model: Model: a published name, builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub. Or saved images:
            flat:DIR, folder:DIR, npz:FILE, zip:FILES or tar:FILES.
        reference: Files to compare with: a .safetensors file of `raekit reference`, ADM's .npz file, or statistics of
            other projects.
        source: Dataset to compare with, instead of the dataset that the model was trained on. With --reference, only
            for --interpolate, which searches its training images, and for --baselines.
        features: Networks whose features are compared: inception, inception:WEIGHTS, clean_inception, vgg16,
            vgg16:WEIGHTS, fdr6 or fdr6:DIR (the six networks of FDr6), classifier:NAME, or encoders, also as
            ENCODER@SIZE. Default: the networks of the reference; classifier:builtin:emoji for the built-in images.
        count: Number of samples. Default: 50,000 with --reference, otherwise 1,000.
        reconstruct: Score reconstructions of the real images instead of samples.
        lpips: Score reconstructions by LPIPS too, with VGG16's weights from this file; auto finds them in torchvision's
            cache or on the Hub.
        interpolate: Score the autoencoder without a denoiser, by images halfway between held-out images and similar
            training images in its latents (iFID).
        baselines: Also score training images, held-out images, their reconstructions and decoded noise, and compare all
            images with their nearest training images.
        relative_to: References of other real images. Also report each distance divided by the distance of these images.
        seed: Seed of the samples, or of --interpolate's draws.
        labels: Classes of the samples: each class equally often; drawn uniformly; or in the proportions of the
            reference's images. Default: balanced with --reference, otherwise reference.
        ema: EMA decay of the weights to use, one of the recipe's `ema` values. Default: the first.
        intervals: Compute 95 % intervals of distances and accuracies, and the bias of distances.
        batch_size: Number of images to process at once, at most 250.
        compile: Compile the blocks of the model. This saves time only for many samples.
        workers: Number of processes that decode images. 0: decode in the main process.
        out: Folder of the report. It must not lie in a folder of evaluated images. Default: reports/HASH.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.evaluation.evaluate import evaluate as run
    from raekit.evaluation.reports import baseline_rows, score_rows

    with processes(device, resumable=True) as here, Display(console.err, quiet=not here.is_main) as progress:
        report, folder = run(
            model,
            reference=reference,
            source=source,
            features=features,
            count=count,
            seed=seed,
            labels=labels,
            sampling=options.sampling(model, here) if {*options.given()} - {"precision"} else None,
            ema=ema,
            reconstruct=reconstruct,
            lpips=lpips,
            interpolate=interpolate,
            baselines=baselines,
            relative_to=relative_to,
            intervals=intervals,
            batch_size=batch_size,
            dtype=options.dtype,
            compile=compile,
            workers=workers,
            out=out,
            names={"weak": options.weak},
            world=here,
            progress=progress,
        )
    if here.is_main:
        for head, *rows in [score_rows(report), *([baseline_rows(report)] if report.baselines else [])]:
            console.print_table(head, rows)
        for note in report.notes:
            console.out.print(note)
        console.out.print(f"report: {folder / 'report.html'}, settings {report.hash}")


def compare(reports: Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Put reports of `raekit evaluate` side by side, and say which settings differ.

    Example: raekit compare reports/plain reports/guided --out guidance.png

    Args:
        reports: Folders of reports, or their report.json files.
        out: File to write the comparison to: .png, .md or .html.
    """
    from raekit.evaluation.reports import Comparison, check_comparison

    if out:
        check_comparison(out)
    comparison = Comparison(reports)
    console.print_table(["", *comparison.labels], comparison.rows())
    for note in comparison.notes():
        console.out.print(note)
    if out:
        comparison.write(out)
        console.out.print(f"written: {out}")


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
    """Measure the statistics of real images, for `raekit evaluate --reference`.

    Example: raekit reference folder:imagenet --split heldout --image-size 256 --out imagenet256.safetensors

    Args:
        source: Real images: emoji, folder:DIR, hf:OWNER/NAME, tar:FILES and others (docs/data.md).
        out: The .safetensors file to write.
        image_size: Side in pixels that the images are centre-cropped to.
        split: Split of the source.
        features: Networks that compute the features: inception, inception:WEIGHTS, clean_inception, vgg16,
            vgg16:WEIGHTS, fdr6 or fdr6:DIR (the six networks of FDr6), classifier:NAME, or encoders, also as
            ENCODER@SIZE.
        keep: Number of images whose features are kept, for precision, recall and KID.
        workers: Number of processes that decode images. 0: decode in the main process.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from raekit.data.loader import DataConfig
    from raekit.evaluation.features import load_networks
    from raekit.evaluation.references import measure_reference

    check_file(out, ".safetensors")
    with processes(device) as here, Display(console.err, quiet=not here.is_main) as progress:
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
    """Classify held-out images with a linear probe of latents.

    Example: raekit probe builtin:vit-tiny --source folder:images

    For comparison, the command also probes the encoder with random weights.

    Args:
        name: A registered encoder, builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        source: Labelled images: emoji, folder:DIR, hf:OWNER/NAME, tar:FILES and others (docs/data.md).
        tokens: Input of the probe: the mean of an image's tokens, or all tokens.
        image_size: Side in pixels that the images are centre-cropped to. Default: the model's own.
        penalty: L2 penalty of the regression. Default: the penalty that is best on a tenth of the training images.
        workers: Number of processes that decode images. 0: decode in the main process.
        out: JSON file for the results.
        device: Device to compute on. None: the GPU if there is one, else the CPU.
    """
    from dataclasses import asdict

    from raekit.config import to_json
    from raekit.evaluation.probe import probe as run_probe
    from raekit.files import whole

    if out:
        check_file(out)
    with processes(device) as here, Display(console.err, quiet=not here.is_main) as progress:
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
    console.print_table(
        ["", "held-out accuracy", "95 % interval", "training accuracy", "penalty", "fits"],
        [
            [
                row,
                f"{r.accuracy:.1%}",
                f"{r.low:.1%} to {r.high:.1%}",
                f"{r.training:.1%}",
                f"{r.penalty:g}",
                f"{r.seconds:.1f} s",
            ]
            for row, r in results.items()
        ],
    )
    if out:
        rows = {row: asdict(result) for row, result in results.items()}
        with whole(out) as partial:
            partial.write_text(to_json({"model": name, "source": source, "tokens": tokens, "results": rows}), "utf-8")
