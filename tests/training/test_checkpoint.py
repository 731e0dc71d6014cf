import errno
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, filesystem

from raekit.distributed import World
from raekit.errors import UserError
from raekit.training import checkpoint

ONE = World()


def state(step: int, size: int = 50) -> dict[str, Any]:
    """Make a small training state; every value depends on the step."""
    return {
        "trainer": {"step": step, "skipped": torch.tensor([step, 0])},
        "net": {"weight": torch.full((size, 7), float(step)), "averages": {"0.9": torch.arange(5.0) + step}},
    }


def save(folder: Path, step: int, values: dict[str, Any], keep: int, world: World = ONE) -> None:
    checkpoint.Writer(folder, keep, world).save(step, values)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded(path: Path) -> dict[str, Any]:
    values = state(0)
    checkpoint.load(path, values, ONE)
    return values


def assert_holds(path: Path, step: int) -> None:
    values, expected = loaded(path), state(step)
    assert values["trainer"]["step"] == step
    assert torch.equal(values["trainer"]["skipped"], expected["trainer"]["skipped"])
    assert torch.equal(values["net"]["weight"], expected["net"]["weight"])
    assert torch.equal(values["net"]["averages"]["0.9"], expected["net"]["averages"]["0.9"])


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, 7, state(7), 2, ONE)
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "step-00000007"]
    assert_holds(tmp_path / "step-00000007", 7)


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100, 1000, 100_000_000):
        save(tmp_path, step, state(step), 3, ONE)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == names(tmp_path)
    assert names(tmp_path) == ["step-00000100", "step-00001000", "step-100000000"]
    for path, step in zip(checkpoint.checkpoints(tmp_path), (100, 1000, 100_000_000), strict=True):
        assert_holds(path, step)


def test_the_first_process_chooses_the_checkpoint(tmp_path, monkeypatch):
    """On a shared file system, another process may not see the newest checkpoint yet."""
    save(tmp_path, 7, state(7), 2)
    told = [tmp_path / "step-00000009", tmp_path / "step-00000007"]
    monkeypatch.setattr(World, "gather", lambda world, value: told)
    assert checkpoint.newest(tmp_path, World(rank=1, size=2)) == told[0]


def test_what_is_half_written_counts_for_nothing_and_is_cleared_away(tmp_path):
    save(tmp_path, 1, state(1), 2, ONE)
    for torn in ("step-00000002.raekit-partial", "step-00000005.raekit-partial"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / torn)
        (tmp_path / torn / ".metadata").unlink()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
    save(tmp_path, 5, state(5), 2, ONE)
    assert names(tmp_path) == ["step-00000001", "step-00000005"]
    assert_holds(tmp_path / "step-00000005", 5)


@pytest.mark.parametrize("damage", ["half", "empty", "gone", "garbage"])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_one_message_that_names_the_folder(tmp_path, file, damage):
    save(tmp_path, 3, state(3), 2, ONE)
    save(tmp_path, 4, state(4), 2, ONE)
    folder = tmp_path / "step-00000004"
    content = (folder / file).read_bytes()
    if damage == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes({"half": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 99}[damage])
    with pytest.raises(UserError) as error:
        loaded(folder)
    assert str(error.value).startswith(f"{folder}: damaged (")
    assert f"mv {folder} {folder}.damaged" in str(error.value)
    assert "\n" not in str(error.value)
    folder.rename(f"{folder}.damaged")
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "step-00000003"]
    assert_holds(tmp_path / "step-00000003", 3)


def test_a_changed_value_is_damage(tmp_path):
    """torch writes a checksum of each tensor, but does not compare it when it reads."""
    save(tmp_path, 3, state(3), 2, ONE)
    save(tmp_path, 4, state(4), 2, ONE)
    file = tmp_path / "step-00000004" / "__0_0.distcp"
    content = file.read_bytes()
    four = torch.full((50, 7), 4.0).numpy().tobytes()
    assert content.count(four) == 1
    file.write_bytes(content.replace(four, four[:-4] + torch.tensor(5.0).numpy().tobytes()))
    with pytest.raises(UserError, match=r"damaged \(.*net\.weight.*checksum.*mv .*step-00000004 "):
        loaded(tmp_path / "step-00000004")
    assert_holds(tmp_path / "step-00000003", 3)


