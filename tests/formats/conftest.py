"""Fixtures: a small encoder for every registered name, and a folder that stands in for the Hub."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from raekit.formats import decoder_files as autoencoders
from raekit.formats import guesses as guesses
from raekit.formats import releases as releases
from raekit.models.registry import REGISTRY, EncoderSpec

# The size of a small published decoder. The small encoder gives it 2 x 2 tokens of 64 channels.
SIZES: dict[str, Any] = {"width": 24, "depth": 2, "heads": 3, "hidden": 40}


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DINOv2 with registers, one block and 64 channels, saved in the format of the Hub."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=518, patch_size=14
    )
    folder = tmp_path_factory.mktemp("encoder")
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(encoder_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every registered encoder by the small one, and the published decoder sizes by `ViT-tiny`."""
    for name, spec in list(REGISTRY.items()):
        monkeypatch.setitem(REGISTRY, name, tiny_spec(encoder_folder, spec))
    monkeypatch.setattr(autoencoders, "DECODERS", {"ViT-tiny": SIZES})
    monkeypatch.setattr(guesses, "DECODERS", {"ViT-tiny": SIZES})


def tiny_spec(folder: str, like: EncoderSpec) -> EncoderSpec:
    return EncoderSpec(
        family="dinov2_with_registers",
        width=64,
        patch_size=14,
        image_size=28,
        prefix_tokens=5,
        mean=like.mean,
        std=like.std,
        hub_id=folder,
    )


class Hub:
    """A stand-in for the Hub: serves files from a folder, and records the requests in `asked`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.down = False

    def __call__(self, repository: str, filename: str, **options: object) -> str:
        self.asked.append(f"{repository}/{filename}")
        if self.down:
            raise LocalEntryNotFoundError("no network")
        return str(self.root / repository / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    monkeypatch.setenv("RAEKIT_CACHE", str(tmp_path / "cache"))
    return hub
