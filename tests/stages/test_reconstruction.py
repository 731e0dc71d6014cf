import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from raekit import randomness
from raekit.config import from_dict, to_dict
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.distributed import World
from raekit.distributed.sharding import full_state
from raekit.errors import UserError
from raekit.models.augment import AugmentConfig, augment
from raekit.models.autoencoder import Autoencoder
from raekit.models.discriminator import DiscriminatorConfig, discriminator_loss
from raekit.models.encoders import Encoder, load_encoder
from raekit.models.layers import to_grid
from raekit.models.perceptual import load_perceptual
from raekit.models.registry import LayersConfig
from raekit.pictures import quantize
from raekit.progress import silent
from raekit.stages.decoder_losses import AdversarialConfig, Encoded, Losses, PerceptualConfig, noise_scales, noisy
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig, build
from raekit.stages.stage import Stage
from raekit.training.objective import Objective
from raekit.training.optim import OptimConfig
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig, Trainer

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


def first_encoded(made: Stage) -> Encoded:
    return next(made.batches(0))


def all_tokens(config: ReconstructionConfig) -> torch.Tensor:
    """Return the tokens (30, 16, 4, 4) of all training images."""
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


@pytest.mark.parametrize(("tau", "law"), [(0.0, "half-normal"), (0.8, "half-normal"), (0.8, "uniform")])
def test_the_loss_is_the_distance_of_pixels_decoded_from_noisy_tokens(config, tmp_path, tau, law):
    config = replace(config, noise=tau, noise_law=law)
    made = stage(config, tmp_path)
    objective = made.objectives[0]
    batch = first_batch(config)
    encoder = load_encoder(config.encoder)
    tokens = to_grid(encoder(batch.pixels()), (4, 4))
    scales = noise_scales(tau, law, 5, batch.positions, CPU)
    noise = randomness.normal(5, "noise", batch.positions, (16, 4, 4))
    decoded = objective.module(tokens + scales.view(-1, 1, 1, 1) * noise) * encoder.std + encoder.mean
    expected = (decoded - batch.pixels()).abs().mean()
    encoded = first_encoded(made)
    loss, metrics = objective.loss(encoded, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics == {"l1": loss}
    parts = [objective.loss(part, 3)[0].item() for part in encoded.split(2)]
    assert sum(parts) / 3 == pytest.approx(loss.item(), rel=1e-5)


def test_a_heldout_loss_has_the_noise_of_the_training(config, tmp_path):
    batch = first_encoded(stage(config, tmp_path))
    model = Autoencoder.load(config.encoder)
    losses = Losses(config, model, 5, ONE)
    assert losses.reconstruction(model.decoder, batch, 0).item() == pytest.approx(losses.decoder(batch, 0)[0].item())


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
    made.prepare(silent)
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
    # The artifact contains the encoder, because the encoder is not a public one.
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
        made.objectives[0].loss(next(iter(made.batches(0))), 0)
        assert used[-1].layers == layers
        assert used[-1].dtype == dtype
        assert not compiled  # a dry run must not compile
    made.prepare(silent)
    assert compiled == used[-1:]


def test_the_artifact_remembers_the_layers(config, tmp_path):
    layers = LayersConfig(blocks=(0,), combine="sum", token_mean=True)
    made = stage(replace(config, layers=layers), tmp_path)
    made.prepare(silent)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    loaded = Autoencoder.load(str(tmp_path))
    images = first_batch(config).pixels()
    assert torch.equal(loaded.tokens(images), to_grid(load_encoder(config.encoder, layers=layers)(images), (4, 4)))
    assert not torch.allclose(loaded.tokens(images), to_grid(load_encoder(config.encoder)(images), (4, 4)))


def test_training_latents_are_white(config, tmp_path):
    made = stage(config, tmp_path)
    made.prepare(silent)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    latents = Autoencoder.load(str(tmp_path)).encode(next(iter(Loader(config.data, 0).once(30, ONE))).pixels())
    assert latents.mean(0).abs().max() < 1e-4
    assert latents.var(0, correction=0).min() > 0.99
    assert latents.var(0, correction=0).max() < 1.01


def test_statistics_are_measured_once(config, tmp_path, monkeypatch):
    stage(config, tmp_path).prepare(silent)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]
    monkeypatch.setattr(Loader, "once", None)
    stage(config, tmp_path).prepare(silent)
    (tmp_path / "statistics.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=rf"{tmp_path / 'statistics.safetensors'}: damaged"):
        stage(config, tmp_path).prepare(silent)


def test_a_dry_build_measures_and_writes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Loader, "once", None)
    stage(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_decoder_for_another_image_size_is_refused(config, tmp_path):
    wrong = replace(config, decoder=replace(config.decoder, patch_size=8))
    with pytest.raises(UserError, match=r"decoder\.patch_size: 8 on a grid of \(4, 4\) gives .* 32 .* is 16"):
        stage(wrong, tmp_path)


def test_an_encoder_that_is_not_there_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="encoder nowhere: no such folder"):
        stage(replace(config, encoder="nowhere"), tmp_path)


