"""Runs the code in the documentation and keeps the outputs shown below it true.

    python -m scripts.docs.snippets            # says where an output differs from what is shown
    python -m scripts.docs.snippets --write    # writes what came out into the pages

A fenced block ``python`` is code, a fenced block ``console`` a command after ``$``; a fenced block
``text`` right below either is what it prints. The blocks of one page run one after another and see
each other's names, in a folder of their own in which `weights` is the repository's.
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
    """One block of a page: its first line's number, its code, what is shown below it and what
    came out."""

    page: Path
    line: int
    code: str
    shown: str
    printed: str


def run_page(page: Path) -> list[Snippet]:
    """Runs a page's blocks in order; what a block raises is raised."""
    text, names = page.read_text("utf-8"), {"__name__": page.stem}
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("weights").symlink_to(ROOT / "weights")
        for match in _SNIPPET.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            code = match["code"]
            if match["language"] == "python":
                printed = _run_python(code, names, f"{page.name}, line {line}")
            else:
                printed = _run_command(code)
            found.append(Snippet(page, line, code, match["shown"] or "", printed))
    return found


def refreshed(page: Path) -> str:
    """The page's text with what came out in place of what is shown."""
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
    """What one command prints. `sdconv` is this Python's; a failure (as of `sdconv check`, which
    says so when networks differ) is part of what is shown."""
    command = code.strip().removeprefix("$ ").split()
    if command[:1] != ["sdconv"]:
        raise ValueError(f"only sdconv's commands are run, not {code!r}")
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
    parser.add_argument("--write", action="store_true", help="put what came out into the pages")
    args = parser.parse_args()
    wrong = 0
    for page in args.pages:
        if args.write:
            page.write_text(refreshed(page), "utf-8")
            continue
        for snippet in run_page(page):
            if snippet.printed != snippet.shown:
                wrong += 1
                print(f"{page}:{snippet.line}: shown\n{snippet.shown}printed\n{snippet.printed}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
