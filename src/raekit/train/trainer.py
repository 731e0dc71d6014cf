"""The training loop, for any list of objectives and any number of processes."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from raekit.compilation import check_compiler
from raekit.config import configclass
from raekit.distributed import World, set_gradient_sync
from raekit.errors import UserError
from raekit.train import checkpoint, ema
from raekit.train.objective import Metrics, Objective, Periodic, TrainingBatch
from raekit.train.optim import build_optimizer
from raekit.train.precision import Precision, autocast, compute_dtype, matmul_precision
from raekit.train.recompute import checkpoint_blocks
from raekit.train.signals import stop_signals
from raekit.train.tracking import Tracker

_log = logging.getLogger(__name__)
Report = Callable[[int, dict[str, float]], None]
"""Called with the number of steps done and the latest metrics."""


@configclass
class TrainConfig:
    """`batch_size` is the global batch; `micro_batch`, the images at once on a process, by default all its share.

    With `checkpointing` a block keeps nothing but its input for the backward pass, and is run again in it. Every
    `monitor_every` steps, a multiple of `log_every`, attention's largest logit is measured, in a forward pass more.
    """

    steps: int
    batch_size: int
    micro_batch: int | None = None
    precision: Precision = "auto"
    compile: bool = False
    checkpointing: bool = False
    seed: int = 0
    log_every: int = 50
    monitor_every: int | None = None
    checkpoint_every: int = 1000
    keep: int = 2
    max_skipped: int = 20
    tensorboard: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "micro_batch", "log_every", "checkpoint_every", "keep", "max_skipped")
        for name in (*counts, "monitor_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name}: {value} must be at least 1")
        if self.monitor_every and self.monitor_every % self.log_every:
            raise UserError(
                f"train.monitor_every: {self.monitor_every} must be a multiple of train.log_every = {self.log_every}"
            )


class Trainer:
    """Trains `objectives` on `batches(images_seen)`, an endless stream of this process's shares.

    State lives in `run`; a trainer built on a run that has checkpoints goes on from the newest.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        objectives: Sequence[Objective],
        batches: Callable[[int], Iterator[TrainingBatch]],
        world: World,
        periodics: Sequence[Periodic] = (),
    ) -> None:
        share, rest = divmod(config.batch_size, world.size)
        if rest or share % (config.micro_batch or share):
            raise UserError(
                f"train.batch_size: {config.batch_size} must divide into {world.size} processes with whole "
                f"micro-batches of train.micro_batch = {config.micro_batch}"
            )
        if config.compile:
            check_compiler("train.compile", world.device)
        if config.tensorboard and not find_spec("tensorboard"):
            raise UserError("train.tensorboard: TensorBoard is not installed; pip install 'raekit[track]'")
        if config.precision == "bf16" and compute_dtype("auto", world.device) == torch.float32:
            _log.warning("train.precision: bf16 is slow on this processor, which has no instructions for it")
        self.run, self.config, self.world = run, config, world
        self.objectives, self.batches, self.periodics = list(objectives), batches, periodics
        self.micro_batch = config.micro_batch or share
        self.step = 0
        self.saved = -1  # the step of the newest checkpoint
        self.skipped = {o.name: torch.zeros(2, device=world.device) for o in self.objectives}  # in all, in a row
        self.optimizers: dict[str, optim.Optimizer] = {}
        for objective in self.objectives:
            self._prepare(objective)
        self.folder = run / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        if saved := checkpoint.checkpoints(self.folder):
            self._load(saved[-1])

    def _prepare(self, objective: Objective) -> None:
        module = objective.module.to(self.world.device)
        objective.averages = {decay: ema.averaged_copy(module) for decay in objective.ema}
        names = [name for name, m in module.named_modules() if any(m is block for block in objective.blocks)]
        for replica in (module, *objective.averages.values()):
            blocks = [replica.get_submodule(name) for name in names]
            if self.config.checkpointing and replica is module:
                checkpoint_blocks(blocks)
            self.world.shard(replica, blocks)
            if self.config.compile:
                for block in blocks or [replica]:
                    block.compile()
        optimizer = self.optimizers[objective.name] = build_optimizer(objective.optim, module, objective.convolutions)
        # Reading its state for a checkpoint makes an unused optimizer do a step, which must not count.
        optimizer.found_inf = torch.ones((), device=self.world.device)  # type: ignore[attr-defined]

    def fit(self, report: Report = lambda step, metrics: None) -> bool:
        """Train to the last step. False if a signal stopped it; either way the state is saved."""
        tracker = Tracker(self.run, self.step, self.config.tensorboard) if self.world.is_main else None
        self.tracker = tracker
        history: defaultdict[str, list[Tensor]] = defaultdict(list)
        since, began = self.step, time.perf_counter()
        try:
            with stop_signals() as stopped:
                if self.step:  # a kill may have come between this checkpoint and its evaluation
                    self._evaluate(tracker, again=False)
                    began = time.perf_counter()
                stream = self.batches(self.step * self.config.batch_size)
                while self.step < self.config.steps:
                    batch = next(stream).to(self.world.device)
                    for objective in self.objectives:
                        if self.step >= objective.start:
                            for name, value in self._train(objective, batch).items():
                                history[name].append(value)
                    self.step += 1
                    last = self.step == self.config.steps
                    if self.step % self.config.log_every == 0 or last:
                        values = self._summary(history)
                        values["images_per_second"] = (
                            (self.step - since) * self.config.batch_size / (time.perf_counter() - began)
                        )
                        if tracker:
                            tracker.scalars(self.step, values)
                        report(self.step, values)
                        history.clear()
                        since, began = self.step, time.perf_counter()
                    # A checkpoint comes first, so that a kill during an evaluation costs nothing.
                    if self.step % self.config.checkpoint_every == 0 or last:
                        self.save()
                    paused = time.perf_counter()
                    self._evaluate(tracker)
                    began += time.perf_counter() - paused
                    # Several processes agree every tenth step, since each agreement waits for the slowest.
                    if (self.world.size == 1 or self.step % 10 == 0) and self.world.any(bool(stopped)) and not last:
                        self.save()
                        return False
            return True
        finally:
            if tracker:
                tracker.close()

    def _evaluate(self, tracker: Tracker | None, again: bool = True) -> None:
        """Call what is due at this step and log it; with `again` False, only what metrics.jsonl lacks."""
        for periodic in self.periodics:
            if self.step % periodic.every and self.step != self.config.steps:
                continue
            if not again and self.world.any(tracker is not None and f"{periodic.name}/seconds" in tracker.resumed):
                continue
            began = time.perf_counter()
            values = periodic.call(self.step) | {"seconds": time.perf_counter() - began}
            if tracker:
                tracker.scalars(self.step, {f"{periodic.name}/{name}": value for name, value in values.items()})

    def _train(self, objective: Objective, batch: TrainingBatch) -> Metrics:
        """One optimizer step of `objective` on this process's share of the batch."""
        module, optimizer = objective.module, self.optimizers[objective.name]
        module.train()
        parts = batch.split(self.micro_batch)
        totals = self._monitor(objective, parts[0])
        for part in parts:
            set_gradient_sync(module, part is parts[-1])
            with matmul_precision(self.config.precision):
                with autocast(self.config.precision, self.world.device):
                    loss, metrics = objective.loss(part, self.step)
                (loss / len(parts)).backward()
            for name, value in ({"loss": loss} | metrics).items():
                name = f"{objective.name}/{name}"
                totals[name] = totals.get(name, 0) + value.detach().float() / len(parts)
        norm = nn.utils.clip_grad_norm_(module.parameters(), objective.optim.clip or float("inf"))
        lr = objective.learning_rate(self.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # The fused AdamW skips the step by itself where the gradient is not finite: the host need not wait.
        failed = 1 - norm.isfinite().float()
        optimizer.found_inf = failed  # type: ignore[attr-defined]
        optimizer.step()
        # A loss may reach into another objective's module (a generator's, through the discriminator).
        for every in self.optimizers.values():
            every.zero_grad(set_to_none=True)
        for decay, average in objective.averages.items():
            ema.update(average, module, decay)
        failed = failed.to_local() if isinstance(failed, DTensor) else failed
        skipped = self.skipped[objective.name]
        skipped[0] += failed
        skipped[1] = (skipped[1] + 1) * failed
        totals[f"{objective.name}/grad_norm"] = norm.to_local() if isinstance(norm, DTensor) else norm
        return totals

    def _monitor(self, objective: Objective, part: TrainingBatch) -> Metrics:
        """If it is due, what the objective's monitor sees in a forward pass of its own, at most over all processes."""
        every = self.config.monitor_every
        if objective.monitor is None or not every or (self.step + 1) % every:
            return {}
        with (
            torch.compiler.set_stance("force_eager"),
            objective.monitor() as seen,
            autocast(self.config.precision, self.world.device),
        ):
            objective.loss(part, self.step)
        largest = {name: max(self.world.gather(value.item())) for name, value in seen.items()}
        return {f"{objective.name}/{name}": torch.tensor(v, device=self.world.device) for name, v in largest.items()}

    def _summary(self, history: dict[str, list[Tensor]]) -> dict[str, float]:
        """Means over steps and processes, without skipped steps; UserError if too many in a row were skipped."""
        names = sorted(history)
        windows = [torch.stack(history[name]) for name in names]
        means = self.world.sum(torch.stack([w[w.isfinite()].mean() for w in windows])) / self.world.size
        values = dict(zip(names, means.tolist(), strict=True))
        for objective in self.objectives:
            if self.step > objective.start:
                values[f"{objective.name}/lr"] = objective.learning_rate(self.step - 1)
            skipped, in_a_row = self.skipped[objective.name].tolist()
            values[f"{objective.name}/skipped"] = skipped
            if in_a_row >= self.config.max_skipped:
                raise UserError(
                    f"{objective.name}: the gradient was not finite for {int(in_a_row)} steps in a row up to step "
                    f"{self.step}. Lower its lr, set train.precision fp32, or denoiser.qk_norm; the last good state "
                    f"is the newest in {self.folder}"
                )
        return values

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"trainer": {"step": self.step, "skipped": self.skipped}}
        for objective in self.objectives:
            state[objective.name] = {
                "module": get_model_state_dict(objective.module),
                "optimizer": get_optimizer_state_dict(objective.module, self.optimizers[objective.name]),
                "averages": {str(decay): get_model_state_dict(m) for decay, m in objective.averages.items()},
            }
        return state

    def save(self) -> None:
        """Checkpoint the present step, unless it is there already."""
        if self.step != self.saved:
            checkpoint.save(self.folder, self.step, self._state(), self.config.keep, self.world)
            self.saved = self.step

    def _load(self, path: Path) -> None:
        state = self._state()
        checkpoint.load(path, state, self.world)
        self.step, self.skipped = state["trainer"]["step"], state["trainer"]["skipped"]
        self.saved = self.step
        for objective in self.objectives:
            saved = state[objective.name]
            set_model_state_dict(objective.module, saved["module"])
            set_optimizer_state_dict(objective.module, self.optimizers[objective.name], saved["optimizer"])
            for decay, module in objective.averages.items():
                set_model_state_dict(module, saved["averages"][str(decay)])
