import math
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from raekit import randomness
from raekit.config import from_dict, to_dict
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.distributed import World
from raekit.errors import UserError
from raekit.models.autoencoder import Autoencoder
from raekit.models.encoders import Encoder, LayersConfig, load_encoder
from raekit.models.layers import to_grid
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig, build, noise_scales
from raekit.train.optim import OptimConfig
from raekit.train.trainer import TrainConfig, Trainer

ONE, CPU = World(), torch.device("cpu")


@pytest.fixture
def config(images, tiny_model) -> ReconstructionConfig:
    return ReconstructionConfig(
        data=DataConfig(source=images, image_size=16),
        encoder=str(tiny_model),
        decoder=DecoderSize(width=16, depth=1, heads=2, hidden=32, patch_size=4),
        train=TrainConfig(steps=3, batch_size=6, precision="fp32", seed=5),
        optim=OptimConfig(lr=1e-3),
        ema=(0.5,),
    )


def stage(config: ReconstructionConfig, tmp_path):
    torch.manual_seed(0)
    return build(config, tmp_path, ONE)


def first_batch(config: ReconstructionConfig) -> Batch:
    return next(Loader(config.data, config.train.seed).stream(0, config.train.batch_size, ONE))


def all_tokens(config: ReconstructionConfig) -> torch.Tensor:
    """The tokens (30, 16, 4, 4) of all training images."""
    encoder = load_encoder(config.encoder)
    batches = Loader(config.data, 0).once(30, ONE)
    return to_grid(encoder(next(iter(batches)).pixels()), (4, 4))


def test_noise_scales_follow_their_laws():
    positions = torch.arange(4000)
    half_normal = noise_scales(0.8, "half-normal", 0, positions, CPU)
    uniform = noise_scales(0.8, "uniform", 0, positions, CPU)
    assert half_normal.shape == uniform.shape == (4000,)
    assert half_normal.min() >= 0
    assert half_normal.square().mean().sqrt() == pytest.approx(0.8, rel=0.05)
    assert half_normal.mean() == pytest.approx(0.8 * math.sqrt(2 / math.pi), rel=0.05)
    assert uniform.min() >= 0
    assert 0.79 < uniform.max() < 0.8
    assert uniform.mean() == pytest.approx(0.4, rel=0.05)
    for law, scales in (("half-normal", half_normal), ("uniform", uniform)):
        assert torch.equal(noise_scales(0.8, law, 0, positions[7:9], CPU), scales[7:9])  # type: ignore[arg-type]


