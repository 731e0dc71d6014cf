"""Folders of generated and of reconstructed pictures, which the same call completes after an interruption.

Each picture keeps in its file what it was made from. It is left alone if the same would be made again. Samples of
another model or setting are refused a folder that holds some; reconstructions of them are made anew.
"""

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from raekit.config import to_dict, to_json
from raekit.data.images import find_images
from raekit.data.transforms import Fit, center_crop
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import quantize
from raekit.evaluation.metrics import psnr, ssim
from raekit.files import check_folder, whole
from raekit.inference import BatchSize, Model, fitting_batch, generate, read_image, reconstruct
from raekit.models.latent_space import LatentSpace
from raekit.models.perceptual import load_perceptual
from raekit.pictures import PictureFormat, from_pil, grid, read_origin, to_pil, write_picture
from raekit.progress import Report, silent
from raekit.sampling import Sampling, check_sampling
from raekit.weights import fingerprint

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
"""What a reconstruction is scored by: (images, originals), both (B, 3, S, S) in [0, 1] -> (B,)."""


def reconstruction_metrics(lpips: str | None, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """METRICS, and LPIPS with VGG16 from the file `lpips`; "auto" seeks one (`load_perceptual`), None leaves it out."""
    return METRICS | ({"lpips": load_perceptual(None if lpips == "auto" else lpips).to(device)} if lpips else {})


CONTACT_SHEET = "contact-sheet.png"
_PAIRS, _COLUMNS, _SIDE = 32, 8, 192  # at most, on a contact sheet; the side in pixels


def generate_folder(
    model: Model,
    out: Path,
    labels: Sequence[int] | None = None,
    *,
    total: int,
    seed: int = 0,
    sampling: Sampling,
    batch_size: BatchSize = "auto",
    world: World,
    form: PictureFormat = "png",
    progress: Report = silent,
) -> Counter[str]:
    """Write samples 0 to `total` as OUT/000000.png and so on, those alone that are missing or damaged.

    Other pictures of such names are neither written over nor added to: UserError if there are any.
    The label of sample i is `labels[i % len(labels)]`, so a larger total later adds samples to the same. Batches are
    of the same samples whatever is missing, so that with a `batch_size` of one's own an interruption changes no bit.
    Called by all processes, which share the work. Returns the forward passes that an image cost (`Samples.passes`),
    none if all are there. Raises UserError as `generate` does.
    """
    every = _labels(labels, total)
    settings = _settings(model, seed, sampling)
    check_sampling(sampling, model.denoiser, labels is not None)
    size = fitting_batch(model, sampling, batch_size, world)

    def origin(index: int) -> dict[str, object]:
        return {"settings": settings, "sample": index, "class": labels[index % len(labels)] if labels else None}

    def place(index: int) -> Path:
        return out / f"{index:06d}.{form}"

    there = _numbered(out)
    if others := [path for i, path in sorted(there) if path != place(i) or read_origin(path) != origin(i)]:
        raise UserError(
            f"{out}: holds other pictures, as {others[0].name}: of another model, class, seed, setting or format, "
            "or not of raekit; give another folder, or remove them"
        )
    missing = set(range(total)) - {i for i, _ in there}
    world.barrier()  # before anyone writes, all have looked
    shares = (range(first, min(first + size, total)) for first in range(0, total, size))
    numbers = [i for share in shares if not missing.isdisjoint(share) for i in share]
    batches = generate(
        model,
        every,
        count=None if every else total,
        seed=seed,
        sampling=sampling,
        batch_size=size,
        world=world,
        indices=numbers,
    )
    done, passes = total - len(numbers), Counter()
    for batch in batches:
        passes |= batch.passes
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            if index in missing:
                with whole(place(index)) as partial:
                    write_picture(to_pil(image), partial, origin(index), form)
        done = min(done + len(batch) * world.size, total)
        progress("generate", done, total)
    return passes


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The pictures in `folder` that are named as samples are, with their numbers; without those that are damaged."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\d{6,}\.(png|webp)", path.name):
            with suppress(UnidentifiedImageError), Image.open(path):
                found.append((int(path.stem), path))
    return found


def _labels(labels: Sequence[int] | None, total: int) -> list[int] | None:
    return None if labels is None else [labels[i % len(labels)] for i in range(total)]


