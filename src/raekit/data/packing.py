"""Pack a dataset into tar shards of images that are scaled once, so that each epoch decodes less."""

import hashlib
import io
import logging
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from torch.utils.data import Dataset

from raekit.config import configclass, differences, read_json, to_dict, to_json
from raekit.data.images import UnreadableImage, log_once, warn_of_unreadable
from raekit.data.loader import DataConfig
from raekit.data.sources import absolute, in_words, open_source, stamp
from raekit.data.sources.archive_index import CLASSES
from raekit.data.sources.base import Source, Split
from raekit.data.transforms import shrink
from raekit.data.workers import load_parts
from raekit.distributed import World
from raekit.errors import UserError, whole_number
from raekit.files import sweep, whole
from raekit.progress import Progress, silent

_log = logging.getLogger(__name__)

SETTINGS, SUMS = "pack.json", "SHA256SUMS"
PARTS: dict[Split, str] = {"train": "train", "heldout": "validation"}
"""The first words of the names of the shards, by split. `tar:` reads the splits from them."""


@configclass
class Packed:
    """What a packed dataset was made from. Two datasets with equal settings have equal shards.

    Attributes:
        source: the address of the dataset.
        stamp: a hash of the names, sizes and times of the files at `source`.
        images: the number of images in each split of the source.
        size: the short side in pixels that larger images are scaled to.
        format: the format of the images.
        quality: the quality of JPEGs, from 1 to 100.
        shard_size: the number of images in a shard.
    """

    source: str
    stamp: str
    images: dict[str, int]
    size: int
    format: Literal["jpeg", "png"]
    quality: int
    shard_size: int

    def __post_init__(self) -> None:
        for name, low, high in (("size", 1, 65_536), ("quality", 1, 100), ("shard_size", 1, 10**6)):
            whole_number(name, getattr(self, name), low, high)


@dataclass(frozen=True)
class Report:
    """A finished packing.

    Attributes:
        images: the number of images in the shards, by split.
        shards: the number of shards.
        left_out: the number of images that could not be read.
    """

    images: dict[str, int]
    shards: int
    left_out: int


