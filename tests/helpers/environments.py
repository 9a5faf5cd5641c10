"""New environments for a built package; no index is asked.

Both kinds see packages of the running environment, but never its sdconv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def run(command: list[str | Path], folder: Path) -> str:
    """What a command prints, in an environment without the checkout."""
    ran = attempt(command, folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def attempt(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command's result, in an environment without the checkout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    return subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, env=env
    )


def with_every_package(folder: Path, package: Path) -> Path:
    """The folder of the commands of a new environment, into which a package is installed, and which
    sees all other packages."""
    site = _empty(folder)
    # a plain path: the .pth files in it, such as the one of an editable sdconv, are not read
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"])
    _pip(folder, "--no-deps", "--no-build-isolation", package)
    return folder / "bin"


def with_extras(folder: Path, wheel: Path, extras: str, others: Iterable[str] = ()) -> Path:
    """The folder of the commands of a new environment, into which ``wheel[extras]`` is installed,
    and which sees what those ask for, ``others``, and nothing else. pip checks that nothing is
    missing."""
    site = _empty(folder)
    linked: set[str] = set()
    for one in _needed([*_asked(wheel, extras.split(",")), *others]):
        _link(one, site, linked)
    _pip(folder, f"{wheel}[{extras}]")
    return folder / "bin"


def _empty(folder: Path) -> Path:
    """The site-packages of a new environment without packages."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    return site


def _pip(folder: Path, *what: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    run([*pip, "--no-index", *what], folder.parent)


def _asked(wheel: Path, extras: Iterable[str]) -> list[str]:
    """What a wheel's metadata asks for."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    every = map(Requirement, metadata.get_all("Requires-Dist", []))
    return [str(one) for one in every if _applies(one, "", *extras)]


def _applies(requirement: Requirement, *extras: str) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def _needed(requirements: Iterable[str]) -> list[Distribution]:
    """The installed packages that these requirements ask for, and those that they ask for in
    turn."""
    queue = [Requirement(one) for one in requirements]
    seen: dict[tuple[str, str], Distribution] = {}
    while queue:
        wanted = queue.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) not in seen:
                own = seen[wanted.name, extra] = distribution(wanted.name)
                asked = map(Requirement, own.requires or ())
                queue += [one for one in asked if _applies(one, extra)]
    return [own for (_, extra), own in seen.items() if not extra]


def _link(package: Distribution, site: Path, linked: set[str]) -> None:
    """Make a package's modules and metadata importable from ``site``."""
    for file in package.files or ():
        top = file.parts[0]
        if top in linked or top in ("..", "__pycache__") or top.endswith(".pth"):
            continue
        linked.add(top)
        (site / top).symlink_to(Path(str(package.locate_file(top))).resolve())
