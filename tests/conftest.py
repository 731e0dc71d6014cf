"""Fixtures for all tests."""

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import spawn

from raekit.distributed import liveness, world
from raekit.models import linear
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig, TransformerConfig
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.perceptual import LPIPS
from raekit.models.vit import ViT, ViTConfig
from tests.hub import Hub, serve

# Many tests compare exact results, which differ on a GPU. benchmarks/on_gpu.sh checks a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Return a function that runs code in several CPU processes, like `torchrun`.

    `run_ranks(function, size, *args)` calls `function(world, *args)` in `size` new processes, connected by gloo, and
    returns the results by rank. The function must be defined at the top level of its test file, and its arguments and
    results must be picklable. An exception in one process ends all processes and is raised with its traceback.
    """

    def run(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        # The parent keeps the store open on a free port, so that no other process can take the port.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        folder = tmp_path_factory.mktemp("ranks")
        spawn(_rank, (size, store.port, folder, function, args), nprocs=size)
        return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(size)]

    return run


def _rank(rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    liveness.GRACE = liveness.DEAD = 300.0  # a busy machine may stop a process for a while
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # join the store of the parent instead of starting a new one
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with world("cpu") as here:
        (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(function(here, *args)))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a source: 30 training and 9 held-out images in three classes, one colour each."""
    return write_images(tmp_path_factory.mktemp("images"), 30, 9)


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a source with 6 training images and a single held-out image."""
    return write_images(tmp_path_factory.mktemp("few"), 6, 1)


def write_images(root: Path, train: int, heldout: int) -> str:
    for split, count in (("train", train), ("val", heldout)):
        for i in range(count):
            path = root / split / ("blue", "green", "red")[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([i, count]).integers(0, 128, (18 + i % 3, 16 + i % 5, 3), dtype=np.uint8)
            pixels[..., 2 - i % 3] += 127
            Image.fromarray(pixels).save(path)
    return f"folder:{root}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model with random weights: images of 16 pixels, latents (16, 4, 4), classes blue, green and red."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    vit = ViTConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2)
    Encoder("vit", vit.spec, ViT(vit)).save(folder)
    decoder = DecoderConfig(token_dim=16, grid=(4, 4), patch_size=4, width=16, depth=1, heads=2, hidden=32)
    autoencoder = Autoencoder(AutoencoderConfig(encoder="vit", decoder=decoder), load_encoder(str(folder)))
    autoencoder.set_statistics(0.1 * torch.randn(16, 4, 4), 0.5 + torch.rand(16, 4, 4))
    autoencoder.save(folder)
    part = TransformerConfig(width=16, depth=1, heads=2)
    denoiser = Denoiser(
        DenoiserConfig(
            channels=16, grid=(4, 4), backbone=part, head=part, num_classes=3, class_names=("blue", "green", "red")
        )
    )
    for parameter in denoiser.parameters():  # a new denoiser returns zero
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser.save(folder)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small diffusers AutoencoderKL with random weights: images of 16 pixels, latents (4, 8, 8)."""
    from diffusers import AutoencoderKL  # slow to import

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    sizes: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
    }
    AutoencoderKL(**sizes, norm_num_groups=4).save_pretrained(folder)
    return folder


@pytest.fixture
def weaker(tiny_model: Path, tmp_path: Path) -> Path:
    """Write another denoiser for the autoencoder of `tiny_model`."""
    denoiser = Denoiser.load(str(tiny_model))
    torch.nn.init.normal_(denoiser.final.out.weight, std=0.1)
    denoiser.save(tmp_path / "weaker")
    return tmp_path / "weaker"


@pytest.fixture
def vgg(tmp_path) -> str:
    """Write random weights for LPIPS and return the path of the file."""
    torch.manual_seed(0)
    model = LPIPS()
    state = {name: torch.rand(value.shape) * 0.02 for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "vgg.safetensors")
    return str(tmp_path / "vgg.safetensors")


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack frozen bfloat16 weights (`raekit.models.linear`), whether or not this processor multiplies them fast."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN does not multiply bfloat16 on this processor")
    monkeypatch.setattr(linear, "NATIVE", True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount an empty file system of four MiB. The test is skipped if mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve a stand-in of the Hub, which this process takes for the Hub."""
    with serve() as stand_in:
        files = f"{stand_in.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("raekit.hub._has_network", lambda: True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield stand_in


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """`shared(path)` returns a file or folder outside the repository. The test is skipped if it does not exist."""
    root = Path(os.environ.get("RAEKIT_SHARED", Path(__file__).parents[2] / "shared"))

    def find(path: str) -> Path:
        if not (root / path).exists():
            pytest.skip(f"no {path}; RAEKIT_SHARED names the folder that holds it")
        return root / path

    return find


@pytest.fixture
def golden(shared: Callable[[str], Path]) -> Callable[[str], Path]:
    """`golden(name)` returns the path of a reference case."""
    return lambda name: shared(f"golden/{name}")