def test_negative_noise_is_refused(config):
    with pytest.raises(UserError, match=r"noise: -0\.1 must not be negative"):
        replace(config, noise=-0.1)


def test_the_config_goes_through_json_strictly(config):
    values = to_dict(config)
    assert from_dict(ReconstructionConfig, values, "config.json") == config
    values["decoder"]["dept"] = 3
    with pytest.raises(UserError, match=r"config\.json: decoder\.dept: "):
        from_dict(ReconstructionConfig, values, "config.json")


# The adversarial loss: a discriminator on the encoder's features, in the decoder's loss from step 1 on


@pytest.fixture
def adversarial(config) -> ReconstructionConfig:
    return replace(
        config,
        train=replace(config.train, steps=4, log_every=1),
        adversarial=AdversarialConfig(
            discriminator=DiscriminatorConfig(backbone=config.encoder, blocks=(0,), kernel_size=3),
            optim=OptimConfig(lr=1e-3, final_lr=1e-4, decay="linear", decay_end=4),
            start=1,
        ),
    )


def parts(made: Stage) -> tuple[Objective, Objective]:
    decoder, discriminator = made.objectives
    return decoder, discriminator


def test_the_adversarial_loss_and_its_gradient(adversarial, tmp_path):
    """Compare with plain autograd; the adaptive weight is the ratio of the gradient norms at the last layer."""
    made = stage(adversarial, tmp_path)
    decoder, discriminator = parts(made)
    batch = first_encoded(made)
    network, heads = decoder.module, discriminator.module
    heads.eval()
    settings = adversarial.adversarial
    encoder = load_encoder(adversarial.encoder)
    decoded = (
        network(noisy(batch.latents, adversarial, adversarial.train.seed, batch.positions)) * encoder.std + encoder.mean
    )
    l1 = (decoded - batch.images).abs().mean()
    seen = augment(decoded, settings.augment, seed=5, stream="generator", step=1, positions=batch.positions)
    gan = -heads(seen).mean()
    last = network.get_parameter("out.weight")
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (l1, gan)]
    balance = norms[0] / (norms[1] + 1e-6)
    (l1 + 0.75 * balance.detach() * gan).backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    heads.zero_grad()

    loss, metrics = decoder.loss(batch, 1)
    loss.backward()
    assert loss.item() == pytest.approx((l1 + 0.75 * balance * gan).item(), rel=1e-5)
    assert metrics["adaptive_weight"].item() == pytest.approx(balance.item(), rel=1e-4)
    assert metrics["l1"].item() == pytest.approx(l1.item(), rel=1e-5)
    assert metrics["gan"].item() == pytest.approx(gan.item(), rel=1e-5)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in heads.parameters()), "the decoder's loss does not train the discriminator"
    before, _ = decoder.loss(batch, 0)
    assert before.item() == pytest.approx(l1.item(), rel=1e-5), "the adversarial term starts later"


