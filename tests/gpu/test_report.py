"""The report is drawn from JSON, and the page's tables from the runs that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.gpu import report
from scripts.gpu.record import Record


def made(folder: Path, **facts: Any) -> Path:
    """A run's folder with the facts of its device and one row of speed."""
    Record(folder, "environment").facts(**facts)
    Record(folder, "environment").end("done")
    speed = Record(folder, "speed")
    work = {"network": "VAE", "method": "decode", "size": 1024, "batch": 1, "dtype": "bfloat16"}
    speed.row("1", **work, side="diffusers", milliseconds=50.0, peak_bytes=3 << 30)
    speed.row("2", **work, side="sdconv fast", milliseconds=20.0, difference=float("nan"))
    speed.row("3", **work, side="a|b", error="OutOfMemoryError: <no room>")
    speed.complain("diffusers is slow")
    speed.end("done")
    return folder


GPU = {"device": "cuda", "name": "NVIDIA H200", "torch": "2.11.0", "small": False}


def test_a_run_becomes_a_report(tmp_path: Path) -> None:
    text = (made(tmp_path, **GPU) / "report.md").read_text()
    assert "NVIDIA H200, 20" in text and "torch 2.11.0" in text
    assert "| environment | passed |" in text
    assert "| speed | 1 complaint |" in text and "- diffusers is slow" in text
    assert "| diffusers | 50.00 | 2.50 |  | 3072 |" in text
    assert "| sdconv fast | 20.00 | 1.00 |  |  | nan |" in text
    assert "| a\\|b |" in text and "&lt;no room>" in text


def test_a_run_is_kept_by_device_and_day(tmp_path: Path) -> None:
    run, docs = made(tmp_path / "run", **GPU), tmp_path / "docs"
    first, second = report.keep(run, docs), report.keep(run, docs)
    assert first.name.startswith("nvidia-h200-20") and second.name == f"{first.name}-2"
    page = report.page(docs)
    assert page.count("\n#### NVIDIA H200, 20") == 4, "two stages each"
    assert "| sdconv fast | 20.00 |" in page
    assert report.NONE not in page


@pytest.mark.parametrize("facts", [{**GPU, "device": "cpu"}, {**GPU, "small": True}])
def test_only_full_runs_on_a_gpu_are_kept(tmp_path: Path, facts: dict[str, Any]) -> None:
    run = made(tmp_path / "run", **facts)
    with pytest.raises(SystemExit, match=r"not a run on a GPU|small networks"):
        report.keep(run, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_the_page_shows_the_runs_that_are_kept() -> None:
    page = (report.DOCS / "gpu.md").read_text("utf-8")
    assert report.with_tables(page, report.page(report.DOCS / "gpu")) == page, (
        "run `python -m scripts.gpu.report`"
    )
    kept = [path for path in (report.DOCS / "gpu").glob("*") if path.is_dir()]
    assert (report.NONE in page) is (not kept)


def test_a_page_with_another_table_is_noticed(tmp_path: Path) -> None:
    page = (report.DOCS / "gpu.md").read_text("utf-8")
    planted = page.replace(report.END, f"| a figure | 11 ms |\n{report.END}")
    assert report.with_tables(planted, report.page(report.DOCS / "gpu")) != planted
