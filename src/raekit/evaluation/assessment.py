"""An evaluation, from streams of images to a report. The same call resumes an evaluation that was stopped."""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raekit import __version__
from raekit.config import differences, read_json, to_dict, to_json
from raekit.data.sources import absolute, stamp
from raekit.distributed import World
from raekit.distributed.locks import lock
from raekit.errors import UserError
from raekit.evaluation.against import Against
from raekit.evaluation.chunks import Features, collect, collected, images_digest
from raekit.evaluation.features import PairScore, weights_of
from raekit.evaluation.interpolations import Interpolations
from raekit.evaluation.intervals import LEAST
from raekit.evaluation.metrics import SPLIT, Accumulator, FrechetDistance, NearestNeighbours
from raekit.evaluation.pairs import PairMean
from raekit.evaluation.reports import LITERATURE, Report, read_report, told, write_report
from raekit.evaluation.streaming import score_stream
from raekit.evaluation.streams import RealImages, Reconstructions, StoredImages, Stream
from raekit.files import remove, whole
from raekit.models.conditioning import same_classes
from raekit.progress import Progress, silent
from raekit.weights import fingerprint

REPORTS = "reports"
"""The folder of reports without a folder of their own."""
_CLAIM = "evaluation.json"
_BASELINES = "baselines"
_WRITTEN = ("features", _BASELINES, "samples.png", "report.json", "report.md", "report.html")
"""What an evaluation writes to its folder, apart from the claim."""
_HASHED = ("weights", "networks", "references", "relative_to")
"""Settings that hold hashes, or consist of them."""
TRAINING = "training images"
"""The name of the baseline whose images are searched for the nearest neighbours of all others."""
_NEIGHBOURS = 10


def assess(
    stream: Stream,
    against: Against,
    names: dict[str, Any],
    out: Path | None = None,
    *,
    baselines: Mapping[str, Stream] | None = None,
    notes: Sequence[str] = (),
    intervals: bool = False,
    world: World | None = None,
    progress: Progress = silent,
) -> tuple[Report, Path]:
    """Compare images with references, and write a report. All processes call it and share the work.

    Reconstructions and interpolations are compared with references of their originals. A call that was stopped resumes
    after the last stored chunk of images; a call that has finished reads its report.

    Args:
        stream: the images.
        against: the references, and the networks in whose features images are compared.
        names: names for the report: its `model`, and the files.
        out: the folder of the report. Default: reports/ and a hash of all settings.
        baselines: further images, whose scores give a meaning to the scores of `stream`. With TRAINING among them, the
            nearest training images of all others are searched.
        notes: what a reader of the report should know.
        intervals: compute 95 % intervals.
        world: the processes. Default: this one, on the CPU.
        progress: called after each batch.

    Returns:
        The report, and its folder.

    Raises:
        UserError: the images must not be compared with the references, or `out` holds another evaluation.
    """
    world, baselines = world or World(), baselines or {}
    against.check_size(stream.image_size)
    if isinstance(stream, Reconstructions | Interpolations):
        if intervals:
            raise UserError("intervals: not available for images whose originals are the reference; leave it out")
        for each in against.references:
            each.check_originals(stream.source, stream.split, stream.count)
    check_count(stream.count, intervals)
    settings = _settings(stream, against, baselines, intervals)
    claim: dict[str, Any] = {}
    if world.is_main:  # other machines may have other GPUs, and copies of the images with other times
        claim["settings"] = _lasting(settings, against)
        claim["environment"] = _environment(world)
        claim["images"] = _stamps(stream, against, baselines)
    claim = world.gather(claim)[0]
    digest = fingerprint({}, json.dumps(settings, sort_keys=True))
    out = out or Path(REPORTS, fingerprint({}, json.dumps(claim, sort_keys=True)))
    if (out / "report.json").is_file():
        _claim(out, claim, world)
        if world.is_main:  # of a process that was killed after it wrote the report
            _discard_features(out, baselines)
        return read_report(out), out
    with lock(out, world):
        with world.main_first():
            _claim(out, claim, world)
        # Baselines first: an unreadable image ends the evaluation before the samples, which take the most time.
        for name, row in baselines.items():
            folder = _row_folder(out, name)
            collect(row, _features(row, against), folder, folder.with_suffix(".png"), world, progress, name)
        collect(stream, _features(stream, against), out / "features", out / "samples.png", world, progress)
        if not isinstance(stream, Reconstructions | Interpolations):
            against.complete(world, progress)
        if world.is_main:
            # One process does this: for any number of processes the sums have the same numbers in the same order.
            bank = _bank(against, baselines, out, world.device)
            rows = _score_baselines(against, bank, baselines, out, world.device)
            if isinstance(stream, Reconstructions):
                accumulators = [*against.distances("r"), *map(PairMean, stream.scores.values())]
            elif isinstance(stream, Interpolations):
                accumulators = against.distances("i")
            else:
                allowed = against.accumulators(stream.count, intervals, stream.classes)
                labelled = not bank or same_classes(stream.classes, baselines[TRAINING].classes)
                accumulators = [*allowed, *_neighbours(against, bank, intervals, labelled)]
            results = _score(stream, against, accumulators, out / "features", world.device, progress)
            report = Report(
                names=names,
                hash=digest,
                images=images_digest(stream.count, out / "features"),
                results=results,
                baselines=rows,
                notes=(*notes, *_notes(stream, against)),
                settings=settings,
                environment={**claim["environment"], "processes": world.size, "threads": torch.get_num_threads()},
            )
            write_report(report, out)
            _discard_features(out, baselines)
        world.barrier()
    return read_report(out), out


