"""Evaluate a model, or saved images: the one function behind `raekit evaluate`, `raekit.evaluate` and the demo."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from raekit.artifacts import MissingArtifact
from raekit.data.loader import DataConfig
from raekit.data.sources import FORMATS, check_apart, is_address, open_source
from raekit.data.sources.base import Split
from raekit.data.workers import MAX_WORKERS
from raekit.distributed import World, plain_tensors, prepare_device
from raekit.errors import MAX_COUNT, UserError, some, whole_number
from raekit.evaluation.against import Against, find_networks
from raekit.evaluation.assessment import REPORTS, TRAINING, assess, check_count
from raekit.evaluation.features import default_features, load_networks
from raekit.evaluation.interpolations import Interpolations
from raekit.evaluation.labels import Labels
from raekit.evaluation.pairs import METRICS, reconstruction_metrics
from raekit.evaluation.references import Reference, measure_reference, read_reference
from raekit.evaluation.reports import LITERATURE, Report
from raekit.evaluation.streaming import BATCH
from raekit.evaluation.streams import (
    DecodedNoise,
    RealImages,
    Reconstructions,
    Samples,
    StoredImages,
    Stream,
    chunk_batch,
)
from raekit.files import check_folder
from raekit.flow.sampling import Sampling, as_sampling, check_sampling
from raekit.inference.model import Model, load
from raekit.models.autoencoder import load_autoencoder
from raekit.models.conditioning import same_classes
from raekit.models.latent_space import LatentSpace
from raekit.progress import Progress, silent

Places = str | Path | Sequence[str | Path]
COUNT = 1000
"""Samples that are compared with held-out images, unless another number is asked for."""


@plain_tensors()
def evaluate(
    model: str | Path | Model,
    *,
    reference: Places = (),
    source: str | Path | None = None,
    features: str | Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    labels: Labels | None = None,
    sampling: Sampling | None = None,
    ema: float | None = None,
    reconstruct: bool = False,
    lpips: str | None = None,
    interpolate: bool = False,
    baselines: bool = False,
    relative_to: Places = (),
    intervals: bool = False,
    batch_size: int = BATCH,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    workers: int = 0,
    out: str | Path | None = None,
    names: dict[str, Any] | None = None,
    world: World | None = None,
    progress: Progress = silent,
) -> tuple[Report, Path]:
    """Compare a model's samples or reconstructions, or saved images, with real images, and write a report.

    Without `reference` the images are compared with the held-out images of the dataset that the model was trained on,
    which trained models record, or of `source`. A call that was stopped resumes where it stopped.

    Args:
        model: a model, as a name that `raekit.load` takes or loaded; or the address of saved images, such as flat:DIR.
        reference: files that `read_reference` reads.
        source: address of the dataset to compare with, instead of the dataset that the model was trained on. With
            `interpolate` and a reference file: the dataset whose training images are searched, if it is not the
            dataset of the reference.
        features: the networks to compare in (`load_networks`). Default: the networks of the reference. Without a
            reference there is a default only for the built-in images.
        count: number of samples. Default: 50,000 with a reference file, otherwise 1,000.
        seed: seed of the samples, or of the draws of `interpolate`.
        labels: how the classes of the samples are drawn. Default: "balanced" with a reference file, otherwise
            "reference", in the proportions of the held-out images.
        sampling: how to sample. Default: 50 Euler steps without guidance.
        ema: the decay of the weight average to load, if `model` is a name. Default: the first that was trained.
        reconstruct: score reconstructions of the reference's own images (rFID, PSNR, SSIM) instead of samples.
        lpips: score reconstructions by LPIPS too, with VGG16 from this file, or "auto" to find VGG16.
        interpolate: score the autoencoder by images halfway between held-out images and similar training images in
            its latents (iFID), instead of samples.
        baselines: also score training images, held-out images, their reconstructions and decoded noise, and compare
            all images with their nearest training images.
        relative_to: references of other real images. The report also has each distance divided by the distance of these
            images.
        intervals: compute 95 % intervals of distances and accuracies, and the bias of distances.
        batch_size: images at once, at most 250.
        dtype: type that a model given by name is loaded and computes in, as in `raekit.load`.
        compile: compile the blocks of the model. Worth it for many samples.
        workers: processes that decode images.
        out: folder of the report. Default: reports/ and a hash of all settings.
        names: further names for the report.
        world: the processes and their device. Default: this process, on the best device.
        progress: called after each batch.

    Returns:
        The report, whose `results` are {metric: value}, and its folder.

    Raises:
        UserError: an argument has no effect, the images must not be compared, or a file is missing or damaged.
    """
    model = str(model) if isinstance(model, Path) else model
    if not isinstance(model, str | Model):
        raise UserError(
            f"model: a {type(model).__name__} is neither a name nor a `Model`; of a pipeline, give pipe.model"
        )
    source = str(source) if isinstance(source, Path) else source
    features = [features] if isinstance(features, str) else features
    seed, count = whole_number("seed", seed), None if count is None else whole_number("count", count, 1, MAX_COUNT)
    batch_size, workers = chunk_batch(batch_size), whole_number("workers", workers, 0, MAX_WORKERS)
    if isinstance(model, Model) and ema is not None:
        raise UserError("ema: has no effect on a loaded model, which holds one average; leave it out")
    if isinstance(model, str) and (scheme := Path(model).suffix[1:]) in FORMATS and Path(model).is_file():
        raise UserError(f"{model}: give saved images by their address, {scheme}:{model}")
    references, others = _places("reference", reference), _places("relative_to", relative_to)
    saved = isinstance(model, str) and is_address(model)
    _check_arguments(
        saved=saved,
        reconstruct=reconstruct,
        interpolate=interpolate,
        sampled={
            "count": count is not None,
            "seed": seed != 0 and not interpolate,
            "labels": labels is not None,
            "sampling": sampling is not None,
            "ema": ema is not None,
            "compile": compile,
        },
        lpips=lpips,
        others=others,
        intervals=intervals,
        source=source if references and not (baselines or interpolate) else None,
    )
    sampling, report_folder = as_sampling(sampling), Path(out) if out else None
    check_folder(report_folder or Path(REPORTS))
    world = world or World(device=model.device if isinstance(model, Model) else prepare_device())
    own = reconstruct or interpolate  # the autoencoder is scored, without a denoiser
    loaded = _load(model, own, ema, dtype, world) if not saved else None
    dataset = source or (loaded.trained_on if loaded else None)
    name = model if isinstance(model, str) else "a model in memory"
    # All that can be wrong is checked before the reference is measured, which may take hours.
    relative = [read_reference(path) for path in others]
    scores = reconstruction_metrics(lpips, world.device) if reconstruct else {}
    if isinstance(loaded, Model):
        check_sampling(sampling, loaded.denoiser, labelled=bool(loaded.classes))
    if not references or baselines:
        dataset = _check_dataset(name, dataset, source is not None, loaded)
    read = [read_reference(path) for path in references]
    originals = _originals(read[0])[0] if read and own else None
    evaluated = [name if saved else None, originals, dataset if source or baselines or not read else None]
    check_apart(report_folder or Path(REPORTS), filter(None, evaluated), "out")
    stored = StoredImages(name, batch_size, workers, world) if saved else None
    image_size = (loaded or stored).image_size  # type: ignore[union-attr]
    count = count or (LITERATURE if references else COUNT)
    if not own:
        check_count(stored.count if stored else count, intervals)

    notes = []
    if read:
        networks = find_networks(read, features, world.device)
    else:
        assert dataset is not None
        chosen = features or default_features(dataset)
        networks = {key: network for each in chosen for key, network in load_networks(each, world.device).items()}
        tolerated = 0.0 if own else DataConfig.max_unreadable  # every original is reconstructed
        data = DataConfig(
            source=dataset, split="heldout", image_size=image_size, workers=workers, max_unreadable=tolerated
        )
        read = [measure_reference(data, networks, world, progress=progress)]
        trained = "" if source or saved else ", the dataset that the model was trained on"
        notes.append(f"Compared with the {read[0].about.count:,} held-out images of {dataset}{trained}.")

    stream: Stream
    if stored:
        stored.images.loader.announce(world)
        stream = stored
    elif isinstance(loaded, LatentSpace):
        originals, split = _originals(read[0])
        if interpolate:
            stream = Interpolations(
                loaded,
                originals,
                split,
                training=source or originals,
                seed=seed,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
            )
        else:
            stream = Reconstructions(loaded, originals, split, scores, batch_size=batch_size, workers=workers)
            stream.originals.loader.announce(world)
    else:
        assert loaded
        if compile:
            loaded.compile(sampling.weak)
        classes, config = read[0].about.classes, loaded.denoiser.config
        if labels is None and not references and classes is not None and len(classes) == config.num_classes:
            labels = "reference"
        if labels == "reference":
            read[0].check_classes(config.class_names)
        labels = labels or "balanced"
        stream = Samples(loaded, count, sampling, seed=seed, labels=labels, of_reference=classes, batch_size=batch_size)
    rows = {}
    if baselines:
        assert dataset is not None
        rows = _baselines(loaded, dataset, image_size, stream.count, seed, batch_size, workers)
    compared = Against(read, networks, world.device, relative)
    names = {
        "model": name,
        "ema": loaded.denoiser.ema if isinstance(loaded, Model) else None,
        "reference": [*map(str, references)] or [f"{dataset} (held out)"],
        "relative_to": [*map(str, others)],
        **(names or {}),
    }
    return assess(
        stream,
        compared,
        names,
        report_folder,
        baselines=rows,
        notes=notes,
        intervals=intervals,
        world=world,
        progress=progress,
    )


def _places(name: str, places: Places) -> list[Path]:
    if isinstance(places, str | Path):
        return [Path(places)]
    if not isinstance(places, Iterable) or not all(isinstance(place, str | Path) for place in places):
        raise UserError(f"{name}: {places!r} must be a file, or several")
    return [Path(place) for place in places]


def _check_arguments(
    *,
    saved: bool,
    reconstruct: bool,
    interpolate: bool,
    sampled: dict[str, bool],
    lpips: str | None,
    others: Sequence[Path],
    intervals: bool,
    source: str | None,
) -> None:
    """UserError for an argument without effect."""
    given = [name for name, was in sampled.items() if was]
    if reconstruct and interpolate:
        raise UserError("interpolate: cannot be combined with reconstruct; evaluate twice")
    if saved and (wrong := [*given, *["reconstruct"] * reconstruct, *["interpolate"] * interpolate]):
        raise UserError(f"{wrong[0]}: has no effect on saved images, which are scored as they are; leave it out")
    if (reconstruct or interpolate) and (
        wrong := [*given, *["relative_to"] * bool(others), *["intervals"] * intervals]
    ):
        raise UserError(
            f"{wrong[0]}: has no effect with {'reconstruct' if reconstruct else 'interpolate'}; leave it out"
        )
    if lpips is not None and not reconstruct:
        raise UserError("lpips: has no effect without reconstruct; leave it out")
    if source is not None:
        raise UserError("source: has no effect with reference, unless baselines are scored; leave one of them out")


def _load(model: str | Model, own: bool, ema: float | None, dtype: torch.dtype, world: World) -> Model | LatentSpace:
    if isinstance(model, Model):
        return model.autoencoder if own else model
    try:
        return load_autoencoder(model, dtype).to(world.device) if own else load(model, world.device, ema, dtype)
    except MissingArtifact as error:
        raise UserError(f"{error}; saved images are given as flat:{model}") from None


def _check_dataset(name: str, dataset: str | None, given: bool, loaded: Model | LatentSpace | None) -> str:
    """Return the address of the dataset to compare with; UserError if it is unknown, unreadable or of other classes."""
    if dataset is None and loaded is None:
        raise UserError(
            f"{name}: saved images need real images to be compared with; give a dataset (source), or a file that "
            "`raekit reference` wrote (reference)"
        )
    if dataset is None:
        raise UserError(
            f"{name}: does not record the dataset that it was trained on; give the dataset (source), or a file that "
            "`raekit reference` wrote (reference)"
        )
    try:
        classes = open_source(dataset, "heldout").classes
    except UserError as error:
        if given:
            raise
        raise UserError(
            f"{name}: was trained on {dataset}, which cannot be read: {error}. Give its present address (source), or a "
            "file that `raekit reference` wrote (reference)"
        ) from None
    ours = loaded.denoiser.config.class_names if isinstance(loaded, Model) else ()
    if not same_classes(ours, classes):
        raise UserError(
            f"{dataset}: its classes ({some(classes)}) are not the classes of {name} ({some(ours)}); give the dataset "
            "that the model was trained on"
        )
    return dataset


def _originals(reference: Reference) -> tuple[str, Split]:
    """Return the data source and split that `reference` was measured on; UserError if it does not name them."""
    source, split = reference.about.source, reference.about.split
    if source is None or split is None:
        raise UserError(
            f"{reference.place}: does not say which images it was measured on, and reconstructions and "
            "interpolations are compared with their own originals; make a reference with `raekit reference`"
        )
    return source, split


def _baselines(
    loaded: Model | LatentSpace | None,
    dataset: str,
    image_size: int,
    count: int,
    seed: int,
    batch_size: int,
    workers: int,
) -> dict[str, Stream]:
    rows: dict[str, Stream] = {
        "held-out images": RealImages(dataset, "heldout", image_size, batch_size, workers),
        TRAINING: RealImages(dataset, "train", image_size, batch_size, workers, DataConfig.max_unreadable),
    }
    if loaded is None:
        return rows
    autoencoder = loaded.autoencoder if isinstance(loaded, Model) else loaded
    if isinstance(loaded, Model):
        rows["reconstructions"] = Reconstructions(
            autoencoder, dataset, "heldout", METRICS, batch_size=batch_size, workers=workers
        )
    rows["decoded noise"] = DecodedNoise(autoencoder, count, seed, batch_size)
    return rows
