"""Commands that score."""

from pathlib import Path
from typing import Literal

from rich.table import Table
from tyro.conf import Positional

from raekit.cli import console
from raekit.cli.console import Device
from raekit.cli.generation import load_weaker
from raekit.errors import UserError
from raekit.progress import Display


def evaluate(
    model: Positional[str],
    count: int = 1000,
    guidance: tuple[str, ...] = (),
    weak: str | None = None,
    steps: int = 50,
    seed: int = 0,
    ema: float | None = None,
    source: str = "emoji",
    features: str = "builtin:vit-tiny",
    out: Path | None = None,
    device: Device | None = None,
) -> None:
    """Score a model's samples and reconstructions beside baselines.

    Example: raekit evaluate builtin:emoji --count 1000 --guidance cfg:2.0

    Args:
        model: builtin:NAME, a model folder, a run, or OWNER/NAME on the Hub.
        count: samples for each setting.
        guidance: settings to score beside unguided sampling, as in cfg:2.0@0.1-0.9 or auto:1.4.
        weak: the weaker model of auto guidance, named as the model is.
        steps: solver steps.
        seed: of the samples.
        ema: the decay of the average to use, of those that were trained (the recipe's `ema`). Default: the first.
        source: real images, split into train and held-out.
        features: the encoder in whose features images are compared.
        out: a JSON file for the scores.
        device: default is the best there is.
    """
    from raekit.config import to_json
    from raekit.data.loader import DataConfig
    from raekit.distributed import world
    from raekit.files import whole
    from raekit.flow.guidance import parse_guidance
    from raekit.inference import Sampling, load
    from raekit.scoring import score

    rules = {text: parse_guidance(text) for text in guidance}
    if weak and not any(rule.method == "auto" for chosen in rules.values() for rule in chosen):
        raise UserError("--weak: no effect without --guidance auto:SCALE")
    with world(device) as here, Display(console.err, quiet=not here.is_main) as progress:
        loaded, weaker = load(model, here.device, ema), load_weaker(weak, model, here)
        samplings = {"samples": Sampling(steps=steps)}
        for text, chosen in rules.items():
            needed = weaker if any(rule.method == "auto" for rule in chosen) else None
            samplings[f"samples, {text}"] = Sampling(steps=steps, guidance=chosen, weak=needed)
        data = DataConfig(source=source, image_size=loaded.autoencoder.image_size)
        scores = score(
            loaded, data, samplings, count=count, seed=seed, features=features, world=here, progress=progress
        )
    if here.is_main:
        console.out.print(scores_table(scores))
        if out:
            with whole(out) as partial:
                partial.write_text(
                    to_json(
                        {"model": model, "ema": ema, "count": count, "seed": seed, "steps": steps, "scores": scores}
                    )
                )


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
