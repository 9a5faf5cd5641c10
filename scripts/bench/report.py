"""The tables and plots of the pages, drawn from the files of runs that are kept in ``docs/bench``.

    python -m scripts.bench.report --keep out/bench.json   # a run: into docs/bench, onto the pages
    python -m scripts.bench.report                         # the pages again, from docs/bench

On a page, what lies between ``<!-- bench: decode encode -->`` and ``<!-- end of bench -->`` is
drawn: a table of these benchmarks for each run that has them, the newest first. Of the runs of one
command on one machine, the newest counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.bench.plot import plot_parts, plot_sizes
from scripts.bench.record import ROOT, differences, table, write_whole
from scripts.bench.sides import CONVERTED, FAST, LABELS

DOCS = ROOT / "docs"
_DRAWN = re.compile(r"(<!-- bench: (?P<what>[^>]*) -->\n).*?(<!-- end of bench -->\n)", re.DOTALL)
_NONE = "**Not measured yet.**"

Run = Mapping[str, Any]
Row = Mapping[str, Any]


def runs(folder: Path) -> dict[str, Run]:
    """The runs that are kept, by file name, the newest first. Those that say no time of their day
    are older than those that do."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}

    def age(name: str) -> tuple[str, ...]:
        on = found[name]["machine"]
        return on["date"], on.get("time", ""), name

    drawn: set[tuple[Any, ...]] = set()
    newest = {}
    for name in sorted(found, key=age, reverse=True):
        run, machine = found[name], machine_of(found[name])
        results = {
            command: result
            for command, result in run["results"].items()
            if (*machine, command) not in drawn
        }
        drawn |= {(*machine, command) for command in results}
        if results:
            newest[name] = run | {"results": results}
    return newest


def machine_of(run: Run) -> tuple[Any, ...]:
    """What tells one machine from another: its processor, cores and vectors."""
    return tuple(run["machine"][name] for name in ("processor", "cores", "vectors"))


def rows_of(run: Run, what: Sequence[str]) -> list[Row]:
    """The rows of a run's benchmarks, with the number of threads unless it is that of the cores."""
    results = [one for name in what for one in run["results"].values() if one["what"] == name]
    several = {one["threads"] for one in results} != {run["machine"]["cores"]}
    rows = []
    for one in results:
        for row in one["rows"]:
            first, *_ = row
            own = {first: row[first]} | ({"threads": one["threads"]} if several else {})
            rows.append(own | {k: v for k, v in row.items() if not isinstance(v, list)})
        if "failed" in one:
            rows.append({"work": one["what"], "failed": one["failed"]})
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in columns} for row in rows]


def heading(name: str, run: Run) -> str:
    """The machine, the software and the day, in a line."""
    on = run["machine"]
    packages = [f"{one} {number}" for one, number in on["packages"].items() if number]
    units = ["AMX"] if "amx_bf16" in on.get("features", ()) else []
    parts = [on["processor"], f"{on['cores']} cores", on["vectors"], *units, *packages]
    if on.get("sdconv"):
        parts.append(f"sdconv {on['sdconv']}")
    return f"{', '.join(map(str, parts))}; {on['date']} (`docs/bench/{name}.json`):"


def section(kept: Mapping[str, Run], what: Sequence[str]) -> str:
    """The tables of some benchmarks, one for each run."""
    parts = []
    for name, run in kept.items():
        rows = rows_of(run, what)
        if rows:
            parts += [heading(name, run), table(rows).rstrip()]
    parts += [_PLOTS[name] for name in what if parts and name in _PLOTS]
    return "\n\n".join(parts) or _NONE


# that are on a page only once there are figures for them
_PLOTS = {"parts": "![Seconds of each part, diffusers and sdconv fast](plots/parts.webp)"}


def summary(kept: Mapping[str, Run]) -> str:
    """README's tables: seconds of the sides next to each other, on all cores, of the two machines
    that were measured last and have a decode."""
    parts: list[str] = []
    seen: set[tuple[Any, ...]] = set()
    for name, run in kept.items():
        machine = machine_of(run)
        if machine in seen or len(parts) == 2:
            continue
        seen.add(machine)
        lines = _summary_lines(machine, kept.values())
        if any(line["work"].startswith("decode") for line in lines):
            parts.append(f"{heading(name, run)}\n\n{table(lines).rstrip()}")
    return "\n\n".join(parts) or _NONE


