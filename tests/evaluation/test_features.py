from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import raekit.evaluation.features
from raekit.data.loader import Batch
from raekit.evaluation.features import ClassifierFeatures, EncoderFeatures, Images, InceptionFeatures, load_networks
from raekit.models.classifier import Classifier, ClassifierConfig
from raekit.models.encoders import Encoder
from raekit.models.inception import Inception
from raekit.models.perceptual import LPIPS
from raekit.models.registry import EncoderSpec, LayersConfig, Size, sides
from raekit.pictures import quantize


class FakeEncoder(nn.Module):
    """Tokens (B, 4, 5): a linear map of the mean colours of the four quadrants."""

    def __init__(self, name: str, input_size: Size, layers: LayersConfig | None):
        super().__init__()
        self.name, self.input_size, self.layers = name, sides(input_size), layers or LayersConfig()
        self.spec = EncoderSpec(
            family="vit", width=5, patch_size=8, image_size=16, prefix_tokens=0, mean=(0, 0, 0), std=(1, 1, 1)
        )
        self.linear = nn.Linear(3, 5)
        self.shapes: list[Any] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        assert images.min() >= 0
        assert images.max() <= 1
        return self.linear(nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2))


def network(
    name: str = "vit-tiny", input_size: Size = 16, layers: LayersConfig | None = None
) -> tuple[EncoderFeatures, FakeEncoder]:
    encoder = FakeEncoder(name, input_size, layers)
    return EncoderFeatures(cast(Encoder, encoder)), encoder


def test_features_are_the_mean_over_tokens():
    features, encoder = network()
    images = torch.rand(3, 3, 16, 16)
    result = features(images)
    assert result.shape == (3, features.width)
    assert not result.requires_grad
    torch.testing.assert_close(result, encoder.linear(images.mean((2, 3))))


def test_other_sizes_are_resized_without_aliasing():
    features, encoder = network()
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 1
    torch.testing.assert_close(features(stripes), encoder.linear(torch.full((1, 3), 0.5)), atol=1e-3, rtol=0)
    assert encoder.shapes == [(1, 3, 16, 16)]
    features, encoder = network(input_size=(16, 24))
    features(stripes)
    assert encoder.shapes == [(1, 3, 16, 24)]