def test_the_state_of_another_network_is_refused(tmp_path):
    save(tmp_path, 1, state(1), 1)
    other = state(1)
    other["net"]["bias"] = torch.zeros(3)
    folder = tmp_path / "step-00000001"
    with pytest.raises(UserError) as error:
        checkpoint.load(folder, other, ONE)
    assert str(error.value).startswith(f"{folder}: saved by a run with other shapes")
    assert str(error.value).splitlines()[1:-1] == ["  net.bias: absent -> (3,)"]
    with pytest.raises(UserError) as error:
        checkpoint.load(folder, state(1, size=51), ONE)
    assert str(error.value).splitlines()[1:-1] == ["  net.weight: (50, 7) -> (51, 7)"]
    assert_no_advice_to_delete(str(error.value))


def assert_no_advice_to_delete(message: str) -> None:
    assert not re.search(r"remove|delete|\brm\b", message)


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (
            OSError(errno.EIO, "Input/output error"),
            r"could not be read \(.*Input/output error.*may be intact: check the disk",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), r"could not be read \(.*Permission denied.*permissions"),
        (MemoryError("no room"), r"does not fit into the memory \(MemoryError.*is not damaged: free memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "does not fit into the memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit into the memory"),
    ],
)
def test_a_load_that_fails_names_the_true_cause(tmp_path, monkeypatch, cause, says):
    save(tmp_path, 1, state(1), 1)

    def fail(*arguments: object) -> None:
        raise cause

    monkeypatch.setattr(checkpoint.dcp.FileSystemReader, "read_data", fail)
    with pytest.raises(UserError, match=says) as error:
        loaded(tmp_path / "step-00000001")
    assert "damaged (" not in str(error.value)
    assert_no_advice_to_delete(str(error.value))


class Code:
    """Runs a function when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harm",)


def test_nothing_of_an_index_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1, state(1), 1)
    (tmp_path / "step-00000001" / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match=r"damaged \(UnpicklingError: posix\.mkdir is not allowed in a checkpoint\)"):
        loaded(tmp_path / "step-00000001")
    assert not Path("harm").exists()


def test_nothing_of_a_stored_value_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = state(1)
    values["trainer"]["step"] = Code()
    save(tmp_path, 1, values, 1)
    with pytest.raises(UserError, match=r"damaged \(.*[Ww]eights.only"):
        loaded(tmp_path / "step-00000001")
    assert not Path("harm").exists()


# In the background


def slowly(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let saves wait until the returned event is set."""
    go, write = threading.Event(), FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *arguments: go.wait(30) and write(*arguments))
    return go


def test_a_save_in_the_background_holds_the_state_of_its_step(tmp_path, monkeypatch):
    save(tmp_path, 1, state(1), 2)
    go, writer, values = slowly(monkeypatch), checkpoint.Writer(tmp_path, 2, ONE, background=True), state(2)
    writer.save(2, values)
    values["net"]["weight"].zero_()  # the training continues
    values["trainer"]["skipped"].fill_(9)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"], "what a kill would leave"
    assert writer.failure() is None
    go.set()
    writer.finish()
    assert_holds(tmp_path / "step-00000002", 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_finished_save_counts_without_another_save(tmp_path):
    writer = checkpoint.Writer(tmp_path, 2, ONE, background=True)
    writer.save(1, state(1))
    deadline = time.monotonic() + 30
    while not checkpoint.checkpoints(tmp_path) and time.monotonic() < deadline:
        assert writer.failure() is None
    assert_holds(tmp_path / "step-00000001", 1)


def test_checkpoints_that_may_not_be_read_or_written_are_not_taken_for_none(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"checkpoints: cannot be read \(Not a directory\)"):
        checkpoint.checkpoints(tmp_path / "checkpoints")

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileSystemWriter, "write_data", refuse)
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match=r"\(.*Permission denied\).*\. Allow writing to .*new and run the same"):
        save(tmp_path / "new", 1, state(1), 2)


def test_a_failure_in_the_background_is_told_and_costs_only_its_own_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, state(1), 2)
    writer = checkpoint.Writer(tmp_path, 2, ONE, background=True)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", refuse)
    writer.save(2, state(2))
    deadline = time.monotonic() + 30
    while (failure := writer.failure()) is None and time.monotonic() < deadline:
        pass
    assert re.search(
        r"step-00000002: could not be saved \(.*No space left.*newest complete.*step-00000001", str(failure)
    )
    with pytest.raises(UserError, match="could not be saved"):
        writer.finish()
    assert names(tmp_path) == ["step-00000001"]


