"""The training loop, on networks of a few hundred weights and random data."""

import copy
import importlib
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raekit import randomness
from raekit.distributed import World
from raekit.errors import Stopped, UserError
from raekit.training import checkpoint, ema
from raekit.training.casting import CastWeights
from raekit.training.objective import Objective, Periodic
from raekit.training.optim import OptimConfig, learning_rate
from raekit.training.signals import SIGNALS, keyboard_interrupts, stop_signals
from raekit.training.throughput import Speed, flop_counter
from raekit.training.tracking import read_metrics
from raekit.training.trainer import TrainConfig, Trainer

ONE = World()
ITEMS = 20  # images of an epoch; no batch size here divides it
CONFIG = TrainConfig(steps=8, batch_size=8, precision="fp32", seed=3, log_every=1)
OPTIM = OptimConfig(
    lr=1e-2, final_lr=1e-3, warmup_steps=2, warmup_from_zero=True, decay="cosine", decay_end=8, clip=2.9
)


@dataclass(frozen=True)
class Rows:
    """Vectors (B, 6) and their positions in the data stream."""

    values: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.values.to(device), self.positions.to(device))

    def split(self, size: int) -> "list[Rows]":
        return [Rows(*part) for part in zip(self.values.split(size), self.positions.split(size), strict=True)]


