"""The training loop for a list of objectives, on any number of processes."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

from raekit.config import Interval, OnPurpose, Operation, Steps, configclass
from raekit.distributed import World
from raekit.distributed.sharding import gathered, local, set_gradient_sync, shard
from raekit.errors import Stopped, UserError, whole_number
from raekit.files import PARTIAL, check_space, remove
from raekit.training import checkpoint, ema
from raekit.training.casting import CastWeights
from raekit.training.compilation import check_compiler, compile_parts
from raekit.training.memory import fitting
from raekit.training.objective import Metrics, Objective, Periodic, TrainingBatch
from raekit.training.optim import build_optimizer, count_moments
from raekit.training.precision import Precision, autocast, compute_dtype, float32_precision
from raekit.training.recompute import checkpoint_blocks, without_recomputation
from raekit.training.signals import Stop
from raekit.training.throughput import Speed, flop_counter, peak_of
from raekit.training.tracking import TrackerName, Tracking, check_trackers

_log = logging.getLogger(__name__)
Report = Callable[[int, dict[str, float]], None]
"""A function that receives the number of finished steps and the latest metrics."""


@configclass
class TrainConfig:
    """Settings of the training loop.

    Attributes:
        steps: Optimizer steps of the complete training.
        batch_size: Global batch: images per optimizer step, over all processes.
        micro_batch: Images per forward pass on one process. Gradients accumulate over the micro-batches of a step.
            None: the full share of the process in the batch. `auto`: the largest part of this share that fits into the
            memory of every GPU, found by a trial before the first step.
        precision: Number format of forward and backward passes. `auto`: bf16 on GPUs that multiply it natively, on CPUs
            with AMX and on AMD's CPUs with AVX-512 BF16, else fp32. Weights stay float32.
        compile: Compile the blocks with torch.compile.
        checkpointing: Keep only the inputs of the blocks in memory. The backward pass runs each block again.
        seed: Seed of the data order, of the noise and of all other random numbers.
        log_every: Steps between two records in metrics.jsonl.
        monitor_every: Steps between two measurements of the largest attention logit, a multiple of `log_every`. Each
            measurement costs one forward pass. None turns them off.
        checkpoint_every: Steps between two checkpoints.
        keep: Number of checkpoints to keep.
        background_saves: Write checkpoints while the training continues, from a copy of the state in host memory.
            None: True on CUDA, False on a CPU.
        milestones: Steps whose weights are kept, in RUN/milestones. RUN@STEP is the name of such a model.
        ema_warmup: Averages start with a small decay, min(decay, (1 + n) / (10 + n)) after n updates, so that the
            averages of a short training do not contain its initial weights. If off, the decay is constant, as
            published.
        max_skipped: Training fails if the gradient was not finite in at least this many steps up to a log record.
        shard: Number of processes that share one copy of weights, gradients, moments and averages. The copies are
            replicated over the other processes. 1 needs the most memory and the fewest messages.
        track: Trackers to send the config, values and pictures to: TensorBoard, Weights & Biases, trackio.
    """

    steps: OnPurpose[Steps]
    batch_size: int
    micro_batch: Operation[int | Literal["auto"] | None] = None
    precision: OnPurpose[Precision] = "auto"
    compile: Operation[bool] = False
    checkpointing: Operation[bool] = False
    seed: int = 0
    log_every: Operation[int] = 50
    monitor_every: Operation[int | None] = None
    checkpoint_every: Operation[Interval] = 1000
    keep: Operation[int] = 2
    background_saves: Operation[bool | None] = None
    milestones: Operation[tuple[Interval, ...]] = ()
    ema_warmup: bool = False
    max_skipped: Operation[int] = 20
    shard: Operation[int] = 1
    track: Operation[tuple[TrackerName, ...]] = ()

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "micro_batch", "log_every", "checkpoint_every", "keep", "max_skipped", "shard")
        for name in (*counts, "monitor_every"):
            value = getattr(self, name)
            if isinstance(value, int):
                whole_number(f"train.{name}", value, 1, 10**12)
        whole_number("train.seed", self.seed, -(2**63), 2**63 - 1)  # what torch takes
        for step in self.milestones:
            whole_number("train.milestones", step, 1)
        if self.monitor_every and self.monitor_every % self.log_every:
            raise UserError(
                f"train.monitor_every: {self.monitor_every} must be a multiple of train.log_every = {self.log_every}"
            )


def check_settings(config: TrainConfig, world: World) -> int:
    """Return the largest micro-batch of a process, and raise UserError if these processes cannot train so."""
    share, rest = divmod(config.batch_size, world.size)
    micro_batch = config.micro_batch if isinstance(config.micro_batch, int) else share
    if rest or share % micro_batch:
        raise UserError(
            f"train.batch_size: {config.batch_size} must divide into {world.size} processes with whole micro-batches "
            f"of train.micro_batch = {config.micro_batch}"
        )
    if (last := max(config.milestones, default=0)) > config.steps:
        raise UserError(f"train.milestones: the training ends at train.steps = {config.steps}, before step {last}")
    if world.size % config.shard:
        raise UserError(f"train.shard: {config.shard} must divide {world.size}, the number of processes")
    if config.compile:
        check_compiler("train.compile", world.device)
    check_trackers(config.track)
    return micro_batch


class Trainer:
    """Trains a list of objectives and keeps its state in a run folder.

    If the run has checkpoints, the trainer resumes from the newest.

    Args:
        run: The run folder; it receives metrics and checkpoints.
        config: Settings of the loop.
        objectives: The modules to train, each with its loss. Every step trains them in this order.
        batches: Takes the number of images seen so far and returns an endless stream of this process's batches.
        world: The processes of this training.
        periodics: Functions to call at intervals, for example evaluations.
        export: Writes the present weights as a model folder. Called after each checkpoint, and for milestones.
        about: The config of the run, for its trackers.

    Raises:
        UserError: If the batch does not divide into processes and micro-batches, or if a requirement is not installed.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        objectives: Sequence[Objective],
        batches: Callable[[int], Iterator[TrainingBatch]],
        world: World,
        periodics: Sequence[Periodic] = (),
        export: Callable[[Path], None] = lambda folder: None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.micro_batch = check_settings(config, world)
        if config.precision == "bf16" and compute_dtype("auto", world.device) == torch.float32:
            _log.warning("train.precision: bf16 is slower than fp32 on this device, which does not multiply it fast")
        self.run, self.config, self.world = run, config, world
        self.objectives, self.batches, self.periodics = list(objectives), batches, periodics
        self.export, self.about = export, about
        self.step = 0
        self.saved = -1  # step of the newest checkpoint
        self.skipped = {o.name: torch.zeros(2, device=world.device) for o in self.objectives}  # total, in a row
        self.window: defaultdict[str, list[Tensor]] = defaultdict(list)  # metrics of the steps since the last record
        self.flops: dict[frozenset[str], float] = {}  # of one image, by the names of a step's metrics
        self.optimizers: dict[str, optim.Optimizer] = {}
        for objective in self.objectives:
            self._prepare(objective)
        self.folder = run / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        background = world.device.type == "cuda" if config.background_saves is None else config.background_saves
        self.writer = checkpoint.Writer(self.folder, config.keep, world, background)
        if saved := checkpoint.newest(self.folder, world):
            self._load(saved)
        else:
            # A new checkpoint is written before the oldest is deleted.
            check_space(self.folder, (config.keep + 1) * self._checkpoint_size(), "put the run on another disk")
        missed = [step for step in config.milestones if step < self.step and not self._milestone(step).is_dir()]
        if missed and world.is_main:
            _log.warning(
                "train.milestones: %s will not be kept, because this run has already trained %d steps",
                ", ".join(map(str, missed)),
                self.step,
            )

    def _checkpoint_size(self) -> int:
        """Return the bytes of the weights, moments and averages of all objectives, which are float32."""
        return 4 * sum(
            sum(p.numel() for p in o.module.parameters()) * (1 + len(o.averages))
            + count_moments(o.optim, o.module, o.convolutions)
            for o in self.objectives
        )

    def _prepare(self, objective: Objective) -> None:
        module = objective.module.to(self.world.device)
        objective.averages = {decay: ema.averaged_copy(module) for decay in objective.ema}
        names = [name for name, m in module.named_modules() if any(m is block for block in objective.blocks)]
        for replica in (module, *objective.averages.values()):
            blocks = [replica.get_submodule(name) for name in names]
            if self.config.checkpointing and replica is module:
                checkpoint_blocks(blocks)
            shard(replica, blocks, self.world, self.config.shard)
            if self.config.compile:
                compile_parts(blocks or [replica])
        optimizer = self.optimizers[objective.name] = build_optimizer(objective.optim, module, objective.convolutions)
        # To read the state of a new optimizer, torch runs one step. With found_inf = 1 that step changes nothing.
        optimizer.found_inf = torch.ones((), device=self.world.device)  # type: ignore[attr-defined]

    def fit(self, report: Report = lambda step, metrics: None, stop: Stop | None = None) -> None:
        """Train to the last step and save the state.

        Args:
            report: Receives the metrics of each log record.
            stop: Says when to stop. Default: never.

        Raises:
            Stopped: If `stop` was requested. The state of the last complete step is saved.
        """
        self.stop = stop or Stop()
        tracker = Tracking(self.run, self.step, self.config.track, self.about) if self.world.is_main else None
        try:
            if self.step:  # the last process may have died between this checkpoint and its artifact or evaluation
                self._publish()
                self._evaluate(tracker, again=False)
            if self.config.micro_batch == "auto":
                first = cache(lambda: next(self.batches(0)))
                self.micro_batch = fitting(self.micro_batch, lambda size: self._trial(first(), size), self.world)
            stream = self.batches(self.step * self.config.batch_size)
            peak = peak_of(self.world.device, self.config.precision)
            speed = Speed(self.step, self.config.batch_size, self.world, peak)
            with self.stop.deferred():
                while self.step < self.config.steps:
                    for name, value in self._train_step(stream, speed).items():
                        self.window[name].append(value)
                    self.step += 1
                    last = self.step == self.config.steps
                    if self.step % self.config.log_every == 0 or last:
                        values = self._summary()
                        values |= speed.record(self.step, self.config.steps)
                        if tracker:
                            tracker.scalars(self.step, values)
                        report(self.step, values)
                        self.window.clear()
                    # Save before an evaluation, which a signal may end, so that no step is lost.
                    if self._saves():
                        with speed.paused():
                            self.save()
                            if any(map(self._is_due, self.periodics)):
                                self.writer.finish()  # a process that stops in an evaluation ends its threads
                            with self.stop.allowed():
                                self._publish()
                                self._evaluate(tracker)
        except Stopped:
            with self.stop.deferred():
                self.writer.finish()
            raise
        except BaseException:  # of this process; others may be anywhere
            with self.stop.deferred():
                self.writer.settle()
            raise
        else:
            with self.stop.deferred():
                self.writer.finish()
        finally:
            if tracker:
                tracker.close()

    def _train_step(self, stream: Iterator[TrainingBatch], speed: Speed) -> Metrics:
        """Do one step of all active objectives; return their metrics, and tell `speed` what the step took.

        If a process was asked to stop or has no batch, all processes save the state of the last step and raise.
        """
        batch, failure = None, self.writer.failure()
        try:
            with self.stop.allowed(), speed.waiting():
                batch = next(stream).to(self.world.device)
        except (Stopped, Exception) as error:
            failure = failure or error
        if self.world.any(failure is not None or self.stop.requested):
            self._save_and_publish()
            if self.world.any(isinstance(failure, Exception)):
                elsewhere = UserError("another process could not load its batch; its own message says why")
                raise failure if isinstance(failure, Exception) else elsewhere
            raise Stopped
        assert batch is not None
        metrics: Metrics = {}
        for objective in self.objectives:
            if self.step >= objective.start:
                metrics |= self._train(objective, batch, may_stop=not metrics)
        work = frozenset(metrics)  # a loss that starts later has a metric of its own
        if work not in self.flops:
            with speed.paused():
                self.flops[work] = self._count_flops(batch)
        speed.add(self.config.batch_size * self.flops[work])
        return metrics

    def _count_flops(self, batch: TrainingBatch) -> float:
        """Return the FLOPs of one image in the present step, forward and backward, without recomputed activations."""
        with ExitStack() as stack:
            for objective in self.objectives:
                stack.enter_context(without_recomputation(objective.blocks))
            counter = stack.enter_context(flop_counter())
            self._passes(batch.split(1)[0], self.step)
        return counter.get_total_flops()

    def _trial(self, batch: TrainingBatch, size: int) -> None:
        """Do the work of the last step on two micro-batches of `size` images of `batch`, and change nothing."""
        self._state()  # allocates the state of new optimizers
        self._passes(batch.split(size)[0].to(self.world.device), self.config.steps - 1, count=2)

    def _passes(self, part: TrainingBatch, step: int, count: int = 1) -> None:
        """Do the forward and backward passes of a step on `count` micro-batches `part`, and change nothing."""
        modes = [objective.module.training for objective in self.objectives]
        for objective in self.objectives:
            objective.module.eval()  # no buffer changes
        for objective in self.objectives:
            if step >= objective.start:
                # With the casts of several micro-batches, which take the most memory.
                with torch.compiler.set_stance("force_eager"):
                    weights = self._cast_weights(objective, parts=2)
                    for number in range(1, count + 1):
                        # A distributed module would keep a gradient that is never synchronised until the next step.
                        set_gradient_sync(objective.module, number == count)
                        self._backward(objective, part, step, weights)
                    del weights
                for optimizer in self.optimizers.values():
                    optimizer.zero_grad(set_to_none=True)
        for objective, mode in zip(self.objectives, modes, strict=True):
            objective.module.train(mode)

    def _cast_weights(self, objective: Objective, parts: int) -> CastWeights:
        """Return the weights that the passes of a step with `parts` micro-batches compute with.

        In distributed modules, and for a single micro-batch, autocast casts the weights: compiled blocks then cast them
        together with other work, which makes a step of DiT^DH-XL 6 % faster on an H200.
        """
        dtype = compute_dtype(self.config.precision, self.world.device)
        once = dtype != torch.float32 and self.world.size == 1 and parts > 1
        return CastWeights(objective.blocks if once else [], dtype)

    def _backward(
        self, objective: Objective, part: TrainingBatch, step: int, weights: CastWeights, parts: int = 1
    ) -> Metrics:
        """Do the forward and backward passes of one of `parts` micro-batches; return the loss and the metrics."""
        with float32_precision(self.config.precision), weights.used():
            with autocast(self.config.precision, self.world.device):
                loss, metrics = objective.loss(part, step)
            (loss / parts).backward()
        return {"loss": loss} | metrics

    def _stop_within_step(self, buffers: dict[str, dict[str, Tensor]]) -> None:
        """Between two micro-batches, before any weight has changed: save the last step and stop, if this is wanted."""
        if not self.world.any(self.stop.requested):
            return
        for objective in self.objectives:
            self.optimizers[objective.name].zero_grad(set_to_none=True)
            for name, value in objective.module.named_buffers():
                value.copy_(buffers[objective.name][name])
        self._save_and_publish()
        raise Stopped

    def _is_due(self, periodic: Periodic) -> bool:
        return self.step % periodic.every == 0 or self.step == self.config.steps

    def _saves(self) -> bool:
        """Return whether a checkpoint is due at this step."""
        regular = self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps
        return regular or self.step in self.config.milestones or any(map(self._is_due, self.periodics))

    def _save_and_publish(self) -> None:
        """Save the state before the training ends early."""
        if self.step:
            self.save()
            self.writer.finish()
            self._publish()

    def _milestone(self, step: int) -> Path:
        return self.run / "milestones" / checkpoint.name(step)

    def _publish(self) -> None:
        """Refresh RUN/artifact, so that a running training can be sampled from, and keep a milestone."""
        self.export(self.run / "artifact")
        milestone = self._milestone(self.step)
        if self.step in self.config.milestones and self.world.any(self.world.is_main and not milestone.is_dir()):
            # A milestone can have several artifacts. It gets its name when all of them are there.
            partial = milestone.with_name(milestone.name + PARTIAL)
            if self.world.is_main:
                remove(partial)
            self.export(partial)
            if self.world.is_main:
                partial.replace(milestone)
        self.world.barrier()  # the first process writes, and then all may read

    def _evaluate(self, tracker: Tracking | None, again: bool = True) -> None:
        """Call the periodics that are due and log their values. Without `again`, skip those in metrics.jsonl."""
        for periodic in self.periodics:
            if not self._is_due(periodic):
                continue
            if not again and self.world.any(
                tracker is not None and f"{periodic.name}/seconds" in tracker.files.resumed
            ):
                continue
            began = time.perf_counter()
            with gathered(module for o in self.objectives for module in (o.module, *o.averages.values())):
                results = periodic.call(self.step)
            values = dict(results) | {"seconds": time.perf_counter() - began}
            pictures = {name: value for name, value in values.items() if isinstance(value, Image)}
            scalars = {f"{periodic.name}/{k}": v for k, v in values.items() if not isinstance(v, Image)}
            if tracker:
                with self.stop.deferred():
                    # The pictures first: the values say that this evaluation is done.
                    if pictures:
                        tracker.images(self.step, pictures)
                    tracker.scalars(self.step, scalars)
                self.stop.check()

    def _train(self, objective: Objective, batch: TrainingBatch, may_stop: bool) -> Metrics:
        """Do one optimizer step of `objective` on this process's share of the batch; return its metrics.

        If `may_stop`, the training may stop between two micro-batches, as if the step had not begun.
        """
        module, optimizer = objective.module, self.optimizers[objective.name]
        module.train()
        parts = batch.split(self.micro_batch)
        may_stop &= len(parts) > 1
        # Forward passes may change buffers.
        buffers = {o.name: {k: v.clone() for k, v in o.module.named_buffers()} for o in self.objectives if may_stop}
        totals = self._monitor(objective, parts[0])
        weights = self._cast_weights(objective, len(parts))
        for part in parts:
            if may_stop and part is not parts[0]:
                self._stop_within_step(buffers)
            set_gradient_sync(module, part is parts[-1])
            for name, value in self._backward(objective, part, self.step, weights, len(parts)).items():
                name = f"{objective.name}/{name}"
                totals[name] = totals.get(name, 0) + value.detach().float() / len(parts)
        del weights  # the optimizer needs the memory
        norm = nn.utils.get_total_norm(p.grad for p in module.parameters() if p.grad is not None)
        if isinstance(norm, DTensor):  # summed over the shards
            norm = norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
        if objective.optim.clip:
            nn.utils.clip_grads_with_norm_(module.parameters(), objective.optim.clip, norm)
        lr = objective.learning_rate(self.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # With found_inf = 1 the fused AdamW changes nothing. So a gradient that is not finite is skipped on the device,
        # and the host does not wait for the norm.
        failed = 1 - norm.isfinite().float()
        optimizer.found_inf = failed  # type: ignore[attr-defined]
        optimizer.step()
        # A loss may leave gradients in another objective's module.
        for every in self.optimizers.values():
            every.zero_grad(set_to_none=True)
        for decay, average in objective.averages.items():
            updates = self.step - objective.start
            ema.update(average, module, ema.warmed_up(decay, updates) if self.config.ema_warmup else decay)
        failed = local(failed)
        skipped = self.skipped[objective.name]
        skipped[0] += failed
        skipped[1] = (skipped[1] + 1) * failed
        totals[f"{objective.name}/grad_norm"] = local(norm)
        return totals

    def _monitor(self, objective: Objective, part: TrainingBatch) -> Metrics:
        """Return the monitor's values of an extra forward pass, the largest over all processes; {} if it is not due."""
        every = self.config.monitor_every
        if objective.monitor is None or not every or (self.step + 1) % every:
            return {}
        with (
            torch.compiler.set_stance("force_eager"),
            objective.monitor() as seen,
            float32_precision(self.config.precision),
            autocast(self.config.precision, self.world.device),
        ):
            objective.loss(part, self.step)
        largest = {name: max(self.world.gather(value.item())) for name, value in seen.items()}
        return {f"{objective.name}/{name}": torch.tensor(v, device=self.world.device) for name, v in largest.items()}

    def _summary(self) -> dict[str, float]:
        """Return means over steps and processes, without skipped steps. UserError if too many in a row were skipped."""
        names = sorted(self.window)
        windows = [torch.stack(self.window[name]) for name in names]
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
        window = {name: self._shared_means(self.window[name]) for name in sorted(self.window)}
        state: dict[str, Any] = {
            "trainer": {"step": self.step, "skipped": self.skipped, "window": json.dumps(window)},
        }
        for objective in self.objectives:
            state[objective.name] = {
                "module": get_model_state_dict(objective.module),
                "optimizer": get_optimizer_state_dict(objective.module, self.optimizers[objective.name]),
                "averages": {str(decay): get_model_state_dict(m) for decay, m in objective.averages.items()},
            }
        return state

    def _shared_means(self, values: list[Tensor]) -> list[float]:
        """Return the mean over the processes of a metric of each step. Every process must call it."""
        return (self.world.sum(torch.stack(values)) / self.world.size).tolist()

    def save(self) -> None:
        """Write a checkpoint of the current step, unless it exists. The state before the first step needs none."""
        if self.step not in (0, self.saved):
            self.writer.save(self.step, self._state())
            if self.saved < 0:  # a run that has an artifact also has a checkpoint to resume from
                self.writer.finish()
            self.saved = self.step

    def _load(self, path: Path) -> None:
        state = self._state()
        checkpoint.load(path, state, self.world)
        self.step, self.skipped = state["trainer"]["step"], state["trainer"]["skipped"]
        self.saved = self.step
        for name, values in json.loads(state["trainer"]["window"]).items():
            self.window[name] = list(torch.tensor(values, device=self.world.device))
        for objective in self.objectives:
            saved = state[objective.name]
            set_model_state_dict(objective.module, saved["module"])
            set_optimizer_state_dict(objective.module, self.optimizers[objective.name], saved["optimizer"])
            for decay, module in objective.averages.items():
                set_model_state_dict(module, saved["averages"][str(decay)])