def assert_save_fails(folder: Path, values: dict[str, Any], have: str) -> None:
    before = names(folder)
    with pytest.raises(UserError) as error:
        save(folder, 3, values, 1, ONE)
    message = str(error.value)
    assert message.startswith(f"{folder / 'step-00000003'}: could not be saved (")
    assert "No space left on device" in message
    assert "Free disk space" in message
    assert have in message
    assert "\n" not in message
    assert names(folder) == before


def test_a_full_disk_costs_nothing_that_was_saved(full_disk):
    save(full_disk, 1, state(1), 2, ONE)
    save(full_disk, 2, state(2), 2, ONE)
    assert_save_fails(full_disk, state(3, size=200_000), f"newest complete checkpoint is {full_disk / 'step-00000002'}")
    assert_holds(full_disk / "step-00000001", 1)
    assert_holds(full_disk / "step-00000002", 2)
    save(full_disk, 3, state(3), 1, ONE)
    assert names(full_disk) == ["step-00000003"]


def test_a_full_disk_is_still_the_cause_when_the_partial_checkpoint_is_gone(full_disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FULL", 2**16)  # the whole disk is small
    writer = checkpoint.Writer(full_disk, 2, ONE, background=True)
    writer.save(1, state(1, size=200_000))
    deadline = time.monotonic() + 30
    while (failure := writer.failure()) is None and time.monotonic() < deadline:
        pass
    assert "(No space left on device)" in str(failure)
    assert not any(full_disk.iterdir())
    with pytest.raises(UserError, match=re.escape(str(failure))):
        writer.finish()


@pytest.mark.parametrize("background", [False, True])
def test_a_save_does_not_wait_for_a_gpu(tmp_path, monkeypatch, background):
    def wait(*arguments: object, **options: object) -> None:
        raise AssertionError("torch waits for the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", wait)
    writer = checkpoint.Writer(tmp_path, 2, ONE, background)
    writer.save(1, state(1))
    writer.finish()
    assert_holds(tmp_path / "step-00000001", 1)


def test_a_first_save_that_fails_says_that_there_is_no_other(tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", refuse)
    assert_save_fails(tmp_path, state(3), "there is no earlier checkpoint")


# A process killed at each file operation of a save


def kill_at(operation: int, folder: Path) -> None:
    """Kill this process with SIGKILL before its n-th change in `folder`, where n is `operation`."""
    changes = iter(range(1, operation))

    def die_if_due() -> None:
        if next(changes, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        changes_names = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if (writes or changes_names) and str(folder) in str(arguments[0]):
            die_if_due()

    fsync = os.fsync
    os.fsync = lambda file: die_if_due() or fsync(file)
    sys.addaudithook(watch)


def save_under_fire(world: World, root: Path) -> int:
    """Fork one process per operation of a save and kill it there.

    Returns the number of the first operation that the save never reaches.
    """
    for operation in count(1):
        folder = root / str(operation)
        for step in (1, 2):
            save(folder, step, state(step), 2, world)
        child = os.fork()
        if child == 0:
            kill_at(operation, folder)
            save(folder, 3, state(3), 2, world)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return operation
    raise AssertionError


def test_killed_at_any_moment_of_a_save_the_newest_complete_checkpoint_loads(tmp_path, run_ranks):
    (survived,) = run_ranks(save_under_fire, 1, tmp_path)
    assert survived > 8, "a save makes, writes, syncs, renames and removes"
    newest = []
    for operation in range(1, survived + 1):
        folder = tmp_path / str(operation)
        path = checkpoint.checkpoints(folder)[-1]
        newest.append(int(path.name.removeprefix("step-")))
        assert_holds(path, newest[-1])
        # The next run resumes from this checkpoint, and deletes what the killed save left.
        save(folder, 4, state(4), 2, ONE)
        assert_holds(folder / "step-00000004", 4)
        assert len(names(folder)) == 2
    assert newest == sorted(newest)
    assert {2, 3} == set(newest), "killed before the save was complete, and after it"
