import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raekit import randomness
from raekit.config import from_dict, to_dict
from raekit.data import sources
from raekit.data.loader import Batch, DataConfig, Loader
from raekit.data.sources import FORMATS
from raekit.distributed import World
from raekit.errors import UserError
from raekit.flow import path
from raekit.flow.sampling import Sampling
from raekit.formats.conversion import convert
from raekit.inference.cache import cache_latents
from raekit.inference.generation import generate
from raekit.inference.model import load
from raekit.models.autoencoder import Autoencoder
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import ContextConfig, TransformerConfig
from raekit.models.encoders import Encoder
from raekit.progress import silent
from raekit.stages.generation import DenoiserSize, GenerationConfig, build, flow_matching_loss
from raekit.stages.inspection import describe_folder
from raekit.stages.watch import HeldoutConfig
from raekit.training.optim import OptimConfig, by_muon
from raekit.training.recompute import checkpoint_blocks
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig, Trainer

ONE = World()
PART = TransformerConfig(width=16, depth=1, heads=2)


@pytest.fixture
def config(images, tiny_model) -> GenerationConfig:
    return GenerationConfig(
        data=DataConfig(source=images, image_size=16),
        autoencoder=str(tiny_model),
        denoiser=DenoiserSize(backbone=PART, head=PART),
        train=TrainConfig(steps=3, batch_size=6, precision="fp32", seed=5),
        optim=OptimConfig(lr=1e-3),
        ema=(0.5,),
    )


def stage(config: GenerationConfig, tmp_path: Path):
    torch.manual_seed(0)
    return build(config, tmp_path, ONE)


def test_the_encoder_follows_the_training(config, tmp_path, monkeypatch):
    used, compiled = [], []
    monkeypatch.setattr(Encoder, "forward", lambda self, images: used.append(self) or torch.zeros(len(images), 16, 16))
    monkeypatch.setattr(Encoder, "compile", lambda self: compiled.append(self))
    made = stage(replace(config, train=replace(config.train, precision="bf16", compile=True)), tmp_path)
    made.objectives[0].loss(batch_of(config, 2), 0)
    assert used[0].dtype == torch.bfloat16
    assert not compiled  # a dry run must not compile
    made.prepare(silent)
    assert compiled == used


@pytest.mark.parametrize("name", ["embed", "head_embed"])
def test_muon_does_not_train_the_embeddings_of_latents(config, tmp_path, name):
    (objective,) = stage(config, tmp_path).objectives
    embedding = objective.module.get_parameter(f"{name}.weight")
    matrices = by_muon(OptimConfig(lr=1e-3, method="muon"), objective.module, objective.convolutions)
    assert all(matrix is not embedding for matrix in matrices)


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_the_format_of_the_residual_stream_follows_the_config(config, tmp_path, residual):
    made = stage(replace(config, residual=residual, train=replace(config.train, precision="bf16")), tmp_path)
    module, seen = made.objectives[0].module, []
    assert isinstance(module, Denoiser)
    module.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        made.objectives[0].loss(batch_of(config, 2), 0)
    assert seen == [torch.bfloat16 if residual == "bf16" else torch.float32]


def batch_of(config: GenerationConfig, size: int) -> Batch:
    return next(Loader(config.data, config.train.seed).stream(0, size, ONE))