def _summary_lines(machine: tuple[Any, ...], kept: Iterable[Run]) -> list[Row]:
    results = [
        (run["machine"].get("sdconv", ""), result)
        for run in kept
        if machine_of(run) == machine
        for result in run["results"].values()
        if result["threads"] == run["machine"]["cores"] and result["rows"]
    ]
    lines = [
        _summary_line(one["rows"]) | {"sdconv": commit}
        for what in _SUMMARY
        for commit, one in results
        if one["what"] == what
    ]
    # of several results of one work, the first
    works = {line["work"]: line for line in reversed(lines)}
    return [line for line in lines if works[line["work"]] is line]


_SUMMARY = (
    *("decode", "decode-bf16", "encode", "encode-bf16", "unet", "unet-bf16", "unet-f16"),
    *("unet-xl", "tiny-decode", "taef1-decode"),
)


def _summary_line(rows: Sequence[Row]) -> dict[str, Any]:
    seconds = {row["side"]: row["seconds"] for row in rows if row.get("seconds")}
    torchs = [seconds[LABELS[one]] for one in ("plain", "channels_last") if LABELS[one] in seconds]
    runtimes = {
        side: seconds[side] for side in (LABELS[one] for one in CONVERTED) if side in seconds
    }
    best = min(runtimes, key=lambda side: runtimes[side], default="")
    return {
        "work": rows[0]["work"],
        "diffusers' faster layout, s": min(torchs) if torchs else "",
        "compiled, s": seconds.get(LABELS["compiled"], ""),
        "fastest runtime, s": f"{runtimes[best]} ({best})" if best else "",
        "sdconv fast, s": seconds.get(FAST, ""),
    }


def drawn(text: str, kept: Mapping[str, Run]) -> str:
    """A page with its tables drawn anew."""

    def replaced(match: re.Match[str]) -> str:
        what = match["what"].split()
        tables = summary(kept) if what == ["summary"] else section(kept, what)
        return f"{match[1]}\n{tables}\n\n{match[3]}"

    return _DRAWN.sub(replaced, text)


def draw(pages: Sequence[Path], folder: Path, plots: Path) -> None:
    """Draws the pages' tables, and each plot from the newest run that has its rows."""
    kept = runs(folder)
    for page in pages:
        write_whole(page, drawn(page.read_text("utf-8"), kept))
    for what, plot in (("sizes", plot_sizes), ("parts", plot_parts)):
        found = next(filter(None, (rows_of(run, [what]) for run in kept.values())), None)
        if found:
            plots.mkdir(parents=True, exist_ok=True)
            plot(found, plots / f"{what}.webp")


def keep(path: Path, folder: Path) -> Path:
    """Copies a run's file to a folder, named by processor, day and commit. Results that a file of
    this name has and the run has not are kept.

    Raises:
        SystemExit: its sizes are small, or those of the file of this name are of other software.
    """
    run = json.loads(path.read_text("utf-8"))
    if run["quick"]:
        raise SystemExit(f"{path}: a run of small sizes; its figures say nothing")
    on = run["machine"]
    what = " ".join(str(on[name]) for name in ("processor", "vectors", "date", "sdconv"))
    name = re.sub(r"[^a-z0-9]+", "-", what.lower())
    to = folder / f"{name.strip('-')}.json"
    if to.exists():
        before = json.loads(to.read_text("utf-8"))
        if others := differences(before["machine"], on):
            raise SystemExit(f"{to}: figures with other {', '.join(others)}; move it away first")
        run["results"] = before["results"] | run["results"]
    write_whole(to, json.dumps(run, indent=1) + "\n")
    return to


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--keep", type=Path, metavar="FILE", help="of scripts.bench.all")
    options = parser.parse_args(arguments)
    if options.keep:
        print(keep(options.keep, DOCS / "bench"))
    draw([DOCS / "performance.md", ROOT / "README.md"], DOCS / "bench", DOCS / "plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