def check_count(count: int, intervals: bool) -> None:
    """Raise UserError if `count` images are too few for distances, or for intervals of them."""
    if count < 2:
        raise UserError(f"count: distances need at least 2 images, and there is {count}; evaluate more images")
    if intervals and count < LEAST:
        raise UserError(f"intervals: they need at least {LEAST} images, and there are {count}; evaluate more images")


def _discard_features(out: Path, baselines: Mapping[str, Stream]) -> None:
    for folder in (out / "features", *(_row_folder(out, name) for name in baselines)):
        remove(folder)


def _features(stream: Stream, against: Against) -> Features:
    pairs: dict[str, PairScore] = stream.scores if isinstance(stream, Reconstructions) else {}
    return {**against.networks, **pairs}


def _row_folder(out: Path, name: str) -> Path:
    return out / _BASELINES / name.replace(" ", "-")


def _score(
    stream: Stream,
    against: Against,
    accumulators: Sequence[Accumulator],
    folder: Path,
    device: torch.device,
    progress: Progress = silent,
) -> dict[str, float]:
    """Score the stored features of a stream."""
    if not accumulators:
        return {}
    stored = collected(_features(stream, against), stream.count, folder, device)
    alone = World(device=device)
    return score_stream(stored, accumulators, alone, lambda done: progress("scores", done, stream.count))


Bank = dict[str, tuple[Tensor, Tensor]]
"""The features (N, width) and labels (N,) of the training images, by network."""


def _bank(against: Against, baselines: Mapping[str, Stream], out: Path, device: torch.device) -> Bank:
    if TRAINING not in baselines:
        return {}
    networks = {name: n for name, n in against.networks.items() if not name.endswith(("_spatial", "_logits"))}
    training = baselines[TRAINING]
    batches = list(collected(networks, training.count, _row_folder(out, TRAINING), device))
    labels = torch.cat([batch.labels for batch in batches])
    return {name: (torch.cat([batch.features(n) for batch in batches]), labels) for name, n in networks.items()}


def _neighbours(against: Against, bank: Bank, intervals: bool = False, labelled: bool = True) -> list[Accumulator]:
    found: list[Accumulator] = []
    for name, (features, labels) in bank.items():
        known = labels if labelled else torch.full_like(labels, -1)
        found.append(
            NearestNeighbours(against.networks[name], features, known, min(_NEIGHBOURS, len(features)), intervals)
        )
    return found


def _score_baselines(
    against: Against, bank: Bank, baselines: Mapping[str, Stream], out: Path, device: torch.device
) -> dict[str, dict[str, float]]:
    """Score each baseline: distances, nearest neighbours, and for reconstructions the comparison with the originals."""
    rows = {}
    for name, stream in baselines.items():
        accumulators: list[Accumulator] = []
        for reference, network in against.pairs():
            # The distance between a set of images and itself says nothing.
            same = isinstance(stream, RealImages) and (reference.about.source, reference.about.split) == (
                absolute(stream.source),
                stream.split,
            )
            if not same:
                accumulators.append(FrechetDistance(network, reference.gaussian(network)))
        if name != TRAINING:
            accumulators += _neighbours(against, bank)
        if isinstance(stream, Reconstructions):
            accumulators += map(PairMean, stream.scores.values())
        rows[name] = _score(stream, against, accumulators, _row_folder(out, name), device)
    return rows