def _settings(model: Model, seed: int, sampling: Sampling) -> str:
    """A fingerprint of all that samples are a function of, but their number and label."""
    state = {**model.autoencoder.state_dict(), **{f"denoiser.{k}": v for k, v in model.denoiser.state_dict().items()}}
    weak = sampling.weak
    if weak is not None:
        state |= {f"weak.{key}": value for key, value in weak.state_dict().items()}
    rest = (weak and weak.config, seed, replace(sampling, weak=None))
    return fingerprint(state, model.autoencoder.config, model.denoiser.config, *rest)


def generate_npz(
    model: Model,
    out: Path,
    labels: Sequence[int] | None = None,
    *,
    total: int,
    seed: int = 0,
    sampling: Sampling,
    batch_size: BatchSize = "auto",
    world: World,
    progress: Report = silent,
) -> Counter[str]:
    """Write samples 0 to `total` to the .npz file `out` as ADM does: `arr_0`, uint8 (N, H, W, 3), and `arr_1`, their
    labels, if there are any.

    They are gathered in the folder OUT.parts, which an interrupted call completes and the last removes. A file of
    these very samples is left alone. As `generate_folder` otherwise.
    """
    every, parts = _labels(labels, total), out.with_name(out.name + ".parts")
    origin = {"settings": _settings(model, seed, sampling), "total": total, "classes": fingerprint({}, every)}
    if _npz_origin(out) == origin:
        return Counter()
    passes = generate_folder(
        model,
        parts,
        labels,
        total=total,
        seed=seed,
        sampling=sampling,
        batch_size=batch_size,
        world=world,
        progress=progress,
    )
    world.barrier()
    if world.is_main:
        height, width = model.autoencoder.image_shape
        with whole(out) as partial, ZipFile(partial, "w") as archive:
            with archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:  # ZipInfo: of no date
                shape = (total, height, width, 3)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for index in range(total):
                    with Image.open(parts / f"{index:06d}.png") as image:
                        file.write(image.tobytes())
                    progress("pack", index + 1, total)
            if every:
                with archive.open(ZipInfo("arr_1.npy"), "w") as file:
                    np.lib.format.write_array(file, np.array(every, np.int64))
            archive.comment = json.dumps(origin).encode()
        shutil.rmtree(parts)
    world.barrier()
    return passes


def _npz_origin(path: Path) -> object:
    """What `generate_npz` noted in the file; None if it is another's or not there."""
    try:
        with ZipFile(path) as archive:
            return json.loads(archive.comment)
    except (OSError, BadZipFile, ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Reconstruction:
    """The file `image`, its reconstruction in the file `output`, and {metric: score}."""

    image: Path
    output: Path
    scores: dict[str, float]


@dataclass(frozen=True)
class Reconstructions:
    """What was reconstructed, and the messages of what could not be read."""

    pictures: list[Reconstruction]
    unreadable: list[str]

    def means(self) -> dict[str, float]:
        """{metric: mean over all pictures}."""
        names = self.pictures[0].scores if self.pictures else ()
        return {name: sum(p.scores[name] for p in self.pictures) / len(self.pictures) for name in names}


@dataclass(frozen=True)
class _Task:
    image: Path
    output: Path
    origin: dict[str, object]


@torch.no_grad()
def reconstruct_folder(
    autoencoder: LatentSpace,
    paths: Sequence[Path],
    out: Path,
    *,
    fit: Fit = "crop",
    batch_size: int = 32,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = METRICS,
    progress: Report = silent,
) -> Reconstructions:
    """Encode and decode the images that `paths` mean (`find_images`), each to a PNG below `out`.

    FILE.jpg becomes OUT/FILE.png, and a file FOLDER/a/b.jpg of a folder OUT/a/b.png; where that is taken, by
    another original of the same name or a file of yours, -2, -3 and so on is added. OUT/scores.csv and
    OUT/scores.json have the scores, of the squares as they are on disk, and their means; OUT/contact-sheet.png
    the first pictures below their originals. UserError if `out` holds originals.
    """
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} must be at least 1")
    check_folder(out)
    names = find_images(paths, besides=out)
    if any(image.parent.resolve() == out.resolve() for image in names):
        raise UserError(f"{out}: holds originals; give another folder for the reconstructions")
    weights = dict(autoencoder.state_dict())
    for name, metric in metrics.items():
        if isinstance(metric, nn.Module):
            weights |= {f"{name}.{key}": value for key, value in metric.state_dict().items()}
    settings = fingerprint(weights, to_dict(autoencoder.config), fit, sorted(metrics))
    tasks, unreadable = _plan(names, out, settings)
    scores = {task.output: found for task in tasks if (found := _scores_of(task, metrics)) is not None}
    missing = [task for task in tasks if task.output not in scores]
    device = autoencoder.var.device
    for first in range(0, len(missing), batch_size):
        batch: list[tuple[_Task, Tensor]] = []
        for task in missing[first : first + batch_size]:
            try:
                batch.append((task, from_pil(read_image(task.image, autoencoder.image_size, fit))))
            except UserError as error:
                unreadable.append(str(error))
        if batch:
            originals = torch.stack([original for _, original in batch]).to(device)
            decoded = quantize(reconstruct(autoencoder, originals))
            values = {name: metric(decoded, originals).tolist() for name, metric in metrics.items()}
            for i, (task, _) in enumerate(batch):
                scores[task.output] = {name: values[name][i] for name in metrics}
                with whole(task.output) as partial:
                    write_picture(to_pil(decoded[i]), partial, {**task.origin, "scores": scores[task.output]})
        progress("reconstruct", len(tasks) - len(missing) + min(first + batch_size, len(missing)), len(tasks))
    pictures = [Reconstruction(t.image, t.output, scores[t.output]) for t in tasks if t.output in scores]
    results = Reconstructions(pictures, unreadable)
    _write_scores(results, out)
    _write_contact_sheet(pictures[:_PAIRS], out, min(autoencoder.image_size, _SIDE), fit)
    return results


