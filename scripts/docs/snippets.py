"""Runs the code in the documentation and compares its output with the output shown there.

    python -m scripts.docs.snippets            # reports outputs that differ
    python -m scripts.docs.snippets --write    # writes the outputs into the pages

A fenced block ``python`` is code, a fenced block ``console`` is a command after ``$``, and a fenced
block ``text`` directly below either is its output. The blocks of a page run in order and share
their variables, in a temporary folder in which `weights` is the repository's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_SNIPPET = re.compile(
    r"^```(?P<language>python|console)\n(?P<code>.*?)^```\n"
    r"(?:\n?^```text\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_WIDTH = "100"  # characters of a command's tables


@dataclass(frozen=True)
class Snippet:
    """One block of a page: the number of its first line, its code, the output shown below it and
    the output of this run."""

    page: Path
    line: int
    code: str
    shown: str
    printed: str


def run_page(page: Path) -> list[Snippet]:
    """Runs a page's blocks in order; exceptions are not caught."""
    text, names = page.read_text("utf-8"), {"__name__": page.stem}
    snippets = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("weights").symlink_to(ROOT / "weights")
        for match in _SNIPPET.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            code = match["code"]
            if match["language"] == "python":
                printed = _run_python(code, names, f"{page.name}, line {line}")
            else:
                printed = _run_command(code)
            snippets.append(Snippet(page, line, code, match["shown"] or "", printed))
    return snippets


def refreshed(page: Path) -> str:
    """The page's text with the outputs of this run."""
    outputs = iter([snippet.printed for snippet in run_page(page)])

    def block(match: re.Match[str]) -> str:
        code = f"```{match['language']}\n{match['code']}```\n"
        printed = next(outputs)
        return f"{code}```text\n{printed}```\n" if printed else code

    return _SNIPPET.sub(block, page.read_text("utf-8"))


def _run_python(code: str, names: dict[str, Any], label: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, label, "exec"), names)
    return _trimmed(out.getvalue())


def _run_command(code: str) -> str:
    """The output of one `sdconv` command, run with this Python. A failing exit status is ignored:
    `sdconv check` has one when networks differ."""
    command = code.strip().removeprefix("$ ").split()
    if command[:1] != ["sdconv"]:
        raise ValueError(f"not a command of sdconv: {code!r}")
    ran = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": _WIDTH, "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
    )
    return _trimmed(ran.stdout + ran.stderr)


def _trimmed(printed: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in printed.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, default=sorted(DOCS.glob("*.md")))
    parser.add_argument("--write", action="store_true", help="write the outputs into the pages")
    args = parser.parse_args()
    # methods by the constants that ship, not by those that were fitted here
    os.environ["SDCONV_CACHE"] = str(Path(tempfile.gettempdir()) / "no-cache-of-sdconv")
    differing = 0
    for page in args.pages:
        if args.write:
            page.write_text(refreshed(page), "utf-8")
            continue
        for snippet in run_page(page):
            if snippet.printed != snippet.shown:
                differing += 1
                print(f"{page}:{snippet.line}: shown\n{snippet.shown}printed\n{snippet.printed}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
