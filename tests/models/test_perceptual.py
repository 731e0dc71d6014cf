from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from raekit.errors import UserError
from raekit.models.perceptual import HEADS, LPIPS, VGG_CHECKPOINT, load_perceptual

State = dict[str, Tensor]
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def vgg() -> State:
    """Make random convolutions under torchvision's names."""
    torch.manual_seed(0)
    state, channels = {}, 3
    for layer, width in zip(CONVOLUTIONS, (64, 64, 128, 128, *[256] * 3, *[512] * 6), strict=True):
        state[f"features.{layer}.weight"] = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
        state[f"features.{layer}.bias"] = 0.1 * torch.randn(width)
        channels = width
    return state


@pytest.fixture(scope="module")
def heads() -> State:
    return {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}


@pytest.fixture(scope="module")
def file(vgg: State, heads: State, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(vgg | heads, path)
    return str(path)


def distance(a: Tensor, b: Tensor, state: State) -> Tensor:
    """Compute LPIPS by its definition in float64, for images in [0, 1]."""
    shift, scale = (torch.tensor(v).double()[:, None, None] for v in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    x = ((torch.cat([a, b]).double() * 2 - 1) - shift) / scale
    total = torch.zeros(len(a)).double()
    stage = 0
    for layer in CONVOLUTIONS:
        x = F.conv2d(x, state[f"features.{layer}.weight"].double(), state[f"features.{layer}.bias"].double(), padding=1)
        x = x.relu()
        if layer in (2, 7, 14, 21, 28):
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[: len(a)] - unit[len(a) :]).square()
            total += (difference * state[f"lin{stage}.model.1.weight"].double()).sum(1).mean((1, 2))
            x, stage = F.max_pool2d(x, 2), stage + 1
    return total.float()


def test_the_distance_is_that_of_the_definition(file: str, vgg: State, heads: State):
    a, b = torch.rand(2, 2, 3, 40, 33)
    torch.testing.assert_close(load_perceptual(file)(a, b), distance(a, b, vgg | heads), rtol=1e-4, atol=0)


def test_it_is_a_frozen_distance(file: str):
    model = load_perceptual(file).train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    a, b = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16)
    a[2] = b[2]
    there, back = model(a, b), model(b, a)
    assert there.shape == (3,)
    assert torch.equal(there, back)
    assert there[2] == 0
    assert (there[:2] > 0).all()
    assert torch.allclose(model(a[1:2], b[1:2]), there[1:2], rtol=1e-5)


def test_gradients_reach_the_images_alone(file: str):
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    model = load_perceptual(file)
    model(images, torch.rand(1, 3, 16, 16)).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_is_finite_where_no_channel_is_active(vgg: State, tmp_path: Path):
    save_file(vgg | {"features.28.bias": torch.full((512,), -1e3)}, tmp_path / "vgg.safetensors")
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    load_perceptual(str(tmp_path / "vgg.safetensors"))(images, torch.rand(1, 3, 16, 16)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0


def test_under_autocast_the_distance_stays_float32(file: str):
    model, a, b = load_perceptual(file), torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(a, b)
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, model(a, b), rtol=0.05)
    assert not torch.equal(rough, model(a, b))


def assert_holds(model: LPIPS, vgg: State, heads: State) -> None:
    state = model.state_dict()
    assert state.keys() == vgg.keys() | {f"lin{i}" for i in range(5)}
    assert all(torch.equal(state[key], vgg[key]) for key in vgg)
    assert all(torch.equal(state[f"lin{i}"], heads[f"lin{i}.model.1.weight"]) for i in range(5))


def test_a_file_with_heads_gives_its_own(file: str, vgg: State, heads: State):
    assert_holds(load_perceptual(file), vgg, heads)


def test_the_package_has_the_released_heads():
    released = load_file(HEADS)
    assert sum(value.numel() for value in released.values()) == 1472
    assert all((value >= 0).all() for value in released.values())
    sums = [released[f"lin{i}.model.1.weight"].sum().item() for i in range(5)]
    assert sums == pytest.approx([6.926, 8.8583, 17.515, 51.5213, 47.0349], abs=1e-3)  # sums in the released file


def test_torchvisions_checkpoint_and_cache(vgg: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    classifier = {"classifier.0.weight": torch.zeros(2, 3), "classifier.6.bias": torch.zeros(2)}
    path = tmp_path / "hub" / "checkpoints" / VGG_CHECKPOINT
    path.parent.mkdir(parents=True)
    torch.save(vgg | classifier, path)
    released = load_file(HEADS)
    assert_holds(load_perceptual(str(path)), vgg, released)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert_holds(load_perceptual(), vgg, released)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide an empty Hub cache and an empty torchvision cache, without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


def test_the_hubs_copy(vgg: State, offline: Path):
    commit = "0" * 40
    folder = offline / "models--timm--vgg16.tv_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    extra = {"pre_logits.fc1.weight": torch.zeros(2), "head.fc.bias": torch.zeros(2)}
    save_file(vgg | extra, folder / "snapshots" / commit / "model.safetensors")
    assert_holds(load_perceptual(), vgg, load_file(HEADS))


def test_without_weights_the_error_says_what_to_download_and_where_to_put_it(offline: Path):
    with pytest.raises(UserError) as caught:
        load_perceptual()
    message = str(caught.value)
    assert f"https://download.pytorch.org/models/{VGG_CHECKPOINT}" in message
    assert str(offline.parent / "torch" / "hub" / "checkpoints" / VGG_CHECKPOINT) in message
    assert "hf download timm/vgg16.tv_in1k model.safetensors" in message
    assert "\n" not in message


def test_every_fault_of_a_file_is_named(vgg: State, heads: State, tmp_path: Path):
    state = vgg | heads | {"features.30.weight": torch.zeros(1), "lin3.model.1.weight": torch.zeros(1, 256, 1, 1)}
    del state["features.28.bias"]
    path = tmp_path / "vgg.safetensors"
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        load_perceptual(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for fault in (
        "missing features.28.bias",
        "unexpected features.30.weight",
        "lin3 is (1, 256, 1, 1), expected (1, 512, 1, 1)",
    ):
        assert fault in message


def test_a_file_with_some_of_the_heads_is_refused(vgg: State, heads: State, tmp_path: Path):
    some = {key: value for key, value in heads.items() if "lin2" not in key}
    save_file(vgg | some, tmp_path / "vgg.safetensors")
    with pytest.raises(UserError, match="missing lin2"):
        load_perceptual(str(tmp_path / "vgg.safetensors"))


def test_an_absent_file():
    with pytest.raises(UserError, match=r"nowhere/vgg\.pth: no such file"):
        load_perceptual("nowhere/vgg.pth")