def test_features_stay_float32_under_autocast():
    classifier = Classifier(ClassifierConfig(image_size=16, num_classes=2, widths=(8, 8)))
    for features in (network()[0], ClassifierFeatures("classifier", classifier)):
        images = torch.rand(2, 3, 16, 16)
        exact = features(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(features(images), exact)


def test_names_say_which_encoder(tmp_path):
    folder = tmp_path / "my.encoder-2"
    names = {
        "vit-tiny": "vit_tiny",
        "builtin:vit-tiny": "vit_tiny",
        "someone/their--model": "someone_their_model",
        str(folder): "my_encoder_2",
        f"{folder}/": "my_encoder_2",
        f"dinov2:{folder}": "my_encoder_2",
        "vit:someone/theirs": "someone_theirs",
    }
    assert {name: network(name)[0].name for name in names} == names
    assert network("vit-tiny", input_size=32)[0].name == "vit_tiny_32"
    assert network("vit-tiny", input_size=(32, 24))[0].name == "vit_tiny_32_24"
    assert network("vit-tiny", layers=LayersConfig(blocks=(9,)))[0].name == "vit_tiny_blocks_9"
    several = LayersConfig(blocks=(1, 3), combine="sum", token_mean=True)
    assert network("vit-tiny", layers=several)[0].name == "vit_tiny_sum_of_blocks_1_3_with_token_mean"


def test_a_relative_folder_is_named_by_its_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert network("runs/first")[0].name == "first"


def test_quantize_rounds_to_the_levels_that_files_have():
    levels = torch.arange(256, dtype=torch.uint8)
    loaded = Batch(levels.expand(1, 3, 1, 256), torch.zeros(1).long(), torch.zeros(1).long()).pixels()
    assert torch.equal(quantize(loaded), loaded)
    assert torch.equal(quantize(loaded + 0.49 / 255), loaded)
    assert torch.equal(quantize(torch.tensor([-0.2, 1.3, 0.6 / 255])), torch.tensor([0, 1, 1 / 255]))


def test_images_are_rounded_and_their_features_computed_once():
    features, encoder = network()
    raw = torch.rand(2, 3, 16, 16)
    batch = Images(raw, torch.zeros(2).long(), torch.arange(2), raw)
    assert len(batch) == 2
    assert torch.equal(batch.images, quantize(raw))
    assert batch.originals is not None
    assert torch.equal(batch.originals, batch.images)
    assert batch.features(features) is batch.features(features)
    assert len(encoder.shapes) == 1
    batch.features(network()[0])
    assert len(encoder.shapes) == 1


@pytest.mark.parametrize(
    ("shape", "labels", "indices", "originals", "dtype"),
    [
        ((2, 1, 8, 8), 2, 2, None, torch.float32),
        ((2, 3, 8, 8), 2, 2, None, torch.uint8),
        ((2, 3, 8, 8), 3, 2, None, torch.float32),
        ((2, 3, 8, 8), 2, 1, None, torch.float32),
        ((2, 3, 8, 8), 2, 2, (2, 3, 4, 4), torch.float32),
    ],
)
def test_malformed_batches_are_rejected(shape, labels, indices, originals, dtype):
    with pytest.raises(ValueError, match="images"):
        Images(
            torch.zeros(shape, dtype=dtype),
            torch.zeros(labels).long(),
            torch.arange(indices),
            None if originals is None else torch.zeros(originals),
        )


class FakeInception:
    """Features that contain their own column number. `calls` counts the passes."""

    resize = "tf1"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return torch.arange(2048 + 1008 + 2023).float().expand(len(images), -1)


def test_a_batch_of_stored_features_has_no_images():
    features, _ = network()
    batch = Images.gone({features: torch.ones(2, 3)}, torch.zeros(2), torch.arange(2))
    assert len(batch) == 2
    assert torch.equal(batch.features(features), torch.ones(2, 3))
    with pytest.raises(ValueError, match="stored features and no images"):
        _ = batch.images
    assert not hasattr(batch, "other")


def test_the_parts_of_inception_share_one_pass():
    inception = FakeInception()
    features = InceptionFeatures(cast(Inception, inception))
    parts = (features.pool, features.logits, features.spatial)
    batch = Images(torch.rand(2, 3, 8, 8), torch.zeros(2).long(), torch.arange(2))
    found = [batch.features(part) for part in parts]
    assert inception.calls == 1
    assert torch.equal(torch.cat(found, 1), features(batch.images))
    assert [part.width for part in parts] == [2048, 1008, 2023]
    assert [part.name for part in parts] == ["inception", "inception_logits", "inception_spatial"]
    assert torch.equal(features.spatial(batch.images), found[2])


def test_networks_by_name(monkeypatch):
    sources = []

    def load(source: str | None, resize: str) -> torch.nn.Module:
        sources.append((source, resize))
        with torch.device("meta"):
            return Inception(cast(Any, resize))

    monkeypatch.setattr(raekit.evaluation.features, "load_inception", load)
    device = torch.device("meta")
    assert list(load_networks("inception", device)) == ["inception", "inception_spatial"]
    assert list(load_networks("clean_inception:a/b.pth", device)) == ["clean_inception", "clean_inception_spatial"]
    assert sources == [(None, "tf1"), ("a/b.pth", "clean")]
    networks = load_networks("builtin:vit-tiny", torch.device("cpu"))
    assert {name: network.width for name, network in networks.items()} == {"vit_tiny": 192}


def test_vgg16_features_are_means_of_two_layers(monkeypatch):
    torch.manual_seed(0)
    lpips = LPIPS()
    monkeypatch.setattr(raekit.evaluation.features, "load_perceptual", lambda place: lpips)
    [(name, features)] = load_networks("vgg16:some.safetensors", torch.device("cpu")).items()
    images = torch.rand(2, 3, 128, 128)
    x = (2 * images - 1 - lpips.mean) / lpips.std
    expected = []
    for index, layer in enumerate(lpips.features):
        x = layer(x)
        if index in (15, 29):  # the ReLU after conv3_3 and after conv5_3
            expected.append(x.mean((2, 3)))
    assert name == features.name == "vgg16"
    assert features.width == 768
    torch.testing.assert_close(features(images), torch.cat(expected, 1))
    small = torch.rand(1, 3, 32, 32)
    resized = nn.functional.interpolate(small, 128, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(features(small), features(resized))


def test_an_encoder_runs_at_a_given_size():
    [(name, features)] = load_networks("builtin:vit-tiny@32", torch.device("cpu")).items()
    assert name == "vit_tiny_32"
    assert features.resize == "bicubic, antialiased, to 32 x 32"
    assert features(torch.rand(1, 3, 64, 64)).shape == (1, features.width)
