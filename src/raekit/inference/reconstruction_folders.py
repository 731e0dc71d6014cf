"""Writing reconstructions of images to a folder. The same call resumes after an interruption."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn

from raekit.config import read_json, to_dict, to_json
from raekit.data.images import find_images, read_image, real_path
from raekit.data.transforms import Fit, center_crop
from raekit.errors import UserError, whole_number
from raekit.files import check_file, check_folder, sweep, whole
from raekit.flow.sampling import check_finite
from raekit.inference.model import reconstruct
from raekit.models.latent_space import LatentSpace
from raekit.pictures import from_pil, grid, quantize, read_origin, save_grid, to_pil, write_picture
from raekit.progress import Progress, silent
from raekit.weights import fingerprint

SCORES, TABLE, CONTACT_SHEET = "scores.json", "scores.csv", "contact-sheet.png"
_PAIRS, _COLUMNS, _SIDE = 32, 8, 192  # the limits of a contact sheet; _SIDE in pixels


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of one image.

    Attributes:
        image: the file of the original.
        output: the file of the reconstruction.
        scores: {metric: score}.
    """

    image: Path
    output: Path
    scores: dict[str, float]


@dataclass(frozen=True)
class Reconstructions:
    """The result of `reconstruct_folder`.

    Attributes:
        pictures: the reconstructed images.
        unreadable: an error message for each image that could not be read, or whose output cannot be written.
    """

    pictures: list[Reconstruction]
    unreadable: list[str]

    def means(self) -> dict[str, float]:
        """Return {metric: mean over all pictures}."""
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
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    progress: Progress = silent,
) -> Reconstructions:
    """Encode and decode images, and write each reconstruction to a PNG file below `out`.

    The reconstruction of FILE.jpg goes to OUT/FILE.png. The reconstruction of a file a/b.jpg inside a given folder goes
    to OUT/a/b.png. If another original or a file of another origin has that name, -2, -3 and so on is appended.
    Reconstructions in `out` are kept if neither the original nor the settings have changed.

    OUT/scores.csv and OUT/scores.json hold the scores of all images and their means, computed from the 8-bit
    reconstructions. OUT/contact-sheet.png shows the first originals, each above its reconstruction. Each call
    replaces these three files, unless it could not read any image. Such files of something else are an error.

    Args:
        autoencoder: the autoencoder.
        paths: image files, and folders to search for images (`find_images`).
        out: the folder for the results.
        fit: how to make an image square.
        batch_size: the number of images to process at once.
        metrics: {name: function}; a function takes reconstructions and originals (B, 3, H, W) in [0, 1] and returns
            scores (B,).
        progress: receives the progress.

    Raises:
        UserError: if `out` holds originals or scores of something else, or a setting is invalid.
    """
    whole_number("batch_size", batch_size, 1)
    check_folder(out)
    place = real_path(out)
    inside = any(path.is_dir() and real_path(path).is_relative_to(place) for path in paths)
    names = {} if inside else find_images(paths, besides=out)
    if inside or any(real_path(image.parent) == place for image in names):
        raise UserError(f"{out}: holds originals; give another folder for the reconstructions")
    _check_scores(out)
    weights = dict(autoencoder.state_dict())
    for name, metric in metrics.items():
        if isinstance(metric, nn.Module):
            weights |= {f"{name}.{key}": value for key, value in metric.state_dict().items()}
    settings = fingerprint(weights, to_dict(autoencoder.config), fit, sorted(metrics))
    tasks, unreadable = _plan(names, out, settings)
    for folder in {out, *(task.output.parent for task in tasks)}:
        sweep(folder)
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
            decoded = reconstruct(autoencoder, originals)
            check_finite(decoded, [task.image for task, _ in batch], what="the reconstruction of")
            decoded = quantize(decoded)
            values = {name: metric(decoded, originals).tolist() for name, metric in metrics.items()}
            for i, (task, _) in enumerate(batch):
                scores[task.output] = {name: values[name][i] for name in metrics}
                with whole(task.output) as partial:
                    write_picture(to_pil(decoded[i]), partial, {**task.origin, "scores": scores[task.output]})
        progress("reconstruct", len(tasks) - len(missing) + min(first + batch_size, len(missing)), len(tasks))
    pictures = [Reconstruction(t.image, t.output, scores[t.output]) for t in tasks if t.output in scores]
    results = Reconstructions(pictures, unreadable)
    if pictures:  # otherwise keep the files of an earlier call
        _write_scores(results, out)
        _write_contact_sheet(pictures[:_PAIRS], out, min(autoencoder.image_size, _SIDE), fit)
    return results


