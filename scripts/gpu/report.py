"""The report of a run, drawn from its JSON, and the tables of ``docs/gpu.md``, drawn from runs that
are kept.

    python -m scripts.gpu.report --keep DIR   # a run on a GPU: into docs/gpu, and onto the page
    python -m scripts.gpu.report              # the page's tables again, from docs/gpu
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.gpu.options import STAGES
from scripts.gpu.record import read, write_whole

DOCS = Path(__file__).resolve().parents[2] / "docs"
# on the page, what lies between is drawn
BEGIN, END = "<!-- tables: python -m scripts.gpu.report -->\n", "<!-- end of tables -->\n"
# rows that are left out and named
NAMED = 5
NONE = "**No run on a GPU is recorded yet**, so there is no figure here.\n"

Content = Mapping[str, Any]
# a column's title and its cell's text for a row
Columns = Mapping[str, Callable[[Content], object]]


# --- one run


def markdown(folder: Path) -> str:
    """The report of what a run has found so far."""
    contents = stages(folder)
    parts = ["# sdconv on a GPU\n" if on_gpu(contents) else "# sdconv, the GPU's checks on a CPU\n"]
    parts.append(heading(contents))
    parts.append(table(SUMMARY, contents.values()))
    for stage, content in contents.items():
        parts += [f"## {stage}\n", part(content)]
    return "\n".join(parts)


def stages(folder: Path) -> dict[str, Content]:
    """The stages' files, by stage, in the order in which they run."""
    found = {stage: read(folder, stage) for stage in STAGES}
    return {stage: content for stage, content in found.items() if content is not None}


def on_gpu(contents: Mapping[str, Content]) -> bool:
    """Whether the run was one on a GPU."""
    facts = contents.get("environment", {}).get("facts", {})
    return facts.get("device") == "cuda" and "name" in facts


def heading(contents: Mapping[str, Content]) -> str:
    """The device, the day, and the software, in a sentence."""
    environment = contents.get("environment", {"facts": {}})
    facts = environment["facts"]
    day = next((content["started"][:10] for content in contents.values()), "no day")
    software = [f"{name} {facts[name]}" for name in _SOFTWARE if facts.get(name)]
    small = ", small networks" if facts.get("small") else ""
    return f"{facts.get('name', 'Unknown device')}, {day}{small}: {', '.join(software)}.\n"


_SOFTWARE = ("driver", "cuda", "cudnn", "torch", "triton", "diffusers", "python")


def outcome(folder: Path, stage: str) -> str:
    """How a stage ended, in a sentence."""
    content = read(folder, stage)
    return "not run" if content is None else _outcome(content)


def is_good(folder: Path, stage: str) -> bool:
    """Whether a stage ran to its end and has no complaint."""
    content = read(folder, stage)
    return content is not None and content["status"] == "done" and not content["complaints"]


def _outcome(content: Content) -> str:
    complaints = len(content["complaints"])
    match content["status"]:
        case "running":
            return "the run ended within this stage"
        case "done" if not complaints:
            return "passed"
        case "done":
            return f"{complaints} complaint{'s' * (complaints > 1)}"
    return f"{content['status']}: {content.get('why', 'no reason is known')}"


def part(content: Content) -> str:
    """A stage's part of the report."""
    lines = []
    if content["status"] != "done":
        lines.append(f"{_sentence(_outcome(content))}\n")
    lines += [f"- {_cell(complaint)}" for complaint in content["complaints"]]
    lines += [""] if content["complaints"] else []
    lines.append(TABLES[content["stage"]](content))
    left_out = content["left_out"]
    if left_out:
        named = "; ".join(left_out[:NAMED]) + ("; ..." if len(left_out) > NAMED else "")
        lines.append(f"Left out for want of time, {len(left_out)}: {named}.\n")
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


# --- tables


def table(columns: Columns, rows: Iterable[Content]) -> str:
    """A Markdown table; nothing without rows."""
    lines = [[_cell(cell(row)) for cell in columns.values()] for row in rows]
    if not lines:
        return ""
    head = [list(columns), ["---"] * len(columns)]
    return "".join(f"| {' | '.join(line)} |\n" for line in head + lines)


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def number(value: Any, form: str = ".3g") -> str:
    """A number of a row; NaN and infinity, which are text there, stay."""
    if isinstance(value, int | float):
        return format(value, form)
    return "" if value is None else str(value)


def field(name: str, form: str | None = None) -> Callable[[Content], object]:
    """A cell that shows one value of a row."""
    return lambda row: row.get(name) if form is None else number(row.get(name), form)


def scaled(name: str, unit: float, form: str) -> Callable[[Content], str]:
    """A cell that shows one value of a row in another unit."""

    def cell(row: Content) -> str:
        value = row.get(name)
        return number(value / unit, form) if isinstance(value, int | float) else number(value)

    return cell


def facts(content: Content) -> str:
    """A stage's single figures."""
    known = {name: value for name, value in content["facts"].items() if value is not None}
    rows = [{"name": name, "value": value} for name, value in known.items()]
    return table({"": field("name"), "value": lambda row: _rounded(row["value"])}, rows)


def _rounded(value: Any) -> Any:
    return format(value, ".4g") if isinstance(value, float) else value


def environment(content: Content) -> str:
    ceilings = {
        "ceiling": field("key"),
        "of": field("of"),
        "rate": field("rate", ".4g"),
        "unit": field("unit"),
        "failed": field("error"),
    }
    return facts(content) + "\n" + table(ceilings, content["rows"])


def _verdict(side: str) -> Callable[[Content], object]:
    return lambda row: row.get("error") or row.get(f"{side}_why") or row.get(side)