def pack(
    source: str,
    size: int,
    out: Path,
    *,
    format: Literal["jpeg", "png"] = "jpeg",
    quality: int = 95,
    shard_size: int = 1000,
    max_unreadable: float = 0.01,
    workers: int = 0,
    world: World,
    progress: Progress = silent,
) -> Report:
    """Write both splits of a dataset as uncompressed tar shards, which `tar:OUT` reads.

    The short side of a larger image is scaled to `size` with ADM's filters; smaller images keep their size. A shard has
    KEY.jpg or KEY.png and KEY.cls for each image. Complete shards are kept, so the same call resumes. The shards do not
    depend on the number of processes or on interruptions. All processes must call this function.

    Args:
        source: the address of the dataset.
        size: the short side in pixels.
        out: the folder for the shards, the names of the classes, the settings and the checksums.
        format: the format of the images: JPEG without chroma subsampling, or PNG without loss.
        quality: the quality of JPEGs.
        shard_size: the number of images in a shard.
        max_unreadable: the fraction of the images that may be unreadable. They are left out.
        workers: the number of processes that decode and encode.
        world: the processes that share the work.
        progress: receives the progress.

    Raises:
        UserError: a setting is invalid, `out` holds another dataset or a shard that has changed, only some images have
            a class, the name of a class does not fit on a line, or too many images are unreadable.
    """
    config = DataConfig(source=source, image_size=size, workers=workers, max_unreadable=max_unreadable)
    sources: dict[Split, Source] = {"train": open_source(source, "train")}
    try:
        sources["heldout"] = open_source(source, "heldout")
    except UserError as error:  # a small dataset without held-out images
        _log.warning("%s", error)
    for split, each in sources.items():
        if each.classes and (unlabelled := int((each.labels < 0).sum())):
            raise UserError(
                f"data source {source!r}: {unlabelled:,} images of the split {split} have no class, and archives have "
                "classes for all images or for none; label these images or remove them"
            )
    for name in sources["train"].classes:
        if name.encode("utf-8", "ignore").decode().splitlines() != [name]:
            raise UserError(
                f"data source {source!r}: the class {name!r} has a line break or is not UTF-8, so {CLASSES} cannot "
                "hold its name; rename the class"
            )
    if world.is_main:
        log_once(logging.INFO, "%s", in_words(sources["train"], source, "train"))
    images = {split: len(each) for split, each in sources.items()}
    settings = Packed(
        source=absolute(source),
        stamp=world.gather(stamp(source) if world.is_main else None)[0],
        images=images,
        size=size,
        format=format,
        quality=quality,
        shard_size=shard_size,
    )
    if world.is_main:
        _check_folder(out, settings)
        sweep(out)
        if classes := sources["train"].classes:
            with whole(out / CLASSES) as partial:
                partial.write_text("".join(f"{name}\n" for name in classes), "utf-8")
    world.barrier()
    shards = [
        _Shard(split, number, range(first, min(first + shard_size, len(each))))
        for split, each in sources.items()
        for number, first in enumerate(range(0, len(each), shard_size))
    ]
    writer = _Writer(sources, settings, out, shards)
    missing = [k for k, shard in enumerate(shards) if not (out / shard.name).is_file()]
    world.barrier()  # before a process writes a shard, all have looked for it
    unreadable: dict[str, str] = {}
    total = sum(images.values())
    done = total - sum(len(shards[k].images) for k in missing)
    mine = missing[world.rank :: world.size]
    for k, found in zip(mine, load_parts(writer, (range(k, k + 1) for k in mine), workers, world), strict=True):
        warn_of_unreadable(found, world)
        unreadable |= found
        _check_left_out(source, len(unreadable), unreadable, total, config)
        done = min(done + len(shards[k].images) * world.size, total)
        progress("pack", done, total)
    unreadable = {name: reason for part in world.gather(unreadable) for name, reason in part.items()}
    hashed = world.gather([_sha256(out / shard.name) for shard in shards[world.rank :: world.size]])
    digests = [hashed[k % world.size][k // world.size] for k in range(len(shards))]
    sums = [f"{digest}  {shard.name}\n" for digest, shard in zip(digests, shards, strict=True)]
    if (out / SUMS).is_file():
        before = (out / SUMS).read_text("utf-8", "replace").splitlines(keepends=True)
        for k in sorted(set(range(len(shards))) - set(missing)):
            if sums[k] not in before:
                raise UserError(
                    f"{out / shards[k].name}: does not have its checksum in {SUMS}; remove it and run the same "
                    "command again"
                )
    kept = {split: len(open_source(f"tar:{out}", split)) for split in sources}  # also makes the index
    left_out = total - sum(kept.values())  # also by earlier calls
    _check_left_out(source, left_out, unreadable, total, config)
    world.barrier()  # all have read the earlier checksums
    if world.is_main:
        with whole(out / SUMS) as partial:
            partial.write_text("".join(sums))
    world.barrier()
    return Report(kept, len(shards), left_out)


def _check_left_out(source: str, count: int, known: Mapping[str, str], total: int, config: DataConfig) -> None:
    """Raise UserError if `count` unreadable images, some of which are `known` by name, are too many."""
    if count > config.tolerated(total):
        example = f", such as {next(iter(known))}" if known else ""
        raise UserError(
            f"data source {source!r}: {count:,} of {total:,} images are unreadable{example}; this is more than "
            f"max_unreadable={config.max_unreadable:g} allows"
        )


def _check_folder(out: Path, settings: Packed) -> None:
    """Write the settings to `out`; UserError if the folder holds a dataset of other settings."""
    if (out / SETTINGS).is_file():
        if changed := list(differences(read_json(out / SETTINGS), to_dict(settings))):
            raise UserError(f"{out}: holds another dataset:\n  " + "\n  ".join(changed) + "\nGive another folder")
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):  # .lock
        raise UserError(f"{out}: is not empty; give a new folder")
    with whole(out / SETTINGS) as partial:
        partial.write_text(to_json(to_dict(settings)))


@dataclass(frozen=True)
class _Shard:
    split: Split
    number: int
    images: range

    @property
    def name(self) -> str:
        return f"{PARTS[self.split]}-{self.number:06}.tar"


class _Writer(Dataset[dict[str, str]]):
    """Writes a shard in any process, and returns its unreadable images: range of one number -> {name: reason}."""

    def __init__(self, sources: dict[Split, Source], settings: Packed, out: Path, shards: Sequence[_Shard]):
        self.sources, self.settings, self.out, self.shards = sources, settings, out, shards

    def __getitem__(self, numbers: range) -> dict[str, str]:
        shard = self.shards[numbers[0]]
        source, unreadable = self.sources[shard.split], dict[str, str]()
        with (
            whole(self.out / shard.name) as partial,
            tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for index in shard.images:
                try:
                    image, label = source[index]
                except UnreadableImage as error:
                    unreadable[error.path] = error.reason
                    continue
                for extension, content in self._files(image, label):
                    info = tarfile.TarInfo(f"{index:08}.{extension}")  # without time and owner: equal on every machine
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return unreadable

    def _files(self, image: Image.Image, label: int) -> Iterator[tuple[str, bytes]]:
        encoded = io.BytesIO()
        image = shrink(image, self.settings.size)
        if self.settings.format == "jpeg":
            image.save(encoded, "JPEG", quality=self.settings.quality, subsampling=0)
            yield "jpg", encoded.getvalue()
        else:
            image.save(encoded, "PNG", icc_profile=None)
            yield "png", encoded.getvalue()
        if label >= 0:
            yield "cls", str(label).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
