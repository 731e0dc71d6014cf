"""The features of a stream of images on disk, so that a killed evaluation does not repeat finished work.

One process computes a chunk, and one process reads all chunks in order. So the scores are the same to the last digit
for any number of interruptions and processes.
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation import streams
from raekit.evaluation.features import FeatureNetwork, Images, PairScore
from raekit.evaluation.streams import Stream
from raekit.files import sweep, whole
from raekit.pictures import save_grid, to_pil
from raekit.progress import Progress, silent
from raekit.weights import read_weights

_PICTURE = 36  # images in the picture of the first images

Features = Mapping[str, FeatureNetwork | PairScore]


@torch.no_grad()
def collect(
    stream: Stream,
    networks: Features,
    folder: Path,
    picture: Path,
    world: World,
    progress: Progress = silent,
    what: str = "images",
) -> None:
    """Compute the features of all images of a stream that `folder` lacks. All processes call it and share the work.

    Args:
        stream: the images.
        networks: the networks, and scores of pairs, by name.
        folder: where the features are stored.
        picture: the PNG file for the first images.
        world: the processes.
        progress: called after each batch.
        what: what the progress calls the work.
    """
    chunks = [c for c in _chunks(stream.count) if not _place(folder, c).is_file()]
    if world.is_main:
        sweep(folder)
    world.barrier()  # before anyone writes, everyone has looked
    mine = chunks[world.rank :: world.size]
    batches = stream.batches(mine, world)
    done = stream.count - sum(map(len, chunks))
    for chunk in mine:
        rows: dict[str, list[Tensor]] = {name: [] for name in networks}
        labels: list[Tensor] = []
        digest, left = blake2b(digest_size=8), len(chunk)
        while left:
            batch = next(batches)
            for name, network in networks.items():
                rows[name].append(batch.features(network).float().cpu())
            labels.append(batch.labels.cpu())
            digest.update(batch.images.mul(255).round().byte().cpu().numpy().tobytes())
            if chunk.start == 0 and left == len(chunk):
                save_grid([to_pil(image) for image in batch.images[:_PICTURE]], picture)
            left -= len(batch)
            done = min(done + len(batch) * world.size, stream.count)
            progress(what, done, stream.count)
        tensors = {name: torch.cat(parts) for name, parts in rows.items()}
        tensors["labels"] = torch.cat(labels)
        tensors["digest"] = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        with whole(_place(folder, chunk)) as partial:
            save_file(tensors, partial)
    world.barrier()


def collected(networks: Features, count: int, folder: Path, device: torch.device | str) -> Iterator[Images]:
    """Yield the features of all images that `collect` stored, in order.

    Raises:
        UserError: a file is damaged. The message names it.
    """
    for chunk in _chunks(count):
        tensors = _read(folder, chunk)
        shapes = {name: tensors[name].shape for name in networks if name in tensors}
        if shapes != {name: (len(chunk), network.width) for name, network in networks.items()}:
            raise UserError(f"{_place(folder, chunk)}: damaged; remove it and run the same command again")
        features = {network: tensors[name].to(device) for name, network in networks.items()}
        yield Images.gone(features, tensors["labels"], torch.arange(chunk.start, chunk.stop))


def images_digest(count: int, folder: Path) -> str:
    """Return 16 hexadecimal digits that identify the images, as 8-bit pixels in their order."""
    digest = blake2b(digest_size=8)
    for chunk in _chunks(count):
        digest.update(bytes(_read(folder, chunk)["digest"].tolist()))
    return digest.hexdigest()


def _chunks(count: int) -> list[range]:
    return [range(first, min(first + streams.CHUNK, count)) for first in range(0, count, streams.CHUNK)]


def _place(folder: Path, chunk: range) -> Path:
    return folder / f"{chunk.start:08d}.safetensors"


def _read(folder: Path, chunk: range) -> dict[str, Tensor]:
    try:
        tensors = read_weights(_place(folder, chunk))
    except UserError:
        tensors = {}
    if not {"labels", "digest"} <= tensors.keys():
        raise UserError(f"{_place(folder, chunk)}: damaged; remove it and run the same command again")
    return tensors
