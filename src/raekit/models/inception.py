"""The Inception network of 2015 whose features define FID, with the details of the original TensorFlow graph."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

from raekit.errors import UserError
from raekit.hub import find_file
from raekit.weights import load_strict, read_weights

CHECKPOINTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""File names of the published weights in pytorch-fid and torch-fidelity. Each ends with the start of its SHA-256."""
HASH = "6726825d"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{CHECKPOINTS[0]}"

SIZE = 299  # side of the network's input in pixels
POOL, LOGITS, SPATIAL = 2048, 1008, 7 * 17 * 17  # numbers of features
EPS = 1e-3  # epsilon of the published batch norms

Resize = Literal["tf1", "clean"]


class Node(NamedTuple):
    """A convolution of a block: its published name, its input, and its shape."""

    name: str
    source: str  # "x" is the block's input, "pool" its pooled input
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Convolution(nn.Conv2d):
    """A convolution with the published batch norm folded in, then ReLU. With stride 1 and padding it keeps the size."""

    def __init__(self, channels: int, width: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True):
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else 0
        super().__init__(channels, width, kernel, stride, padding)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


class Mixed(nn.Module):
    """Parallel branches over one input.

    The output concatenates every value that no other node reads, in the order of the nodes, then the pooled input.
    """

    def __init__(self, channels: int, nodes: Iterable[Node], pool: Literal["average", "max", "halve"]):
        super().__init__()
        self.pool = pool
        self.nodes = tuple(nodes)
        widths = {"x": channels, "pool": channels}
        for name, source, width, kernel, stride in self.nodes:
            self.add_module(name, Convolution(widths[source], width, kernel, stride))
            widths[name] = width
        read = {node.source for node in self.nodes} | {"x"}
        self.outputs = [name for name in [*(node.name for node in self.nodes), "pool"] if name not in read]
        self.width = sum(widths[name] for name in self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        values = {"x": x, "pool": self._pooled(x)}
        for node in self.nodes:
            values[node.name] = self.get_submodule(node.name)(values[node.source])
        return torch.cat([values[name] for name in self.outputs], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":  # as in TensorFlow, without the padding
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.max_pool2d(x, 3, 2)


def _block_a(channels: int, pool_width: int) -> Mixed:
    nodes = (
        Node("branch1x1", "x", 64),
        Node("branch5x5_1", "x", 48),
        Node("branch5x5_2", "branch5x5_1", 64, (5, 5)),
        Node("branch3x3dbl_1", "x", 64),
        Node("branch3x3dbl_2", "branch3x3dbl_1", 96, (3, 3)),
        Node("branch3x3dbl_3", "branch3x3dbl_2", 96, (3, 3)),
        Node("branch_pool", "pool", pool_width),
    )
    return Mixed(channels, nodes, "average")


def _block_b(channels: int) -> Mixed:
    nodes = (
        Node("branch3x3", "x", 384, (3, 3), 2),
        Node("branch3x3dbl_1", "x", 64),
        Node("branch3x3dbl_2", "branch3x3dbl_1", 96, (3, 3)),
        Node("branch3x3dbl_3", "branch3x3dbl_2", 96, (3, 3), 2),
    )
    return Mixed(channels, nodes, "halve")


def _block_c(channels: int, inner: int) -> Mixed:
    nodes = (
        Node("branch1x1", "x", 192),
        Node("branch7x7_1", "x", inner),
        Node("branch7x7_2", "branch7x7_1", inner, (1, 7)),
        Node("branch7x7_3", "branch7x7_2", 192, (7, 1)),
        Node("branch7x7dbl_1", "x", inner),
        Node("branch7x7dbl_2", "branch7x7dbl_1", inner, (7, 1)),
        Node("branch7x7dbl_3", "branch7x7dbl_2", inner, (1, 7)),
        Node("branch7x7dbl_4", "branch7x7dbl_3", inner, (7, 1)),
        Node("branch7x7dbl_5", "branch7x7dbl_4", 192, (1, 7)),
        Node("branch_pool", "pool", 192),
    )
    return Mixed(channels, nodes, "average")


def _block_d(channels: int) -> Mixed:
    nodes = (
        Node("branch3x3_1", "x", 192),
        Node("branch3x3_2", "branch3x3_1", 320, (3, 3), 2),
        Node("branch7x7x3_1", "x", 192),
        Node("branch7x7x3_2", "branch7x7x3_1", 192, (1, 7)),
        Node("branch7x7x3_3", "branch7x7x3_2", 192, (7, 1)),
        Node("branch7x7x3_4", "branch7x7x3_3", 192, (3, 3), 2),
    )
    return Mixed(channels, nodes, "halve")


def _block_e(channels: int, pool: Literal["average", "max"]) -> Mixed:
    nodes = (
        Node("branch1x1", "x", 320),
        Node("branch3x3_1", "x", 384),
        Node("branch3x3_2a", "branch3x3_1", 384, (1, 3)),
        Node("branch3x3_2b", "branch3x3_1", 384, (3, 1)),
        Node("branch3x3dbl_1", "x", 448),
        Node("branch3x3dbl_2", "branch3x3dbl_1", 384, (3, 3)),
        Node("branch3x3dbl_3a", "branch3x3dbl_2", 384, (1, 3)),
        Node("branch3x3dbl_3b", "branch3x3dbl_2", 384, (3, 1)),
        Node("branch_pool", "pool", 192),
    )
    return Mixed(channels, nodes, pool)


class Inception(nn.Module):
    """FID's network: images (B, 3, H, W) in [0, 1] -> features (B, 2048 + 1008 + 2023), float32.

    The columns are:

    - the pooled features (`pool_3`), which FID compares;
    - the logits without their bias, whose softmax gives the Inception Score;
    - the first seven channels of `mixed_6/conv`, ordered by row, column and channel, which sFID compares.

    Images are rounded to 8 bits and resized to 299 x 299. The network is frozen and in evaluation mode, and computes
    in full float32 regardless of autocast and TF32 settings.

    Args:
        resize: `tf1` is the bilinear resize of TensorFlow 1, without antialiasing and with the top left pixels
            aligned. `clean` is clean-fid's bicubic resize with antialiasing.
    """

    def __init__(self, resize: Resize = "tf1"):
        super().__init__()
        self.resize: Resize = resize
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(self.Mixed_5b.width, 64)
        self.Mixed_5d = _block_a(self.Mixed_5c.width, 64)
        self.Mixed_6a = _block_b(self.Mixed_5d.width)
        self.Mixed_6b = _block_c(self.Mixed_6a.width, 128)
        self.Mixed_6c = _block_c(self.Mixed_6b.width, 160)
        self.Mixed_6d = _block_c(self.Mixed_6c.width, 160)
        self.Mixed_6e = _block_c(self.Mixed_6d.width, 192)
        self.Mixed_7a = _block_d(self.Mixed_6e.width)
        self.Mixed_7b = _block_e(self.Mixed_7a.width, "average")
        self.Mixed_7c = _block_e(self.Mixed_7b.width, "max")
        self.fc = nn.Linear(POOL, LOGITS)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), exact:
            x = self.resized(images.float().clamp(0, 1).mul(255).round())
            x = (x - 128) / 128
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # the first channels of Mixed_6d are its branch1x1
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
            pooled = x.mean((2, 3))
            # In float64, because the flags above do not turn off TF32 in matrix products.
            logits = (pooled.double() @ self.fc.weight.T.double()).float()
            return torch.cat([pooled, logits, spatial], 1)

    def resized(self, pixels: Tensor) -> Tensor:
        """Resize pixels in [0, 255] to the network's input size."""
        if self.resize == "clean":
            return F.interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        return _resize_tf1(_resize_tf1(pixels, 3), 2)


def _resize_tf1(pixels: Tensor, dim: int) -> Tensor:
    """Resize one dimension to 299 as TensorFlow 1 does: output position i reads input position i * length / 299."""
    length = pixels.shape[dim]
    at = torch.arange(SIZE, dtype=torch.float32, device=pixels.device) * (length / SIZE)
    low = at.long()
    shape = [1, 1, 1, 1]
    shape[dim] = SIZE
    before, after = pixels.index_select(dim, low), pixels.index_select(dim, (low + 1).clamp(max=length - 1))
    return before + (after - before) * (at - low).view(shape)


def load_inception(source: str | None = None, resize: Resize = "tf1") -> Inception:
    """Load the network with the published weights `pt_inception-2015-12-05`.

    Args:
        source: The weights' file, or a folder or Hub repository OWNER/NAME with the file. None takes the file from
            torch's cache, which pytorch-fid and torch-fidelity share, and downloads it if it is not there.
        resize: The resize in front of the network, see `Inception`.

    Raises:
        UserError: If there is no file, or if a tensor is missing, unexpected or misshapen.
    """
    path = _find(source) if source else _cached()
    with torch.device("meta"):
        model = Inception(resize)
    load_strict(model, inception_state(read_weights(path), path), path)
    return model


def inception_state(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Convert the published state dict to the state dict of `Inception`.

    The batch norms are folded into the convolutions in float64. `source` names the file in error messages.
    """
    # Some exports contain batch counters, which affect no result.
    rest = {key: value for key, value in state.items() if not key.endswith(".num_batches_tracked")}
    ours = {}
    for key in [key for key in rest if key.endswith(".conv.weight")]:
        name = key.removesuffix(".conv.weight")
        parts = [f"{name}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if missing := [part for part in parts if part not in rest]:
            raise UserError(f"{source}: not the Inception weights of FID: missing {', '.join(missing)}")
        kernel = rest.pop(key).double()
        weight, bias, mean, variance = (rest.pop(part).double() for part in parts)
        if kernel.ndim != 4 or any(part.shape != kernel.shape[:1] for part in (weight, bias, mean, variance)):
            raise UserError(f"{source}: not the Inception weights of FID: {name} has misshapen tensors")
        scale = weight / (variance + EPS).sqrt()
        ours[f"{name}.weight"] = (kernel * scale[:, None, None, None]).float()
        ours[f"{name}.bias"] = (bias - mean * scale).float()
    return ours | rest


def _find(source: str) -> Path:
    if (path := Path(source)).is_file() or path.suffix in (".pth", ".pt", ".safetensors"):
        return path
    if not path.is_dir():
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise UserError(f"{source}: no such file or folder, and not a Hub repository OWNER/NAME")
        return find_file(source, CHECKPOINTS[0])
    if found := [path / name for name in CHECKPOINTS if (path / name).is_file()]:
        return found[0]
    raise UserError(f"{source}: contains neither {' nor '.join(CHECKPOINTS)}")


def _cached() -> Path:
    """Return the file in torch's cache; download it and check its hash if it is not there."""
    folder = Path(get_dir(), "checkpoints")
    for name in CHECKPOINTS:
        if (folder / name).is_file():
            return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download_url_to_file(URL, str(folder / CHECKPOINTS[0]), hash_prefix=HASH, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash does not match
        raise UserError(
            f"FID's Inception weights could not be fetched ({error}); "
            f"download {URL} to {folder}, or give a file that holds them as inception:FILE (--features)"
        ) from None
    return folder / CHECKPOINTS[0]