def _plan(names: Mapping[Path, str], out: Path, settings: str) -> tuple[list[_Task], list[str]]:
    """Return a task for each image, and an error message for each image that is missing or cannot have an output."""
    tasks, failed = [], []
    taken = {CONTACT_SHEET}
    for image, name in names.items():
        try:
            status = image.stat()
        except OSError as error:
            failed.append(f"{image}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}")
            continue
        source = blake2b(os.fsencode(real_path(image)), digest_size=8).hexdigest()
        origin = {"source": source, "bytes": status.st_size, "modified": status.st_mtime_ns, "settings": settings}
        stem = os.path.splitext(name)[0]
        numbered = (f"{stem}-{number}.png" for number in count(2))
        name = next(
            n for n in chain([f"{stem}.png"], numbered) if n.casefold() not in taken and _is_free(out / n, source)
        )
        try:
            check_file(out / name)
        except UserError as error:
            failed.append(f"{image}: its output {error}")
            continue
        taken.add(name.casefold())  # some file systems ignore the case
        tasks.append(_Task(image, out / name, origin))
    return tasks, failed


def _is_free(output: Path, source: str) -> bool:
    """Return whether the file does not exist, or is an earlier reconstruction of `source`."""
    if not os.path.lexists(output):
        return True
    origin = read_origin(output)
    return isinstance(origin, dict) and origin.get("source") == source


def _scores_of(task: _Task, metrics: Mapping[str, object]) -> dict[str, float] | None:
    """Return the scores of an existing reconstruction; None if there is none, or it is out of date."""
    origin = read_origin(task.output)
    if not isinstance(origin, dict):
        return None
    scores = origin.pop("scores", None)
    return scores if origin == task.origin and isinstance(scores, dict) and scores.keys() == metrics.keys() else None


def _check_scores(out: Path) -> None:
    """Raise UserError if `out` holds files with the names of the results, but no scores that were written here."""
    there = [name for name in (SCORES, TABLE, CONTACT_SHEET) if os.path.lexists(out / name)]
    with suppress(UserError):
        scores = read_json(out / SCORES)  # written before the other two
        if isinstance(scores, dict) and scores.keys() == {"means", "images", "unreadable"}:
            return
    if there:
        raise UserError(
            f"{out}: holds {there[0]} of something else than a reconstruction; give another folder, or move that file"
        )


def _write_scores(results: Reconstructions, out: Path) -> None:
    means = results.means()
    rows = [{"image": str(p.image), "output": str(p.output), **p.scores} for p in results.pictures]
    with whole(out / SCORES) as partial:
        partial.write_text(to_json({"means": means, "images": rows, "unreadable": results.unreadable}), "utf-8")
    with whole(out / TABLE) as partial, _open_csv(partial) as file:
        writer = csv.DictWriter(file, ["image", "output", *means])
        writer.writeheader()
        writer.writerows([*rows, {"image": "mean", **means}])


def _open_csv(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")  # names of files may be no UTF-8


def _write_contact_sheet(pictures: Sequence[Reconstruction], out: Path, side: int, fit: Fit) -> None:
    pairs = [
        grid([read_image(p.image, side, fit), center_crop(read_image(p.output, side), side)], columns=1)
        for p in pictures
    ]
    save_grid(pairs, out / CONTACT_SHEET, columns=_COLUMNS)
