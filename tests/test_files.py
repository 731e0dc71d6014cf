import errno
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from raekit.errors import UserError
from raekit.files import check_file, check_folder, check_space, entries, sweep, whole
from raekit.hub import cache_folder, expanded


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with whole(path) as partial:
        partial.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert names(path.parent) == ["file.txt"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with whole(path, folder=True) as partial:
            partial.mkdir()
            (partial / name).touch()
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["new"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    path = tmp_path / "folder"
    with whole(path, folder=True) as partial:
        partial.mkdir()
    partial.mkdir(parents=True)
    (partial / "torn").touch()
    (partial.parent / ".tmpAbC").touch()  # safetensors leaves such files
    with whole(path, folder=True) as partial:
        partial.mkdir()
        (partial / "good").touch()
    assert names(path) == ["good"]
    assert names(tmp_path) == ["folder"]


def test_leftovers_beside_finished_files_are_swept_but_no_only_copy(tmp_path):
    (tmp_path / "image.png").write_text("finished")
    (tmp_path / "image.png.raekit-partial").mkdir()  # killed just after the file was moved to its place
    torn = tmp_path / "never.png.raekit-partial" / "never.png"
    torn.parent.mkdir()
    torn.touch()
    old = tmp_path / "model.raekit-partial" / "old" / "model"  # killed between the two moves of a folder
    old.mkdir(parents=True)
    sweep(tmp_path)
    sweep(tmp_path / "nowhere")
    assert names(tmp_path) == ["image.png", "model.raekit-partial"]
    assert old.is_dir()


def test_only_what_raekit_made_is_removed_and_no_link_is_followed(tmp_path):
    for name in ("folder", "thesis"):
        (tmp_path / f"{name}.partial").mkdir()
        (tmp_path / f"{name}.partial" / "notes").touch()
        (tmp_path / f"{name}.raekit-partial").symlink_to(f"{name}.partial")
    with whole(tmp_path / "folder", folder=True) as partial:
        partial.mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["folder", "folder.partial", "thesis.partial"]
    assert names(tmp_path / "folder.partial") == names(tmp_path / "thesis.partial") == ["notes"]


def test_a_folder_is_not_replaced_by_a_file_nor_a_file_by_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("good")
    with pytest.raises(UserError, match="folder: is a folder; give the path of a file"), whole(tmp_path / "folder"):
        pass
    with (
        pytest.raises(UserError, match="file: is a file; give the path of a folder"),
        whole(tmp_path / "file", folder=True),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"x: cannot be written because .*file is a file"),
        whole(tmp_path / "file" / "x"),
    ):
        pass
    assert names(tmp_path) == ["file", "folder"]


def test_a_kill_while_a_folder_takes_the_place_of_another_loses_neither(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with whole(path, folder=True) as partial:
            partial.mkdir()
            (partial / content).touch()
    moves, move = [], Path.replace

    def killed(self: Path, target: Path) -> Path:
        moves.append(self)
        if len(moves) == 2:  # the old folder has been moved away
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt), whole(path, folder=True) as partial:
        partial.mkdir()
    assert not path.exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="could not be written"), whole(path, folder=True) as partial:
        (partial / "into nothing").mkdir()
    assert names(path) == ["second"]


