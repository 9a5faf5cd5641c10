"""The tests marked ``gpu``, each outcome noted as soon as pytest prints it.

``DIR/pytest.txt`` has all that pytest prints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from scripts.gpu.options import Options
from scripts.gpu.record import Record

ROOT = Path(__file__).resolve().parents[3]
# seconds that a single test may take, where pytest-timeout is installed
EACH = 60
# processes that share a GPU, at most; each takes two cores and half a minute to begin
PROCESSES = 6
_WORDS = r"(?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
# of one process, and of several
_OUTCOMES = (
    re.compile(rf"^(?P<test>\S+::.+?) {_WORDS}\b"),
    re.compile(rf"^\[gw\d+\] \[ *\d+%\] {_WORDS} (?P<test>\S+::.+?)\s*$"),
)


def run(record: Record, options: Options) -> None:
    files = marked(ROOT / "tests")
    if options.small:
        files = files[-1:]  # one shows that the stage works
    record.facts(files=[str(file.relative_to(ROOT)) for file in files])
    log = record.folder / "pytest.txt"
    with log.open("w", encoding="utf-8") as copy:
        process = subprocess.Popen(
            command(files), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        try:
            counts = follow(record, process.stdout, copy)
        finally:
            process.kill()
            status = process.wait()
    judge(record, counts, status, on_gpu=options.device == "cuda")


def marked(folder: Path) -> list[Path]:
    """The files that have such tests, CUDA's own first: to collect only these takes seconds instead
    of a minute."""
    files = sorted(folder.rglob("test_*.py"), key=lambda file: ("cuda" not in str(file), file))
    return [file for file in files if "mark.gpu" in file.read_text()]


def command(files: Iterable[Path]) -> list[str]:
    given = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--color=no"]
    # another pytest or torch than the project's: no test may fail for its version's sake
    given += ["-o", "minversion=0", "-W", "default", "-p", "no:cacheprovider"]
    given += [f"--timeout={EACH}"] if find_spec("pytest_timeout") else []
    processes = min(PROCESSES, (os.cpu_count() or 1) // 2)
    given += ["-n", str(processes)] if processes > 1 and find_spec("xdist") else []
    return given + [str(file) for file in files]


def follow(record: Record, lines: Iterable[str], copy: object) -> Counter[str]:
    """Notes outcomes line by line, failures at once, and returns their counts."""
    counts: Counter[str] = Counter()
    for line in lines:
        print(line, end="", file=copy, flush=True)  # type: ignore[call-overload]
        match = next(filter(None, (one.match(line) for one in _OUTCOMES)), None)
        if match is None:
            continue
        counts[match["outcome"].lower()] += 1
        if match["outcome"] in ("FAILED", "ERROR", "XPASS"):
            record.row(match["test"], outcome=match["outcome"].lower())
            record.complain(f"{match['test']}: {match['outcome'].lower()}")
        record.facts(counts=dict(counts))
    return counts


def judge(record: Record, counts: Counter[str], status: int, *, on_gpu: bool) -> None:
    """Complains if pytest did not end well, or if on a GPU no test has passed."""
    if status not in (0, 1):
        record.complain(f"pytest ended with status {status}; see pytest.txt")
    if on_gpu and not counts["passed"]:
        record.complain("no test has passed")
