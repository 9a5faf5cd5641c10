"""The benchmarks of data sets and of ranks: what they print, and that a run goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.bench import dataset, ranks

Shown = list[dict[str, Any]]


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The sides that were run, and their images; nothing is encoded."""
    found: list[tuple[str, int]] = []

    def measured(side: str, size: int, args: Any, folder: Path, model: Path) -> dict[str, float]:
        count = len(list(folder.glob("*.jpg")))
        found.append((side, count))
        if len(found) == 4:
            raise KeyboardInterrupt
        return {"seconds": 2.0, "waited": 0.5, "memory": 3e6}

    monkeypatch.setattr(dataset, "measured", measured)
    monkeypatch.setattr(dataset, "write_model", lambda folder, full: folder)
    monkeypatch.setattr(dataset.write_images, "__defaults__", (40,))
    return found


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dataset", *arguments])
    dataset.main()


def test_sides_take_turns_and_a_run_goes_on(
    sides: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "rows.json"
    some = ["--images", "5", "--rounds", "2", "--sizes", "32", "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *some)
    assert sides == [(side, 3) for side in dataset.SIDES] + [(dataset.LOOP, 2)]
    run(monkeypatch, *some)
    assert sides[4:] == [(side, 2) for side in dataset.SIDES]
    rows: Shown = json.loads(file.read_text())["rows"]
    assert [row["side"] for row in rows] == list(dataset.SIDES)
    code = dataset.lines_of_code()
    assert code[dataset.LOOP] > 2 * code["sdconv fast"] > 0
    for row in rows:
        wanted = {"images": 5, "images/s": 1.25, "waited, s": 1.0, "memory, MB": 3}
        assert wanted.items() <= row.items()
        assert row["lines of code"] == code[row["side"]]
    assert "| encode 32x32, small VAE | sdconv fast | 5 | 1.25 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="figures of other options"):
        run(monkeypatch, *some, "--workers", "7")


def test_planning_counts_every_file(tmp_path: Path) -> None:
    first, second = dataset.planning(200, tmp_path)
    assert first["files"] == second["files"] == 200
    assert first["files/s"] > 0
    assert first["work"] != second["work"]


def test_ranks_are_compared_with_one_rank() -> None:
    options = SimpleNamespace(work="decode", size=(8, 16), dtype=torch.bfloat16, errors=True)
    chosen = [
        (name, number, "", None)
        for name, number in (
            ("diffusers", 1),
            ("sdconv fast", 1),
            ("sdconv fast, over ranks", 2),
            ("distvae", 2),
            ("not run yet", 2),
        )
    ]
    times = [[4.0, 5.0, 6.0], [2.0], [1.5], [4.0], []]
    runs = [[(seconds, 2e6, 1e-3) for seconds in one] for one in times]
    rows = ranks.rows_of(options, chosen, runs)
    assert [row["seconds"] for row in rows] == [5.0, 2.0, 1.5, 4.0]
    assert [row["of one rank's"] for row in rows] == ["", "", 0.75, 0.8]
    assert {row["memory of a rank, MB"] for row in rows} == {2}
    assert rows[0]["work"] == "decode 8x16"
    assert rows[0]["dtype"] == "bfloat16"
    assert rows[0]["error against float64"] == "1.0e-03"
    (alone,) = ranks.rows_of(options, chosen[2:3], runs[2:3])
    assert alone["of one rank's"] == ""
