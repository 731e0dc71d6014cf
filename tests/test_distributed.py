import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self, cast

import pytest
import torch

from raekit.distributed import World, check_shared, prepare_device, world
from raekit.distributed.liveness import Watch
from raekit.errors import UserError
from raekit.training import checkpoint
from raekit.training.tracking import read_metrics


def test_cudnn_attention_and_tf32_are_off_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    try:
        with world("cuda") as here:
            assert here.device.type == "cuda"
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.flash_sdp_enabled()
            assert not torch.backends.cudnn.allow_tf32
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(UserError, match=r"torchrun: more processes than CUDA devices \(1\); start at most 1"):
            world("cuda").__enter__()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# Processes that end without the others


def start(code: str, **environment: str) -> "subprocess.Popen[str]":
    prelude = (
        "import os, sys, time\nfrom raekit.distributed import liveness\nliveness.DEAD, liveness.GRACE = 5.0, 0.5\n"
    )
    command = [sys.executable, "-c", f"{prelude}from raekit.distributed import world\n{code}"]
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def pair_of(code: str) -> "list[subprocess.Popen[str]]":
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(code, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]


WAITING = """
with world("cpu") as here:
    here.barrier()
    if here.rank == {rank}:
        {end}
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("rank", "end", "says"),
    [
        (1, "os.kill(os.getpid(), 9)", "error: process 1 gave no sign of life for 5 seconds"),
        (0, "os.kill(os.getpid(), 9)", "error: the first process, or the launcher, ended"),
        (1, "raise OSError('disk')", "error: process 1 failed; its own message says why"),
    ],
)
def test_nobody_waits_for_a_process_that_died(rank, end, says):
    processes = pair_of(WAITING.format(rank=rank, end=end))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert processes[1 - rank].returncode == 1
    assert says in errors[1 - rank]
    assert "run the same command again to resume" in errors[1 - rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_has_done_its_work_waits_for_the_others(rank):
    code = f"with world('cpu') as here:\n    here.barrier()\n    time.sleep(9 if here.rank == {rank} else 0)"
    processes = pair_of(code)  # a process is dead after 5 seconds
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_a_process_that_may_not_end_yet_is_not_ended_by_a_stop():
    """As one that writes a checkpoint for longer than `GRACE`."""
    code = """
with world("cpu") as here:
    here.barrier()
    with here.watch.on_stop(lambda: None, lambda: False):
        here.rank or here.watch.request_stop()
        time.sleep(4)
"""
    processes = pair_of(code)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_a_late_request_to_stop_does_not_stop_the_next_piece_of_work(monkeypatch):
    looked, go, again = threading.Event(), threading.Event(), threading.Event()
    interrupted = []

    class Store:
        """Another process wants to stop the first piece of work. This process learns of it late."""

        def clone(self) -> Self:
            return self

        def add(self, key: str, amount: int) -> int:
            if go.is_set():
                again.set()
            return 1

        def check(self, keys: list[str]) -> bool:
            if keys == ["failed"]:
                looked.set()
                go.wait(30)
            return keys == ["stop/1"]

    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: store)
    watch = Watch(cast(Any, Store()), 0, 1)
    with watch.on_stop(lambda: interrupted.append("first"), lambda: True):
        assert looked.wait(30)
    with watch.on_stop(lambda: interrupted.append("second"), lambda: True):
        go.set()
        assert again.wait(30)
    watch.leave(failed=False)
    assert interrupted == []


def test_a_process_that_has_done_its_work_does_not_wait_for_a_dead_one():
    code = "with world('cpu') as here:\n    here.barrier()\n    here.rank and os.kill(os.getpid(), 9)"
    processes = pair_of(code)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert processes[0].returncode == 0, errors


FAILING = """
import os
import socket
from raekit.recipes.emoji_encoder import config
from raekit.stages import run

def fail(*arguments):
    raise OSError("the disk broke")

if os.environ.get("RANK") == "0":  # the other process waits for this one
    run.build = fail
