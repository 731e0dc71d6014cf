"""Writing generated images to a folder or an .npz file. The same call resumes after an interruption."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np
from PIL import Image

from raekit.distributed import World
from raekit.errors import MAX_COUNT, UserError, whole_number
from raekit.files import check_space, remove, sweep, whole
from raekit.flow.sampling import Sampling, check_sampling
from raekit.inference.generation import BatchSize, fitting_batch, generate
from raekit.inference.model import Model
from raekit.pictures import PictureFormat, read_origin, to_pil, write_picture
from raekit.progress import Progress, SamplingProgress, silent
from raekit.weights import fingerprint


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
    progress: Progress = silent,
) -> Counter[str]:
    """Generate samples 0 to `total` - 1 and write them as OUT/000000.png and so on.

    All processes must call this function. They divide the work among them. Samples that are already in the folder are
    kept. Missing samples and empty files are written. A file that has the name of a sample, but no matching record of
    how it was made, is never overwritten. The samples are always divided into the same batches, so with a fixed
    `batch_size` an interruption does not change a single bit of the result.

    Args:
        model: the model to sample from.
        out: the folder.
        labels: class ids. Sample i has the class `labels[i % len(labels)]`, so a later call with a larger `total` adds
            samples to the same folder. None generates samples without a class.
        total: the number of samples.
        seed: the seed of the noise.
        sampling: the solver, steps and guidance.
        batch_size: the number of images in a batch.
        world: this process and its device.
        form: the format of the pictures. Both formats are lossless.
        progress: receives the progress.

    Returns:
        The forward passes for each image (`Samples.passes`); empty if there was nothing to generate.

    Raises:
        UserError: if a file with the name of a sample is another picture, or is damaged, or if `total` is out of range
            or `generate` rejects the settings.
    """
    every = _labels(labels, total)
    settings = _settings(model, seed, sampling)
    check_sampling(sampling, model.denoiser, labels is not None)
    size = fitting_batch(model, sampling, batch_size, world, total)

    def origin(index: int) -> dict[str, object]:
        return {"settings": settings, "sample": index, "class": labels[index % len(labels)] if labels else None}

    def place(index: int) -> Path:
        return out / f"{index:06d}.{form}"

    there = numbers_there(out, place, origin)
    if world.is_main:
        sweep(out)
    world.barrier()  # no process writes before all have listed the folder
    shares = (range(first, min(first + size, total)) for first in range(0, total, size))
    numbers = [i for share in shares if not there.issuperset(share) for i in share]
    shown = SamplingProgress(progress, "generate", total - len(numbers), total)
    batches = generate(
        model,
        every,
        count=None if every else total,
        seed=seed,
        sampling=sampling,
        batch_size=size,
        world=world,
        indices=numbers,
        watch=shown.watch,
    )
    passes: Counter[str] = Counter()
    for batch in batches:
        passes |= batch.passes
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            if index not in there:
                with whole(place(index)) as partial:
                    write_picture(to_pil(image), partial, origin(index), form)
        shown.finish(len(batch) * world.size)
    return passes


def numbers_there(out: Path, place: Callable[[int], Path], origin: Callable[[int], object]) -> set[int]:
    """Return the numbers of the samples that are in a folder already. Empty files do not count.

    Args:
        out: the folder.
        place: returns the path of a sample.
        origin: returns what the file of a sample must record.

    Raises:
        UserError: if a file with the name of a sample is another picture, or is damaged.
    """
    named = re.compile(r"\d{6,12}\.(png|webp)")
    there = [
        (int(path.stem), path)
        for path in (out.iterdir() if out.is_dir() else ())
        if named.fullmatch(path.name) and (path.lstat().st_size or not path.is_file())
    ]
    if others := [path for i, path in sorted(there) if path != place(i) or read_origin(path) != origin(i)]:
        raise UserError(
            f"{out}: holds other pictures, such as {others[0].name}, made with another model, class, seed, setting or "
            "format, damaged, or not by raekit; give another folder or remove the pictures"
        )
    return {i for i, _ in there}


def _labels(labels: Sequence[int] | None, total: int) -> list[int] | None:
    """Return the label of each sample."""
    whole_number("total", total, 1, MAX_COUNT)
    return None if labels is None else [labels[i % len(labels)] for i in range(total)]


def _settings(model: Model, seed: int, sampling: Sampling) -> str:
    """Return a fingerprint of everything that determines a sample, except its number and label."""
    state = {**model.autoencoder.state_dict(), **{f"denoiser.{k}": v for k, v in model.denoiser.state_dict().items()}}
    weak = sampling.weak
    if weak is not None:
        state |= {f"weak.{key}": value for key, value in weak.state_dict().items()}
    rest = (weak and weak.config, seed, replace(sampling, weak=None))
    return fingerprint(state, model.autoencoder.config, model.denoiser.config, *rest)


def parts_of(out: Path) -> Path:
    """Return the folder in which `generate_npz` collects the samples of the file `out`."""
    return out.with_name(out.name + ".raekit-parts")


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
    progress: Progress = silent,
) -> Counter[str]:
    """Generate samples 0 to `total` - 1 and write them to an .npz file in the format of ADM.

    The file holds the images as `arr_0`, uint8 (N, H, W, 3), and the labels, if there are any, as `arr_1`.

    `generate_folder` first collects the samples in the folder OUT.raekit-parts. After an interruption, the same call
    resumes from this folder. The folder is removed at the end. If OUT already holds exactly these samples, it is kept.
    Any other file at OUT is replaced.

    See `generate_folder` for the arguments, the returned forward passes and the errors.
    """
    every, parts = _labels(labels, total), parts_of(out)
    origin = {"settings": _settings(model, seed, sampling), "total": total, "classes": fingerprint({}, every)}
    if _npz_origin(out) == origin:
        return Counter()
    height, width = model.autoencoder.image_shape
    check_space(out, total * height * width * 3, "give another path")
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
        with whole(out) as partial, ZipFile(partial, "w") as archive:
            with archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:  # ZipInfo: without the current date
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
        remove(parts)
    world.barrier()
    return passes


def _npz_origin(path: Path) -> object:
    """Return the settings that `generate_npz` recorded in the file; None if there are none or there is no file."""
    try:
        with ZipFile(path) as archive:
            return json.loads(archive.comment)
    except (OSError, BadZipFile, ValueError, RecursionError):
        return None
