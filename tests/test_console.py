"""Names of files and classes are printed as they are: markup is not read, and control characters become escapes."""

import io
import logging
import sys

import pytest

from raekit.cli import console
from raekit.progress import Display

NAMES = ["a[/b].png", "[red]x", "[link=http://x]y[/link]", ":smile:", "[bold", "\\[x]", "plain ü 猫.png"]
HIDDEN = ["\x1b[31mred", "a\rb", "a\x08b", "\x9b2J", "\u202egnp.exe", "\u2028", "Mu\udcf1oz.webp", "\x00"]


def printed(capsys: pytest.CaptureFixture, name: str) -> list[str]:
    """Print a name in every way that commands print, and return the results."""
    results = []
    console.out.print(f"1 image: {name}")
    results.append(capsys.readouterr().out)
    console.print_table(["image", name], [[name, "1.0"]])
    results += capsys.readouterr().out.splitlines()[1:4:2]
    with pytest.raises(SystemExit):
        console.fail(f"{name}: no such file")
    results.append(capsys.readouterr().err)
    with Display(console.err) as progress:
        progress(name, 1, 1, name)
    results.append(capsys.readouterr().err)
    return results


@pytest.mark.parametrize("name", NAMES)
def test_brackets_are_no_markup(capsys, name):
    assert all(name in result for result in printed(capsys, name))


@pytest.mark.parametrize("name", HIDDEN)
def test_control_characters_are_shown_as_escapes(capsys, name):
    shown = ascii(name)[1:-1]
    for result in printed(capsys, name):
        assert shown in result
        assert not any(character in result for character in name if not character.isprintable())


def test_a_log_record_is_plain(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    console.prepare()
    logging.getLogger("raekit.test").warning("unreadable image %s", "a\x1b[31m[/b].png")
    assert capsys.readouterr().err == "WARNING: unreadable image a\\x1b[31m[/b].png\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_escaped(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    console.prepare()
    console.out.print("猫.png")
    console.print_table(["image"], [["猫.png"]])
    stream.flush()
    assert stream.buffer.getvalue().count(b"\\u732b.png") == 2  # type: ignore[attr-defined]
