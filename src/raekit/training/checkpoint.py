"""Training checkpoints on disk, in torch's distributed format: the number of processes may change between runs."""

import errno
import io
import os
import pickle
import re
import shutil
import sys
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from raekit.distributed import World
from raekit.errors import UserError
from raekit.files import PARTIAL, entries, remove

_SAVE_ERRORS = (CheckpointException, OSError, RuntimeError)


def name(step: int) -> str:
    """Return the name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first; UserError if it cannot be read."""
    return sorted(path for path in entries(folder) if re.fullmatch(r"step-\d+", path.name))


_ALONE = "torch.distributed is disabled"  # how torch's warning to a single process begins


_SETTLING = 600
"""The longest time in seconds to wait after an error for a save in the background."""


_FULL = 2**24
"""A disk is full if it has fewer free bytes while a partial checkpoint is on it."""


class Writer:
    """Writes the checkpoints of a run, and deletes all but the newest.

    A checkpoint is written under a temporary name and then renamed. So a killed process leaves the previous one.

    Args:
        folder: The folder of the checkpoints.
        keep: How many to keep.
        world: The processes. All of them call each method at the same point of the training, except `failure`.
        background: Write while the training continues. The state is copied to the host first.
    """

    def __init__(self, folder: Path, keep: int, world: World, background: bool = False) -> None:
        self.folder, self.keep, self.world, self.background = folder, keep, world, background
        # The background has its own connections: its messages would mix with messages of the training.
        self._group: Any = dist.new_group(backend="gloo") if background and world.size > 1 else None
        if background and world.size == 1:  # the thread that writes warns outside of `_quietly`
            warnings.filterwarnings("ignore", message=_ALONE)
        self._step = 0  # of the latest save
        self._saving: Future | None = None
        self._failure: UserError | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save `state` as the checkpoint of `step`. An earlier save in the background is completed first.

        Raises:
            UserError: If this or the earlier checkpoint cannot be written. Those before remain.
        """
        self.finish()
        if self.world.is_main:
            for unfinished in self.folder.glob(f"step-*{PARTIAL}"):  # left by a process that was killed while saving
                with suppress(OSError):
                    remove(unfinished)
        self.world.barrier()
        # With copies ahead, torch would wait for the GPU in the thread that writes, although the state is on the host.
        files, alone = dcp.FileSystemWriter(self._partial(step), per_thread_copy_ahead=0), self.world.size == 1
        future: Future = Future()
        try:
            with _quietly():
                if self.background:
                    copies = DefaultStager(StagingOptions(False, False, False, False))
                    saving = dcp.async_save(
                        state, storage_writer=files, async_stager=copies, process_group=self._group, no_dist=alone
                    )
                    assert isinstance(saving, Future)
                    future = saving
                else:
                    dcp.save(state, storage_writer=files, no_dist=alone)
                    future.set_result(None)
        except _SAVE_ERRORS as error:
            future.set_exception(error)
        self._step, self._saving = step, future
        if not self.background:
            self.finish()

    def failure(self) -> UserError | None:
        """Complete the save in the background if it is done; return its error. Processes may call it at any time."""
        if self._saving and self._saving.done():
            if (error := self._saving.exception()) is not None:
                self._failure = self._unsaved(error)
            else:
                self._publish()  # the first process learns that all have written their parts
            self._saving = None
        return self._failure

    def finish(self) -> None:
        """Wait for the save in the background and complete it.

        Raises:
            UserError: If the checkpoint could not be written.
        """
        if self._saving:
            self._saving.exception()  # waits
        error, self._failure = self.failure(), None
        if self.world.any(error is not None):
            raise error or self._unsaved(None)
        self.world.barrier()

    def settle(self) -> None:
        """Complete the save in the background after an error, if this needs no other process that has ended."""
        if self._saving:
            with suppress(TimeoutError):
                self._saving.exception(timeout=_SETTLING)
            self.failure()

    def _partial(self, step: int) -> Path:
        return self.folder / (name(step) + PARTIAL)

    def _publish(self) -> None:
        if self.world.is_main:
            final = self.folder / name(self._step)
            remove(final)
            self._partial(self._step).rename(final)
            for old in checkpoints(self.folder)[: -self.keep]:
                remove(old)

    def _unsaved(self, error: BaseException | None) -> UserError:
        _forget_files(error)
        root, full = _root(error) if error else None, False
        with suppress(OSError):  # not every file system tells
            # torch raises RuntimeError for a full disk.
            full = isinstance(root, RuntimeError) and shutil.disk_usage(self.folder).free < _FULL
        with suppress(OSError):
            remove(self._partial(self._step))
        kept = checkpoints(self.folder)
        have = f"the newest complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        remedy = f"Allow writing to {self.folder}" if isinstance(root, PermissionError) else "Free disk space"
        if not (full or isinstance(root, OSError)):
            remedy = "Remove the cause"
        cause = os.strerror(errno.ENOSPC) if full else _cause(error)
        return UserError(
            f"{self.folder / name(self._step)}: could not be saved ({cause}); {have}. {remedy} and run the "
            "same command again"
        )


def newest(folder: Path, world: World) -> Path | None:
    """Return the newest checkpoint in `folder` as the first process sees it, on every process.

    On a shared file system, processes may see a folder at different times.
    """
    found = checkpoints(folder)
    return world.gather(found[-1] if found else None)[0]


def load(path: Path, state: dict[str, Any], world: World) -> None:
    """Load the checkpoint at `path` into `state`, in place.

    Nothing of the checkpoint runs: classes outside of a fixed list are an error.

    Raises:
        UserError: If the checkpoint is unreadable, damaged, too large for the memory, or does not fit `state`.
    """
    reader = _Reader(path)
    try:
        with _quietly():
            _check_shapes(path, reader.read_metadata(), state)
            dcp.load(state, storage_reader=reader, planner=_Planner(), no_dist=world.size == 1)
    except UserError:
        raise
    except (CheckpointException, Exception) as error:
        raise _unloadable(path, _root(error)) from None


class _Unpickler(pickle.Unpickler):
    """Reads the index of a checkpoint, which is a pickle, but only these names of it."""

    NAMES = frozenset(
        {
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13
            ("torch", "Size"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.serialization", "_get_layout"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        number_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in self.NAMES or number_type:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read what `plan` needs, after a comparison with the checksums that torch writes but does not check."""
        for index in {item.storage_index for item in plan.items}:
            stored = self.storage_data[index]
            with (Path(self.path) / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                content = io.BytesIO(file.read(stored.length))
            if zipfile.ZipFile(content).testzip() is not None:
                raise ValueError(f"{index.fqn} does not match its checksum")
        return super().read_data(plan, planner)


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        torch.load(value, weights_only=True)  # fails for everything but numbers, texts and containers
        value.seek(0)
        super().load_bytes(read_item, value)


def _check_shapes(path: Path, metadata: Metadata, state: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint lacks a tensor of this run, or has it in another shape."""
    then = {
        name: tuple(stored.size)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    now = dict(_tensors(state))
    changed = [
        f"{name}: {then.get(name, 'absent')} -> {now[name]}"
        for name in sorted(now)  # a checkpoint may hold more
        if then.get(name) != now[name]
    ]
    if changed:
        more = [f"and {len(changed) - 10} more"] if len(changed) > 10 else []
        raise UserError(
            f"{path}: saved by a run with other shapes. Shapes in the checkpoint -> shapes now:\n  "
            + "\n  ".join(changed[:10] + more)
            + "\nSet the sizes of that run again (RUN/config.json has them), or choose another --run"
        )


def _tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(state, Tensor):
        yield prefix, tuple(state.shape)
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from _tensors(value, f"{prefix}.{i}")


def _unloadable(path: Path, error: BaseException) -> UserError:
    """Return the error for a checkpoint that cannot be loaded, with the true cause."""
    cause = _cause(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return UserError(
            f"{path}: does not fit into the memory ({cause}). The checkpoint is not damaged: free memory, or use more "
            "processes with train.shard"
        )
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | EOFError):
        return UserError(
            f"{path}: could not be read ({cause}). The checkpoint may be intact: check the disk and its permissions, "
            "and run the same command again"
        )
    if checkpoints(path.parent)[:1] == [path]:
        return UserError(
            f"{path}: damaged ({cause}), and there is no earlier checkpoint to resume from. Choose another --run; in "
            f"stages 1 and 2, --init-from {path.parents[1]} starts it from the model of this run"
        )
    return UserError(
        f"{path}: damaged ({cause}). To resume from the checkpoint before it, move it aside: mv {path} {path}.damaged"
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide torch's warning that the process group is disabled, which is intended for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        yield


def _forget_files(error: BaseException | None) -> None:
    """Delete the local variables of a failed save. From Python 3.13 on, torch's files print errors when they go."""
    if error is None:
        return
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = before
    failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    for other in (*failures, error.__cause__, error.__context__):
        _forget_files(other)


def _root(error: BaseException) -> BaseException:
    """Return the innermost cause of a distributed checkpoint's nested exceptions."""
    if isinstance(error, CheckpointException) and error.failures:
        return _root(next(iter(error.failures.values()))[0])
    return error


def _cause(error: BaseException | None) -> str:
    """Return the innermost cause of an error in one line. None: the error is another process's."""
    if error is None:
        return "another process failed; its own message says why"
    root = _root(error)
    lines = [line for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0][:200]}" if lines else type(root).__name__
