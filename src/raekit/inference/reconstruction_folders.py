"""Folders of reconstructed pictures, which the same call completes after an interruption."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path

import torch
from torch import Tensor, nn

from raekit.config import to_dict, to_json
from raekit.data.images import find_images, read_image
from raekit.data.transforms import Fit, center_crop
from raekit.errors import UserError
from raekit.files import check_folder, whole
from raekit.inference.model import reconstruct
from raekit.models.latent_space import LatentSpace
from raekit.pictures import from_pil, grid, quantize, read_origin, to_pil, write_picture
from raekit.progress import Progress, silent
from raekit.weights import fingerprint

CONTACT_SHEET = "contact-sheet.png"
_PAIRS, _COLUMNS, _SIDE = 32, 8, 192  # at most, on a contact sheet; the side in pixels


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
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    progress: Progress = silent,
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
