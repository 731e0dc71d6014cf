import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raekit.distributed import World
from raekit.distributed.locks import NAME, _remove, _started, lock
from raekit.errors import UserError

ONE = World()


def test_a_folder_is_held_once_and_given_back(tmp_path: Path):
    folder = tmp_path / "new" / "run"
    with lock(folder, ONE):
        with pytest.raises(UserError, match=rf"^{folder}: in use by process {os.getpid()} on \S+ since \S+\. Wait"):
            lock(folder, ONE).__enter__()
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with pytest.raises(ZeroDivisionError), lock(folder, ONE):
        raise ZeroDivisionError
    with lock(folder, ONE):
        pass


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path):
    with lock(tmp_path / "run", ONE):
        assert (tmp_path / "run" / NAME).is_file()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{tmp_path}/file/run: cannot be written because {tmp_path}/file is a file"):
        lock(tmp_path / "file" / "run", ONE).__enter__()


HOLD = """
import sys, time
from pathlib import Path
from raekit.distributed import World
from raekit.distributed.locks import lock
with lock(Path(sys.argv[1]), World()):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid} "):
            lock(tmp_path, ONE).__enter__()
        other.send_signal(signal.SIGKILL)
        # The process has ended, although its parent has not asked for its exit status yet.
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with lock(tmp_path, ONE):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def with_owner(folder: Path, **values: object) -> None:
    """Change the owner in the lock that this process holds."""
    owner = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps(owner | values))


def test_only_a_process_that_is_known_to_be_dead_loses_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")
    with lock(tmp_path, ONE):
        with_owner(tmp_path, host="elsewhere")
        with pytest.raises(UserError, match=rf"on elsewhere since .* if it no longer runs, remove {tmp_path}/\.lock$"):
            lock(tmp_path, ONE).__enter__()
        with_owner(tmp_path, started="0")  # this process has the number of one that has ended
        with pytest.raises(UserError, match="on elsewhere"):
            lock(tmp_path, ONE).__enter__()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # SLURM has started the job again, on this host
        with lock(tmp_path, ONE):
            pass
    with lock(tmp_path, ONE):
        with_owner(tmp_path, started="0")
        with lock(tmp_path, ONE):
            pass


def test_a_lock_of_another_slurm_job_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock(tmp_path, ONE):
        with_owner(tmp_path, host="elsewhere", job="7", restarts=0)
        with pytest.raises(UserError, match=r"in use by process .* on elsewhere"):
            lock(tmp_path, ONE).__enter__()


def test_a_lock_that_another_process_has_taken_over_is_kept(tmp_path: Path):
    with lock(tmp_path, ONE):
        stale = json.loads((tmp_path / NAME).read_text())
        with_owner(tmp_path, host="elsewhere")
    taken = (tmp_path / NAME).read_text()
    _remove(tmp_path / NAME, stale)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_text() == taken


def test_the_start_of_a_process_does_not_change_and_is_its_own():
    before = _started(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = _started(other.pid)
        sum(range(10**6))  # takes processor time
        assert _started(os.getpid()) == before
        assert _started(other.pid) == started
        assert None not in (before, started)
        assert started != before
        other.kill()


def test_a_damaged_lock_is_one_of_an_unknown_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with lock(tmp_path, ONE):
        with_owner(tmp_path, restarts=None)
        texts = [(tmp_path / NAME).read_text(), '{"host": ', "[" * 100_000]
    for text in texts:
        (tmp_path / NAME).write_text(text)
        with pytest.raises(UserError, match=rf"in use by an unknown process\. .* remove {tmp_path}/\.lock$"):
            lock(tmp_path, ONE).__enter__()
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to("nowhere")
    with pytest.raises(UserError, match="in use by an unknown process"):
        lock(tmp_path, ONE).__enter__()


def hold_together(world: World, folder: Path) -> list[str]:
    with lock(folder, world):
        world.barrier()
        pid = str(json.loads((folder / NAME).read_text())["pid"])
        try:
            lock(folder, world).__enter__()
        except UserError as error:
            return [pid, str(error)]
        finally:
            world.barrier()
    return [pid]


def test_the_processes_of_a_job_hold_a_folder_together(run_ranks, tmp_path: Path):
    first, second = run_ranks(hold_together, 2, tmp_path)
    assert first == second
    assert f"in use by process {first[0]} " in first[1]


def test_many_processes_that_find_a_stale_lock_hold_it_one_by_one(tmp_path: Path):
    with lock(tmp_path, ONE):
        with_owner(tmp_path, started="0")
        others = [
            subprocess.Popen(
                [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            for _ in range(3)
        ]
        try:
            ended = time.monotonic() + 120
            while sum(other.poll() is not None for other in others) < 2 and time.monotonic() < ended:
                time.sleep(0.1)
            assert [other.poll() for other in others].count(None) == 1
        finally:
            for other in others:
                other.kill()
                other.communicate()