@pytest.mark.parametrize("tau", [0.0, 0.8])
def test_the_loss_is_the_distance_of_pixels_decoded_from_noisy_tokens(config, tmp_path, tau):
    config = replace(config, noise=tau)
    objective = stage(config, tmp_path).objectives[0]
    batch = first_batch(config)
    encoder = load_encoder(config.encoder)
    tokens = to_grid(encoder(batch.pixels()), (4, 4))
    scales = noise_scales(tau, "half-normal", 5, batch.positions, CPU)
    noise = randomness.normal(5, "noise", batch.positions, (16, 4, 4))
    decoded = objective.module(tokens + scales.view(-1, 1, 1, 1) * noise) * encoder.std + encoder.mean
    expected = (decoded - batch.pixels()).abs().mean()
    loss, metrics = objective.loss(batch, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics == {}
    parts = [objective.loss(part, 3)[0].item() for part in batch.split(2)]
    assert sum(parts) / 3 == pytest.approx(loss.item(), rel=1e-5)


def test_only_the_decoder_is_trained(config, tmp_path):
    made = stage(config, tmp_path)
    before = [p.detach().clone() for p in made.objectives[0].module.parameters()]
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    after = list(made.objectives[0].module.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [o.name for o in made.objectives] == ["decoder"]
    saved = FileSystemReader(tmp_path / "checkpoints" / "step-00000003").read_metadata().state_dict_metadata
    assert "decoder.module.out.weight" in saved
    assert not [name for name in saved if not name.startswith(("trainer.", "decoder."))], "no encoder in it"


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_size", [6, 7])
def test_the_artifact_holds_the_averages_and_the_exact_statistics(config, tmp_path, flip, batch_size):
    config = replace(
        config,
        data=replace(config.data, flip=flip, crop="random"),
        train=replace(config.train, batch_size=batch_size),
    )
    made = stage(config, tmp_path)
    made.prepare()
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    loaded = Autoencoder.load(str(tmp_path))

    tokens = all_tokens(config)
    if flip:
        encoder = load_encoder(config.encoder)
        images = next(iter(Loader(config.data, 0).once(30, ONE))).pixels()
        tokens = torch.cat([tokens, to_grid(encoder(images.flip(-1)), (4, 4))])
    values = tokens.double().numpy()
    assert loaded.mean is not None
    assert loaded.mean.numpy() == pytest.approx(values.mean(0), abs=1e-6)
    assert loaded.var.numpy() == pytest.approx(values.var(0), abs=1e-6)
    averaged = made.objectives[0].averaged
    assert all(torch.equal(a, b) for a, b in zip(loaded.decoder.parameters(), averaged.parameters(), strict=True))
    # The encoder travels along, for it is no public one.
    assert sorted(path.name for path in (tmp_path / "artifact").iterdir()) == ["autoencoder", "encoder"]
    images = first_batch(config).pixels()
    assert torch.equal(loaded.tokens(images), to_grid(load_encoder(config.encoder)(images), (4, 4)))


def test_the_encoder_follows_the_configuration(config, tmp_path, monkeypatch):
    used, compiled = [], []
    monkeypatch.setattr(Encoder, "forward", lambda self, images: used.append(self) or torch.zeros(len(images), 16, 16))
    monkeypatch.setattr(Encoder, "compile", lambda self: compiled.append(self))
    layers = LayersConfig(blocks=(0,), token_mean=True)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        train = replace(config.train, precision=precision, compile=precision == "bf16")
        made = stage(replace(config, layers=layers, train=train), tmp_path / precision)
        made.objectives[0].loss(first_batch(config), 0)
        assert used[-1].layers == layers
        assert used[-1].dtype == dtype
        assert not compiled  # which a dry run would not want
    made.prepare()
    assert compiled == used[-1:]


def test_the_artifact_remembers_the_layers(config, tmp_path):
    layers = LayersConfig(blocks=(0,), combine="sum", token_mean=True)
    made = stage(replace(config, layers=layers), tmp_path)
    made.prepare()
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    loaded = Autoencoder.load(str(tmp_path))
    images = first_batch(config).pixels()
    assert torch.equal(loaded.tokens(images), to_grid(load_encoder(config.encoder, layers=layers)(images), (4, 4)))
    assert not torch.allclose(loaded.tokens(images), to_grid(load_encoder(config.encoder)(images), (4, 4)))


def test_training_latents_are_white(config, tmp_path):
    made = stage(config, tmp_path)
    made.prepare()
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    latents = Autoencoder.load(str(tmp_path)).encode(next(iter(Loader(config.data, 0).once(30, ONE))).pixels())
    assert latents.mean(0).abs().max() < 1e-4
    assert latents.var(0, correction=0).min() > 0.99
    assert latents.var(0, correction=0).max() < 1.01


def test_statistics_are_measured_once(config, tmp_path, monkeypatch):
    stage(config, tmp_path).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]
    monkeypatch.setattr(Loader, "once", None)
    stage(config, tmp_path).prepare()
    (tmp_path / "statistics.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=rf"{tmp_path / 'statistics.safetensors'}: damaged"):
        stage(config, tmp_path).prepare()


def test_a_dry_build_measures_and_writes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Loader, "once", None)
    stage(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_decoder_for_another_image_size_is_refused(config, tmp_path):
    wrong = replace(config, decoder=replace(config.decoder, patch_size=8))
    with pytest.raises(UserError, match=r"decoder\.patch_size: 8 over a grid of \(4, 4\) gives .* 32 .* is 16"):
        stage(wrong, tmp_path)


def test_an_encoder_that_is_not_there_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="encoder nowhere: no such folder"):
        stage(replace(config, encoder="nowhere"), tmp_path)


def test_negative_noise_is_refused(config):
    with pytest.raises(UserError, match=r"noise: -0\.1 is negative"):
        replace(config, noise=-0.1)


def test_the_config_goes_through_json_strictly(config):
    values = to_dict(config)
    assert from_dict(ReconstructionConfig, values, "config.json") == config
    values["decoder"]["dept"] = 3
    with pytest.raises(UserError, match=r"config\.json: decoder\.dept: "):
        from_dict(ReconstructionConfig, values, "config.json")