def _settings(stream: Stream, against: Against, baselines: Mapping[str, Stream], intervals: bool) -> dict[str, Any]:
    def about(references: Sequence[Any]) -> list[dict[str, Any]]:
        known = [to_dict(each.about) for each in references]
        implied = ("names", "sizes", "resize", "weights", "classes", "class_names")
        return [{key: value for key, value in each.items() if key not in implied} for each in known]

    rows = {name: {"source": row.source, "count": row.count, **row.settings()} for name, row in baselines.items()}
    return {
        "count": stream.count,
        "image_size": stream.image_size,
        **stream.settings(),
        "rounding": "8 bit",
        "networks": {
            name: {"resize": network.resize, "weights": weights_of(network)}
            for name, network in against.networks.items()
        },
        "references": about(against.references),
        "relative_to": about(against.relative_to),
        "baselines": rows,
        "intervals": intervals,
    }


def _lasting(settings: dict[str, Any], against: Against) -> dict[str, Any]:
    """Return the settings without the hashes of references that every call measures anew."""
    pairs = zip(settings["references"], against.references, strict=True)
    return settings | {"references": [about | ({"hash": ""} if each.measured else {}) for about, each in pairs]}


def _environment(world: World) -> dict[str, Any]:
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    packages = ("torch", "numpy", "pillow", "transformers")
    return {
        "raekit": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": f"{world.device.type}, {device}",
        "float32_matmul": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }


def _stamps(stream: Stream, against: Against, baselines: Mapping[str, Stream]) -> list[str]:
    """Return stamps of the image files, which no hash in the settings covers."""
    streams = [stream.source, *(row.source for row in baselines.values())]
    measured = [each.about.source for each in against.references if each.measured]
    places = dict.fromkeys([*streams, *measured, *(each.images for each in against.references)])
    return [stamp(place) for place in places if place]


def _claim(out: Path, claim: dict[str, Any], world: World) -> None:
    """Write OUT/evaluation.json; UserError, with the differences, if `out` belongs to another evaluation."""
    path = out / _CLAIM
    claim = json.loads(json.dumps(claim))
    if path.is_file():
        if (before := read_json(path)) != claim:
            finished = (out / "report.json").is_file()
            kind, remedy = ("another", "Choose") if finished else ("an unfinished", "Remove this folder, choose")
            lines = [f"{out}: holds {kind} evaluation with other settings:", *_changes(before, claim)]
            raise UserError("\n  ".join(lines) + f"\n{remedy} another --out, or use the earlier settings")
    elif foreign := [name for name in _WRITTEN if os.path.lexists(out / name)]:
        raise UserError(f"{out}: holds {foreign[0]} of something else than an evaluation; choose another --out")
    elif world.is_main:
        with whole(path) as partial:
            partial.write_text(to_json(claim), "utf-8")


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each difference of two claims. Values that are hashes are not given."""
    hidden = (*_HASHED, "drawn_labels")  # the latter is a hash that follows from other settings
    for part in ("settings", "environment"):
        one, other = told(old[part]), told(new[part])
        yield from (f"{key}: changed" for key in _HASHED if one.get(key) != other.get(key))
        yield from differences(*({k: v for k, v in each.items() if k not in hidden} for each in (one, other)))
    if old["images"] != new["images"]:
        yield "images: changed"


def _notes(stream: Stream, against: Against) -> list[str]:
    notes = []
    count = stream.count
    if count < LITERATURE:
        notes.append(
            f"An early estimate: Frechet distances of {count:,} images are biased upwards, about in inverse proportion "
            f"to their number, and cannot be compared with distances of {LITERATURE:,} images. Precision and recall "
            "depend on the numbers of images, too."
        )
    for name, network in against.networks.items():
        if count <= network.width and name != "inception_logits":
            notes.append(f"{count:,} images in the {network.width:,} dimensions of {name}: the distance says little.")
    if "inception_logits" in against.networks and (rest := count % SPLIT):
        notes.append(
            f"The Inception Score is the mean over splits of {SPLIT:,} images, and the last split has {rest:,}: the "
            f"score of fewer images is lower. Scores of the literature have {LITERATURE // SPLIT} complete splits."
        )
    if against.has_fdr6 and not isinstance(stream, Reconstructions | Interpolations):
        notes.append(
            "fdr6 divides the distances by the published distances of ImageNet's validation images from its training "
            "images. It can only be compared with published figures if the reference is ImageNet's training images at "
            "256 pixels. The published distance in MAE (0.04) has one digit, so compare the distances themselves too."
        )
    for each in (*against.references, *against.relative_to):
        if each.about.image_size is None:
            notes.append(f"{each.place} does not say the resolution of its images; {stream.image_size} is assumed.")
    if judges := [each.pool.name for each in against.judges if each not in against.judges_of(stream.classes)]:
        notes.append(f"{', '.join(judges)} knows other classes than these images have, so there is no class accuracy.")
    if isinstance(stream, StoredImages):
        notes.append("Saved images: the report cannot say how they were made.")
    return notes