def rows(world: World, start: int, batch_size: int = 8) -> Iterator[Rows]:
    """Yield this process's share of each batch, from ITEMS vectors in a new order per epoch."""
    share = batch_size // world.size
    for first in count(start + world.rank * share, batch_size):
        positions = range(first, first + share)
        items = [randomness.numpy_generator(0, "order", p // ITEMS).permutation(ITEMS)[p % ITEMS] for p in positions]
        yield Rows(randomness.normal(0, "data", [int(i) for i in items], (6,)), torch.tensor(positions))


class Net(nn.Module):
    """Two blocks, a linear layer, and a buffer that counts the training batches."""

    def __init__(self, outputs: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.out = nn.Linear(6, outputs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("calls").add_(1)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def objective(**options: Any) -> Objective:
    """Predict noisy squares; the noise depends on the positions, as in the stages."""
    torch.manual_seed(0)
    net = Net()

    def loss(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        noise = randomness.normal(1, "noise", batch.positions, (6,))
        error = net(batch.values) - (batch.values**2 + 0.1 * noise)
        return error.square().mean(), {"bias": error.detach().mean()}

    settings = {"optim": OPTIM, "ema": (0.9, 0.5), "blocks": list(net.blocks)} | options
    return Objective(name="net", module=net, loss=loss, **settings)


def trainer(
    run: Path, world: World = ONE, config: TrainConfig = CONFIG, one: Objective | None = None, **more
) -> Trainer:
    return Trainer(run, config, [one or objective()], partial(rows, world), world, **more)


def fit(trained: Trainer) -> list[float]:
    """Train to the end and return the loss of each step."""
    losses: list[float] = []
    trained.fit(lambda step, values: losses.append(values["net/loss"]))
    return losses


def finishes(trained: Trainer, losses: list[float] | None = None) -> bool:
    """Train until the end or a signal; return whether it was the end."""
    into = [] if losses is None else losses
    try:
        with stop_signals(trained.world) as stop:
            trained.fit(lambda step, values: into.append(values.get("net/loss", 0)), stop)
    except Stopped:
        return False
    return True


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state(trained: Trainer) -> dict[str, Tensor]:
    """Return the full training state by name: weights, buffers, averages and optimizer state."""
    tensors = {"step": torch.tensor(trained.step)}
    for one in trained.objectives:
        modules = {"weights": one.module} | {f"average {decay}": m for decay, m in one.averages.items()}
        for kind, module in modules.items():
            tensors |= {f"{one.name} {kind} {name}": whole(t) for name, t in module.state_dict().items()}
        optimizer = trained.optimizers[one.name]
        for i, parameter in enumerate(one.module.parameters()):
            for name, value in optimizer.state[parameter].items():
                tensors[f"{one.name} optimizer {i} {name}"] = whole(value)
        tensors[f"{one.name} skipped"] = trained.skipped[one.name].clone()
    return tensors


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether both states are identical to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Compare up to rounding, without the buffer that counts calls: micro-batches make more calls."""
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith("calls"):
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


# One process


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses and the last state of one process that never stops."""
    trained = trainer(tmp_path_factory.mktemp("alone"))
    return fit(trained), state(trained)


def test_it_is_adamw_with_clipping_schedule_and_averages(alone):
    one = objective()
    module = one.module
    averages = {decay: copy.deepcopy(module) for decay in one.ema}
    adam = torch.optim.AdamW(module.parameters(), betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=0.0, fused=False)
    losses, norms = [], []
    for step, batch in zip(range(8), rows(ONE, 0), strict=False):
        loss, _ = one.loss(batch, step)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), OPTIM.clip).item())
        adam.param_groups[0]["lr"] = learning_rate(OPTIM, step)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        for decay, average in averages.items():
            for old, new in zip(average.parameters(), module.parameters(), strict=True):
                old.data.mul_(decay).add_(new.data, alpha=1 - decay)
    assert min(norms) < OPTIM.clip < max(norms), "a test of clipping needs steps with it and without"
    assert alone[0] == pytest.approx(losses, rel=1e-5)
    for kind, expected in [("weights", module), *((f"average {d}", m) for d, m in averages.items())]:
        for name, tensor in expected.named_parameters():
            torch.testing.assert_close(alone[1][f"net {kind} {name}"], tensor.detach(), rtol=1e-5, atol=1e-6)


def test_averages_warm_up_if_asked(tmp_path):
    """A short run exports what it learnt, and not its first weights."""
    trained = trainer(tmp_path, config=replace(CONFIG, ema_warmup=True))
    weights = [trained.objectives[0].module.get_parameter("out.weight").detach().clone()]
    trained.periodics = [
        Periodic(every=1, call=lambda step: weights.append(state(trained)["net weights out.weight"]) or {})
    ]
    trained.fit()
    average = weights[0]
    for n, new in enumerate(weights[1:]):
        average = average.lerp(new, 1 - min(0.9, (1 + n) / (10 + n)))
    torch.testing.assert_close(state(trained)["net average 0.9 out.weight"], average)


def test_the_artifact_follows_each_checkpoint_and_milestones_are_kept(tmp_path, caplog):
    def export(folder: Path) -> None:
        newest = checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name
        written.append((str(folder.relative_to(tmp_path)), newest.removeprefix("step-0000000")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model").touch()

    written: list[tuple[str, str]] = []
    config = replace(CONFIG, checkpoint_every=3, milestones=(2, 6))
    trainer(tmp_path, config=config, export=export).fit()
    kept = [("milestones/step-00000002.raekit-partial", "2"), ("milestones/step-00000006.raekit-partial", "6")]
    assert written == [
        ("artifact", "2"), kept[0], ("artifact", "3"), ("artifact", "6"), kept[1], ("artifact", "8"),
    ]  # fmt: skip
    written.clear()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    shutil.rmtree(tmp_path / "milestones" / "step-00000006")  # as if the process had died before it wrote this one
    trainer(tmp_path, config=config, export=export).fit()
    assert written == [("artifact", "6"), kept[1], ("artifact", "8")]
    left = [str(path.relative_to(tmp_path)) for path in sorted((tmp_path / "milestones").rglob("*")) if path.is_file()]
    assert left == ["milestones/step-00000002/model", "milestones/step-00000006/model"]
    assert "train.milestones" not in caplog.text
    trainer(tmp_path, config=replace(config, milestones=(2, 3, 5, 8)))
    assert "train.milestones: 3, 5 will not be kept, because this run has already trained 8 steps" in caplog.text


def test_a_milestone_that_was_not_written_completely_is_written_again(tmp_path):
    def export(folder: Path) -> None:
        for name in ("denoiser", "autoencoder"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            if killed and folder.parent.name == "milestones":
                raise KeyboardInterrupt

    config, killed = replace(CONFIG, milestones=(2,)), True
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, config=config, export=export).fit()
    killed = False
    (tmp_path / "milestones" / "step-00000002.raekit-partial" / "of another model").touch()
    trainer(tmp_path, config=config, export=export).fit()
    kept = {str(path.relative_to(tmp_path / "milestones")) for path in (tmp_path / "milestones").rglob("*")}
    assert kept == {"step-00000002", "step-00000002/denoiser", "step-00000002/autoencoder"}


def test_a_milestone_that_is_there_is_left_alone(tmp_path):
    def export(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model").write_text(str(len(starts)))

    starts = []
    for _ in range(2):
        starts.append("start")
        trainer(tmp_path, config=replace(CONFIG, milestones=(8,)), export=export).fit()
    assert (tmp_path / "milestones" / "step-00000008" / "model").read_text() == "1"
    assert (tmp_path / "artifact" / "model").read_text() == "2"


def test_a_run_that_stops_before_its_first_step_has_no_artifact(tmp_path):
    def stopping(start: int) -> Iterator[Rows]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from rows(ONE, start)

    exported: list[Path] = []
    trained = Trainer(tmp_path, CONFIG, [objective()], stopping, ONE, export=exported.append)
    assert not finishes(trained)
    assert exported == checkpoint.checkpoints(tmp_path / "checkpoints") == []


def test_a_stopped_run_publishes_what_it_saved(tmp_path):
    exported = []
    assert not finishes(trainer(tmp_path, one=signalled(2), export=exported.append))
    assert exported == [tmp_path / "artifact"]


@pytest.mark.parametrize("stop", [2, 5])
def test_saves_in_the_background_change_nothing(tmp_path, alone, stop):
    config = replace(CONFIG, background_saves=True, checkpoint_every=1)
    assert not finishes(trainer(tmp_path, config=config, one=signalled(stop)))
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name == f"step-0000000{stop + 1}"
    resumed = trainer(tmp_path, config=config)
    resumed.fit()
    assert same(state(resumed), alone[1])
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000008"
    assert not list((tmp_path / "checkpoints").glob("*.raekit-partial"))


def test_a_run_with_an_artifact_has_a_checkpoint(tmp_path):
    saved = []

    def export(folder: Path) -> None:
        saved.append(len(checkpoint.checkpoints(tmp_path / "checkpoints")))

    trainer(tmp_path, config=replace(CONFIG, background_saves=True), export=export).fit()
    assert min(saved) == 1


@pytest.mark.parametrize("stop", [False, True])
def test_a_run_that_ends_early_completes_its_save_in_the_background(tmp_path, monkeypatch, stop):
    """The run ends right after the save of step 4 began: with an error in the next step, or with a signal."""
    go, write = threading.Event(), FileSystemWriter.write_data
    one, exported = objective(), []
    loss = one.loss

    def slowly(*arguments: Any) -> Any:
        assert not exported or go.wait(30)  # the first checkpoint is complete before the first export
        return write(*arguments)

    def export(folder: Path) -> None:
        exported.append(folder)
        if len(exported) == 2 and stop:
            threading.Timer(0.2, go.set).start()
            os.kill(os.getpid(), signal.SIGTERM)

    def fail(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == 4:
            threading.Timer(0.2, go.set).start()
            raise RuntimeError
        return loss(batch, step)

    one.loss = fail
    monkeypatch.setattr(FileSystemWriter, "write_data", slowly)
    config = replace(CONFIG, background_saves=True, checkpoint_every=2)
    trained = trainer(tmp_path, config=config, one=one, export=export)
    if stop:
        assert not finishes(trained)
    else:
        with pytest.raises(RuntimeError):
            trained.fit()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_an_evaluation_finds_its_checkpoint_complete_also_in_the_background(tmp_path):
    found = []

    def call(step: int) -> dict[str, float]:
        found.append(checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name)
        return {}

    config = replace(CONFIG, background_saves=True)
    trainer(tmp_path, config=config, periodics=[Periodic(every=4, call=call)]).fit()
    assert found == ["step-00000004", "step-00000008"]


def test_a_failed_save_in_the_background_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    def fail(writer: checkpoint.Writer) -> UserError | None:
        return UserError("step 4: could not be saved") if trained.step == 5 else None

    monkeypatch.setattr(checkpoint.Writer, "failure", fail)
    trained = trainer(tmp_path)
    with pytest.raises(UserError, match="step 4: could not be saved"):
        trained.fit()
    assert trained.step == 5


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_micro_batches_accumulate(tmp_path, alone, micro_batch):
    parts = trainer(tmp_path, config=replace(CONFIG, micro_batch=micro_batch))
    assert fit(parts) == pytest.approx(alone[0], rel=1e-5)
    assert_close(state(parts), alone[1])
    assert parts.objectives[0].module.get_buffer("calls") == 8 * 8 / micro_batch


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    for config in (replace(CONFIG, micro_batch=3), replace(CONFIG, batch_size=7, micro_batch=2)):
        with pytest.raises(UserError, match=r"train\.batch_size: [87] .*train\.micro_batch = [32]"):
            trainer(tmp_path, config=config)
    with pytest.raises(UserError, match=r"train\.batch_size: 8 must divide into 3 processes"):
        Trainer(tmp_path, CONFIG, [], partial(rows, ONE), World(size=3))


def test_a_milestone_after_the_last_step_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"train\.milestones: .*train\.steps = {CONFIG.steps}, before step 999"):
        trainer(tmp_path, config=replace(CONFIG, milestones=(2, 999)))


def test_a_world_that_cannot_be_sharded_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.shard: 3 must divide 4, the number of processes"):
        Trainer(tmp_path, replace(CONFIG, shard=3), [], partial(rows, ONE), World(size=4))


@pytest.mark.parametrize(
    "name",
    [
        *("steps", "batch_size", "micro_batch", "log_every", "monitor_every"),
        *("checkpoint_every", "keep", "max_skipped", "shard"),
    ],
)
def test_a_config_with_a_zero_is_refused(name):
    with pytest.raises(UserError, match=rf"train\.{name}: 0 "):
        replace(CONFIG, **{name: 0})


def test_metrics_are_means_over_the_steps_since_the_last_record(tmp_path, alone):
    seen = []
    trainer(tmp_path, config=replace(CONFIG, log_every=3)).fit(lambda step, values: seen.append((step, values)))
    records = read_metrics(tmp_path)
    assert [step for step, _ in seen] == [r["step"] for r in records] == [3, 6, 8]
    losses = alone[0]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 3), (3, 6), (6, 8))]
    assert [r["net/loss"] for r in records] == pytest.approx(means, rel=1e-5)
    assert {"net/bias", "net/grad_norm", "images_per_second"} <= records[0].keys()
    assert records[-1]["net/lr"] == learning_rate(OPTIM, 7)
    assert records[-1]["net/skipped"] == 0


def test_periodic_calls_come_on_time_after_the_checkpoint_and_are_recorded(tmp_path):
    calls = []

    def call(step: int) -> dict[str, float]:
        calls.append((step, checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name))
        return {"score": step / 2}

    config = replace(CONFIG, checkpoint_every=3)
    trainer(tmp_path, config=config, periodics=[Periodic(every=3, call=call)]).fit()
    assert calls == [(3, "step-00000003"), (6, "step-00000006"), (8, "step-00000008")]
    scores = [(r["step"], r["evaluation/score"]) for r in read_metrics(tmp_path) if "evaluation/score" in r]
    assert scores == [(3, 1.5), (6, 3.0), (8, 4.0)]


def test_an_evaluation_may_leave_the_module_in_its_mode(tmp_path, alone):
    one = objective()
    trained = trainer(tmp_path, one=one, periodics=[Periodic(every=2, call=lambda step: one.module.eval() and {})])
    trained.fit()
    assert same(state(trained), alone[1])


def test_the_values_of_an_evaluation_are_recorded_after_its_pictures(tmp_path, monkeypatch):
    """The values say that the evaluation is done, so that a restart does not repeat it."""

    def fail(*arguments: object) -> None:
        raise UserError("no space for the picture")

    monkeypatch.setattr("raekit.training.tracking.RunFiles.images", fail)
    call = Periodic(every=8, call=lambda step: {"score": 1.0, "picture": Image.new("RGB", (2, 2))})
    with pytest.raises(UserError, match="no space for the picture"):
        trainer(tmp_path, periodics=[call]).fit()
    assert not any("evaluation/score" in record for record in read_metrics(tmp_path))


def test_only_steps_count_for_the_speed(tmp_path, monkeypatch):
    """Saves, exports, evaluations and the counting of FLOPs are left out of it."""
    inside, others = [0], []
    pause, save, count = Speed.paused, checkpoint.Writer.save, Trainer._count_flops

    @contextmanager
    def paused(speed: Speed) -> Iterator[None]:
        with pause(speed):
            inside[0] += 1
            yield
            inside[0] -= 1

    def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: others.append((name, inside[0])) or call(*arguments)

    monkeypatch.setattr(Speed, "paused", paused)
    monkeypatch.setattr(checkpoint.Writer, "save", note("save", save))
    monkeypatch.setattr(Trainer, "_count_flops", note("flops", count))
    evaluation = Periodic(every=8, call=note("evaluation", lambda step: {}))
    trainer(tmp_path, periodics=[evaluation], export=note("export", lambda folder: None)).fit()
    assert others == [("flops", 1), ("save", 1), ("export", 1), ("evaluation", 1)]


def test_an_evaluation_that_was_killed_is_made_up_for(tmp_path, alone):
    """The checkpoint of its step exists, so the restart begins with this evaluation and repeats no other."""
    calls = []

    def call(step: int) -> dict[str, float]:
        calls.append(step)
        if calls == [3, 6]:
            raise KeyboardInterrupt
        return {"score": step / 2}

    config = replace(CONFIG, checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, config=config, periodics=[Periodic(every=3, call=call)]).fit()
    again = trainer(tmp_path, config=config, periodics=[Periodic(every=3, call=call)])
    again.fit()
    trainer(tmp_path, config=config, periodics=[Periodic(every=3, call=call)]).fit()  # and not once more
    assert calls == [3, 6, 6, 8]
    scores = [(r["step"], r["evaluation/score"]) for r in read_metrics(tmp_path) if "evaluation/score" in r]
    assert scores == [(3, 1.5), (6, 3.0), (8, 4.0)]
    assert same(state(again), alone[1])


@pytest.mark.parametrize(("precision", "fast", "warned"), [("bf16", False, 1), ("bf16", True, 0), ("auto", False, 0)])
def test_bf16_without_instructions_for_it_is_warned_of(tmp_path, monkeypatch, caplog, precision, fast, warned):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": fast})
    trainer(tmp_path, config=replace(CONFIG, precision=precision))
    assert [record.message.startswith("train.precision: bf16 is slow") for record in caplog.records] == [True] * warned


def test_bf16_is_autocast_around_float32_weights(tmp_path, alone):
    trained = trainer(tmp_path, config=replace(CONFIG, precision="bf16"))
    losses = fit(trained)
    assert losses != pytest.approx(alone[0], rel=1e-5)
    assert losses == pytest.approx(alone[0], rel=3e-2)
    assert {p.dtype for p in trained.objectives[0].module.parameters()} == {torch.float32}


@pytest.mark.parametrize(("micro_batch", "once"), [(None, False), (4, True)])
def test_only_several_micro_batches_share_casts_of_the_weights(tmp_path, monkeypatch, micro_batch, once):
    cast: list[bool] = []

    def weights(blocks: Sequence[nn.Module], dtype: torch.dtype) -> CastWeights:
        cast.append(bool(blocks))
        return CastWeights(blocks, dtype)

    monkeypatch.setattr("raekit.training.trainer.CastWeights", weights)
    trained = trainer(tmp_path, config=replace(CONFIG, precision="bf16", micro_batch=micro_batch))
    trained.objectives[0].blocks = [trained.objectives[0].module]
    trained.fit()
    assert cast[-1] == once


class Spy(torch.autograd.Function):
    """The identity. It notes whether CUDA may use TF32 in products and convolutions, in both passes."""

    seen: ClassVar[list[tuple[bool, bool]]] = []

    @staticmethod
    def note() -> None:
        Spy.seen.append((bool(torch.backends.cuda.matmul.allow_tf32), torch.backends.cudnn.allow_tf32))

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Spy.note()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Spy.note()
        return gradients[0]


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True)])
def test_forward_backward_and_monitor_use_the_configured_float32(tmp_path, precision, tf32):
    Spy.seen.clear()
    one = monitored()
    loss = one.loss
    one.loss = lambda batch, step: (Spy.apply(loss(batch, step)[0]), {})
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    trainer(tmp_path, config=replace(CONFIG, steps=1, precision=precision, monitor_every=1), one=one).fit()
    # The monitor, forward and backward, and both again to count the FLOPs.
    assert Spy.seen == [(tf32, tf32)] * 5
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


