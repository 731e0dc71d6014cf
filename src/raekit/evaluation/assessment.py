"""An evaluation from a stream of images to a report; the same call goes on where it was stopped."""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raekit import __version__, artifacts
from raekit.config import differences, read_json, to_dict, to_json
from raekit.data.loader import DataConfig, Loader
from raekit.data.sources import stamp
from raekit.data.sources.base import Split
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.against import Against
from raekit.evaluation.chunks import Stream, collect, collected, discard, images_digest
from raekit.evaluation.evaluate import BATCH, StoredImages, batches_of, evaluate, images_of
from raekit.evaluation.features import Images, PairScore, weights_of
from raekit.evaluation.intervals import LEAST
from raekit.evaluation.labels import Labels, draw_labels
from raekit.evaluation.pairs import PairMean
from raekit.evaluation.reports import LITERATURE, Report, read_report, write_report
from raekit.files import whole
from raekit.flow.sampling import Sampling, check_sampling
from raekit.inference.generation import generate
from raekit.inference.model import Model, reconstruct
from raekit.models.latent_space import LatentSpace
from raekit.progress import Report as Progress
from raekit.progress import silent
from raekit.weights import fingerprint

_CLAIM = "evaluation.json"


class Assessed(Stream, Protocol):
    """Images to report on."""

    @property
    def image_size(self) -> int: ...
    @property
    def source(self) -> str | None: ...  # where images are read from, if they are

    def settings(self) -> dict[str, Any]:
        """All that the images are a function of, but for those of `source`."""
        ...


class Samples:
    """Images that `model` generates, as a stream of `evaluation.chunks`: no score depends on the number of processes.

    `of_reference` are the numbers of the reference's images by class, for labels in their proportions. UserError for a
    sampling that the model does not allow, or labels that it has not.
    """

    def __init__(
        self,
        model: Model,
        count: int,
        sampling: Sampling,
        *,
        seed: int = 0,
        labels: Labels = "balanced",
        of_reference: Sequence[int] | None = None,
        batch_size: int = BATCH,
    ):
        for name, value in (("count", count), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name}: {value} must be at least 1")
        classes = model.denoiser.config.num_classes
        self.model, self.count, self.sampling = model, count, sampling
        self.seed, self.kind, self.batch_size = seed, labels if classes else None, batch_size
        self.labels = draw_labels(labels, classes, count, seed, of_reference) if classes else None
        check_sampling(sampling, model.denoiser, self.labels is not None)

    @property
    def image_size(self) -> int:
        return self.model.autoencoder.image_size

    @property
    def source(self) -> str | None:
        return None

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        for chunk in chunks:
            for batch in generate(
                self.model,
                self.labels,
                count=None if self.labels else self.count,
                seed=self.seed,
                sampling=self.sampling,
                batch_size=self.batch_size,
                world=World(device=world.device),
                indices=chunk,
            ):
                yield Images(batch.images, batch.labels, indices=batch.indices)

    def share(self, world: World) -> Iterator[Images]:
        """This process's share of all the images."""
        firsts = range(world.rank * self.batch_size, self.count, world.size * self.batch_size)
        return self.batches([range(first, min(first + self.batch_size, self.count)) for first in firsts], world)

    def settings(self) -> dict[str, Any]:
        """All that the images are a function of."""
        sampling = self.sampling
        chosen = {name: value for name, value in vars(sampling).items() if name not in ("guidance", "weak")}
        if sampling.solver != "dopri5":
            chosen = {name: value for name, value in chosen.items() if name not in ("atol", "rtol")}
        models = {"autoencoder": self.model.autoencoder, "denoiser": self.model.denoiser, "weak": sampling.weak}
        return {
            "seed": self.seed,
            "labels": self.kind,
            "drawn_labels": fingerprint({}, self.labels),
            "sampling": {"guidance": "+".join(map(str, sampling.guidance)) or None, **chosen},
            "weights": {n: fingerprint(m.state_dict(), m.config) for n, m in models.items() if m is not None},
            "precision": "bf16" if self.model.denoiser.dtype == torch.bfloat16 else "fp32",
            "batch_size": self.batch_size,
        }


class Reconstructions:
    """What `autoencoder` makes of the images of `source`, as a stream of `evaluation.chunks`.

    `scores` {name: (images, originals) -> (B,)} compare each with its original. UserError, when its turn comes, if an
    image is unreadable.
    """

    def __init__(
        self,
        autoencoder: LatentSpace,
        source: str,
        split: Split,
        scores: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
        *,
        batch_size: int = BATCH,
        workers: int = 0,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} must be at least 1")
        data = DataConfig(
            source=source, split=split, image_size=autoencoder.image_size, workers=workers, max_unreadable=0
        )
        self.autoencoder, self.loader, self.batch_size = autoencoder, Loader(data, seed=0), batch_size
        self.scores = {name: PairScore(name, score) for name, score in scores.items()}

    @property
    def count(self) -> int:
        return len(self.loader)

    @property
    def image_size(self) -> int:
        return self.autoencoder.image_size

    @property
    def source(self) -> str:
        return self.loader.config.source

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        for batch in images_of(self.loader.read(batches_of(chunks, self.batch_size), world), world):
            made = reconstruct(self.autoencoder, batch.images)
            yield Images(made, torch.full_like(batch.labels, -1), batch.images, batch.indices)

    def settings(self) -> dict[str, Any]:
        autoencoder = fingerprint(self.autoencoder.state_dict(), self.autoencoder.config)
        return {"reconstructions": True, "weights": {"autoencoder": autoencoder}, "batch_size": self.batch_size}


