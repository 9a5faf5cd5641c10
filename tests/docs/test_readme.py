"""The README's Python prints the output that the README shows."""

from __future__ import annotations

import re
import subprocess
import sys

from helpers.paths import ROOT

README = ROOT / "README.md"


def block(language: str) -> str:
    """The first fenced block in this language."""
    found = re.search(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, language
    return found[1]


def test_the_example_prints_what_is_shown_below_it() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == block("text")


def test_files_and_commands_that_it_names_exist() -> None:
    text = README.read_text()
    commands = set(re.findall(r"`sdconv (\w+)", text))
    assert commands
    help_text = subprocess.run(
        [sys.executable, "-m", "sdconv", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert {name for name in commands if f" {name} " not in help_text} == set()
    for name in re.findall(r"`((?:scripts|weights|docs|tests|sdconv)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