def test_a_failure_while_a_folder_takes_the_place_of_another_keeps_the_old_one(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(UserError, match="could not be written"), whole(path, folder=True):
        pass  # there is nothing to move to the place of the old folder
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        with whole(tmp_path / "x.safetensors") as partial:
            save_file({"x": torch.ones(1)}, partial)
        with whole(tmp_path / "folder", folder=True) as partial:
            partial.mkdir()
            save_file({"x": torch.ones(1)}, partial / "y.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "x.safetensors", tmp_path / "folder" / "y.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640


def test_an_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("good")
    with pytest.raises(UnicodeEncodeError), whole(path) as partial:
        partial.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "good"


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_any_error_leaves_nothing_behind(tmp_path, error):
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise error

    with pytest.raises(error), whole(tmp_path / "file") as partial:
        fail(partial)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_gives_one_message_that_names_the_file(full_disk):
    path = full_disk / "file.txt"
    path.write_text("good")
    with pytest.raises(UserError, match=rf"^{path}: could not be written \(No space"), whole(path) as partial:
        partial.write_bytes(bytes(2**23))
    with pytest.raises(UserError, match=rf"^{path}: could not be written \(.*No space"), whole(path) as partial:
        save_file({"x": torch.rand(2**21)}, partial)
    assert path.read_text() == "good"
    assert names(full_disk) == ["file.txt"]


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path):
    for check, name in (check_file, "x.png"), (check_folder, "v1.2"):
        check(tmp_path / "new" / "deep" / name)
        assert names(tmp_path) == []
        for path in Path("/proc/raekit/x"), tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "y":
            with pytest.raises(UserError, match=r"cannot be written \(.+\); give another path"):
                check(path)
    with pytest.raises(UserError, match=r"x\.PNG: a folder is written here, and \.PNG is the ending of a file"):
        check_folder(tmp_path / "x.PNG")
    (tmp_path / "x.PNG").mkdir()
    check_folder(tmp_path / "x.PNG")


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    assert entries(tmp_path / "nowhere") == []
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"link: is a link to nothing; give the path of a folder"):
        check_folder(tmp_path / "link")
    with pytest.raises(UserError, match=r"x: cannot be written because .*link is a link to nothing"):
        check_file(tmp_path / "link" / "x")

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); allow it, or give another path"):
        check_folder(tmp_path)


def test_the_result_goes_to_where_a_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "file.txt").symlink_to("disk/notes")
    (tmp_path / "folder").symlink_to("disk/model")
    for content in ("old", "new"):
        with whole(tmp_path / "file.txt") as partial:
            partial.write_text(content)
    (tmp_path / "disk" / "model").mkdir()
    for content in ("old", "new"):
        with whole(tmp_path / "folder", folder=True) as partial:
            partial.mkdir()
            (partial / content).touch()
    assert names(tmp_path / "disk") == ["model", "notes"]
    assert (names(tmp_path / "folder"), (tmp_path / "disk" / "notes").read_text()) == (["new"], "new")
    assert (tmp_path / "file.txt").is_symlink()
    assert (tmp_path / "folder").is_symlink()


def test_an_error_does_not_name_a_temporary_path(full_disk):
    path = full_disk / "model"
    with (
        pytest.raises(UserError, match=rf"^{path / 'decoder' / 'x'}: could not be written \(No space"),
        whole(path, folder=True) as folder,
        whole(folder / "decoder" / "x") as partial,
    ):
        partial.write_bytes(bytes(2**23))


def test_names_may_have_all_255_bytes(tmp_path):
    path = tmp_path / ("\u00f1" * 126 + "x.p")
    with whole(path) as partial:
        partial.write_text("good")
    assert (path.read_text(), names(tmp_path)) == ("good", [path.name])


def test_an_error_of_another_file_is_not_an_error_of_the_output(tmp_path):
    with pytest.raises(FileNotFoundError, match="input"), whole(tmp_path / "out" / "x") as partial:
        partial.write_text((tmp_path / "input").read_text())
    with pytest.raises(TimeoutError), whole(tmp_path / "x"):
        raise TimeoutError("the network")
    assert names(tmp_path / "out") == []


def test_an_empty_folder_is_filled_in_place(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with whole(Path("."), folder=True) as partial:
        partial.mkdir()
        (partial / "x").touch()
    assert os.listdir() == ["x"]
    assert names(tmp_path) == ["empty"]


def test_without_a_home_folder_the_message_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x"

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert expanded("x") == Path("x")
    monkeypatch.delenv("RAEKIT_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HOME", "~/.cache/huggingface")
    for action in (lambda: expanded("~/x"), cache_folder):
        with pytest.raises(UserError, match=r"~/.*: no home folder is known, .* set HOME"):
            action()


def test_too_little_space_is_an_error_before_the_work(tmp_path, monkeypatch):
    disk = SimpleNamespace(free=2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda place: {tmp_path: disk}[place])
    check_space(tmp_path / "new" / "out", 2**30, "give another path")
    with pytest.raises(UserError) as error:
        check_space(tmp_path / "new" / "out", 3 * 2**29, "give another path")
    assert str(error.value) == (
        f"{tmp_path}/new/out: needs 1.5 GiB, but only 1.0 GiB of its disk are free; free some space, or give another "
        "path"
    )