def assess(
    stream: Assessed,
    against: Against,
    names: dict[str, Any],
    out: Path | None = None,
    *,
    intervals: bool = False,
    world: World | None = None,
    progress: Progress = silent,
) -> tuple[Report, Path]:
    """Compare the images of `stream` with references, and write the report into the folder `out`; both are returned.

    Reconstructions are compared with references of their originals. Stopped, the same call goes on after the last chunk
    of images that was done; done, it reads the report. By default `out` is reports/ and a hash of all settings. `names`
    are for the report, its `model` and the files. Called by all processes, which share the work. UserError if the
    images must not be compared with the references, or if `out` holds another evaluation.
    """
    world = world or World()
    against.check_size(stream.image_size)
    scores = stream.scores if isinstance(stream, Reconstructions) else {}
    features = {**against.networks, **scores}
    if isinstance(stream, Reconstructions):
        if intervals:
            raise UserError("intervals: not of reconstructions: they and their reference are of the same images")
        for each in against.references:
            each.check_originals(stream.source, stream.loader.config.split)
    if intervals and stream.count < LEAST:
        raise UserError(f"intervals: they need at least {LEAST} images, and there are {stream.count}")
    settings = _settings(stream, against, intervals)
    environment = _environment(world)
    claim = {"settings": settings, "environment": environment, "images": _stamps(stream, against)}
    digest = fingerprint({}, json.dumps(settings, sort_keys=True))
    out = out or Path("reports", fingerprint({}, json.dumps(claim, sort_keys=True)))
    with world.main_first():
        _claim(out, claim, world)
    if not (out / "report.json").is_file():
        collect(stream, features, out, world, progress)
        if not scores:
            against.complete(world, progress)
        if world.is_main:
            # By one process: for any number of them the sums are of the same numbers in the same order.
            alone = World(device=world.device)
            if scores:
                accumulators = [*against.reconstruction_accumulators(), *map(PairMean, scores.values())]
            else:
                accumulators = against.accumulators(stream.count, intervals)
            kept = collected(features, stream.count, out, world.device)
            results = evaluate(kept, accumulators, alone, lambda done: progress("scores", done, stream.count))
            report = Report(
                names=names,
                hash=digest,
                images=images_digest(stream.count, out),
                results=results,
                notes=tuple(_notes(stream, against, results)),
                settings=settings,
                environment={**environment, "processes": world.size, "threads": torch.get_num_threads()},
            )
            write_report(report, out)
            discard(out)
        world.barrier()
    return read_report(out), out


def exported_average(name: str) -> float | None:
    """The decay of the average that the model `name` gives by default; None if it does not say."""
    path, _ = artifacts.find(name, "denoiser")
    return next((decay for decay, (of, _) in artifacts.averages(path, "denoiser").items() if of == path), None)


def _settings(stream: Assessed, against: Against, intervals: bool) -> dict[str, Any]:
    def about(references: Sequence[Any]) -> list[dict[str, Any]]:
        told = [to_dict(each.about) for each in references]
        return [{key: value for key, value in each.items() if key not in ("resize", "classes")} for each in told]

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
        "baselines": about(against.baselines),
        "intervals": intervals,
    }


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


def _stamps(stream: Assessed, against: Against) -> list[str]:
    """Of the files that no hash among the settings is of."""
    places = [stream.source] if stream.source else []
    return [stamp(place) for place in (*places, *(each.images for each in against.references if each.images))]


def _claim(out: Path, claim: dict[str, Any], world: World) -> None:
    """Write OUT/evaluation.json; UserError, listing the differences, if another evaluation has `out`."""
    path = out / _CLAIM
    claim = json.loads(json.dumps(claim))
    if path.is_file():
        if changed := list(differences(read_json(path), claim)):
            raise UserError(
                f"{out}: holds another evaluation:\n  " + "\n  ".join(changed) + "\nChoose another --out, or undo these"
            )
    elif world.is_main:
        with whole(path) as partial:
            partial.write_text(to_json(claim))


def _notes(stream: Assessed, against: Against, results: dict[str, float]) -> list[str]:
    notes = []
    count = stream.count
    if count < LITERATURE:
        notes.append(
            f"An early estimate: Frechet distances of {count:,} images are biased upwards, about in inverse proportion "
            f"to their number, and are not those of {LITERATURE:,}."
        )
    for name, network in against.networks.items():
        if count <= network.width and name != "inception_logits":
            notes.append(f"{count:,} images in the {network.width:,} dimensions of {name}: the distance says little.")
    for each in (*against.references, *against.baselines):
        if each.about.image_size is None:
            notes.append(f"{each.place} does not tell the resolution of its images; {stream.image_size} is assumed.")
    if isinstance(stream, StoredImages):
        notes.append("Saved images: how they were made is not known here.")
    return notes
