"""The collection of wheels for a machine without a network."""

import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from tools import make_wheels

NEEDS = {
    "direct": ["low>=2", 'windows; sys_platform == "win32"', 'late; python_version >= "3.13"', 'more; extra == "big"'],
    "low": ["there"],
    "there": [],
    "more": [],
}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch):
    """An index of the packages in NEEDS, whose project needs direct[big], torch and there."""

    def download(wanted: list[str], folder: Path, python: str, platform: str) -> list[Path]:
        paths = []
        for requirement in wanted:
            name, version = requirement.split("==")
            path = folder / f"{name}-{version}-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as archive:
                lines = [f"Requires-Dist: {line}" for line in NEEDS[name]]
                archive.writestr(
                    f"{name}-{version}.dist-info/METADATA", "\n".join([f"Name: {name}", *lines, "", "Text"])
                )
            paths.append(path)
        return paths

    needed = [make_wheels.Requirement(line) for line in ("direct[big]", "torch>=2", "there>=3")]
    monkeypatch.setattr(make_wheels, "requirements", lambda extras: needed)
    monkeypatch.setattr(make_wheels, "constraints", lambda: dict.fromkeys(NEEDS, "4.0"))
    monkeypatch.setattr(make_wheels, "download", download)


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("have", "collected", "left_out"),
    [
        ({}, {"direct", "low", "more", "there"}, ["torch"]),
        ({"there": None}, {"direct", "low", "more"}, ["there", "torch"]),
        ({"there": Version("3.1")}, {"direct", "low", "more"}, ["there", "torch"]),
        ({"there": Version("2.9")}, {"direct", "low", "more", "there"}, ["torch"]),
    ],
)
def test_what_is_missing_is_collected_with_what_it_needs(have, collected, left_out, tmp_path: Path):
    wheels, left = make_wheels.collect(tmp_path, [], have, "3.12", "manylinux_2_28_x86_64")
    assert {wheel.name.split("-")[0] for wheel in wheels} == collected
    assert left == left_out


def test_the_packages_of_the_machine_are_read_with_or_without_versions(tmp_path: Path):
    file = tmp_path / "have.txt"
    file.write_text("numpy==2.5.2\nHuggingface_Hub, torch==2.11.0+cu130\n")
    found = make_wheels.present(file)
    assert found == {"numpy": Version("2.5.2"), "huggingface-hub": None, "torch": Version("2.11.0+cu130")}
    assert make_wheels.present(None) == {}


def test_the_tested_versions_are_those_of_the_constraints():
    versions = make_wheels.constraints()
    names = {make_wheels.canonicalize_name(need.name) for need in make_wheels.requirements(["vae"])}
    assert "diffusers" in names
    assert names <= versions.keys()