def test_the_decoders_loss_makes_no_power_iteration(adversarial, tmp_path):
    made = stage(adversarial, tmp_path)
    decoder, discriminator = parts(made)
    heads = discriminator.module.train()  # as its own step leaves it
    before = [buffer.clone() for buffer in heads.buffers()]
    decoder.loss(first_encoded(made), 1)
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, heads.buffers(), strict=True))


def test_the_discriminator_tells_images_from_reconstructions_of_8_bits(adversarial, tmp_path):
    made = stage(adversarial, tmp_path)
    decoder, discriminator = parts(made)
    batch = first_encoded(made)
    heads = discriminator.module.eval()
    encoder = load_encoder(adversarial.encoder)
    with torch.no_grad():
        decoded = (decoder.module(batch.latents) * encoder.std + encoder.mean).clamp(0, 1).mul(255).round() / 255
        views = [
            augment(x, AugmentConfig(), seed=5, stream=name, step=2, positions=batch.positions)
            for x, name in ((decoded, "decoded"), (batch.images, "real"))
        ]
        fake, real = (heads(view) for view in views)
    loss, metrics = discriminator.loss(batch, 2)
    assert loss.item() == pytest.approx(((1 - real).relu().mean() + (1 + fake).relu().mean()).item() / 2, rel=1e-5)
    assert metrics["fake"].item() == pytest.approx(fake.mean().item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad is None for p in decoder.module.parameters())


def test_loss_augmentation_and_limit_are_as_configured(adversarial, tmp_path):
    """None of them has its default here."""
    settings = replace(adversarial.adversarial, loss="softplus", augment=AugmentConfig(prob=0.0), max_weight=1e-3)
    made = stage(replace(adversarial, noise=0.0, adversarial=settings), tmp_path)
    decoder, discriminator = parts(made)
    batch = first_encoded(made)
    heads = discriminator.module.eval()
    encoder = load_encoder(adversarial.encoder)
    with torch.no_grad():
        decoded = decoder.module(batch.latents) * encoder.std + encoder.mean
        real, fake = heads(batch.images), heads(quantize(decoded))
    loss, _ = discriminator.loss(batch, 2)
    assert loss.item() == pytest.approx(discriminator_loss(real, fake, "softplus").item(), rel=1e-5)
    _, metrics = decoder.loss(batch, 2)
    assert metrics["gan"].item() == pytest.approx(-heads(decoded).mean().item(), rel=1e-4, abs=1e-6)
    assert metrics["adaptive_weight"].item() == pytest.approx(1e-3)


@pytest.mark.parametrize(("schedule", "last"), [("published", 1e-3 - 0.9e-3 / 4), ("common", 1e-3 - 0.9e-3 * 3 / 4)])
def test_the_schedule_of_the_discriminator(adversarial, tmp_path, schedule, last):
    settings = replace(adversarial.adversarial, schedule=schedule, discriminator_start=2, start=3)
    config = replace(adversarial, adversarial=settings)
    made = stage(config, tmp_path)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    records = read_metrics(tmp_path)
    assert records[-1]["discriminator/lr"] == pytest.approx(last)
    assert ["discriminator/loss" in record for record in records] == [False, False, True, True]
    assert ["decoder/gan" in record for record in records] == [False, False, False, True]


def test_the_decoder_may_not_hear_an_untrained_discriminator(adversarial):
    with pytest.raises(UserError, match=r"adversarial\.start: 1 is before discriminator_start = 2"):
        replace(adversarial.adversarial, discriminator_start=2)


