"""How fast are images read?

    python benchmarks/data_loading.py [--images 64] [--repeats 5] [--out DIR]

Reads JPEGs of ImageNet's size (500 x 375) and of a phone (4000 x 3000) in one process and one thread, in turns: by a
plain loader (Pillow, `convert`, the same crop), and by raekit's training stream with `data.resize` exact and fast. The
last table times the steps of one image: reading and decoding, the copy to RGB, scaling and cutting. Times are of the
processor, because other processes disturb them less than wall times.

    python benchmarks/data_loading.py --index 1281167

Writes that many small entries as 1,000 labelled shards into a temporary folder, and measures building and opening the
index, its memory, and random reads without decoding.
"""

import argparse
import io
import os
import resource
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness import Table, interleaved, publish, report
from machine import MatmulRate
from raekit.data.images import decode, reduced
from raekit.data.loader import DataConfig, Loader
from raekit.data.sources import open_source
from raekit.data.sources.zip_tar import Archived
from raekit.data.transforms import center_window
from raekit.distributed import World

SIZES = {"ImageNet": (500, 375), "phone": (4000, 3000)}
SIDE = 256
_CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--index", type=int, metavar="ENTRIES", help="measure an index instead")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json and results.md")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.index:
            index(Path(scratch), arguments.index, arguments.out)
            return
        for name, size in SIZES.items():
            count = max(arguments.images // (1 if name == "ImageNet" else 16), 1)
            folder = write_photos(Path(scratch) / name, size, count)
            reading(name, folder, count, arguments.repeats, arguments.out)
            steps(name, next(folder.glob("*.jpg")), arguments.repeats, arguments.out)


def write_photos(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write JPEGs with the detail of photos: 500 x 375 pixels take about 85 kB."""
    folder.mkdir()
    width, height = size
    for i in range(count):
        random = np.random.default_rng(i)
        coarse = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        noise = random.normal(0, 9, smooth.shape).astype(np.int16)
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=90)
    return folder


def reading(name: str, folder: Path, count: int, repeats: int, out: Path | None) -> None:
    """Time reading all images, for each crop of the training stream."""
    for crop in ("center", "random"):
        variants: dict[str, Callable[[], object]] = {"plain loader": lambda crop=crop: plain(folder, crop)}
        for resize in ("exact", "fast"):
            data = DataConfig(source=f"flat:{folder}", split="all", image_size=SIDE, crop=crop, resize=resize)  # type: ignore[arg-type]
            stream = Loader(data, seed=0).stream(0, count, World())
            variants[f"raekit, {resize}"] = lambda stream=stream: next(stream)
        rate = MatmulRate(torch.float32, _CPU)
        times = interleaved(variants, repeats, _CPU, rate, time.process_time)
        size = "{} x {}".format(*SIZES[name])
        title = f"Reading {count} JPEGs of {size} to {SIDE} pixels, {crop} crop, one core"
        report(title, times, count, _CPU, out, rate=rate)


def plain(folder: Path, crop: str) -> np.ndarray:
    """Read a batch as a plain loader does: Pillow, `convert`, and the centre crop of ADM or the random crop of RAE."""
    images = []
    for i, path in enumerate(folder.iterdir()):
        with path.open("rb") as file:
            image = Image.open(file).convert("RGB")
        while crop == "center" and min(image.size) >= 2 * SIDE:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = (SIDE if crop == "center" else int(1.5 * SIDE)) / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        if crop == "random":
            left, top = np.random.default_rng(i).integers(0, (2 * left, 2 * top), endpoint=True).tolist()
        images.append(np.asarray(image)[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1))
    return np.stack(images)


def steps(name: str, path: Path, repeats: int, out: Path | None) -> None:
    """Time the steps of one image."""
    image = decode(path, str(path))

    def at_reduced_size() -> None:
        with reduced(SIDE):
            decode(path, str(path))

    variants: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(path, str(path)),
        "decode at a reduced size": at_reduced_size,
        "copy to RGB": lambda: image.convert("RGB"),
        "scale and cut, exact": lambda: center_window(image, SIDE).exact(),
        "scale and cut, fast": lambda: center_window(image, SIDE).fast(),
    }
    runs = 32 if name == "ImageNet" else 2
    several = {row: (lambda run=run: deque((run() for _ in range(runs)), maxlen=0)) for row, run in variants.items()}
    rate = MatmulRate(torch.float32, _CPU)
    report(
        f"The steps of {name}'s size",
        interleaved(several, repeats, _CPU, rate, time.process_time),
        runs,
        _CPU,
        out,
        rate=rate,
    )


def index(folder: Path, entries: int, out: Path | None, shards: int = 1000) -> None:
    """Measure the index of `entries` labelled images in tar shards."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG")
    image, label = _entry("jpg", content.getvalue()), _entry("cls", b"000")
    for shard in range(shards):
        with (folder / f"train-{shard:06}.tar").open("wb") as file:
            for i in range(shard, entries, shards):
                label[512:515] = b"%03d" % (i % 1000)
                for entry in (image, label):
                    entry[:8], entry[148:156] = b"%08d" % i, b" " * 8
                    entry[148:156] = b"%06o\0 " % sum(entry[:512])
                    file.write(entry)
            file.write(bytes(1024))
    rows = []
    for what in ("build", "open"):
        before, began, used = _memory(), time.perf_counter(), time.process_time()
        source = open_source(f"tar:{folder}", "all")
        took, used = time.perf_counter() - began, time.process_time() - used
        rows.append([what, f"{took:.2f} s, {used:.2f} s of a core; memory + {_memory() - before:.0f} MiB"])
    assert isinstance(source, Archived)
    order = np.random.default_rng(0).integers(0, len(source), 20_000).tolist()
    for what in ("read at random, first", "read at random, again"):
        began, used = time.perf_counter(), time.process_time()
        for i in order:
            source.file(i)
        took, used = time.perf_counter() - began, time.process_time() - used
        rows.append([what, f"{len(order) / took:,.0f} a second, {len(order) / used:,.0f} a second of a core"])
    began = time.perf_counter()
    if (child := os.fork()) == 0:
        os._exit(len(source) == 0)
    os.waitpid(child, 0)
    rows.append(["start a worker (fork)", f"{time.perf_counter() - began:.3f} s"])
    publish(Table(f"The index of {len(source):,} images in {shards:,} shards", ["", ""], rows), _CPU, out)


def _entry(extension: str, data: bytes) -> bytearray:
    """Return a tar header, whose name and checksum are still to be set, and the padded content."""
    info = tarfile.TarInfo(f"00000000.{extension}")
    info.size = len(data)
    return bytearray(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))


def _memory() -> float:
    """Return the memory of this process in MiB, with what it shares (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
