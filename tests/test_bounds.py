"""The bounds in pyproject.toml can be satisfied together, at both ends."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.paths import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# `dev` and `docs` are for working on sdconv, and pinned
EXTRAS = sorted(PROJECT["optional-dependencies"].keys() - {"dev", "docs"})


def resolve(folder: Path, requirements: list[str], resolution: str) -> dict[str, str]:
    """The versions that a resolver chooses; a RuntimeError with its reason if it finds none."""
    if importlib.util.find_spec("uv") is None:
        pytest.skip("needs a resolver: pip install uv")
    (folder / "all.in").write_text("\n".join(requirements))
    command = [sys.executable, "-m", "uv", "pip", "compile", "all.in", "--no-header"]
    command += ["--no-annotate", "--python-version", "3.11", "--resolution", resolution]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        reason = " ".join(ran.stderr.split())
        if re.search("error sending request|Failed to fetch|dns error|timed out", ran.stderr):
            pytest.skip(f"needs a package index: {reason[:200]}")
        raise RuntimeError(reason)
    lines = [line for line in ran.stdout.splitlines() if "==" in line]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def requirements() -> list[str]:
    """Everything that the package and its extras ask for, without references to other extras."""
    optional = PROJECT["optional-dependencies"]
    extras = [one for extra in EXTRAS for one in optional[extra]]
    return [*PROJECT["dependencies"], *(one for one in extras if Requirement(one).name != "sdconv")]


@pytest.mark.slow
def test_the_lowest_versions_fit_together(tmp_path: Path) -> None:
    lowest = resolve(tmp_path, requirements(), "lowest-direct")
    # those whose lower bound is what keeps an older version out, as the comments there say
    for text in requirements():
        wanted = Requirement(text)
        assert wanted.specifier.contains(lowest[wanted.name.lower().replace("_", "-")]), text
    assert lowest["diffusers"] == "0.37.0"
    assert lowest["torch"] == "2.6.0"


@pytest.mark.slow
def test_the_highest_versions_fit_together(tmp_path: Path) -> None:
    highest = resolve(tmp_path, requirements(), "highest")
    assert set(highest) >= {"torch", "diffusers", "transformers", "huggingface-hub", "zarr"}


@pytest.mark.slow
def test_bounds_that_contradict_each_other_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="huggingface-hub"):
        resolve(tmp_path, ["diffusers==0.37.0", "huggingface_hub>=2.4"], "lowest-direct")


def test_what_builds_the_package_is_there_for_the_test_that_builds_it() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert set(build) <= set(PROJECT["optional-dependencies"]["dev"])


def test_every_dependency_has_a_lower_bound_and_no_upper_one() -> None:
    own = [Requirement(one) for one in PROJECT["dependencies"]]
    extras = [
        Requirement(one) for all_ in PROJECT["optional-dependencies"].values() for one in all_
    ]
    for one in (*own, *extras):
        if one.name != "sdconv":
            assert [part.operator for part in one.specifier] == [">="], str(one)