def test_only_heads_are_trained_and_saved(adversarial, tmp_path):
    made = stage(adversarial, tmp_path)
    Trainer(tmp_path, adversarial.train, made.objectives, made.batches, ONE).fit()
    saved = FileSystemReader(tmp_path / "checkpoints" / "step-00000004").read_metadata().state_dict_metadata
    names = {name.split(".")[2] for name in saved if name.startswith("discriminator.module.")}
    assert names == {"heads"}


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_each_image_is_encoded_once_for_both_objectives(adversarial, tmp_path, monkeypatch, micro_batch):
    seen = []
    tokens = Autoencoder.tokens
    monkeypatch.setattr(Autoencoder, "tokens", lambda self, images: seen.append(len(images)) or tokens(self, images))
    config = replace(adversarial, train=replace(adversarial.train, micro_batch=micro_batch))
    made = stage(config, tmp_path)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    # One image more at the start, and when the discriminator joins, to count the FLOPs.
    assert sum(seen) == 4 * 6 + 2
    assert max(seen) == (micro_batch or 6)


def test_lpips_joins_the_loss_at_its_start(config, tmp_path, vgg):
    config = replace(config, perceptual=PerceptualConfig(weight=2.0, start=1, weights=vgg))
    made = stage(config, tmp_path)
    batch = first_encoded(made)
    before, _ = made.objectives[0].loss(batch, 0)
    loss, metrics = made.objectives[0].loss(batch, 1)
    encoder = load_encoder(config.encoder)
    decoded = (
        made.objectives[0].module(noisy(batch.latents, config, config.train.seed, batch.positions)) * encoder.std
        + encoder.mean
    )
    distance = load_perceptual(vgg)(decoded, batch.images).mean()
    assert distance.item() > 0
    assert loss.item() == pytest.approx(before.item() + 2 * distance.item(), rel=1e-5)
    assert metrics["lpips"].item() == pytest.approx(distance.item(), rel=1e-5)
    made.objectives[0].loss(batch, 1)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.objectives[0].module.parameters())


def train_whole(world: World, config: ReconstructionConfig, run: Path) -> dict[str, torch.Tensor]:
    """Train and return the weights of both networks."""
    torch.manual_seed(0)
    made = build(config, run, world)
    Trainer(run, config.train, made.objectives, made.batches, world).fit()
    return {
        f"{objective.name} {name}": full_state(objective.module)[name].cpu()
        for objective in made.objectives
        for name in full_state(objective.module)
    }


@pytest.mark.parametrize("local", [False, True])
def test_two_processes_train_the_same_discriminator_and_decoder_as_one(adversarial, tmp_path, run_ranks, local):
    config = replace(
        adversarial,
        train=replace(adversarial.train, steps=20),
        adversarial=replace(adversarial.adversarial, local_weight=local),
    )
    one = train_whole(ONE, config, tmp_path / "one")
    first, second = run_ranks(train_whole, 2, config, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = {
        *("decoder/loss", "decoder/l1", "decoder/gan", "decoder/adaptive_weight"),
        *("discriminator/loss", "discriminator/real", "discriminator/fake"),
    }
    losses = [
        [{name: record[name] for name in names & record.keys()} for record in read_metrics(tmp_path / run)]
        for run in ("one", "two")
    ]
    assert set().union(*losses[0]) == names
    if local:
        assert [each["decoder/loss"] for each in losses[0]] != pytest.approx(
            [each["decoder/loss"] for each in losses[1]], rel=1e-3
        )
        return
    for one_record, two_record in zip(*losses, strict=True):
        for name, value in one_record.items():  # the logits are means of positive and negative numbers
            logits = name in ("discriminator/real", "discriminator/fake")
            assert two_record[name] == pytest.approx(value, rel=1e-5, abs=1e-5 if logits else 0), name
    for name, value in one.items():
        found = first[name]
        # The gradient of a key bias, or of a bias before a norm, is only rounding, which Adam scales up.
        if name.endswith((".first.0.bias", ".residual.0.bias")):
            continue
        if name.endswith("qkv.bias"):
            found, value = (torch.cat([x[:16], x[32:]]) for x in (found, value))
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
