"""A table of unusual, damaged and malicious files, each with the expected outcome.

`python -m tests.hostile` prints the table. A row has a name, a function that makes and uses the file, and the expected
outcome: WORKS, or a pattern that the message of a UserError must match. To add rows, write a function that yields cases
and add it to GROUPS.
"""

import gzip
import io
import json
import math
import os
import pickle
import re
import resource
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import nn

from raekit.artifacts import read_statistics
from raekit.config import from_dict
from raekit.data.images import UnreadableImage, read_image
from raekit.data.loader import DataConfig
from raekit.data.sources import archive_index, open_source
from raekit.distributed import World
from raekit.errors import UserError
from raekit.formats.conversion import read
from raekit.formats.decoder_keys import statistics
from raekit.formats.diffusers_keys import DiffusersAutoencoder
from raekit.inference.cache import cache_latents
from raekit.inference.cached_loader import LatentLoader
from raekit.inference.latents import encode_files, read_latents
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig, TransformerConfig
from raekit.models.discriminator import dino
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.perceptual import LPIPS, load_perceptual
from raekit.models.pooled import load_pooled
from raekit.models.vit import ViT, ViTConfig
from raekit.stages.selection import read_generated
from raekit.weights import load_strict, read_weights

WORKS = "works"
MEMORY = 400  # MiB, the limit for every case


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: the description of the file.
        use: makes the file in an empty folder and reads it with the library.
        expected: WORKS, or a pattern that the message of a UserError must match.
    """

    name: str
    use: Callable[[Path], object]
    expected: str


@dataclass(frozen=True)
class Outcome:
    """The result of a case.

    Attributes:
        text: WORKS, the message of a UserError, or the type and message of any other exception.
        seconds: the time that the case took.
        mebibytes: the growth of the peak memory of the process.
    """

    text: str
    seconds: float
    mebibytes: float

    def matches(self, case: Case) -> bool:
        """Return whether the outcome is as expected, with a message of one line, within the memory limit."""
        expected = self.text == WORKS if case.expected == WORKS else bool(re.search(case.expected, self.text))
        return expected and "\n" not in self.text and self.mebibytes < MEMORY


def outcome(case: Case) -> Outcome:
    """Run the case in a temporary folder."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            case.use(Path(folder))
            text = WORKS
        except UserError as error:
            text = str(error).replace(f"{folder}{os.sep}", "")
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        if (Path(folder) / SPRUNG).exists():
            text = "code was run"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Outcome(text, time.perf_counter() - began, grown / (2**20 if sys.platform == "darwin" else 2**10))