class Known(nn.Module):
    """A denoiser that returns `answer(x, t)`, and keeps its inputs."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor], prediction: path.Prediction = "velocity") -> None:
        super().__init__()
        self.answer = answer
        self.config = SimpleNamespace(prediction=prediction, base_depth=0)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.x, self.t = x, t
        return self.answer(x, t)


def loss_of(denoiser: Any, latents: Tensor, positions: Tensor, **options: Any) -> float:
    settings = {"seed": 1, "time_law": "uniform", "alpha": 2.0} | options
    return flow_matching_loss(denoiser, latents, None, positions, **settings)[0].item()


def test_the_loss_is_the_error_of_the_velocity():
    latents, positions = torch.randn(5, 3, 2, 2), torch.arange(10, 15)
    noise = randomness.normal(1, "noise", positions, (3, 2, 2))
    times = path.shift(randomness.uniform(1, "time", positions) * 0.999, 2.0)
    knowing = Known(lambda x, t: noise - latents)
    assert loss_of(knowing, latents, positions) == 0
    assert torch.allclose(knowing.t, times)
    weight = times.view(-1, 1, 1, 1)
    assert torch.allclose(knowing.x, (1 - weight) * latents + weight * noise)
    still = Known(lambda x, t: torch.zeros_like(x))
    assert loss_of(still, latents, positions) == pytest.approx((noise - latents).square().mean().item())


def test_predicted_data_are_compared_as_velocities():
    latents, positions = torch.randn(400, 1, 2, 2), torch.arange(400)
    assert loss_of(Known(lambda x, t: latents, "data"), latents, positions) == 0
    off = Known(lambda x, t: latents + 0.1, "data")
    loss = loss_of(off, latents, positions, alpha=1.0)
    # An error of the data has the weight 1 / t^2, at most 400.
    assert off.t.min() < 0.05
    assert loss == pytest.approx((0.1 / off.t.clamp_min(0.05)).square().mean().item(), rel=1e-4)


def test_the_error_of_a_base_output_is_added():
    class Two(Known):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None, with_base: bool = False) -> Any:
            assert with_base
            return self.answer(x, t), self.answer(x, t) + 2

    latents, positions = torch.randn(5, 3, 2, 2), torch.arange(5)
    noise = randomness.normal(1, "noise", positions, (3, 2, 2))
    two = Two(lambda x, t: noise - latents + 1)
    two.config.base_depth = 1
    settings: Any = {"seed": 1, "time_law": "uniform", "alpha": 2.0}
    loss, metrics = flow_matching_loss(two, latents, None, positions, **settings)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(1 + 9, rel=1e-5)
    assert metrics["base_loss"].item() == pytest.approx(9, rel=1e-5)


def test_a_network_like_rae_v2_trains(config, tmp_path):
    size = DenoiserSize(backbone=replace(PART, depth=2), head=PART, context=ContextConfig(), base_depth=1)
    made = stage(replace(config, denoiser=replace(size, prediction="data")), tmp_path)
    objective = made.objectives[0]
    loss, metrics = objective.loss(batch_of(config, 6), 0)
    loss.backward()
    assert 0 < metrics["base_loss"].item() < loss.item()
    # At the start only the two output layers get gradients, because their weights are zero.
    assert objective.module.get_parameter("base_final.out.weight").grad.any()  # type: ignore[union-attr]
    assert objective.module.get_parameter("final.out.weight").grad.any()  # type: ignore[union-attr]
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    assert load(str(tmp_path)).denoiser.config == objective.module.config


def test_both_time_laws_are_used():
    latents, positions = torch.zeros(2000, 1, 1, 1), torch.arange(2000)
    quarters = {}
    for law in ("uniform", "logit-normal"):
        asked = Known(lambda x, t: x)
        loss_of(asked, latents, positions, time_law=law, alpha=1.0)
        quarters[law] = asked.t.quantile(0.25).item()
    assert quarters["uniform"] == pytest.approx(0.25, abs=0.05)
    assert quarters["logit-normal"] == pytest.approx(1 / (1 + math.exp(0.6745)), abs=0.03)


def test_noise_and_times_belong_to_positions(config, tmp_path, tiny_model):
    objective = stage(config, tmp_path).objectives[0]
    objective.module.load_state_dict(Denoiser.load(str(tiny_model)).state_dict())  # its output is not zero
    batch = batch_of(config, 6)
    parts = [objective.loss(part, step)[0].item() for step, part in enumerate(batch.split(2))]
    loss = objective.loss(batch, 9)[0].item()
    assert sum(parts) / 3 == pytest.approx(loss, rel=1e-5)
    moved = replace(batch, positions=batch.positions + 6)
    assert objective.loss(moved, 0)[0].item() != pytest.approx(loss, rel=1e-4)


def test_the_network_sees_whitened_latents_and_dropped_labels(config, tmp_path):
    config = replace(config, class_dropout=0.3)
    objective = stage(config, tmp_path).objectives[0]
    seen = []
    objective.module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    batch = batch_of(config, 600)
    objective.loss(batch, 0)
    x, t, labels = seen[0]
    latents = Autoencoder.load(config.autoencoder).encode(batch.pixels())
    noise = randomness.normal(5, "noise", batch.positions, latents.shape[1:])
    assert torch.allclose(x, path.interpolate(latents, noise, t), atol=1e-5)
    dropped = labels == 3
    assert torch.equal(labels[~dropped], batch.labels[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.06)
    objective.loss(batch.split(200)[1], 0)
    assert torch.equal(seen[1][2], labels[200:400])

    for share, expected in ((0.0, 0), (0.1, 60)):
        objective = stage(replace(config, class_dropout=share), tmp_path).objectives[0]
        objective.module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
        objective.loss(batch, 0)
        assert int((seen[-1][2] == 3).sum()) == pytest.approx(expected, abs=0.4 * expected)


@pytest.mark.parametrize(("law", "base"), [("uniform", 4096), ("logit-normal", 64)])
def test_the_law_of_the_times_and_the_base_of_their_shift_follow_the_config(config, tmp_path, law, base):
    objective = stage(replace(config, time_law=law, shift_base=base), tmp_path).objectives[0]
    seen = []
    objective.module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    batch = batch_of(config, 6)
    objective.loss(batch, 0)
    uniform = randomness.uniform(5, "time", batch.positions)
    assert torch.allclose(seen[0], path.sample_times(uniform, law, math.sqrt(16 * 4 * 4 / base)))


def test_the_held_out_loss_drops_no_class(config, tmp_path):
    made = stage(replace(config, class_dropout=0.9, heldout=HeldoutConfig(every=1)), tmp_path)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE)
    seen = []
    for network in (made.objectives[0].module, made.objectives[0].averaged):
        network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2].tolist()))
    made.periodics[0].call(1)
    assert seen == [[0] * 3 + [1] * 3 + [2] * 3] * 2


def test_without_classes_the_network_gets_no_labels(config, tmp_path, images):
    flat = replace(config.data, source=images.replace("folder:", "flat:"))
    config = replace(config, conditional=False, data=flat)
    made = stage(config, tmp_path)
    seen = []
    made.objectives[0].module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    made.objectives[0].loss(batch_of(config, 6), 0)
    assert seen == [None]
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    assert load(str(tmp_path)).classes == ()


def test_the_artifact_is_a_model_of_the_averages(config, tmp_path):
    made = stage(config, tmp_path)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    model = load(str(tmp_path))
    averaged = made.objectives[0].averaged
    assert all(torch.equal(a, b) for a, b in zip(model.denoiser.parameters(), averaged.parameters(), strict=True))
    assert model.classes == ("blue", "green", "red")
    assert model.denoiser.config.shift == pytest.approx(math.sqrt(16 * 4 * 4 / 4096))
    assert sorted(path.name for path in (tmp_path / "artifact").iterdir()) == ["autoencoder", "denoiser", "encoder"]
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.autoencoder.encode(images), Autoencoder.load(config.autoencoder).encode(images))


@pytest.mark.parametrize(("latents", "patch_size"), [("pixels@16", 4), ("vae:{vae}@16", 2)])
def test_baselines_train_and_generate(config, tmp_path, vae, latents, patch_size):
    latents = latents.format(vae=vae)
    wide = TransformerConfig(width=48, depth=1, heads=2)
    size = DenoiserSize(backbone=wide, patch_size=patch_size)
    made = stage(replace(config, autoencoder=latents, denoiser=size), tmp_path)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    samples = next(generate(load(str(tmp_path)), [0, 1], sampling=Sampling(steps=2)))
    assert samples.images.shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match=f"names the baseline {latents.partition('@')[0]}; baselines cannot be"):
        convert(str(tmp_path), tmp_path / "converted")


def test_all_blocks_are_units_of_compilation_and_sharding(config, tmp_path):
    objective = stage(config, tmp_path).objectives[0]
    assert isinstance(objective.module, Denoiser)
    assert list(objective.blocks) == [*objective.module.blocks, *objective.module.head_blocks]
    plain = stage(replace(config, denoiser=DenoiserSize(backbone=PART)), tmp_path).objectives[0]
    assert isinstance(plain.module, Denoiser)
    assert list(plain.blocks) == list(plain.module.blocks)
    assert all(isinstance(block, nn.Module) for block in plain.blocks)


def test_a_width_below_the_token_dimension_is_rejected_with_the_bound(config, tmp_path):
    narrow = replace(PART, width=8, heads=2)
    size = DenoiserSize(backbone=PART, head=narrow)
    with pytest.raises(
        UserError, match=r"denoiser\.head\.width: 8 is below the token dimension 16\..* 0\.500 .*allow_narrow"
    ):
        stage(replace(config, denoiser=size), tmp_path)
    stage(replace(config, denoiser=replace(size, allow_narrow=True)), tmp_path)


def test_an_autoencoder_for_another_image_size_is_rejected(config, tmp_path):
    wrong = replace(config, data=replace(config.data, image_size=8))
    with pytest.raises(UserError, match=r"data\.image_size: 8, but .* needs 16"):
        stage(wrong, tmp_path)


def test_a_source_without_classes_is_rejected_if_training_needs_classes(config, tmp_path, images):
    flat = replace(config.data, source=images.replace("folder:", "flat:"))
    with pytest.raises(UserError, match=r"data\.source: flat:.* has no classes; set --no-conditional"):
        stage(replace(config, data=flat), tmp_path)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_class_dropout_outside_zero_to_one_is_rejected(config, share):
    with pytest.raises(UserError, match=rf"class_dropout: .*{share}"):
        replace(config, class_dropout=share)


def test_the_config_goes_through_json_strictly(config):
    values = to_dict(config)
    assert from_dict(GenerationConfig, values, "config.json") == config
    values["denoiser"]["backbone"]["heds"] = 3
    with pytest.raises(UserError, match=r"config\.json: denoiser\.backbone\.heds: "):
        from_dict(GenerationConfig, values, "config.json")


def curve(config: GenerationConfig, run: Path) -> list[float]:
    losses = []
    made = stage(config, run)
    made.prepare(silent)
    Trainer(run, config.train, made.objectives, made.batches, ONE).fit(
        lambda step, values: losses.append(values["denoiser/loss"])
    )
    made.export(run / "artifact")
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 5e-4), ("int8", 2e-3)])
def test_cached_latents_give_the_loss_curve_of_the_images(config, tmp_path, monkeypatch, dtype, tolerance):
    # Three epochs; the last epoch is incomplete.
    settings = replace(config.train, steps=8, batch_size=12, micro_batch=6, log_every=1)
    config = replace(config, data=replace(config.data, flip=True), train=settings)
    autoencoder = Autoencoder.load(config.autoencoder)
    cache_latents(autoencoder, config.autoencoder, config.data, tmp_path / "cache", dtype=dtype, world=ONE)
    on_the_fly = curve(config, tmp_path / "images")
    # From here on training uses neither the images nor the encoder.
    unread = {name: kind._replace(open=lambda *_: pytest.fail("a source was opened")) for name, kind in FORMATS.items()}
    monkeypatch.setattr(sources, "FORMATS", unread)
    monkeypatch.setattr(Encoder, "forward", lambda self, images: pytest.fail("the encoder ran"))
    cached = curve(replace(config, latents=str(tmp_path / "cache")), tmp_path / "cached")
    assert cached == pytest.approx(on_the_fly, rel=tolerance)
    assert len({*on_the_fly}) == 8
    models = [load(str(tmp_path / name)) for name in ("images", "cached")]
    assert models[0].denoiser.config == models[1].denoiser.config
    assert models[1].classes == ("blue", "green", "red")
    if dtype == "fp32":
        for a, b in zip(*(model.denoiser.parameters() for model in models), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-4)


def test_a_cache_of_another_encoder_does_not_train(config, tmp_path):
    autoencoder = Autoencoder.load(config.autoencoder)
    next(autoencoder.encoder.parameters()).data += 0.1
    cache_latents(autoencoder, "another", config.data, tmp_path / "cache", world=ONE)
    with pytest.raises(UserError, match=r"cache: its latents were made with a different encoder: another has "):
        stage(replace(config, latents=str(tmp_path / "cache")), tmp_path)


def test_checkpointing_saves_memory_and_changes_no_gradient(config, tmp_path):
    size = DenoiserSize(backbone=replace(PART, depth=3), head=PART, context=ContextConfig(), base_depth=1, qk_norm=True)
    config = replace(config, denoiser=size)
    batch, found = batch_of(config, 6), []
    for checkpointing in (False, True):
        objective = stage(config, tmp_path).objectives[0]
        for parameter in objective.module.parameters():
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        if checkpointing:
            checkpoint_blocks(objective.blocks)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective.loss(batch, 0)[0]
        loss.backward()
        gradients = {name: p.grad for name, p in objective.module.named_parameters() if p.grad is not None}
        found.append((sum(saved.values()), gradients))
    assert found[1][0] < found[0][0] / 2
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


def test_the_largest_logit_is_logged_on_request(config, tmp_path):
    settings = replace(config.train, steps=4, log_every=2, monitor_every=4)
    made = stage(replace(config, train=settings), tmp_path)
    Trainer(tmp_path, settings, made.objectives, made.batches, ONE).fit()
    logits = {r["step"]: r["denoiser/max_logit"] for r in read_metrics(tmp_path) if "denoiser/max_logit" in r}
    assert list(logits) == [4]
    assert 0 < logits[4] < 50


def test_every_average_is_kept_and_can_be_chosen(config, tmp_path):
    made = stage(replace(config, ema=(0.5, 0.9, 0.25)), tmp_path)
    Trainer(tmp_path, config.train, made.objectives, made.batches, ONE).fit()
    made.export(tmp_path / "artifact")
    found = {}
    for place in (tmp_path, tmp_path / "artifact", tmp_path / "artifact" / "denoiser"):
        for decay, average in made.objectives[0].averages.items():
            chosen = Denoiser.load(str(place), ema=decay)
            assert all(torch.equal(a, b) for a, b in zip(chosen.parameters(), average.parameters(), strict=True))
            found[decay] = chosen.get_parameter("final.out.weight")
    assert not torch.equal(found[0.5], found[0.9])
    assert torch.equal(load(str(tmp_path), ema=0.9).denoiser.get_parameter("final.out.weight"), found[0.9])
    assert torch.equal(Denoiser.load(str(tmp_path)).get_parameter("final.out.weight"), found[0.5])
    places = sorted(path.name for path in (tmp_path / "artifact").iterdir())
    assert places == ["autoencoder", "denoiser", "denoiser-ema-0.25", "denoiser-ema-0.9", "encoder"]
    assert "averages of decay 0.5, 0.25, 0.9\n" in describe_folder(str(tmp_path))


def test_a_missing_average_is_rejected(config, tmp_path, tiny_model):
    for ema, message in (
        ((0.5, 0.9), r"has no average of decay 0\.99; its averages have decay 0\.5, 0\.9$"),
        ((), "does not name"),
    ):
        run = tmp_path / str(len(ema))
        made = stage(replace(config, ema=ema), run)
        Trainer(run, config.train, made.objectives, made.batches, ONE).fit()
        made.export(run / "artifact")
        with pytest.raises(UserError, match=message):
            load(str(run), ema=0.99)
    with pytest.raises(UserError, match=r"has no average of decay 0\.9; .* does not name a decay"):
        Denoiser.load(str(tiny_model), ema=0.9)