class Allocations(TorchDispatchMode):
    """Notes the number of elements of each new tensor while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        if self.on:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            new = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
            self.sizes += [x.numel() for x in new if x.untyped_storage().data_ptr() not in given]
        return made


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_clipping_optimizer_and_averages_make_no_copy_of_a_matrix(tmp_path, monkeypatch, clip):
    trained = trainer(tmp_path, config=replace(CONFIG, steps=3), one=objective(optim=replace(OPTIM, clip=clip)))
    allocations, measure, update = Allocations(), nn.utils.get_total_norm, ema.update

    def switch(on: bool, call: Callable, *args: Any) -> Any:
        allocations.on = trained.step > 0  # the first step makes the moments
        result = call(*args)
        allocations.on &= on
        return result

    monkeypatch.setattr(nn.utils, "get_total_norm", partial(switch, True, measure))
    monkeypatch.setattr(ema, "update", partial(switch, False, update))
    with allocations:
        trained.fit()
    assert allocations.sizes, "the norm and the flag of a skipped step are new"
    assert max(allocations.sizes) <= len(list(trained.objectives[0].module.parameters())) < 6 * 6


def test_averages_of_a_compiled_module_hold_their_own_weights(tmp_path, monkeypatch, alone):
    compiled = []

    def fake(function: Callable, **options: object) -> Callable:
        """Record the module whose forward is compiled."""
        compiled.append(function.__self__)  # type: ignore[attr-defined]
        return function

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(shutil, "which", lambda name: name)  # the test needs no compiler
    trained = trainer(tmp_path, config=replace(CONFIG, compile=True))
    assert fit(trained) == alone[0]
    assert same(state(trained), alone[1])
    one = trained.objectives[0]
    every = [one.module, *one.averages.values()]
    assert [id(block) for block in compiled] == [id(block) for module in every for block in module.blocks]  # type: ignore[attr-defined]

    x = next(rows(ONE, 0)).values
    plain = Net()
    for decay, average in one.averages.items():
        plain.load_state_dict(average.state_dict())
        assert torch.equal(average(x), plain.eval()(x)), decay
    assert not torch.allclose(one.averaged(x), one.module.eval()(x))
    assert one.averaged is one.averages[0.9]


def test_a_really_compiled_module_gives_the_same_curve(tmp_path, monkeypatch, alone):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    trained = trainer(tmp_path, config=replace(CONFIG, compile=True))
    assert fit(trained) == pytest.approx(alone[0], rel=1e-5)
    assert_close(state(trained), alone[1])


@contextmanager
def largest_output(net: Net) -> Iterator[dict[str, Tensor]]:
    """Monitor the largest output of the blocks and the number of outputs."""
    seen = {"output": torch.tensor(-math.inf), "blocks": torch.tensor(0.0)}

    def look(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen["output"] = torch.maximum(seen["output"], output.detach().amax())
        seen["blocks"] += 1

    hooks = [block[1].register_forward_hook(look) for block in net.blocks]  # type: ignore[index]
    yield seen
    for hook in hooks:
        hook.remove()


def monitored() -> Objective:
    one = objective()
    one.monitor = partial(largest_output, one.module)  # type: ignore[arg-type]
    return one


@pytest.mark.parametrize("compiled", [False, True])
def test_a_monitor_watches_now_and_then_and_changes_nothing(tmp_path, monkeypatch, alone, compiled):
    if compiled:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        monkeypatch.setattr(shutil, "which", lambda name: name)
    config = replace(CONFIG, log_every=1, monitor_every=3, micro_batch=4, compile=compiled)
    trained = trainer(tmp_path, config=config, one=monitored())
    assert fit(trained) == pytest.approx(alone[0], rel=1e-5)
    assert_close(state(trained), alone[1])
    seen = {r["step"]: (r["net/output"], r["net/blocks"]) for r in read_metrics(tmp_path) if "net/output" in r}
    assert list(seen) == [3, 6]
    assert all(0 < output < 1 and blocks == 2 for output, blocks in seen.values())


def test_a_monitor_between_two_records_is_refused():
    with pytest.raises(UserError, match=r"train\.monitor_every: 75 must be a multiple of train\.log_every = 50"):
        replace(CONFIG, log_every=50, monitor_every=75)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch only hides it
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_checkpointed_blocks_run_twice_and_train_the_same(tmp_path, monkeypatch, alone, backend):
    if backend:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        monkeypatch.setattr(shutil, "which", lambda name: name)
    trained = trainer(tmp_path, config=replace(CONFIG, checkpointing=True, compile=bool(backend)))
    one, calls = trained.objectives[0], []
    if not backend:
        for part in (one.module, *one.averages.values()):
            for block in part.blocks:  # type: ignore[union-attr]
                block[0].register_forward_hook(lambda *_: calls.append(1))
    losses = fit(trained)
    # Counting the FLOPs runs each of the two blocks once.
    assert len(calls) == (0 if backend else 2 * 2 * CONFIG.steps + 2)
    assert losses == (pytest.approx(alone[0], rel=1e-5) if backend else alone[0])
    assert_close(state(trained), alone[1])
    # A copy runs with its own weights.
    other = copy.deepcopy(one.module)
    nn.init.zeros_(other.get_parameter("blocks.0.0.weight"))
    assert not torch.equal(other(torch.ones(1, 6)), one.module(torch.ones(1, 6)))


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"train\.compile: .*C\+\+ compiler"):
        trainer(tmp_path, config=replace(CONFIG, compile=True))


def test_without_its_package_a_tracker_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("raekit.training.tracking.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.track: tensorboard is not installed.*'raekit\[track\]'"):
        trainer(tmp_path, config=replace(CONFIG, track=("tensorboard",)))


def test_metrics_go_to_tensorboard_if_asked(tmp_path, alone):
    fit(trainer(tmp_path, config=replace(CONFIG, track=("tensorboard",))))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("net/loss")] == pytest.approx(alone[0], rel=1e-6)


# Stopping and resuming


def signalled(step: int, part: int = 0, number: int = signal.SIGTERM, **options: Any) -> Objective:
    """Return an objective that sends a signal to this process in micro-batch `part` of the step with index `step`."""
    one = objective(**options)
    loss, parts = one.loss, Counter()

    def send(batch: Rows, now: int) -> tuple[Tensor, dict[str, Tensor]]:
        if (now, parts[now]) == (step, part):
            os.kill(os.getpid(), number)
        parts[now] += 1
        return loss(batch, now)

    one.loss = send
    return one


def test_a_record_covers_the_steps_before_and_after_a_stop(tmp_path):
    config = replace(CONFIG, log_every=4)
    trainer(tmp_path / "straight", config=config).fit()
    assert not finishes(trainer(tmp_path / "stopped", config=config, one=signalled(5)))
    trainer(tmp_path / "stopped", config=config).fit()
    straight, stopped = (read_metrics(tmp_path / run) for run in ("straight", "stopped"))
    for name in ("step", "net/loss", "net/bias", "net/grad_norm"):
        assert [record[name] for record in stopped] == [record[name] for record in straight]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_signal_stops_and_the_run_goes_on_exactly(tmp_path, number, micro_batch):
    config = replace(CONFIG, micro_batch=micro_batch)
    straight = trainer(tmp_path / "straight", config=config)
    losses = fit(straight)

    run, parts = tmp_path / "stopped", []
    for last in (2, 5, 8):  # within the first and the second epoch
        before = signal.getsignal(number)
        # One pass of a step is finished. Of several, the rest is left out, and the step begins again.
        one = signalled(last, 1, number) if micro_batch else signalled(last - 1, 0, number)
        trained = trainer(run, config=config, one=one)
        assert finishes(trained, parts) == (last == 8 and micro_batch is not None)
        assert trained.step == last
        assert checkpoint.checkpoints(run / "checkpoints")[-1].name == f"step-{last:08d}"
        assert signal.getsignal(number) is before
    assert parts == losses
    assert same(state(trained), state(straight))
    assert [r["step"] for r in read_metrics(run) if "net/loss" in r] == list(range(1, 9))


def test_a_step_that_changed_a_weight_is_finished(tmp_path, pair_alone):
    """A signal within the second objective does not undo the step of the first."""
    first, second = pair()
    loss = second.loss

    def send(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(batch, step)

    second.loss = send
    trained = Trainer(tmp_path, replace(CONFIG, micro_batch=4), [first, second], partial(rows, ONE), ONE)
    assert not finishes(trained)
    assert trained.step == 5


@pytest.mark.parametrize("stop", [3, 4])
def test_a_step_of_two_objectives_that_changed_no_weight_begins_again(tmp_path, stop):
    """The first objective's loss has left gradients and a changed buffer in the second, which starts at step 3."""
    config = replace(CONFIG, micro_batch=4)
    straight = pair_trainer(tmp_path / "straight", config=config)
    straight.fit()
    first, second = pair()
    loss, parts = first.loss, Counter()

    def send(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        parts[step] += 1
        if (step, parts[step]) == (stop, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(batch, step)

    first.loss = send
    stopped = Trainer(tmp_path / "stopped", config, [first, second], partial(rows, ONE), ONE)
    assert not finishes(stopped)
    assert stopped.step == stop
    resumed = pair_trainer(tmp_path / "stopped", config=config)
    resumed.fit()
    assert same(state(resumed), state(straight))


def test_a_signal_while_a_batch_is_loaded_is_heard_at_once(tmp_path):
    def slow(start: int) -> Iterator[Rows]:
        stream = rows(ONE, start)
        yield next(stream)
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError

    trained = Trainer(tmp_path, CONFIG, [objective()], slow, ONE)
    assert not finishes(trained)
    assert trained.step == trained.saved == 1


def test_a_signal_ends_an_evaluation_after_a_checkpoint_and_the_next_start_repeats_it(tmp_path, alone):
    calls = []

    def call(step: int) -> dict[str, float]:
        calls.append((step, int(checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name.removeprefix("step-"))))
        if len(calls) in (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
            calls.append("went on")
        return {}

    finished = []
    for _ in range(3):
        trained = trainer(tmp_path, periodics=[Periodic(every=3, call=call)])
        finished.append(finishes(trained))
    assert finished == [False, False, True]
    assert calls == [(3, 3), (3, 3), (6, 6), (6, 6), (8, 8)]
    assert same(state(trainer(tmp_path)), alone[1])


def test_a_signal_ends_an_export_after_a_checkpoint_and_the_next_start_repeats_it(tmp_path, alone):
    exported: list[int | str] = []

    def export(folder: Path) -> None:
        exported.append(int(checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name.removeprefix("step-")))
        if len(exported) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            exported.append("went on")

    config = replace(CONFIG, checkpoint_every=3)
    assert [finishes(trainer(tmp_path, config=config, export=export)) for _ in range(2)] == [False, True]
    assert exported == [3, 3, 6, 8]
    assert same(state(trainer(tmp_path, config=config)), alone[1])


def test_a_stream_that_fails_ends_the_run_after_a_checkpoint(tmp_path):
    def broken(start: int) -> Iterator[Rows]:
        stream = rows(ONE, start)
        yield next(stream)
        raise UserError("no more images")

    trained = Trainer(tmp_path, CONFIG, [objective()], broken, ONE)
    with pytest.raises(UserError, match="no more images"):
        trained.fit()
    assert trained.step == trained.saved == 1


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_a_signal_in_an_import_ends_what_follows_the_import(tmp_path, monkeypatch, number, raised):
    """An import may lose an exception, as torch's C++ code does when it imports numpy."""
    name = f"loses_{number.name.lower()}"
    lines = "import signal", "try:", f"    signal.raise_signal({int(number)})", "except BaseException:", "    pass"
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

    def work() -> None:
        with keyboard_interrupts() if number == signal.SIGINT else stop_signals():
            importlib.import_module(name)
            time.sleep(10)

    try:
        with pytest.raises(raised):
            work()
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_a_training_runs_without_signals(tmp_path):
    result = []
    thread = threading.Thread(target=lambda: result.append(finishes(trainer(tmp_path))))
    thread.start()
    thread.join()
    assert result == [True]


def test_a_second_interrupt_ends_at_once(tmp_path):
    def twice(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    one = objective()
    one.loss = twice
    with pytest.raises(KeyboardInterrupt):
        finishes(trainer(tmp_path, one=one))


def test_a_finished_run_does_nothing_more(tmp_path, alone):
    fit(trainer(tmp_path))
    again = trainer(tmp_path)
    assert fit(again) == []
    assert same(state(again), alone[1])
    assert len(read_metrics(tmp_path)) == 8


def test_a_step_is_saved_once(tmp_path, monkeypatch):
    """A signal in a step that is saved anyway must not write the complete checkpoint again."""
    saved = []
    save = checkpoint.Writer.save
    monkeypatch.setattr(checkpoint.Writer, "save", lambda *given: saved.append(given[1]) or save(*given))
    config = replace(CONFIG, checkpoint_every=2, keep=1)
    assert not finishes(trainer(tmp_path, config=config, one=signalled(3)))
    assert saved == [2, 4]


MUON = replace(OPTIM, method="muon")


def test_with_muon_a_run_goes_on_exactly(tmp_path):
    straight = trainer(tmp_path / "straight", one=objective(optim=MUON))
    losses = fit(straight)
    assert "net optimizer 0 momentum_buffer" in state(straight)
    parts = []
    for last in (2, 5, 8):
        trained = trainer(tmp_path / "stopped", one=signalled(last - 1, optim=MUON))
        finishes(trained, parts)
        assert trained.step == last
    assert parts == losses
    assert same(state(trained), state(straight))


# Two objectives: a generator, and a discriminator that starts at step 3

START = 3
DISCRIMINATOR_OPTIM = OptimConfig(
    lr=5e-3, final_lr=1e-3, decay="linear", decay_end=4, betas=(0.5, 0.9), weight_decay=0.1, clip=0.2
)


def pair() -> tuple[Objective, Objective]:
    """Return a GAN: the generator's loss uses the discriminator after the discriminator has started."""
    torch.manual_seed(0)
    maker, judge = Net(), Net(1)

    def generator_loss(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        made = maker(batch.values)
        loss = (made - batch.values**2).square().mean()
        return loss + (0.3 * -judge(made).mean() if step >= START else 0.0), {}

    def discriminator_loss(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        made = maker(batch.values).detach()
        real, fake = judge(batch.values**2), judge(made)
        return (1 - real).relu().mean() + (1 + fake).relu().mean(), {"real": real.detach().mean()}

    return (
        Objective(
            name="generator", module=maker, loss=generator_loss, optim=OPTIM, ema=(0.9,), blocks=list(maker.blocks)
        ),
        Objective(
            name="discriminator",
            module=judge,
            loss=discriminator_loss,
            optim=DISCRIMINATOR_OPTIM,
            ema=(0.8, 0.6),
            start=START,
            blocks=list(judge.blocks),
        ),
    )


def pair_trainer(run: Path, world: World = ONE, config: TrainConfig = CONFIG, **more) -> Trainer:
    return Trainer(run, config, pair(), partial(rows, world), world, **more)


def pair_by_hand() -> dict[str, nn.Module]:
    """Train the same objectives with a plain GAN loop."""
    generator, discriminator = pair()
    maker, judge = generator.module, discriminator.module
    averages = [copy.deepcopy(maker), copy.deepcopy(judge), copy.deepcopy(judge)]
    optimizers = [
        torch.optim.AdamW(one.module.parameters(), betas=one.optim.betas, weight_decay=one.optim.weight_decay)
        for one in (generator, discriminator)
    ]
    for step, batch in zip(range(8), rows(ONE, 0), strict=False):
        for one, adam in zip((generator, discriminator), optimizers, strict=True):
            if step < one.start:
                continue
            other = judge if one is generator else maker
            other.requires_grad_(False)
            one.loss(batch, step)[0].backward()
            other.requires_grad_(True)
            nn.utils.clip_grad_norm_(one.module.parameters(), one.optim.clip)
            adam.param_groups[0]["lr"] = learning_rate(one.optim, step - one.start)
            adam.step()
            adam.zero_grad()
            for average, module, decay, start in zip(
                averages, (maker, judge, judge), (0.9, 0.8, 0.6), (0, 3, 3), strict=True
            ):
                if module is one.module and step >= start:
                    for old, new in zip(average.parameters(), module.parameters(), strict=True):
                        old.data.lerp_(new.data, 1 - decay)
    return {
        "generator weights": maker,
        "discriminator weights": judge,
        "generator average 0.9": averages[0],
        "discriminator average 0.8": averages[1],
        "discriminator average 0.6": averages[2],
    }


@pytest.fixture(scope="module")
def pair_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    run = tmp_path_factory.mktemp("pair")
    trained = pair_trainer(run)
    trained.fit()
    return read_metrics(run), state(trained)


def test_two_objectives_train_as_by_hand(pair_alone):
    for name, module in pair_by_hand().items():
        for key, tensor in module.named_parameters():
            torch.testing.assert_close(pair_alone[1][f"{name} {key}"], tensor.detach(), rtol=1e-5, atol=1e-6)


def test_the_flops_of_a_step_are_those_of_the_objectives_that_train_in_it(tmp_path, monkeypatch):
    counted: list[float] = []
    monkeypatch.setattr(Speed, "add", lambda speed, flops: counted.append(flops))
    pair_trainer(tmp_path, config=replace(CONFIG, micro_batch=2)).fit()

    def flops(step: int) -> int:
        with flop_counter() as counter:
            for one in pair():
                if step >= one.start:
                    one.loss(next(rows(ONE, 0)), step)[0].backward()
        return counter.get_total_flops()

    assert counted == [flops(0)] * START + [flops(START)] * (8 - START)


def test_an_objective_is_untouched_before_its_start(tmp_path):
    """Neither the checkpoints nor the gradients of the other objective's loss change it."""
    generator, discriminator = pair()

    def through_both(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return discriminator.module(generator.module(batch.values)).mean(), {}

    generator.loss = through_both
    before = copy.deepcopy(discriminator.module.state_dict())
    config = replace(CONFIG, steps=START, checkpoint_every=1)
    trained = Trainer(tmp_path, config, [generator, discriminator], partial(rows, ONE), ONE)
    discriminator.module.eval()
    trained.fit()
    for module in (discriminator.module, *discriminator.averages.values()):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for values in trained.optimizers["discriminator"].state.values():
        assert not any(value.any() for value in values.values())
    assert all(p.grad is None for p in discriminator.module.parameters())
    assert not any(
        key.startswith("discriminator/") and "skipped" not in key for r in read_metrics(tmp_path) for key in r
    )


def test_its_schedule_and_its_metrics_count_from_its_start(tmp_path, pair_alone):
    rates = [record.get("discriminator/lr") for record in pair_alone[0]]
    assert rates == [None] * START + [learning_rate(DISCRIMINATOR_OPTIM, step) for step in range(5)]
    assert rates[START] == DISCRIMINATOR_OPTIM.lr
    assert rates[-1] == DISCRIMINATOR_OPTIM.final_lr

    pair_trainer(tmp_path, config=replace(CONFIG, log_every=4)).fit()
    records, losses = read_metrics(tmp_path), [r.get("discriminator/loss", 0) for r in pair_alone[0]]
    assert records[0]["discriminator/loss"] == pytest.approx(losses[3], rel=1e-5)
    assert records[1]["discriminator/loss"] == pytest.approx(sum(losses[4:]) / 4, rel=1e-5)


def test_averages_warm_up_from_the_start_of_their_objective(tmp_path):
    trained = pair_trainer(tmp_path, config=replace(CONFIG, steps=START + 2, ema_warmup=True))
    name, weights = "out.weight", []
    trained.periodics = [
        Periodic(every=1, call=lambda step: weights.append(state(trained)[f"discriminator weights {name}"]) or {})
    ]
    trained.fit()
    average = weights[START - 1]
    for n, new in enumerate(weights[START:]):
        average = average.lerp(new, 1 - (1 + n) / (10 + n))
    torch.testing.assert_close(state(trained)[f"discriminator average 0.8 {name}"], average)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_two_objectives_resume_exactly(tmp_path, pair_alone, stop):
    """Also from a checkpoint before the start of the second objective, which the uninterrupted run does not save."""
    end = Periodic(every=stop, call=lambda step: os.kill(os.getpid(), signal.SIGTERM) or {})
    assert not finishes(pair_trainer(tmp_path, periodics=[end]))
    trained = pair_trainer(tmp_path)
    assert trained.step == stop
    trained.fit()
    assert same(state(trained), pair_alone[1])


# Gradients that are not finite


def poisoned(bad: set[int], value: float = float("nan"), **options: Any) -> Objective:
    """Return an objective whose loss is not finite in one sample of the steps `bad`."""
    one = objective(**options)
    loss = one.loss

    def poison(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        clean, metrics = loss(batch, step)
        hit = step in bad and bool((batch.positions % 8 == 5).any())
        return clean * (value if hit else 1.0), metrics

    one.loss = poison
    return one


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(tmp_path, value, clip, micro_batch, method):
    config = replace(CONFIG, micro_batch=micro_batch, steps=5)
    optim = replace(OPTIM, clip=clip, method=method)
    trained = trainer(tmp_path, config=config, one=poisoned({0, 3}, value, optim=optim))
    states: dict[int, dict[str, Tensor]] = {}
    trained.periodics = [Periodic(every=1, call=lambda step: states.update({step: state(trained)}) or {})]
    initial = state(trained)
    trained.fit()

    def trained_part(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in values.items() if ("weights" in k or "optimizer" in k) and not k.endswith("calls")}

    moments = [k for k in states[3] if "exp_avg" in k or "momentum" in k]
    assert moments
    assert all(states[3][k].any() for k in moments)
    assert same(trained_part(states[3]), trained_part(states[4]))
    assert not same(trained_part(states[4]), trained_part(states[5]))
    weights = {k: v for k, v in initial.items() if "weights" in k and not k.endswith("calls")}
    assert same(weights, {k: states[1][k] for k in weights})
    assert all(v.isfinite().all() for v in states[5].values())
    # Two of five steps do not count, also not for AdamW's bias correction.
    assert states[5]["net optimizer 1 step"] == 3
    records = read_metrics(tmp_path)
    assert [r["net/skipped"] for r in records if "net/skipped" in r] == [1, 1, 1, 2, 2]


def test_a_step_with_one_infinite_gradient_is_skipped(tmp_path):
    """None of its gradients is NaN, but clipping would make one."""
    one = objective()
    loss, bias = one.loss, one.module.get_parameter("out.bias")

    def infinite(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        clean, metrics = loss(batch, step)
        return clean + bias[0] * (math.inf if step == 1 else 0.0), metrics

    one.loss = infinite
    trained = trainer(tmp_path, config=replace(CONFIG, steps=3), one=one)
    trained.fit()
    assert trained.skipped["net"].tolist() == [1, 0]
    assert all(value.isfinite().all() for value in state(trained).values())


def test_a_skipped_step_does_not_spoil_the_mean_of_its_window(tmp_path):
    config = replace(CONFIG, log_every=4, steps=4)
    clean, spoilt = tmp_path / "clean", tmp_path / "spoilt"
    trainer(clean, config=replace(config, log_every=1)).fit()
    trainer(spoilt, config=config, one=poisoned({3})).fit()
    first = [r["net/loss"] for r in read_metrics(clean)][:3]
    (record,) = read_metrics(spoilt)
    assert record["net/loss"] == pytest.approx(sum(first) / 3, rel=1e-6)


def test_averages_do_not_absorb_a_skipped_step(tmp_path):
    trained = trainer(tmp_path, config=replace(CONFIG, steps=2), one=poisoned({1}))
    states: dict[int, dict[str, Tensor]] = {}
    trained.periodics = [Periodic(every=1, call=lambda step: states.update({step: state(trained)}) or {})]
    trained.fit()
    for name, tensor in states[2].items():
        if name.startswith("net average 0.9") and not name.endswith("calls"):
            old = states[1][name]
            torch.testing.assert_close(tensor, old.lerp(states[1][name.replace("average 0.9", "weights")], 0.1))


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    config = replace(CONFIG, steps=20, max_skipped=4, checkpoint_every=1)
    trained = trainer(tmp_path, config=config, one=poisoned({1, 2, 3, 6, 7, 8, 9, 10}))
    with pytest.raises(UserError) as error:
        trained.fit()
    assert trained.step == 10
    assert str(error.value).startswith("net: the gradient was not finite for 4 steps in a row up to step 10. ")
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert "\n" not in str(error.value)
    assert [r["net/skipped"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3, 3, 3, 4, 5, 6]


def test_the_count_of_skipped_steps_survives_a_restart(tmp_path):
    stop = Periodic(every=4, call=lambda step: os.kill(os.getpid(), signal.SIGTERM) or {})
    bad = {1, 2, 3, 4, 5}
    finishes(trainer(tmp_path, one=poisoned(bad), periodics=[stop]))
    with pytest.raises(UserError, match="for 5 steps in a row up to step 6"):
        trainer(tmp_path, config=replace(CONFIG, max_skipped=5), one=poisoned(bad)).fit()


# Two processes

BETWEEN = replace(CONFIG, checkpoint_every=4, log_every=5)  # with a checkpoint between two records
BF16 = replace(CONFIG, precision="bf16", micro_batch=2)


def in_two(world: World, folder: Path) -> dict[str, Any]:
    """Run everything that the tests of two processes need, so that the processes start only once."""
    warnings.simplefilter("error")
    found: dict[str, Any] = {}
    ways = {"plain": {}, "accumulated": {"micro_batch": 2}, "checkpointed": {"micro_batch": 2, "checkpointing": True}}
    for name, settings in ways.items():
        trained = trainer(folder / name, world, replace(CONFIG, **settings))
        found[name] = fit(trained), state(trained)

    found["bf16"] = fit(trainer(folder / "bf16", world, BF16))

    exported: list[str] = []

    def export(to: Path) -> None:
        exported.append(str(to.relative_to(folder)))
        if world.is_main:
            to.mkdir(parents=True, exist_ok=True)

    trainer(folder / "kept", world, replace(CONFIG, milestones=(2,)), export=export).fit()
    found["exported"] = exported

    def broken(start: int) -> Iterator[Rows]:
        for step, batch in enumerate(rows(world, start)):
            if step == 3 and not world.is_main:
                raise UserError("no more images")
            yield batch

    fails = Trainer(folder / "broken", CONFIG, [objective()], broken, world)
    with pytest.raises(UserError) as error:
        fails.fit()
    found["broken"] = fails.saved, str(error.value)

    two = pair_trainer(folder / "pair", world, replace(CONFIG, micro_batch=2))
    two.fit()
    found["pair"] = state(two)

    resumed = trainer(folder / "from one", world)
    found["from one"] = resumed.step, fit(resumed), state(resumed)
    trainer(folder / "for one", world, replace(CONFIG, steps=4)).fit()
    trainer(folder / "between records", world, BETWEEN).fit()

    def evaluate(step: int) -> dict[str, float]:
        """Run the average and the module forward, without a backward pass."""
        one = evaluated.objectives[0]
        x = next(rows(ONE, 0)).values
        with torch.no_grad():
            return {"average": one.averaged(x).sum().item(), "module": one.module(x).sum().item()}

    evaluated = trainer(folder / "evaluated", world, periodics=[Periodic(every=2, call=evaluate)])
    found["evaluated"] = fit(evaluated), state(evaluated)

    trainer(folder / "monitored", world, replace(CONFIG, log_every=1, monitor_every=4), one=monitored()).fit()

    poison = trainer(folder / "poisoned", world, replace(CONFIG, steps=5), one=poisoned({3}))
    poison.fit()
    found["poisoned"] = state(poison)

    muon = trainer(folder / "muon", world, one=poisoned({3}, optim=MUON))
    found["muon"] = fit(muon), state(muon)

    # A signal to the second process only: in a step, in an accumulation, while it loads, and in an evaluation.
    def heard(name: str, one: Objective | None = None, **more: Any) -> tuple[bool, int, list[str]]:
        run, config = folder / f"stopped {name}", replace(CONFIG, steps=3000, micro_batch=2)
        stopped = Trainer(run, config, [one or objective()], more.pop("batches", partial(rows, world)), world, **more)
        return finishes(stopped), stopped.step, [path.name for path in checkpoint.checkpoints(run / "checkpoints")]

    def loading(start: int) -> Iterator[Rows]:
        for step, batch in enumerate(rows(world, start)):
            if step == 3 and not world.is_main:
                os.kill(os.getpid(), signal.SIGUSR2)
            yield batch

    def evaluating(step: int) -> dict[str, float]:
        if not world.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError

    second = not world.is_main
    found["stopped"] = {
        "step": heard("step", signalled(2, 1) if second else None),
        "accumulation": heard("accumulation", signalled(3, 0) if second else None),
        "loading": heard("loading", batches=loading),
        "evaluation": heard("evaluation", periodics=[Periodic(every=3, call=evaluating)]),
    }
    return found


@pytest.fixture(scope="module")
def two(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    trainer(folder / "from one", config=replace(CONFIG, steps=4)).fit()
    return folder, run_ranks(in_two, 2, folder)


@pytest.mark.parametrize("how", ["plain", "accumulated", "checkpointed"])
def test_two_processes_train_as_one(two, alone, how):
    for rank in two[1]:
        losses, last = rank[how]
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert_close(last, alone[1])
    assert same(two[1][0][how][1], two[1][1][how][1])
    records = read_metrics(two[0] / how)
    assert [r["net/loss"] for r in records] == pytest.approx(alone[0], rel=1e-5)
    assert [r["net/lr"] for r in records] == [learning_rate(OPTIM, step) for step in range(8)]


def test_two_processes_train_in_bf16_as_one(two, tmp_path):
    losses = fit(trainer(tmp_path, config=BF16))
    for rank in two[1]:
        assert rank["bf16"] == pytest.approx(losses, rel=0.05)


def test_all_processes_export_and_the_first_keeps_a_milestone(two):
    milestone = "kept/milestones/step-00000002"
    expected = ["kept/artifact", f"{milestone}.raekit-partial", "kept/artifact"]
    assert [rank["exported"] for rank in two[1]] == [expected] * 2
    assert [path.name for path in (two[0] / "kept" / "milestones").iterdir()] == ["step-00000002"]


def test_an_error_of_one_stream_ends_all_processes_after_a_checkpoint(two):
    elsewhere = "another process could not load its batch; its own message says why"
    assert [rank["broken"] for rank in two[1]] == [(3, elsewhere), (3, "no more images")]


def test_two_processes_log_the_largest_of_what_is_monitored(two, tmp_path):
    trainer(tmp_path, config=replace(CONFIG, log_every=1, monitor_every=4), one=monitored()).fit()
    alone, both = (
        [record["net/output"] for record in read_metrics(run) if "net/output" in record]
        for run in (tmp_path, two[0] / "monitored")
    )
    assert len(both) == 2
    assert both == pytest.approx(alone, rel=1e-5)


def test_two_processes_train_two_objectives_as_one(two, pair_alone):
    for rank in two[1]:
        assert_close(rank["pair"], pair_alone[1])


def test_two_processes_go_on_from_the_checkpoint_of_one(two, alone):
    step, losses, last = two[1][0]["from one"]
    assert step == 4
    assert losses == pytest.approx(alone[0][4:], rel=1e-5)
    assert_close(last, alone[1])


def test_one_process_goes_on_from_the_checkpoint_of_two(two, alone):
    trained = trainer(two[0] / "for one")
    assert trained.step == 4
    assert fit(trained) == pytest.approx(alone[0][4:], rel=1e-5)
    assert_close(state(trained), alone[1])


def test_a_record_of_one_process_covers_the_earlier_steps_of_two(two, alone):
    run = two[0] / "between records"
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    trainer(run, config=BETWEEN).fit()
    first = read_metrics(run)[0]
    assert (first["step"], first["net/loss"]) == (5, pytest.approx(sum(alone[0][:5]) / 5, rel=1e-5))


def test_evaluation_between_steps_disturbs_no_average(tmp_path, two, alone):
    losses, last = two[1][0]["evaluated"]
    assert losses == pytest.approx(alone[0], rel=1e-5)
    assert_close(last, alone[1])
    average = Net()
    average.load_state_dict({k.removeprefix("net average 0.9 "): v for k, v in alone[1].items() if "average 0.9" in k})
    expected = average.eval()(next(rows(ONE, 0)).values).sum().item()
    assert read_metrics(two[0] / "evaluated")[-1]["evaluation/average"] == pytest.approx(expected, rel=1e-4)


def test_all_processes_skip_a_step_that_fails_in_one(tmp_path, two):
    single = trainer(tmp_path, config=replace(CONFIG, steps=5), one=poisoned({3}))
    single.fit()
    for rank in two[1]:
        assert_close(rank["poisoned"], state(single))
        assert rank["poisoned"]["net skipped"].tolist() == [1, 0]


def test_muon_trains_in_two_processes_as_in_one(tmp_path, two):
    single = trainer(tmp_path, one=poisoned({3}, optim=MUON))
    losses = fit(single)
    for rank in two[1]:
        assert rank["muon"][0] == pytest.approx(losses, rel=1e-5, nan_ok=True)
        ours, theirs = rank["muon"][1], state(single)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if not name.endswith("calls"):
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(two[1][0]["muon"][1][k], v) for k, v in two[1][1]["muon"][1].items())


@pytest.mark.parametrize("when", ["step", "accumulation", "loading", "evaluation"])
def test_a_signal_to_one_process_stops_all(two, when):
    assert [rank["stopped"][when] for rank in two[1]] == [(False, 3, ["step-00000003"])] * 2


# Four processes that share the weights in several ways


def in_four(world: World, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    current: list[Trainer] = []

    def evaluate(step: int) -> dict[str, float]:
        """Make as many forward passes as the number of this process, which the others do not."""
        x, average = next(rows(ONE, 0)).values, current[-1].objectives[0].averaged
        with torch.no_grad():
            scores = [average(x).sum().item() for _ in range(world.rank + 1)]
        return {"average": scores[0]}

    for ways in (1, 2, 4):
        for name, optim in (("adamw", OPTIM), ("muon", MUON)):
            config, run = replace(CONFIG, shard=ways, background_saves=ways == 2), folder / f"{name}{ways}"
            trained = trainer(run, world, config, objective(optim=optim), periodics=[Periodic(every=4, call=evaluate)])
            current.append(trained)
            found[f"{name}{ways}"] = fit(trained), state(trained)
            parameters = trained.objectives[0].module.parameters()
            found[f"{name}{ways} held"] = sum(p.to_local().numel() for p in parameters)  # type: ignore[attr-defined]
    resumed = trainer(folder / "of one", world, replace(CONFIG, shard=4))
    found["of one"] = resumed.step, fit(resumed), state(resumed)
    return found


@pytest.fixture(scope="module")
def four(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("four")
    trainer(folder / "of one", config=replace(CONFIG, steps=4)).fit()
    return folder, run_ranks(in_four, 4, folder)


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_shared_weights_train_as_whole_ones(four, alone, ways):
    for rank in four[1]:
        losses, last = rank[f"adamw{ways}"]
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert_close(last, alone[1])
    complete = sum(p.numel() for p in Net().parameters())
    assert sum(rank[f"adamw{ways} held"] for rank in four[1]) == complete * 4 / ways
    scores = [r["evaluation/average"] for r in read_metrics(four[0] / f"adamw{ways}") if "evaluation/average" in r]
    average = Net().eval()
    average.load_state_dict({k.removeprefix("net average 0.9 "): v for k, v in alone[1].items() if "average 0.9" in k})
    assert scores[-1] == pytest.approx(average(next(rows(ONE, 0)).values).sum().item(), rel=1e-4)


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_muon_in_four_processes_trains_as_in_one(tmp_path, four, ways):
    single = trainer(tmp_path, one=objective(optim=MUON))
    losses = fit(single)
    for rank in four[1]:
        assert rank[f"muon{ways}"][0] == pytest.approx(losses, rel=1e-5)
        for name, tensor in state(single).items():
            if not name.endswith("calls"):
                torch.testing.assert_close(rank[f"muon{ways}"][1][name], tensor, rtol=1e-4, atol=1e-5)


def test_checkpoints_of_shared_and_whole_weights_are_interchangeable(four, alone):
    step, losses, last = four[1][0]["of one"]
    assert step == 4
    assert losses == pytest.approx(alone[0][4:], rel=1e-5)
    assert_close(last, alone[1])
    for ways in (1, 2, 4):
        alone_again = trainer(four[0] / f"adamw{ways}")
        assert alone_again.step == 8
        assert_close(state(alone_again), alone[1])


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_new_training_needs_space_for_its_checkpoints(tmp_path, monkeypatch, method):
    needed: list[int] = []
    monkeypatch.setattr("raekit.training.trainer.check_space", lambda path, size, remedy: needed.append(size))
    net = nn.Linear(6, 30_000)
    optim = replace(OPTIM, method=method)
    one = Objective(
        name="net", module=net, loss=lambda batch, step: (net(batch.values).mean(), {}), optim=optim, ema=(0.9, 0.5)
    )
    parts = trainer(tmp_path, config=replace(CONFIG, steps=1), one=one)
    fit(parts)
    newest = checkpoint.checkpoints(tmp_path / "checkpoints")[-1]
    written = sum(path.stat().st_size for path in newest.iterdir())
    assert needed == [pytest.approx((CONFIG.keep + 1) * written, rel=0.05)]
    trainer(tmp_path, config=replace(CONFIG, steps=1), one=one)
    assert len(needed) == 1  # a resumed run is not checked


def test_a_trial_has_the_memory_of_a_step_with_several_micro_batches(tmp_path):
    """The last pass of a trial finds gradients, and the trial leaves none."""
    one = objective()
    found: list[bool] = []
    loss = one.loss

    def watched(batch: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        found.append(all(p.grad is not None for p in one.module.parameters()))
        assert len(batch) == 3
        return loss(batch, step)

    one.loss = watched
    parts = trainer(tmp_path, one=one)
    before = state(parts)
    parts._trial(next(rows(ONE, 0)), 3)
    assert found == [False, True]
    assert all(p.grad is None for p in one.module.parameters())
    assert_close(state(parts), before)


def test_a_trial_does_the_work_of_the_last_step(tmp_path):
    """Also of an objective that does not train in the first step."""
    one, two = pair()
    steps: list[tuple[str, int]] = []

    def watched(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda batch, step: steps.append((name, step)) or loss(batch, step)

    for each in (one, two):
        each.loss = watched(each.name, each.loss)
    Trainer(tmp_path, CONFIG, [one, two], partial(rows, ONE), ONE)._trial(next(rows(ONE, 0)), 2)
    assert steps == [("generator", 7)] * 2 + [("discriminator", 7)] * 2


def test_an_automatic_micro_batch_is_the_one_that_fits(tmp_path, monkeypatch, alone):
    def fitting(share: int, trial: Callable[[int], None], world: World) -> int:
        trial(1)
        trial(4)
        assert share == 8
        return 2

    def batches(start: int) -> Iterator[Rows]:
        streams.append(start)
        return rows(ONE, start)

    streams: list[int] = []
    monkeypatch.setattr("raekit.training.trainer.fitting", fitting)
    trained = Trainer(tmp_path, replace(CONFIG, micro_batch="auto"), [objective()], batches, ONE)
    assert fit(trained) == pytest.approx(alone[0], rel=1e-5)
    assert trained.micro_batch == 2
    assert streams == [0, 0], "one batch for all trials, and then the training"
    assert_close(state(trained), alone[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_checkpoint_that_is_being_written_in_the_background(tmp_path, error):
    def fail(step: int) -> dict[str, float]:
        raise error

    config = replace(CONFIG, background_saves=True, checkpoint_every=2)
    parts = trainer(tmp_path, config=config, periodics=[Periodic(name="score", every=6, call=fail)])
    with pytest.raises(error):
        fit(parts)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")][-1] == "step-00000006"
    assert not list((tmp_path / "checkpoints").glob("*.raekit-partial"))
