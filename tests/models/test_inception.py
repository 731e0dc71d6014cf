from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from raekit.errors import UserError
from raekit.models import inception
from raekit.models.inception import LOGITS, POOL, SPATIAL, Inception, inception_state, load_inception
from raekit.weights import load_strict


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Make random weights under the published names."""
    with torch.device("meta"):
        wanted = Inception().state_dict()
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for key, value in wanted.items():
        layer, _, kind = key.rpartition(".")
        if layer == "fc":
            state[key] = torch.randn(value.shape, generator=generator) / 50
        elif kind == "weight":
            fan_in = value[0].numel()
            state[f"{layer}.conv.weight"] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
            for part in ("weight", "bias", "running_mean", "running_var"):
                spread = 0.1 * torch.rand(len(value), generator=generator)
                state[f"{layer}.bn.{part}"] = spread + (part in ("weight", "running_var"))
    return state


@pytest.fixture(scope="module")
def network(published: dict[str, Tensor]) -> Inception:
    with torch.device("meta"):
        model = Inception()
    load_strict(model, inception_state(published, "test"), "test")
    return model


def test_features_are_those_of_the_rounded_images_in_full_precision(network: Inception):
    images = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    features = network(images)
    assert features.shape == (1, POOL + LOGITS + SPATIAL)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(images + 0.4 / 255), features)
    pool, logits, spatial = features.split([POOL, LOGITS, SPATIAL], 1)
    torch.testing.assert_close(logits, pool @ network.fc.weight.T)
    assert spatial.min() == 0 < spatial.max()


def test_batch_norms_are_folded_in(published: dict[str, Tensor], network: Inception):
    name = "Mixed_5b.branch5x5_2"
    x = torch.randn(2, 48, 6, 7)
    mean, variance, weight, bias = (
        published[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
    )
    convolved = F.conv2d(x, published[f"{name}.conv.weight"], padding=2)
    expected = F.batch_norm(convolved, mean, variance, weight, bias, eps=1e-3).relu()
    torch.testing.assert_close(network.get_submodule(name)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 299, 400])
def test_the_resize_of_tensorflow_1(length: int):
    row = torch.randn(1, 1, 1, length)
    values = row.flatten().tolist()
    expected = []
    for i in range(299):
        at = i * length / 299
        low = int(at)
        high = min(low + 1, length - 1)
        expected.append(values[low] + (values[high] - values[low]) * (at - low))
    torch.testing.assert_close(inception._resize_tf1(row, 3).flatten().tolist(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(inception._resize_tf1(row.mT, 2), inception._resize_tf1(row, 3).mT)


@pytest.mark.parametrize("side", [64, 500])
def test_the_clean_resize_is_that_of_pillow(side: int):
    pixels = torch.rand(1, 3, side, side).mul(255).round()
    pixels[..., :10] = 255  # bicubic overshoots here, and the values are clipped
    with torch.device("meta"):
        model = Inception("clean")
    bicubic = Image.Resampling.BICUBIC
    expected = [np.asarray(Image.fromarray(channel.numpy()).resize((299, 299), bicubic)) for channel in pixels[0]]
    np.testing.assert_allclose(model.resized(pixels)[0].numpy(), np.stack(expected).clip(0, 255), rtol=0, atol=0.01)


def test_the_published_file_is_found_and_read_strictly(
    published: dict[str, Tensor], network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "elsewhere" / inception.CHECKPOINTS[1]
    file.parent.mkdir()
    file.write_bytes(b"weights")
    monkeypatch.setattr(inception, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URL", file.as_uri())
    # The content does not match the hash in the name.
    with pytest.raises(UserError, match=r"could not be fetched.*download file:.* to .*checkpoints"):
        load_inception()
    monkeypatch.setattr(inception, "HASH", "")
    cached = inception._cached()
    assert cached == tmp_path / "hub" / "checkpoints" / inception.CHECKPOINTS[0]
    assert cached.read_bytes() == b"weights"
    torch.save(published | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(1)}, cached)
    monkeypatch.setattr(inception, "URL", "file:///nowhere")
    model = load_inception()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network.parameters(), strict=True))
    assert inception._find(str(file)) == inception._find(str(file.parent)) == file
    with pytest.raises(UserError, match=r"nothing\.pth: no such file"):
        load_inception(str(tmp_path / "nothing.pth"))
    with pytest.raises(UserError, match="contains neither pt_inception"):
        load_inception(str(tmp_path))
    with pytest.raises(UserError, match="no/such/folder: no such file or folder"):
        load_inception("no/such/folder")
    monkeypatch.setattr(inception, "find_file", lambda repository, name: Path("hub", repository, name))
    assert inception._find("owner/name") == Path("hub/owner/name", inception.CHECKPOINTS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_6e.branch_pool.bn.running_var"), "missing Mixed_6e.branch_pool.bn.running_var"),
        (lambda s: s.pop("Mixed_6e.branch_pool.conv.weight"), "unexpected Mixed_6e.branch_pool.bn.bias"),
        (lambda s: s.pop("fc.bias"), "missing fc.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), r"fc.weight is \(1000, 2048\)"),
        (lambda s: s.update({"Mixed_5b.branch1x1.bn.bias": torch.zeros(3)}), "Mixed_5b.branch1x1 has misshapen"),
        (lambda s: s.update({"Mixed_5b.branch1x1.conv.weight": torch.tensor(1.0)}), "Mixed_5b.branch1x1 has misshapen"),
    ],
)
def test_other_weights_are_refused(published: dict[str, Tensor], change, message: str):
    state = dict(published)
    change(state)
    with torch.device("meta"):
        model = Inception()
    with pytest.raises(UserError, match=message):
        load_strict(model, inception_state(state, "file"), "file")
