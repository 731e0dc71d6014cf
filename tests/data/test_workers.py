"""What happens when a worker fails, is killed, or has no memory or files left."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from raekit.data import workers
from raekit.data.workers import load_parts
from raekit.distributed import World
from raekit.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
Read = tuple[torch.Tensor, dict[str, str]]


class Failing(Dataset[Read]):
    """Reads two parts. The next part fails in the way `how`."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __getitem__(self, part: range) -> Read:
        if part.start >= 2:
            if self.how == "damaged":
                raise UserError("shard 3: damaged; make it again")
            if self.how == "missing":
                raise FileNotFoundError(2, "No such file or directory", "a.png")
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "asleep":
                time.sleep(1e6)
            if self.how == "full":
                torch.Tensor.share_memory_ = full  # type: ignore[method-assign]
        return torch.full((100,), float(part.start)), {}


def full(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\nat ..."
    )


def read(how: str, count: int = 2) -> Iterator[Read]:
    return load_parts(Failing(how), (range(i, i + 1) for i in range(60)), count, World())


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_in_a_worker_is_the_error_without_workers(count):
    stream = read("damaged", count)
    assert [next(stream)[0][0].item() for _ in range(2)] == [0, 1]
    with pytest.raises(UserError) as raised:
        next(stream)
    assert str(raised.value) == "shard 3: damaged; make it again"


def test_a_missing_file_keeps_its_name():
    with pytest.raises(FileNotFoundError) as raised:
        list(read("missing"))
    assert raised.value.filename == "a.png"


def test_a_killed_worker_is_one_line_and_only_the_next_batch_knows():
    """The error comes from the request for a batch, and not from a signal handler in the middle of a step."""
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match=r"data\.workers: a worker process was killed by SIGKILL, perhaps .*memory"):
        list(read("killed"))
    assert signal.getsignal(signal.SIGCHLD) is before


def test_without_shared_memory_the_limit_is_named():
    with pytest.raises(UserError, match=r"data\.workers: .*No space left on device.*/dev/shm.*lower data\.workers"):
        list(read("full"))


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """Allow this process and its workers only `more` open files than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(map(int, os.listdir("/proc/self/fd")))
    with ExitStack() as fillers:
        while fillers.enter_context(open(os.devnull)).fileno() < top:  # the limit is on the number of a file
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + more, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_open_files_the_limit_is_named():
    held = []
    with few_files(25), pytest.raises(UserError, match=r"data\.workers: .*ulimit -n.*lower data\.workers"):
        held.extend(read("never"))  # each batch in shared memory is an open file


def test_workers_end_in_the_middle_of_their_work():
    stream = read("asleep", count=1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_workers_end_if_the_start_of_others_is_stopped(monkeypatch: pytest.MonkeyPatch):
    def stopped(loaded: DataLoader) -> None:
        started.append(iter(loaded))
        raise KeyboardInterrupt

    started: list[object] = []
    monkeypatch.setattr(workers, "_started", stopped)
    with pytest.raises(KeyboardInterrupt):
        next(read("never"))
    for child in multiprocessing.active_children():
        child.join()
    assert started


def test_a_process_that_ends_with_open_workers_does_not_wait_for_them():
    """As after an error elsewhere, whose traceback keeps the stream."""
    code = "from tests.data.test_workers import read\nstream = read('never')\nnext(stream)\nraise SystemExit(3)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 3