PARITY = {
    "network": field("network"),
    "dtype": field("dtype"),
    "outputs compared": field("compared"),
    "bit-equal": field("equal"),
    "first that differs": field("first"),
    "why": field("reason"),
    "worst": field("relative", ".2g"),
    "its tolerance": field("tolerance", ".2g"),
    "reference": _verdict("reference"),
    "error by": field("fast_measure"),
    "error, diffusers": field("diffusers_error", ".2g"),
    "error, fast": field("fast_error", ".2g"),
    "tolerance": field("fast_tolerance", ".2g"),
    "fast": _verdict("fast"),
}

SPEED = {
    "network": field("network"),
    "work": field("method"),
    "size": field("size"),
    "batch": field("batch"),
    "dtype": field("dtype"),
    "side": lambda row: row.get("side") or row["key"],
    "ms": field("milliseconds", ".2f"),
    "over sdconv fast": field("ratio", ".2f"),
    "compile, s": field("compile_seconds", ".1f"),
    "peak, MiB": scaled("peak_bytes", 2**20, ".0f"),
    "difference": field("difference", ".1g"),
    "failed": field("error"),
}

PROFILE = {
    "operation": field("operation"),
    "shapes": field("shapes"),
    "calls": field("calls"),
    "ms": field("milliseconds", ".3f"),
    "of all": field("of_total", ".1%"),
    "bound, ms": field("bound_milliseconds", ".3f"),
    "share of the bound": field("share", ".2f"),
}

STREAMING = {
    "side": field("side"),
    "seconds": field("seconds", ".2f"),
    "peak, GiB": scaled("peak_bytes", 2**30, ".2f"),
    "reserved, GiB": scaled("reserved_bytes", 2**30, ".2f"),
    "from the unstreamed": field("from_unstreamed", ".2g"),
    "error": field("distance", ".2g"),
    "failed": field("error"),
}

SUMMARY: Columns = {
    "stage": field("stage"),
    "outcome": _outcome,
    "seconds": field("seconds", ".0f"),
}


def speed(content: Content) -> str:
    """The sides of each work together, and how many times sdconv's milliseconds each takes."""
    works: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        work = tuple(row.get(name) for name in ("network", "method", "size", "batch", "dtype"))
        works.setdefault(work, []).append(dict(row))
    rows = [row for sides in works.values() for row in sides]
    for sides in works.values():
        own = next((row.get("milliseconds") for row in sides if row.get("side") == _OURS), None)
        for row in sides:
            if own and row.get("milliseconds"):
                row["ratio"] = row["milliseconds"] / own
    return table(SPEED, rows)


_OURS = "sdconv fast"


def tests(content: Content) -> str:
    """The counts, and each test that did not pass."""
    counts = content["facts"].get("counts", {})
    said = ", ".join(f"{times} {name}" for name, times in counts.items()) or "no test has run"
    failed = table({"test": field("key"), "outcome": field("outcome")}, content["rows"])
    return f"{_sentence(said)}\n\n{failed}" if failed else f"{_sentence(said)}\n"


TABLES: Mapping[str, Callable[[Content], str]] = {
    "environment": environment,
    "parity": lambda content: table(PARITY, content["rows"]),
    "tests": tests,
    "speed": speed,
    "profile": lambda content: facts(content) + "\n" + table(PROFILE, content["rows"]),
    "streaming": lambda content: facts(content) + "\n" + table(STREAMING, content["rows"]),
}


# --- the page


def page(folder: Path) -> str:
    """The page's tables, of all runs below a folder, the newest first."""
    runs = [stages(path) for path in folder.glob("*") if path.is_dir()]
    runs = sorted((run for run in runs if run), key=_started, reverse=True)
    if not runs:
        return NONE
    parts: list[str] = []
    for contents in runs:
        parts += [f"### {_title(contents)}\n", heading(contents), table(SUMMARY, contents.values())]
        for stage, content in contents.items():
            parts += [f"#### {_title(contents)}: {stage}\n", part(content)]
    return "\n".join(parts)


def _started(contents: Mapping[str, Content]) -> str:
    return str(next(iter(contents.values()))["started"])


def _title(contents: Mapping[str, Content]) -> str:
    return f"{contents['environment']['facts']['name']}, {_started(contents)[:10]}"


def with_tables(text: str, tables: str) -> str:
    """The page with these tables."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the page lacks {BEGIN!r} or {END!r}"
    return f"{before}{begin}\n{tables}\n{end}{after}"


def keep(run: Path, folder: Path) -> Path:
    """Copies a run's JSON and report to a folder of its own, named by device and day.

    Raises:
        SystemExit: it was not a run on a GPU, or one of small networks.
    """
    contents = stages(run)
    if not on_gpu(contents):
        raise SystemExit(f"{run}: not a run on a GPU; only those are kept")
    if contents["environment"]["facts"].get("small"):
        raise SystemExit(f"{run}: a run of small networks; its figures say nothing")
    name = re.sub(r"[^a-z0-9]+", "-", _title(contents).lower()).strip("-")
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    to = next(folder / one for one in names if not (folder / one).exists())
    to.mkdir(parents=True)
    for stage, content in contents.items():
        write_whole(to / f"{stage}.json", json.dumps(content, indent=1) + "\n")
    shutil.copy(run / "report.md", to)
    return to


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--keep", type=Path, help="the folder of a run on a GPU")
    options = parser.parse_args(arguments)
    if options.keep:
        print(keep(options.keep, DOCS / "gpu"))
    file = DOCS / "gpu.md"
    write_whole(file, with_tables(file.read_text("utf-8"), page(DOCS / "gpu")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