socket.getfqdn = lambda name="": "name.invalid"  # as in a container whose name has no address
"""


def test_a_first_process_that_fails_says_why_before_the_launcher_ends_it(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "raekit", "train", str(tmp_path / "failing.py"), "--processes", "2"]
    done = subprocess.run([*command, "--run", tmp_path / "run"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "error: input/output: the disk broke" in done.stderr


def test_a_launched_process_that_was_killed_is_named(tmp_path):
    killed = FAILING.replace('raise OSError("the disk broke")', "os.kill(os.getpid(), 9)").replace('"0"', '"1"')
    (tmp_path / "killed.py").write_text(killed)
    command = [sys.executable, "-m", "raekit", "train", str(tmp_path / "killed.py"), "--processes", "2"]
    done = subprocess.run([*command, "--run", tmp_path / "run"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "error: process 1 was killed by signal 9 (SIGKILL), perhaps because memory ran out; run the same command again "
        "to resume\n"
    )


def test_a_process_that_waits_in_a_collective_for_a_killed_one_says_so():
    code = WAITING.replace("time.sleep(100)", "here.barrier()").format(rank=1, end="os.kill(os.getpid(), 9)")
    processes = pair_of(code)
    errors = processes[0].communicate(timeout=300)[1]
    processes[1].communicate(timeout=300)
    assert processes[0].returncode == 1
    assert "UserError: the connection to another process broke (" in errors


def test_tasks_of_slurm_form_a_world():
    code = "with world('cpu') as here:\n    sys.exit(10 * here.size + sum(here.gather(here.rank + 1)))"
    port = free_port()
    tasks = [
        start(code, SLURM_PROCID=rank, SLURM_NTASKS="2", SLURM_LOCALID=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in ("0", "1")
    ]
    for task in tasks:
        task.communicate(timeout=300)
    assert [task.returncode for task in tasks] == [23, 23]


def look(world: World, folders: list[Path]) -> tuple[str, list[bool]]:
    first = [world.is_first(what) for what in ("a, b", "a, b", "c")]
    for _ in range(2):  # the second time, the names are known
        world.count_distinct("d", ["both", f"process {world.rank}"])
    world.barrier()
    assert (world.count_distinct("d", ["both"]), world.count_distinct("e", [])) == (3, 0)
    try:
        check_shared(folders[world.rank], world)
    except UserError as error:
        return str(error), first
    return "shared", first


def test_a_folder_that_only_one_machine_sees_is_refused(run_ranks, tmp_path, monkeypatch):
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    both = run_ranks(look, 2, [shared, shared])
    assert [text for text, _ in both] == ["shared", "shared"]
    for mine_first, other_first in zip(*(first for _, first in both), strict=True):
        assert mine_first != other_first  # exactly one process is the first
    assert all(first[0] == first[1] for _, first in both)  # and stays it
    assert list(shared.iterdir()) == []
    mine.mkdir()
    found = run_ranks(look, 2, [shared, mine])
    assert [text.split(": ")[1] for text, _ in found] == [
        "must be on a file system that all machines share; choose another --run"
    ] * 2


# Launchers


TRAIN = [
    *("train", "emoji_encoder", "--device", "cpu", "--data.image-size", "16", "--score-every", "100000"),
    *("--encoder.image-size", "16", "--encoder.patch-size", "4", "--encoder.width", "16", "--encoder.depth", "1"),
    *("--encoder.heads", "2", "--decoder-width", "16", "--decoder-depth", "1"),
    *(
        "--train.precision",
        "fp32",
        "--train.batch-size",
        "12",
        "--train.log-every",
        "1",
        "--train.checkpoint-every",
        "20",
    ),
]


def losses(run: Path) -> dict[int, float]:
    return {int(r["step"]): r["encoder/loss"] for r in read_metrics(run) if "encoder/loss" in r}


def wait_for(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while max(losses(run), default=0) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def launched(*command: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_a_world_is_stopped_killed_and_resumed_with_other_launchers(images, tmp_path):
    """Two torchruns of two processes; one is killed. Then three processes of `--processes`, stopped by a signal."""
    train = [*TRAIN, "--data.source", images]
    alone, run = tmp_path / "alone", tmp_path / "run"
    single = launched("raekit", *train, "--train.steps", "120", "--run", str(alone))
    _, errors = single.communicate(timeout=300)
    assert single.returncode == 0, errors

    meet = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test"]
    command = ["torch.distributed.run", *meet, "-m", "raekit", "--", *train, "--train.steps", "120", "--run", str(run)]
    machines = [launched(*command) for _ in range(2)]
    wait_for(run, 30, machines[0])
    workers = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text().split()
    assert len(workers) == 2
    for pid in (machines[1].pid, *map(int, workers)):  # as if the machine had lost its power
        os.kill(pid, signal.SIGKILL)
    for machine in machines:
        machine.communicate(timeout=300)
    assert machines[0].returncode == 1
    assert checkpoint.checkpoints(run / "checkpoints")

    again = launched("raekit", *train, "--train.steps", "120", "--run", str(run), "--processes", "3")
    wait_for(run, 60, again)
    again.send_signal(signal.SIGUSR1)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 75, errors
    assert errors.rstrip().endswith("stopped; run the same command again to resume")
    assert errors.count("stopped") == 1
    assert "death signal" not in errors
    saved = int(checkpoint.checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))
    assert saved == max(losses(run)) >= 60

    last = launched("raekit", *train, "--train.steps", "120", "--run", str(run), "--processes", "2")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


def test_an_error_of_all_processes_is_one_line(tmp_path):
    """The launcher adds nothing, and its status is the status of an error."""
    wrong = launched("raekit", *TRAIN, "--run", str(tmp_path), "--data.source", "folder:nowhere", "--processes", "2")
    _, errors = wrong.communicate(timeout=300)
    assert wrong.returncode == 1
    assert errors == "error: data source 'folder:nowhere': there is no folder nowhere\n"


PAIR = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "4"}, "sets 4 processes, but not RANK, MASTER_ADDR, MASTER_PORT; start"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT; start"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: the environment sets 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: the environment sets '0', which is no number from 1 to"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: the environment sets '-1'"),
        (PAIR | {"RANK": "x"}, "RANK: the environment sets 'x'"),
        (PAIR | {"RANK": "2"}, "RANK: the environment sets 2, which is not below WORLD_SIZE 2"),
        (PAIR | {"RANK": ""}, "sets 2 processes, but not RANK; start"),
        (PAIR | {"MASTER_PORT": "abc"}, "MASTER_PORT: the environment sets 'abc'"),
        (PAIR | {"MASTER_PORT": "99999999"}, "MASTER_PORT: .* which is no number from 1 to 65535"),
        (PAIR | {"MASTER_ADDR": "nosuch.invalid"}, "MASTER_ADDR: the host 'nosuch.invalid' is not known"),
    ],
)
def test_variables_that_another_job_left_are_named(variables, message, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("raekit.distributed.SHARING", 0.2)
    with pytest.raises(UserError, match=message), world("cpu"):
        pass


def test_a_port_in_use_is_one_error(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in (PAIR | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="the 2 processes could not meet at port"), world("cpu"):
            pass


def test_another_device_is_one_clear_error():
    with pytest.raises(UserError, match="device: 'gpu' is neither 'cpu' nor 'cuda'"):
        prepare_device("gpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"MALLOC_TRIM_THRESHOLD_": str(2**26), "MALLOC_MMAP_THRESHOLD_": str(2**25)},
        {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**25}"},
    ],
)
def test_a_process_on_a_cpu_keeps_freed_memory_unless_the_environment_says_otherwise(settings: dict[str, str]):
    program = (
        "import resource, torch\n"
        "from pathlib import Path\n"
        "from raekit.distributed import prepare_device\n"
        "resident = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()\n"
        "prepare_device('cpu')\n"
        "before = resident()\n"
        "values = torch.ones(2**26)\n"  # 256 MiB
        "del values\n"
        "print(resident() - before)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", program], env=clean | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**25 if settings else int(done.stdout) > 2**27