def _plan(names: Mapping[Path, str], out: Path, settings: str) -> tuple[list[_Task], list[str]]:
    """For each file that is there, where its reconstruction goes and what it is made from; messages of the others."""
    tasks, absent = [], []
    taken = {CONTACT_SHEET}
    for image, name in names.items():
        try:
            status = image.stat()
        except OSError as error:
            absent.append(f"{image}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}")
            continue
        source = blake2b(os.fsencode(image.resolve()), digest_size=8).hexdigest()
        origin = {"source": source, "bytes": status.st_size, "modified": status.st_mtime_ns, "settings": settings}
        stem = os.path.splitext(name)[0]
        numbered = (f"{stem}-{number}.png" for number in count(2))
        name = next(
            n for n in chain([f"{stem}.png"], numbered) if n.casefold() not in taken and _is_free(out / n, source)
        )
        taken.add(name.casefold())  # some file systems see no difference
        tasks.append(_Task(image, out / name, origin))
    return tasks, absent


def _is_free(output: Path, source: str) -> bool:
    """Whether the reconstruction of `source` may be written there: to no other picture's place."""
    if not os.path.lexists(output):
        return True
    origin = read_origin(output)
    return isinstance(origin, dict) and origin.get("source") == source


def _scores_of(task: _Task, metrics: Mapping[str, object]) -> dict[str, float] | None:
    """The scores of a reconstruction that is there and as it would be made again."""
    origin = read_origin(task.output)
    if not isinstance(origin, dict):
        return None
    scores = origin.pop("scores", None)
    return scores if origin == task.origin and isinstance(scores, dict) and scores.keys() == metrics.keys() else None


def _write_scores(results: Reconstructions, out: Path) -> None:
    means = results.means()
    rows = [{"image": str(p.image), "output": str(p.output), **p.scores} for p in results.pictures]
    with whole(out / "scores.json") as partial:
        partial.write_text(to_json({"means": means, "images": rows, "unreadable": results.unreadable}))
    with whole(out / "scores.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "output", *means])
        writer.writeheader()
        writer.writerows([*rows, {"image": "mean", **means}] if rows else [])


def _write_contact_sheet(pictures: Sequence[Reconstruction], out: Path, side: int, fit: Fit) -> None:
    if not pictures:
        return
    pairs = [
        grid([read_image(p.image, side, fit), center_crop(read_image(p.output, side), side)], columns=1)
        for p in pictures
    ]
    with whole(out / CONTACT_SHEET) as partial:
        grid(pairs, columns=_COLUMNS).save(partial, format="PNG")
