import errno
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from raekit.distributed import World
from raekit.errors import UserError
from raekit.train import checkpoint

ONE = World()


def state(step: int, size: int = 50) -> dict[str, Any]:
    """Make a small training state; every value depends on the step."""
    return {
        "trainer": {"step": step, "skipped": torch.tensor([step, 0])},
        "net": {"weight": torch.full((size, 7), float(step)), "averages": {"0.9": torch.arange(5.0) + step}},
    }


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
    checkpoint.save(tmp_path, 7, state(7), 2, ONE)
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "step-00000007"]
    assert_holds(tmp_path / "step-00000007", 7)


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100, 1000, 100_000_000):
        checkpoint.save(tmp_path, step, state(step), 3, ONE)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == names(tmp_path)
    assert names(tmp_path) == ["step-00000100", "step-00001000", "step-100000000"]
    for path, step in zip(checkpoint.checkpoints(tmp_path), (100, 1000, 100_000_000), strict=True):
        assert_holds(path, step)


def test_what_is_half_written_counts_for_nothing_and_is_cleared_away(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), 2, ONE)
    for torn in ("step-00000002.partial", "step-00000005.partial"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / torn)
        (tmp_path / torn / ".metadata").unlink()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
    checkpoint.save(tmp_path, 5, state(5), 2, ONE)
    assert names(tmp_path) == ["step-00000001", "step-00000005"]
    assert_holds(tmp_path / "step-00000005", 5)


@pytest.mark.parametrize("damage", ["half", "empty", "gone", "garbage"])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_one_message_that_names_the_folder(tmp_path, file, damage):
    checkpoint.save(tmp_path, 3, state(3), 2, ONE)
    checkpoint.save(tmp_path, 4, state(4), 2, ONE)
    folder = tmp_path / "step-00000004"
    content = (folder / file).read_bytes()
    if damage == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes({"half": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 99}[damage])
    with pytest.raises(UserError) as error:
        loaded(folder)
    assert str(error.value).startswith(f"{folder}: damaged or from a different run (")
    assert str(error.value).endswith("remove this folder to resume from the previous checkpoint")
    assert "\n" not in str(error.value)
    assert_holds(tmp_path / "step-00000003", 3)


def test_the_state_of_another_network_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), 1, ONE)
    other = state(1)
    other["net"]["bias"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"step-00000001: damaged or from a different run \(.*net\.bias"):
        checkpoint.load(tmp_path / "step-00000001", other, ONE)
    with pytest.raises(UserError, match=r"step-00000001: damaged or from a different run \(.*[Ss]ize"):
        checkpoint.load(tmp_path / "step-00000001", state(1, size=51), ONE)


def assert_save_fails(folder: Path, values: dict[str, Any], have: str) -> None:
    before = names(folder)
    with pytest.raises(UserError) as error:
        checkpoint.save(folder, 3, values, 1, ONE)
    message = str(error.value)
    assert message.startswith(f"{folder / 'step-00000003'}: could not be saved (")
    assert "No space left on device" in message or "[enforce fail at inline_container" in message
    assert have in message
    assert "\n" not in message
    assert names(folder) == before


def test_a_full_disk_costs_nothing_that_was_saved(full_disk):
    checkpoint.save(full_disk, 1, state(1), 2, ONE)
    checkpoint.save(full_disk, 2, state(2), 2, ONE)
    assert_save_fails(full_disk, state(3, size=200_000), f"newest complete checkpoint is {full_disk / 'step-00000002'}")
    assert_holds(full_disk / "step-00000001", 1)
    assert_holds(full_disk / "step-00000002", 2)
    checkpoint.save(full_disk, 3, state(3), 1, ONE)
    assert names(full_disk) == ["step-00000003"]


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
            checkpoint.save(folder, step, state(step), 2, world)
        child = os.fork()
        if child == 0:
            kill_at(operation, folder)
            checkpoint.save(folder, 3, state(3), 2, world)
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
        checkpoint.save(folder, 4, state(4), 2, ONE)
        assert_holds(folder / "step-00000004", 4)
        assert len(names(folder)) == 2
    assert newest == sorted(newest)
    assert {2, 3} == set(newest), "killed before the save was complete, and after it"
