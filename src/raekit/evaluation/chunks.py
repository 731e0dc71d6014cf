"""The features of a stream of images, on disk until it is at its end: what a kill leaves is not done again.

A chunk is always computed by one process, and read again in order by one. So the scores are the same to the last digit
however often it was interrupted, and for any number of processes.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import FeatureNetwork, Images, PairScore
from raekit.files import whole
from raekit.pictures import grid, to_pil
from raekit.progress import Progress, silent
from raekit.weights import read_weights

CHUNK = 250
"""Images; a kill costs at most so many on each process."""

_PICTURE = 36  # of the first images
_FOLDER = "features"


Features = Mapping[str, FeatureNetwork | PairScore]


class Stream(Protocol):
    """Images to score, each a function of its number."""

    @property
    def count(self) -> int: ...

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        """The images with the numbers in `chunks`, in their order; no batch reaches from one chunk into the next."""
        ...


@torch.no_grad()
def collect(stream: Stream, networks: Features, out: Path, world: World, progress: Progress = silent) -> None:
    """Write the features of all images below `out`, of those alone that are missing there.

    OUT/samples.png has the first images. Called by all processes, which share the work.
    """
    chunks = [c for c in _chunks(stream.count) if not _place(out, c).is_file()]
    world.barrier()  # before anyone writes, all have looked
    mine = chunks[world.rank :: world.size]
    batches = stream.batches(mine, world)
    done = stream.count - sum(map(len, chunks))
    for chunk in mine:
        rows: dict[str, list[Tensor]] = {name: [] for name in networks}
        digest, left = blake2b(digest_size=8), len(chunk)
        while left:
            batch = next(batches)
            for name, network in networks.items():
                rows[name].append(batch.features(network).float().cpu())
            digest.update(batch.images.mul(255).round().byte().cpu().numpy().tobytes())
            if chunk.start == 0 and left == len(chunk):
                with whole(out / "samples.png") as partial:
                    grid([to_pil(image) for image in batch.images[:_PICTURE]]).save(partial, format="PNG")
            left -= len(batch)
            done = min(done + len(batch) * world.size, stream.count)
            progress("images", done, stream.count)
        tensors = {name: torch.cat(parts) for name, parts in rows.items()}
        tensors["digest"] = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        with whole(_place(out, chunk)) as partial:
            save_file(tensors, partial)
    world.barrier()


def collected(networks: Features, count: int, out: Path, device: torch.device | str) -> Iterator[Images]:
    """The features of all images that `collect` wrote, in order; UserError, naming the file, if one is damaged."""
    for chunk in _chunks(count):
        tensors = _read(out, chunk)
        widths = {name: tensors[name].shape for name in networks if name in tensors}
        if widths != {name: (len(chunk), network.width) for name, network in networks.items()}:
            raise UserError(f"{_place(out, chunk)}: damaged; remove it and run the same again")
        features = {n: tensors[name].to(device) for name, n in networks.items()}
        yield Images.gone(features, torch.full((len(chunk),), -1), torch.arange(chunk.start, chunk.stop))


def images_digest(count: int, out: Path) -> str:
    """16 digits that tell the images, as 8-bit pixels in their order, from all others."""
    digest = blake2b(digest_size=8)
    for chunk in _chunks(count):
        digest.update(bytes(_read(out, chunk)["digest"].tolist()))
    return digest.hexdigest()


def discard(out: Path) -> None:
    """Remove the features."""
    shutil.rmtree(out / _FOLDER)


def _chunks(count: int) -> list[range]:
    return [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]


def _place(out: Path, chunk: range) -> Path:
    return out / _FOLDER / f"{chunk.start:08d}.safetensors"


def _read(out: Path, chunk: range) -> dict[str, Tensor]:
    try:
        return read_weights(_place(out, chunk))
    except UserError:
        raise UserError(f"{_place(out, chunk)}: damaged; remove it and run the same again") from None
