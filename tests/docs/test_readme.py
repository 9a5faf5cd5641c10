"""The README's Python prints the output that the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from helpers.paths import ROOT

README = ROOT / "README.md"


def block(language: str) -> str:
    """The first fenced block in this language."""
    found = re.search(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, language
    return found[1]


def test_the_example_prints_what_is_shown_below_it(tmp_path: Path) -> None:
    """Outside of the clone, where only the package is."""
    ran = subprocess.run(
        [sys.executable, "-c", block("python")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == block("text")


def test_files_and_commands_that_it_names_exist() -> None:
    text = README.read_text()
    commands = set(re.findall(r"`sdconv ([\w-]+)", text))
    assert commands
    help_text = subprocess.run(
        [sys.executable, "-m", "sdconv", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert {name for name in commands if f" {name} " not in help_text} == set()
    for name in re.findall(r"`((?:scripts|weights|docs|tests|sdconv)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


SITE = {
    "https://github.com/sdconv/sdconv/blob/main/": False,
    "https://raw.githubusercontent.com/sdconv/sdconv/main/": True,
}


def broken_links(text: str) -> list[str]:
    """The links and images that would not work on an index's page, or name no file of ours."""
    broken = []
    for mark, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text):
        start = next((one for one in SITE if target.startswith(one)), None)
        if start is None or SITE[start] != bool(mark):
            broken.append(target)
        elif not (ROOT / target.removeprefix(start).partition("#")[0]).is_file():
            broken.append(target)
    return broken


def test_links_and_images_work_on_an_indexs_page() -> None:
    assert broken_links(README.read_text()) == []


def test_a_relative_or_broken_link_is_noticed() -> None:
    blob, raw = SITE
    for link in (
        "[a](docs/lora.md)",
        f"[a]({blob}docs/no-such.md)",
        f"![a]({blob}docs/lora.md)",
        f"[a]({raw}docs/lora.md)",
    ):
        assert len(broken_links(link)) == 1
    assert broken_links(f"[a]({blob}docs/lora.md#names) ![a]({raw}docs/screens/page.webp)") == []


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ran = [sys.executable, "-c", "import sdconv; print(sdconv.__version__)"]
    assert subprocess.run(ran, capture_output=True, text=True, cwd=ROOT).stdout.strip() == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
