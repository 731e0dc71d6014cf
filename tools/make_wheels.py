"""Collect the wheels that a machine without a network lacks: a folder for `pip install --no-index --find-links`.

    python tools/make_wheels.py wheels [--have FILE] [--extras vae] [--python 3.12] [--platform manylinux_2_28_x86_64]

Collects the packages that raekit needs at run time in the versions of constraints.txt, except torch, the packages of
CUDA, and the packages that the machine has. FILE lists these as `pip list --format freeze` prints them, with or without
versions. A package whose listed version is too old for raekit is collected all the same. Then, on that machine:

    python3 -m pip install --no-index --no-deps --target SITE wheels/*.whl
    export PYTHONPATH=SITE
"""

import argparse
import email
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OLDER = ("manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux_2_5", "manylinux1")
"""Platforms whose wheels run on the later ones; pip does not derive them from a later one."""


def requirements(extras: Iterable[str]) -> list[Requirement]:
    """Return the requirements of the project and of some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def constraints() -> dict[str, str]:
    """Return the tested version of each package."""
    pairs = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def present(path: Path | None) -> dict[str, Version | None]:
    """Return the packages of the file, with their versions where it tells them."""
    words = re.split(r"[\s,]+", path.read_text()) if path else []
    pairs = (word.split("==") for word in words if word and not word.startswith("#"))
    return {canonicalize_name(pair[0]): Version(pair[1]) if len(pair) > 1 else None for pair in pairs}


def is_foreign(name: str) -> bool:
    """Return whether the package is torch or comes with it."""
    return name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))


def needs(wheel: Path, extras: Iterable[str], python: str) -> list[Requirement]:
    """Return what a wheel requires on Linux with that Python."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    found = [Requirement(line) for line in lines]
    environments = [environment | {"extra": extra} for extra in ("", *extras)]
    return [need for need in found if need.marker is None or any(map(need.marker.evaluate, environments))]


def download(wanted: Iterable[str], folder: Path, python: str, platform: str) -> list[Path]:
    """Download the wheels of NAME==VERSION without what they need, and return their paths."""
    before = {*folder.glob("*.whl")}
    platforms = [f"--platform={old}_x86_64" for old in OLDER]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={python}", "--implementation=cp", f"--platform={platform}", *platforms]
    subprocess.run([*command, "--dest", folder, *wanted], check=True)
    return sorted({*folder.glob("*.whl")} - before)


def collect(
    folder: Path, extras: Iterable[str], have: dict[str, Version | None], python: str, platform: str
) -> tuple[list[Path], list[str]]:
    """Download all that is missing, and what this needs in turn; return the wheels and the packages left out."""
    versions, wheels, left_out, seen = constraints(), [], [], set[str]()
    queue = requirements(extras)
    while queue:
        wanted: dict[str, Requirement] = {}
        for need in queue:
            name = canonicalize_name(need.name)
            there = name in have and (have[name] is None or need.specifier.contains(str(have[name]), prereleases=True))
            if name in seen or is_foreign(name) or there:
                left_out += [name] if name not in seen else []
            else:
                wanted[name] = need
            seen.add(name)
        if not wanted:
            break
        pinned = [f"{name}=={versions[name]}" if name in versions else str(need) for name, need in wanted.items()]
        made = download(pinned, folder, python, platform)
        wheels += made
        queue = []
        for wheel in made:
            name, *_ = parse_wheel_filename(wheel.name)
            queue += needs(wheel, wanted[name].extras, python)
    return wheels, sorted(left_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--have", type=Path, metavar="FILE", help="the packages that the machine has")
    parser.add_argument("--extras", nargs="*", default=[], help="extras of raekit, such as vae for diffusers")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64")
    arguments = parser.parse_args()
    if arguments.folder.is_dir() and any(arguments.folder.iterdir()):
        parser.error(f"{arguments.folder}: holds files already; give a new folder")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    have = present(arguments.have)
    wheels, left_out = collect(arguments.folder, arguments.extras, have, arguments.python, arguments.platform)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 2**20:7.2f} MiB  in {len(wheels)} wheels")
    print(f"left out, as the machine has them: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
