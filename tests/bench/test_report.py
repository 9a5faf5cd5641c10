"""The tables of the pages are drawn from files, and from nothing else."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT

from scripts.bench import report
from scripts.bench.cpu import TOLERANCE, difference
from scripts.bench.parts import PARTS
from scripts.bench.plot import plot_parts, plot_sizes
from scripts.bench.record import machine, table

DRAWN = re.compile(r"<!-- bench: .*?<!-- end of bench -->", re.DOTALL)
TABLE = re.compile(r"^\|-", re.MULTILINE)
PAGE = "Before.\n<!-- bench: decode -->\n\nold\n\n<!-- end of bench -->\nAfter.\n"


def run(
    day: str, *seconds: float, threads: int = 2, quick: bool = False, machine: str = "A|B"
) -> dict[str, Any]:
    """A run of a decode."""
    sides = ("diffusers", "OpenVINO, f32", "sdconv fast")
    rows: list[dict[str, Any]] = [
        {"work": "decode 8x8", "side": side, "seconds": one, "all seconds": [one, one]}
        for side, one in zip(sides, seconds, strict=False)
    ]
    on = {"processor": machine, "vectors": "AVX2", "cores": 2, "packages": {"torch": "9"}}
    results = {f"python {threads}": {"what": "decode", "threads": threads, "rows": rows}}
    return {"quick": quick, "machine": on | {"date": day}, "results": results}


def kept(folder: Path, **runs: dict[str, Any]) -> Any:
    for name, content in runs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return report.runs(folder)


def test_the_pages_are_drawn_from_the_files_that_are_kept() -> None:
    found = report.runs(ROOT / "docs" / "bench")
    assert found
    for page in (ROOT / "docs" / "performance.md", ROOT / "README.md"):
        text = page.read_text("utf-8")
        assert DRAWN.search(text) and report.drawn(text, found) == text, page
    outside = DRAWN.sub("", (ROOT / "docs" / "performance.md").read_text("utf-8"))
    assert not TABLE.search(outside), "a table whose figures are in no file"
    assert TABLE.search("| a |\n|---|\n"), "the control"


def test_a_page(tmp_path: Path) -> None:
    old = run("2026-01-01", 3.0, 2.0, 1.0, machine="C")
    found = kept(tmp_path, old=old, new=run("2026-02-01", 2.5))
    text = report.drawn(PAGE, found)
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "old\n" not in text
    assert text.index("2026-02-01") < text.index("2026-01-01")
    assert "| decode 8x8 | sdconv fast | 1.0 |" in text and "all seconds" not in text
    assert report.drawn(text, found) == text
    assert "Not measured yet" in report.drawn(PAGE.replace("decode", "first"), found)


def test_fewer_threads_than_cores_are_said(tmp_path: Path) -> None:
    for threads, said in ((2, False), (1, True)):
        text = report.drawn(PAGE, kept(tmp_path, a=run("2026-01-01", 3.0, threads=threads)))
        assert ("| threads |" in text) is said


def test_of_one_command_on_one_machine_the_newest_run_is_drawn(tmp_path: Path) -> None:
    new, old = run("2026-02-01", 2.5), run("2026-01-01", 3.0)
    old["results"] |= run("2026-01-01", 7.0, threads=1)["results"]
    found = kept(tmp_path, old=old, new=new)
    text = report.drawn(PAGE, found)
    assert "| 2.5 |" in text and "| 7.0 |" in text and "| 3.0 |" not in text
    text = report.drawn(PAGE, kept(tmp_path, old=run("2026-01-01", 3.0, machine="C"), new=new))
    assert "| 2.5 |" in text and "| 3.0 |" in text, "another machine"


def test_runs_of_one_day_are_ordered_by_their_time(tmp_path: Path) -> None:
    early, late, old = (run("2026-01-02", one, machine=f"{one}") for one in (2.0, 1.0, 3.0))
    early["machine"]["time"], late["machine"]["time"] = "08:30:00", "19:05:00"
    assert list(kept(tmp_path, c=early, a=late, d=old)) == ["a", "c", "d"]
    del late["machine"]["time"], early["machine"]["time"]
    assert list(kept(tmp_path, c=early, a=late, d=old)) == ["d", "c", "a"], "the control: by name"
    assert datetime.time.fromisoformat(machine()["time"])


def test_threads_and_failures_are_shown(tmp_path: Path) -> None:
    two, one = run("2026-01-01", 3.0), run("2026-01-01", 6.0, threads=1)
    two["results"] |= one["results"]
    two["results"]["python 1"]["failed"] = "it fell over"
    text = report.drawn(PAGE, kept(tmp_path, a=two))
    assert "| work | threads | side | seconds | failed |" in text
    assert "| decode 8x8 | 1 | diffusers | 6.0 |  |" in text and "it fell over" in text
    two["results"]["python 2"]["rows"].append({"work": "decode 8x8", "failed": "not timed"})
    text = report.drawn(PAGE, kept(tmp_path, a=two))
    assert "not timed" in text and text.count("| work |") == 1, "in the table of the others"


def test_the_summary_compares_the_best(tmp_path: Path) -> None:
    page = PAGE.replace("decode", "summary")
    text = report.drawn(page, kept(tmp_path, a=run("2026-01-01", 3.0, 2.0, 1.0)))
    assert "| decode 8x8 | 3.0 |  | 2.0 (OpenVINO, f32) | 1.0 |" in text
    assert "Not measured yet" in report.drawn(page, {})
    machines = {one: run(f"2026-01-0{day}", 3.0, machine=one) for day, one in enumerate("CDE", 1)}
    text = report.drawn(page, kept(tmp_path, **machines))
    assert text.index("E, 2 cores") < text.index("D, 2 cores") and "C, 2 cores" not in text


def test_quick_runs_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run("2026-01-01", 1.0, quick=True)))
    with pytest.raises(SystemExit, match="small sizes"):
        report.keep(file, tmp_path / "docs")
    whole = run("2026-01-01", 1.0)
    whole["machine"]["sdconv"] = "1a2b3c4"
    file.write_text(json.dumps(whole))
    assert report.keep(file, tmp_path / "docs").name == "a-b-avx2-2026-01-01-1a2b3c4.json"


def test_runs_of_one_day_and_commit_are_kept_together(tmp_path: Path) -> None:
    file, folder = tmp_path / "run.json", tmp_path / "docs"
    first, second = (run("2026-01-01", seconds) for seconds in (1.0, 2.0))
    command, result = next(iter(first["results"].items()))
    second["results"] = {"another": result}
    second["machine"]["time"] = "12:00:00"
    for one in (first, second):
        one["machine"]["sdconv"] = "1a2b3c4"
        file.write_text(json.dumps(one))
        to = report.keep(file, folder)
    assert list(json.loads(to.read_text())["results"]) == [command, "another"]
    second["machine"]["packages"] = {"torch": "0"}
    file.write_text(json.dumps(second))
    with pytest.raises(SystemExit, match="other packages"):
        report.keep(file, folder)


def test_tables_change_with_their_columns() -> None:
    rows = [{"a": 1, "b": "x|y"}, {"a": 2}, {"c": 3}]
    assert table(rows) == "| a | b |\n|---|---|\n| 1 | x\\|y |\n| 2 |  |\n\n| c |\n|---|\n| 3 |\n"
    assert table([]) == ""


def test_an_output_that_is_not_diffusers_is_not_timed() -> None:
    import numpy as np

    out = np.linspace(-2, 2, 9, dtype=np.float32)
    assert difference(out, out) == 0
    assert difference(out * 1.01, out) > TOLERANCE > difference(out * 1.0001, out)
    assert difference(out[1:], out) == float("inf")
    assert not difference(out * np.nan, out) <= TOLERANCE


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'sdconv[plot]'")
    found = report.runs(ROOT / "docs" / "bench")
    sizes = next(filter(None, (report.rows_of(one, ["sizes"]) for one in found.values())))
    plot_sizes(sizes, tmp_path / "sizes.png")
    parts = [
        {"work": "decode 8x8", "side": side, "part": part, "seconds": 0.5}
        for side in ("diffusers", "sdconv fast")
        for part in PARTS
    ]
    plot_parts(parts, tmp_path / "parts.png")
    assert {one.name for one in tmp_path.glob("*.png")} == {"sizes.png", "parts.png"}