# Images


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.effect_noise(size, 60).convert(mode)


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Build a PNG by hand: the header, other chunks, and the rows, which are compressed here."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def rows(width: int, height: int, bits: int) -> bytes:
    return (b"\0" + bytes((width * bits + 7) // 8)) * height


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[0x0112] = orientation
    return values


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def jpeg_of_size(width: int, height: int) -> bytes:
    data = saved("JPEG")
    start = data.index(b"\xff\xc0") + 5
    return patched(data, start, struct.pack(">HH", height, width))


def animation(kind: str, **options: Any) -> bytes:
    return saved(kind, picture("P"), save_all=True, append_images=[picture("P"), picture("P")], **options)


def readable() -> Iterator[tuple[str, str, bytes | Callable[[], bytes]]]:
    """Yield (row, file name, content) of files that must be read."""
    yield "CMYK JPEG", "a.jpg", saved("JPEG", picture("CMYK"))
    yield "CMYK TIFF", "a.tif", saved("TIFF", picture("CMYK"))
    grey = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    yield "16-bit grey PNG", "a.png", saved("PNG", grey)
    yield "16-bit grey TIFF", "a.tif", saved("TIFF", grey)
    for name, colour, samples in (("RGB", 2, 3), ("RGBA", 6, 4), ("grey with alpha", 4, 2)):
        yield f"16-bit {name} PNG", "a.png", png(40, 30, 16, colour, rows(40, 30, 16 * samples))
    yield "16-bit grey PNG, one level transparent", "a.png", png(9, 9, 16, 0, rows(9, 9, 16), (b"tRNS", b"\0\0"))
    yield "palette with transparency", "a.png", saved("PNG", picture("P"), transparency=3)
    yield "grey with alpha", "a.png", saved("PNG", picture("LA"))
    yield "one bit a pixel", "a.png", saved("PNG", picture("1"))
    yield "animated GIF", "a.gif", animation("GIF")
    yield "animated WebP", "a.webp", animation("WEBP")
    yield "animated PNG", "a.png", animation("PNG")
    yield "TIFF of several pages", "a.tif", animation("TIFF")
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        yield f"1-pixel {kind}", f"a.{kind.lower()}", saved(kind, picture(size=(1, 1)))
    yield "a strip of 1 by 60,000 pixels", "a.png", saved("PNG", picture("L", (1, 60_000)))
    yield "a strip of 60,000 by 1 pixels", "a.png", saved("PNG", picture("L", (60_000, 1)))
    yield "PNG named .jpg", "a.jpg", saved("PNG")
    yield "JPEG named .png", "a.png", saved("JPEG")
    yield "WebP named .gif", "a.gif", saved("WEBP")
    yield "JPEG named .txt", "a.txt", saved("JPEG")
    yield "PNG without a suffix", "a", saved("PNG")
    yield "a name of newlines and signs", "a\n%s {0} [b] é.png", saved("PNG")
    for orientation in range(1, 9):
        yield f"EXIF orientation {orientation}", "a.jpg", saved("JPEG", exif=exif(orientation))
    yield "EXIF orientation 99", "a.jpg", saved("JPEG", exif=exif(99))
    yield "EXIF of garbage", "a.jpg", saved("JPEG", exif=b"Exif\0\0" + b"garbage" * 9)
    yield "colour profile of garbage", "a.png", saved("PNG", icc_profile=b"garbage")
    yield "PNG with too few rows, which Pillow fills", "a.png", png(90, 90, 8, 2, rows(90, 3, 24))
    yield "bytes after the end", "a.png", saved("PNG") + b"garbage" * 99


def damaged() -> Iterator[tuple[str, str, bytes | Callable[[], bytes], str]]:
    """Yield (row, file name, content, pattern) of files that must be rejected."""
    unknown, too_large = "not a readable image .not a known image format", "more than the limit of 89,478,485"
    unreadable = r"^a\.\w+: not a readable image \(.+\)$"
    for suffix in ("png", "jpg", "gif", "webp"):
        yield f"zero bytes named .{suffix}", f"a.{suffix}", b"", unknown
    for kind, suffix in (
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("GIF", "gif"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("BMP", "bmp"),
    ):
        yield f"half of a {kind}", f"a.{suffix}", saved(kind)[: len(saved(kind)) // 2], unreadable
    yield "the first 20 bytes of a JPEG", "a.jpg", saved("JPEG")[:20], unreadable
    yield "text named .png", "a.png", b"no picture", unknown
    yield "a web page named .jpg", "a.jpg", b"<html>not found</html>", unknown
    yield "SVG named .png", "a.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', unknown
    yield "PostScript, which Pillow would execute", "a.png", saved("EPS"), unknown
    yield "PDF named .png", "a.png", b"%PDF-1.7\n", unknown
    yield "a pickle named .png", "a.png", pickle.dumps([1, 2]), unknown
    yield "PNG that says 100,000 squared", "a.png", png(100_000, 100_000, 8, 2, b""), too_large
    yield "PNG bomb of 12,000 squared", "a.png", lambda: png(12_000, 12_000, 1, 0, rows(12_000, 12_000, 1)), too_large
    yield "JPEG that says 65,500 squared", "a.jpg", jpeg_of_size(65_500, 65_500), too_large
    yield "GIF that says 65,535 squared", "a.gif", patched(saved("GIF"), 6, b"\xff" * 4), too_large
    yield (
        "BMP that says 100,000 squared",
        "a.bmp",
        patched(saved("BMP"), 18, struct.pack("<ii", 10**5, 10**5)),
        too_large,
    )
    yield "PPM that says 10^9 squared", "a.ppm", b"P6 1000000000 1000000000 255\n", too_large
    yield "PNG of width 0", "a.png", png(0, 5, 8, 2, b""), unreadable
    yield "PNG with a wrong checksum", "a.png", patched(saved("PNG"), 29, b"\0\0\0\0"), unreadable
    packer = zlib.compressobj()
    bomb = b"key\0\0" + b"".join(packer.compress(bytes(10**6)) for _ in range(100)) + packer.flush()
    yield "PNG with 100 MB of packed text", "a.png", png(9, 9, 8, 0, rows(9, 9, 8), (b"zTXt", bomb)), unreadable
    yield "floating-point TIFF", "a.tif", saved("TIFF", picture("F")), "have no known range"
    wide = Image.fromarray(np.full((9, 9), 10**6, np.int32))
    yield "32-bit TIFF", "a.tif", saved("TIFF", wide), "have no known range"


def images() -> Iterator[Case]:
    def read(name: str, content: bytes | Callable[[], bytes], folder: Path) -> None:
        (folder / name).write_bytes(content() if callable(content) else content)
        for fit in ("crop", "pad"):
            image = read_image(folder / name, 64, fit)
            assert (image.mode, image.size) == ("RGB", (64, 64))

    for row, name, content in readable():
        yield Case(row, partial(read, name, content), WORKS)
    for row, name, content, expected in damaged():
        yield Case(row, partial(read, name, content), expected)

    def special(make: Callable[[Path], object], folder: Path) -> None:
        make(folder / "a.png")
        read_image(folder / "a.png", 16)

    yield Case("no such image", partial(special, lambda path: None), r"a\.png: no such file")
    yield Case("a folder named .png", partial(special, Path.mkdir), "not a regular file")
    yield Case("a named pipe", partial(special, os.mkfifo), "not a regular file")
    yield Case("a link to nothing", partial(special, lambda path: path.symlink_to("none")), "not a regular file")


# Weights


SPRUNG = "sprung"


class Trap:
    """An object that calls `call` on `arguments` when it is unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


@cache
def files() -> dict[str, bytes]:
    """Return the files of a model with random weights and one block in each part: {relative path: content}."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vit = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2)
        Encoder("vit", vit.spec, ViT(vit)).save(folder)
        decoder = DecoderConfig(token_dim=8, grid=(2, 2), patch_size=4, width=8, depth=1, heads=2, hidden=16)
        Autoencoder(AutoencoderConfig(encoder="vit", decoder=decoder), load_encoder(scratch)).save(folder)
        part = TransformerConfig(width=8, depth=1, heads=2)
        Denoiser(DenoiserConfig(channels=8, grid=(2, 2), backbone=part, num_classes=2)).save(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def model(folder: Path, **changed: bytes | None) -> str:
    """Write the model to `folder`. `changed` replaces files by their names in `KINDS`; None leaves a file out."""
    for name, content in (files() | {KINDS[key]: value for key, value in changed.items()}).items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return str(folder)


KINDS = {
    "weights": "autoencoder/model.safetensors",
    "config": "autoencoder/config.json",
    "statistics": "autoencoder/statistics.safetensors",
    "denoiser": "denoiser/config.json",
    "encoder": "encoder/config.json",
}


def tensor_file(header: object, data: bytes = b"") -> bytes:
    """Build a safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors_changed(kind: str, change: Callable[[dict[str, torch.Tensor]], object]) -> bytes:
    state = load(files()[KINDS[kind]])
    change(state)
    return save(state)


def values_changed(kind: str, **values: object) -> bytes:
    config = json.loads(files()[KINDS[kind]])
    for key, value in values.items():
        *parents, leaf = key.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[leaf] = value
    return json.dumps(config).encode()


def safetensors() -> Iterator[Case]:
    def case(row: str, expected: str, **changed: bytes | Callable[[], bytes] | None) -> Case:
        def use(folder: Path) -> None:
            contents = {key: value() if callable(value) else value for key, value in changed.items()}
            Autoencoder.load(model(folder, **contents)).encode(torch.zeros(1, 3, 8, 8))

        return Case(row, use, expected)

    bad = r"model\.safetensors: damaged or not a weights file \(.+\); download or export it again$"
    fit = "autoencoder: the weights do not fit Decoder: .*"
    whole = files()[KINDS["weights"]]

    def entry(shape: list[int], end: int, dtype: str = "F32") -> bytes:
        return tensor_file({"embed.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}, bytes(16))

    yield case("the model as it is", WORKS)
    yield case("weights of zero bytes", bad, weights=b"")
    yield case("weights without their last byte", bad, weights=whole[:-1])
    yield case("half of the weights", bad, weights=whole[: len(whole) // 2])
    yield case("bytes after the weights", bad, weights=whole + b"garbage")
    yield case("a header of 2^63 bytes", bad, weights=patched(whole, 0, struct.pack("<Q", 2**63)))
    yield case("a header of 90 MB that is not there", bad, weights=patched(whole, 0, struct.pack("<Q", 90_000_000)))
    yield case("a header that is not JSON", bad, weights=tensor_file(b"{broken"))
    yield case("a header of a list", bad, weights=tensor_file([]))
    yield case("a header of nested lists", bad, weights=tensor_file(b"[" * 100_000))
    yield case("a tensor beyond the end", bad, weights=entry([10**6], 4 * 10**6))
    yield case("a tensor of 10^18 elements", bad, weights=entry([10**9, 10**9], 16))
    yield case("a tensor of another size than its bytes", bad, weights=entry([5], 16))
    yield case("a tensor of unknown type", bad, weights=entry([4], 16, "F99"))
    yield case("a picture named model.safetensors", bad, weights=saved("PNG"))
    yield case("a pickle named model.safetensors", bad, weights=pickle.dumps(Trap(Path.touch, Path(SPRUNG))))
    yield case("no weights", r"model\.safetensors: no such file", weights=None)
    yield case("no tensor at all", fit + "missing blocks", weights=tensor_file({}))

    def weights(row: str, expected: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Case:
        return case(row, expected, weights=lambda: tensors_changed("weights", change))

    yield weights("a missing tensor", fit + "missing cls_token", lambda state: state.pop("cls_token"))
    yield weights("an extra tensor", fit + "unexpected extra", lambda state: state.update(extra=torch.ones(1)))
    yield weights(
        "a misshapen tensor",
        fit + r"cls_token is \(9,\), expected \(8,\)",
        lambda state: state.update(cls_token=torch.ones(9)),
    )
    yield weights("a tensor of a tensor", fit + "cls_token is", lambda state: state.update(cls_token=torch.ones(1, 8)))
    yield weights(
        "weights of another model",
        fit + "; and [0-9]+ more",
        lambda state: (state.clear(), state.update({f"other.{i}": torch.ones(1) for i in range(9)})),
    )
    yield weights(
        "weights in float16 and int64",
        WORKS,
        lambda state: state.update({"cls_token": state["cls_token"].half(), "out.bias": torch.ones(48).long()}),
    )
    yield case("no statistics", r"statistics\.safetensors: no such file", statistics=None)
    wrong = r"statistics\.safetensors: needs `var`"
    yield case("statistics without var", wrong, statistics=save({"mean": torch.zeros(8, 2, 2)}))
    yield case("statistics of another shape", wrong, statistics=save({"var": torch.zeros(4, 2, 2)}))
    yield case("statistics of zero bytes", "damaged or not a weights file", statistics=b"")

    def latents(change: Callable[[Path], object], folder: Path) -> None:
        (folder / "in").mkdir()
        (folder / "in/a.png").write_bytes(saved("PNG"))
        place = folder / "latents.safetensors"
        encode_files(Autoencoder.load(model(folder / "model")), "model", [folder / "in"], place)
        change(place)
        list(read_latents(place))

    def described(**values: object) -> Callable[[Path], object]:
        def change(place: Path) -> None:
            with safe_open(place, "pt") as file:
                info = json.loads(file.metadata()["raekit"]) | values
            save_file(load_file(place), place, {"raekit": json.dumps(info)})

        return change

    yield Case("latents as they are", partial(latents, lambda place: None), WORKS)
    yield Case(
        "latents without metadata",
        partial(latents, lambda place: save_file(load_file(place), place)),
        "not a file of latents",
    )
    yield Case("latents with unknown metadata", partial(latents, described(colour=1)), "colour: Unexpected")
    yield Case(
        "latents that name too many images", partial(latents, described(images=["a", "b"])), "of its N = 2 images"
    )
    yield Case(
        "half of a file of latents", partial(latents, lambda place: os.truncate(place, 99)), "damaged, or not a file"
    )

    def cached(change: Callable[[Path], object], folder: Path) -> None:
        (folder / "in").mkdir()
        (folder / "in/a.png").write_bytes(saved("PNG"))
        autoencoder = Autoencoder.load(model(folder / "model"))
        data = DataConfig(source=f"flat:{folder / 'in'}", split="all", image_size=autoencoder.image_size)
        cache_latents(autoencoder, "model", data, folder / "cache", world=World())
        for place in (folder / "cache").iterdir():
            change(place)
        next(LatentLoader(folder / "cache", data, 0, autoencoder).stream(0, 1, World()))

    yield Case("a cache of latents as it is", partial(cached, lambda place: None), WORKS)
    yield Case("a cache that says it has 10^18 images", partial(cached, described(items=10**18)), "were unreadable")
    yield Case("a cache without latents", partial(cached, described(images=0)), "`latents` must have")
    yield Case("a cache of another kind", partial(cached, described(kind="images")), "of kind 'images'")
    yield Case("a cache of an unknown kind", partial(cached, described(kind=[])), "kind: Input should be 'source'")
    yield Case("half of a cache", partial(cached, lambda place: os.truncate(place, 99)), "damaged, or not a file")


# Pickles


def pickles() -> Iterator[Case]:
    def case(row: str, expected: str, write: Callable[[Path], object], name: str = "weights.pt") -> Case:
        def use(folder: Path) -> None:
            write(folder / name)
            read_weights(folder / name)

        return Case(row, use, expected)

    def sprung(path: Path) -> Path:
        return path.parent / SPRUNG

    state = {"weight": torch.ones(3)}
    rejected, bad = (
        r"weights\.pt: rejected because it would run ",
        "weights.pt: damaged or not a weights file",
    )
    for protocol in (0, 1, 2):
        yield case(
            f"a pickle of protocol {protocol} that touches a file",
            rejected,
            lambda path, protocol=protocol: path.write_bytes(pickle.dumps(Trap(Path.touch, sprung(path)), protocol)),
        )
    for protocol in (3, 4, 5):
        yield case(
            f"a pickle of protocol {protocol} that touches a file",
            "rejected|damaged",
            lambda path, protocol=protocol: path.write_bytes(pickle.dumps(Trap(Path.touch, sprung(path)), protocol)),
        )
    for call, name in ((os.system, "os.system"), (eval, "eval"), (exec, "exec"), (__import__, "__import__")):
        yield case(
            f"weights that call {name}",
            rejected,
            lambda path, call=call: torch.save(
                state | {"more": Trap(call, f"__import__('pathlib').Path({str(sprung(path))!r}).touch()")}, path
            ),
        )
    yield case(
        "weights that touch a file, in torch's old format",
        rejected,
        lambda path: torch.save(
            state | {"more": Trap(Path.touch, sprung(path))}, path, _use_new_zipfile_serialization=False
        ),
    )
    yield case("a whole module", rejected, lambda path: torch.save(nn.Linear(2, 2), path))
    yield case("an array of objects", rejected, lambda path: torch.save({"a": np.array([{}])}, path))
    yield case("weights in a list", "not a state dict", lambda path: torch.save([torch.ones(3)], path))
    yield case("weights named by numbers", "not a state dict", lambda path: torch.save({1: torch.ones(3)}, path))
    yield case("zero bytes named .pt", bad, lambda path: path.write_bytes(b""))
    yield case("a web page named .pt", bad, lambda path: path.write_bytes(b"<html>rate limited</html>"))
    yield case("a picture named .pt", bad, lambda path: path.write_bytes(saved("PNG")))
    yield case("a string of 4 GB that is not there", bad, lambda path: path.write_bytes(b"\x80\x02X\xff\xff\xff\xff"))
    yield case("a stack that is empty", bad, lambda path: path.write_bytes(b"\x80\x02bbbb."))

    def cut(path: Path) -> None:
        torch.save(state, path)
        os.truncate(path, path.stat().st_size // 2)

    def packed(path: Path) -> None:
        torch.save({"weight": torch.zeros(10**6)}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    yield case("half of a torch file", bad, cut)
    yield case("a torch file, compressed like a zip bomb", "compressed entries", packed)
    yield case(
        "weights and a dictionary of settings", WORKS, lambda path: torch.save(state | {"epoch": {"n": 3}}, path)
    )


# Numbers


def numbers() -> Iterator[Case]:
    """Yield intact files whose content is not weights, statistics or latents."""

    def case(row: str, expected: str, use: Callable[[Any, Path], object], content: object) -> Case:
        def through_a_file(folder: Path) -> None:
            torch.save({"it": content}, folder / "a.pt")
            use(read_weights(folder / "a.pt")["it"], folder / "a.pt")

        return Case(row, through_a_file, expected)

    kinds = {
        "whole numbers": torch.ones(4, dtype=torch.int64),
        "truth values": torch.ones(4, dtype=torch.bool),
        "complex numbers": torch.ones(4, dtype=torch.complex64),
        "a sparse tensor": torch.eye(4)[0].to_sparse(),
        "None": None,
        "a list": [1.0] * 4,
    }

    def weights(value: Any, path: Path) -> None:
        layer = nn.LayerNorm(4)
        load_strict(layer, layer.state_dict() | {"weight": value}, path)

    for name, value in kinds.items():
        yield case(f"{name} for weights", "weight is .*expected floating-point numbers", weights, value)

    def of_vgg(value: Any, path: Path) -> None:
        torch.save({"features.0.weight": value}, path)
        load_perceptual(str(path))

    yield case("None for VGG's weights", r"features\.0\.weight is None", of_vgg, None)
    yield case("a sparse tensor for VGG's weights", r"features\.0\.weight is sparse", of_vgg, torch.eye(4).to_sparse())

    def of_dino(value: Any, path: Path) -> None:
        state = {"pos_embed": torch.zeros(1, 5, 64), "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}
        dino(state | {"blocks.0.attn.qkv.bias": value}, path)

    yield case("a number for DINO's bias", "do not fit Dino", of_dino, torch.tensor(1.0))
    yield case("whole numbers for DINO's bias", "needs only tensors", of_dino, torch.ones(192, dtype=torch.int64))

    def of_statistics(value: Any, path: Path) -> None:
        statistics({"mean": torch.zeros(8, 2, 2), "var": value})

    def of_artifact(value: Any, path: Path) -> None:
        save_file({"var": value}, path.with_suffix(".safetensors"))
        read_statistics(path.with_suffix(".safetensors"), (8, 2, 2))

    var = torch.ones(8, 2, 2)
    yield case("a sparse variance", "var must be a floating-point tensor", of_statistics, var.to_sparse())
    yield case("a variance of whole numbers", "var must be a floating-point tensor", of_statistics, var.long())
    for use, origin in ((of_statistics, "published"), (of_artifact, "in an artifact")):
        for name, value in (("NaN", var * math.nan), ("infinite", var * math.inf), ("negative", -var)):
            yield case(
                f"a variance that is {name}, {origin}", "must be finite, and var must not be negative", use, value
            )

    def of_latents(value: Any, path: Path) -> None:
        torch.save({"unwhitened": value}, path)
        read_generated(path, (8, 2, 2))

    for name, value in (
        ("a list", [1.0]),
        ("no latents", torch.zeros(0, 8, 2, 2)),
        ("one latent", torch.zeros(1, 8, 2, 2)),
        ("latents of NaN", torch.full((3, 8, 2, 2), math.nan)),
        ("whole numbers", torch.zeros(3, 8, 2, 2, dtype=torch.int64)),
    ):
        yield case(f"{name} to select by", "needs two generated latents or more", of_latents, value)

    def of_diffusers(value: Any, path: Path) -> None:
        from_dict(DiffusersAutoencoder, value, path)

    for field, value in (("encoder_patch_size", 0), ("encoder_patch_size", -14), ("encoder_hidden_size", 0)):
        yield case(f"{field} {value} of diffusers", f"{field}: {value}", of_diffusers, {field: value})
    for value in (math.nan, math.inf, 0.0):
        yield case(f"scaling_factor {value} of diffusers", "scaling_factor", of_diffusers, {"scaling_factor": value})

    def of_images(side: Any, path: Path) -> None:
        LPIPS()(torch.zeros(1, 3, side, side), torch.zeros(1, 3, side, side))

    yield case("images of 8 pixels for LPIPS", "too small for VGG16", of_images, 8)


# Configurations


def configs() -> Iterator[Case]:
    def case(row: str, expected: str, **changed: bytes) -> Case:
        def use(folder: Path) -> None:
            name = model(folder, **changed)
            Autoencoder.load(name)
            Denoiser.load(name)

        return Case(row, use, expected)

    def changed(row: str, expected: str, kind: str = "config", **values: object) -> Case:
        return case(row, expected, **{kind: values_changed(kind, **values)})

    extra = r"config\.json: {}: Unexpected keyword argument"
    yield changed("an unknown key", extra.format("colour"), colour="red")
    yield changed("an unknown key further in", extra.format(r"decoder\.widht"), decoder__widht=3)
    yield changed(
        "an unknown key of the denoiser", extra.format("trust_remote_code"), "denoiser", trust_remote_code=True
    )
    yield changed("an unknown key of the encoder", extra.format("class_path"), "encoder", class_path="os.system")
    yield changed("a width of text", r"decoder\.width: Input should be a valid integer", decoder__width="wide")
    yield changed("a width of null", r"decoder\.width: Input should be a valid integer", decoder__width=None)
    yield changed("a grid of one side", r"decoder\.grid", decoder__grid=[2])
    yield changed("no heads", r"config\.json: decoder\.heads: 0 must be", decoder__heads=0)
    yield changed("a negative depth", r"decoder\.depth: -1 must be", decoder__depth=-1)
    yield changed("a depth of 10^9", r"decoder\.depth: 1000000000 must be", decoder__depth=10**9)
    yield changed("a width of 10^9", r"decoder\.width: 1000000000 must be", decoder__width=10**9)
    yield changed("a width that fills the memory", "do not fit Decoder", decoder__width=2**16, decoder__hidden=2**16)
    yield changed("a grid that fills the memory", r"decoder\.tokens: 1000000 must be", decoder__grid=[1000, 1000])
    yield changed("a grid of negative sides", r"decoder\.rows: -2 must be", decoder__grid=[-2, -2])
    yield changed("10^30 classes", "impossible size", "denoiser", num_classes=10**30)
    yield changed("hidden layers of 10^17 times the width", "impossible size", "denoiser", mlp_ratio=1e17)
    yield changed("a denoiser without heads", r"denoiser\.heads: 0", "denoiser", backbone__heads=0)
    yield changed("a denoiser of 60,000 classes", "do not fit Denoiser", "denoiser", num_classes=60_000)
    yield case("another kind", "holds no autoencoder", config=b'{"kind": "denoiser"}')
    yield case("a missing key", "decoder: Field required", config=b'{"kind": "autoencoder", "encoder": "vit"}')
    yield case("a configuration of a list", "holds no autoencoder", config=b"[]")
    yield case("a configuration of zero bytes", r"config\.json: not valid JSON", config=b"")
    yield case("a configuration in YAML", r"config\.json: not valid JSON", config=b"kind: autoencoder\n")
    yield case("a configuration of nested lists", r"config\.json: not valid JSON", config=b"[" * 100_000)
    yield case("a number of 5,000 digits", r"config\.json: not valid JSON", config=b"1" * 5000)
    yield case("a configuration that is not text", r"config\.json: not valid JSON", config=b"\xff\xfe\x00")
    yield changed("NaN for a number", r"decoder\.width", decoder__width=float("nan"))


# Published configurations


def yamls() -> Iterator[Case]:
    def case(row: str, expected: str, text: str) -> Case:
        def use(folder: Path) -> None:
            (folder / "a.yaml").write_text(text.replace("SPRUNG", str(folder / SPRUNG)))
            read(str(folder / "a.yaml"))

        return Case(row, use, expected)

    def stage(params: str, rest: str = "") -> str:
        return f"stage_1: {{target: stage1.RAE, params: {{encoder_cls: Dinov2withNorm, {params}}}}}\n{rest}"

    decoder = "decoder_config_path: none"
    yield case(
        "an unknown key", r"a\.yaml: stage_1: params\.noise_tua: Unexpected", stage(f"{decoder}, noise_tua: 0.8")
    )
    yield case("a misspelt section", "unknown section stage2; expected stage_1", stage(decoder, "stage2: {}"))
    yield case("a missing key", r"decoder_config_path: .*required", stage("noise_tau: 0.8"))
    yield case(
        "a class path", r"params\.command: Unexpected", "stage_1: {target: os.system, params: {command: touch SPRUNG}}"
    )
    yield case(
        "a decoder that is not there", "none is neither in|names no", stage(f"{decoder}, pretrained_decoder_path: none")
    )
    refused = "not valid YAML"
    yield case("a tag that makes a folder", refused, "!!python/object/apply:os.mkdir [SPRUNG]")
    yield case("a tag that evaluates", refused, "a: !!python/object/apply:eval [\"open('SPRUNG', 'w')\"]")
    yield case("brackets without end", refused, "[" * 500)
    yield case("no YAML", refused, "stage_1: [")
    yield case("a list", "not a published YAML", "- 3")
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'ha'}]\n" for i in range(30))
    yield case("10^29 references", "unknown section a0", laughs + stage(f"{decoder}, noise_tau: *a29"))


# Pipelines of diffusers


def pipelines() -> Iterator[Case]:
    parts = {
        "vae": ["diffusers", "AutoencoderRAE"],
        "transformer": ["diffusers", "RAEDiT2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    sizes = {"sample_size": 2, "in_channels": 8, "num_classes": 2}
    sizes |= {"hidden_size": [8, 8], "depth": [1, 1], "num_heads": [2, 2]}
    good: dict[str, Any] = {
        "model_index.json": {"_class_name": "RAEDiTPipeline", "id2label": None, **parts},
        "transformer/config.json": {"_class_name": "RAEDiT2DModel", **sizes},
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
        "transformer/diffusion_pytorch_model.safetensors": {},
    }

    def case(row: str, expected: str, file: str, content: object) -> Case:
        def use(folder: Path) -> None:
            for name, values in (good | {file: content}).items():
                (folder / name).parent.mkdir(exist_ok=True)
                text = json.dumps(values).encode() if not isinstance(values, bytes) else values
                (folder / name).write_bytes(text)
            if not isinstance(content, bytes) or not file.endswith(".safetensors"):
                save_file({"a": torch.zeros(1)}, folder / "transformer" / "diffusion_pytorch_model.safetensors")
            read(str(folder))

        return Case(row, use, expected)

    def changed(row: str, expected: str, file: str, **values: object) -> Case:
        return case(row, expected, file, good[file] | values)

    index, config, scheduler, weights = good
    yield case("an index of nested lists", "not valid JSON", index, b"[" * 100_000)
    yield case("an index of a list", "holds no class of diffusers", index, [])
    yield changed("a pipeline with its own code", "only diffusers' RAEDiTPipeline", index, _class_name=["code", "Mine"])
    yield changed("a part with its own code", "only diffusers' RAEDiT2DModel", index, transformer=["code", "Mine"])
    yield changed("names of other classes", "a name for each of the 2 classes", index, id2label={"0": "a", "7": "b"})
    yield changed("names that are lists", "the names must be text", index, id2label={"0": [], "1": "b"})
    yield changed("a width of 10^9", "must be", config, hidden_size=[10**9, 10**9])
    yield changed("a width that fills the memory", "does not fit", config, hidden_size=[2**16, 2**16], num_heads=[8, 8])
    yield changed("sizes of text", "config\\.json: .*sample_size|input_size", config, sample_size="large")
    yield changed("a shift of NaN", "shift", scheduler, shift=float("nan"))
    yield changed("a negative shift", "shift: -1.0 must be positive", scheduler, shift=-1)
    yield case("weights of something else", "does not fit", weights, save({"a": torch.zeros(3)}))
    yield case("weights of zeros", "safetensors", weights, bytes(99))
    yield case(
        "weights of whole numbers", "does not fit", weights, save({"blocks.0.attn.to_q.weight": torch.ones(2).int()})
    )


# Archives of images


def archives() -> Iterator[Case]:
    def case(row: str, expected: str, files: dict[str, bytes], change: Callable[[bytes], bytes] = bytes) -> Case:
        def use(folder: Path) -> None:
            with tarfile.open(folder / "a.tar", "w") as archive:
                for name, content in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
            (folder / "a.tar").write_bytes(change((folder / "a.tar").read_bytes()))
            source = open_source(f"tar:{folder / 'a.tar'}", "all")
            for i in range(len(source)):
                try:
                    source[i]
                except UnreadableImage as error:
                    raise UserError(str(error)) from None

        return Case(row, use, expected)

    def header(**fields: bytes) -> Callable[[bytes], bytes]:
        places = {"size": slice(124, 136), "kind": slice(156, 157), "target": slice(157, 257)}

        def change(content: bytes) -> bytes:
            first = bytearray(content[:512])
            for name, value in fields.items():
                place = places[name]
                first[place] = value.ljust(place.stop - place.start, b"\0")
            first[148:156] = b" " * 8
            first[148:156] = b"%06o\0 " % sum(first)
            return bytes(first) + content[512:]

        return change

    good = {"a.png": saved("PNG"), "a.cls": b"3"}
    bad = r"^a\.tar: damaged or not an uncompressed tar file \(.+\); decompress it first$"
    yield case("a labelled tar file as it is", WORKS, good)
    yield case("half of a tar file", bad, good, lambda content: content[:700])
    yield case("a tar file without its end", bad, good, lambda content: content[:2048])
    yield case("a tar file of zeros", bad, good, lambda content: bytes(len(content)))
    yield case("gzip named .tar", bad, good, gzip.compress)
    yield case("a member of 8 exabytes", bad, good, header(size=b"\x80" + b"\0" * 3 + b"\x7f" * 8))
    yield case("a member of negative size", bad, good, header(size=b"\xff" * 12))
    yield case("a size that is no number", bad, good, header(size=b"9" * 11))
    yield case("a name of 4 GB", bad, good, header(kind=b"L", size=b"37777777777"))
    yield case("an extended header of garbage", bad, {"x": b"99999 key=value\n" * 3} | good, header(kind=b"x"))
    yield case("an extended header of records of no length", bad, {"x": b"0 a=b\n" * 3} | good, header(kind=b"x"))
    yield case(
        "a link to /etc/passwd",
        "a link to a file that is not",
        {"a.png": b""},
        header(kind=b"2", target=b"/etc/passwd"),
    )
    yield case("a label of 10^9", "labels are from 999999999", good | {"a.cls": b"9" * 9})
    yield case("a label that is code", "must be the number of a class", good | {"a.cls": b"__import__('os')"})
    yield case("labels of nested lists", "not valid JSON", {"a.png": saved("PNG"), "dataset.json": b"[" * 100_000})
    yield case("an image of zeros", "not a known image format", good | {"a.png": bytes(99)})
    yield case("an image outside of the folder", "its path leads out of the archive", {"../../a.png": saved("PNG")})

    def index(folder: Path) -> None:
        with tarfile.open(folder / "a.tar", "w") as archive:
            archive.add(__file__, "a.py")
        place = folder / "a.png"
        place.write_bytes(saved("PNG"))
        with tarfile.open(folder / "a.tar", "a") as archive:
            archive.add(place, "a.png")
        archive_index.KEPT_FROM, before = 0, archive_index.KEPT_FROM
        try:
            for content in (None, b"", tensor_file({"a": {"dtype": "U8", "shape": [9**9], "data_offsets": [0, 9**9]}})):
                if content is not None:
                    next(folder.glob(".raekit-index-*")).write_bytes(content)
                assert len(open_source(f"tar:{folder / 'a.tar'}", "all")) == 1
        finally:
            archive_index.KEPT_FROM = before

    yield Case("indexes of something else", index, WORKS)


def zips() -> Iterator[Case]:
    """Labelled zip archives."""

    def case(row: str, expected: str, files: dict[str, bytes], change: Callable[[bytes], bytes] = bytes) -> Case:
        def use(folder: Path) -> None:
            with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            (folder / "a.zip").write_bytes(change((folder / "a.zip").read_bytes()))
            source = open_source(f"zip:{folder / 'a.zip'}", "all")
            for i in range(len(source)):
                try:
                    source[i]
                except UnreadableImage as error:
                    raise UserError(str(error)) from None

        return Case(row, use, expected)

    def labels(value: object) -> dict[str, bytes]:
        return {"0/a.png": saved("PNG"), "dataset.json": json.dumps({"labels": value}).encode()}

    bad = r"a\.zip: (damaged or )?not a zip file|a\.zip: .*damaged"
    yield case("labels as EDM2 writes them", WORKS, labels([["0/a.png", 6]]))
    yield case("half of a zip file", bad, labels([["0/a.png", 6]]), lambda content: content[: len(content) // 2])
    yield case("zero bytes named .zip", bad, {}, lambda content: b"")
    yield case("labels of something else", r"dataset\.json", labels({"a": "b"}))
    yield case("a label of 10^12", r"dataset\.json|labels are from", labels([["0/a.png", 10**12]]))
    yield case("labels of lists", r"dataset\.json", labels([["0/a.png", [6, []]]]))
    yield case("an image of zeros", "not a known image format", labels([["0/a.png", 6]]) | {"0/a.png": bytes(99)})


def tables() -> Iterator[Case]:
    """Datasets in the formats of Hugging Face's `datasets`."""

    def case(row: str, expected: str, make: Callable[[Path], object]) -> Case:
        def use(folder: Path) -> None:
            datasets.disable_progress_bars()
            make(folder)
            with patch("datasets.config.HF_DATASETS_CACHE", folder / "cache"):
                source = open_source(f"hf:{folder}", "all")
                for i in range(len(source)):
                    try:
                        source[i]
                    except UnreadableImage as error:
                        raise UserError(str(error)) from None

        return Case(row, use, expected)

    def parquet(change: Callable[[bytes], bytes] = lambda content: content, **columns: list[Any]) -> Any:
        def make(folder: Path) -> None:
            pq.write_table(pa.table({"image": [saved("PNG")], "label": [3]} | columns), folder / "train.parquet")
            (folder / "train.parquet").write_bytes(change((folder / "train.parquet").read_bytes()))

        return make

    def saved_to_disk(**state: object) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            datasets.Dataset.from_dict({"image": [saved("PNG")]}).save_to_disk(folder)
            values = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps(values | state))

        return make

    bad = "nor a folder of parquet files"
    yield case("a parquet file as it is", WORKS, parquet())
    yield case("half of a parquet file", bad, parquet(lambda content: content[: len(content) // 2]))
    yield case(
        "a parquet file with a footer of 4 GB", bad, parquet(lambda content: content[:-8] + b"\xff" * 4 + b"PAR1")
    )
    yield case("parquet: an image of zeros", "row 0: not a known image format", parquet(image=[bytes(99)]))
    yield case("parquet: a label of 10^9", r"labels reach 1,000,000,000", parquet(label=[10**9]))
    yield case("parquet: lists instead of images", "has no image column", parquet(image=[[1, 2]]))
    yield case("a saved dataset as it is", WORKS, saved_to_disk())
    yield case("a saved dataset without its file", bad, saved_to_disk(_data_files=[{"filename": "x"}]))
    yield case("a saved dataset of another file", bad, saved_to_disk(_data_files=[{"filename": "state.json"}]))


# Networks of other projects


def networks() -> Iterator[Case]:
    """Checkpoints of the networks of FDr6, and of DINOv3 in the layout of its published code."""
    sizes = {"model_type": "convnextv2", "hidden_sizes": [4, 4, 4, 8], "depths": [1, 1, 1, 1]}

    def checkpoint(row: str, expected: str, weights: Callable[[Path], object], **config: object) -> Case:
        def use(folder: Path) -> None:
            (folder / "config.json").write_text(json.dumps(sizes | config))
            weights(folder)
            load_pooled("convnextv2", folder)

        return Case(f"FDr6: {row}", use, rf"^fdr6 convnextv2: .*{expected}")

    def tensors(folder: Path) -> None:
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})

    def trap(folder: Path) -> None:
        torch.save({"a": Trap(Path.touch, folder / SPRUNG)}, folder / "pytorch_model.bin")

    yield checkpoint("weights of something else", "lacks embeddings", tensors)
    yield checkpoint("weights that touch a file", "damaged or holds more than tensors", trap)
    yield checkpoint(
        "zero bytes", "could not be loaded", lambda folder: (folder / "model.safetensors").write_bytes(b"")
    )
    yield checkpoint("no weights", "could not be loaded", lambda folder: None)
    yield checkpoint("a depth of 10^9", "depths: .* in config.json", tensors, depths=[1, 1, 1, 10**9])
    yield checkpoint("a depth of text", "could not be loaded", tensors, depths="deep")
    yield checkpoint("a width of 10^6", "describes .* parameters", tensors, hidden_sizes=[4, 4, 4, 10**6])
    yield checkpoint("another model", "holds a model of type 'bert'", tensors, model_type="bert")
    yield checkpoint("its own code", "lacks embeddings", tensors, auto_map={"AutoModel": "modeling.Mine"})

    def file(row: str, expected: str, write: Callable[[Path], object]) -> Case:
        def use(folder: Path) -> None:
            write(folder / "a.pth")
            load_encoder(f"dinov3_vit:{folder / 'a.pth'}")

        return Case(f"DINOv3: {row}", use, rf"^encoder dinov3_vit:a\.pth: a\.pth: .*{expected}")

    def state(**others: object) -> Callable[[Path], object]:
        tensors = {"patch_embed.proj.weight": torch.ones(64, 3, 8, 8), "blocks.0.norm1.bias": torch.ones(64)}
        return lambda path: torch.save(tensors | others, path)

    yield file("code", "would run", lambda path: torch.save({"a": Trap(Path.touch, path.parent / SPRUNG)}, path))
    yield file("something else", "not a DINOv3", lambda path: torch.save({"a": torch.ones(1)}, path))
    yield file("a block number of 60 digits", "do not fit", state(**{f"blocks.{'9' * 60}.norm1.bias": torch.ones(64)}))
    yield file("text for a tensor", "not a DINOv3", state(cls_token="a"))
    yield file("registers that are a number", "do not fit", state(storage_tokens=torch.ones(())))


def published() -> Iterator[Case]:
    """The files behind published names, as a hostile mirror of the Hub would serve them."""

    def case(row: str, name: str, expected: str, **served: bytes) -> Case:
        def use(folder: Path) -> None:
            for key, content in served.items():
                (folder / key).write_bytes(content)

            def find_file(repository: str, file: str, remedy: str = "") -> Path:
                return folder / ("config" if file.endswith(".json") else "weights")

            environment = patch.dict(os.environ, RAEKIT_CACHE=str(folder / "cache"))
            with environment, patch("raekit.formats.releases.find_file", find_file):
                Autoencoder.load(name)

        return Case(row, use, expected)

    def pickled(content: object) -> bytes:
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    foreign = pickled({"weight": torch.ones(3)})
    fusereg, scale = "fusereg-dinov3-l-k23-p95", "scale-rae-siglip2-so400m"
    yield case("FuseReg: something else", fusereg, "weights: holds no published decoder", weights=foreign)
    yield case("FuseReg: zero bytes", fusereg, "weights: damaged", weights=b"")
    yield case("Scale-RAE: code", scale, "would run", weights=pickled({"a": Trap(os.getcwd)}), config=b"{}")
    yield case("Scale-RAE: something else", scale, "holds no published decoder", weights=foreign, config=b"{}")
    decoder = {"decoder_embed.weight": torch.ones(8, 1152), "decoder_pred.weight": torch.ones(12, 8)}
    decoder |= {"decoder_layers.0.intermediate.dense.weight": torch.ones(8, 8)}
    weights = pickled(decoder)
    yield case("Scale-RAE: no config", scale, "config: not valid JSON", weights=weights, config=b"")
    yield case("Scale-RAE: a config of a list", scale, "config", weights=weights, config=b"[]")
    huge = {"decoder_hidden_size": 10**9, "decoder_num_hidden_layers": 10**9, "decoder_num_attention_heads": 1}
    huge |= {"decoder_intermediate_size": 10**9, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    yield case("Scale-RAE: 10^9 layers", scale, "must be", weights=weights, config=json.dumps(huge).encode())


GROUPS = {
    "archive": archives,
    "zip": zips,
    "network": networks,
    "published": published,
    "dataset": tables,
    "image": images,
    "safetensors": safetensors,
    "pickle": pickles,
    "numbers": numbers,
    "configuration": configs,
    "YAML": yamls,
    "pipeline": pipelines,
}


@cache
def cases() -> dict[str, Case]:
    """{"GROUP: NAME": case}."""
    return {f"{group}: {case.name}": case for group, make in GROUPS.items() for case in make()}


def main() -> None:
    """Print the table. Exit with 1 if an outcome is not as expected."""
    failed = 0
    for name, case in cases().items():
        found = outcome(case)
        right = found.matches(case)
        failed += not right
        cost = f"{found.seconds:5.2f} s {found.mebibytes:4.0f} MiB"
        print(f"{'ok  ' if right else 'FAIL'} {name:65.65} {cost}  {found.text}")
    print(f"{len(cases())} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
