"""A table that is wider than the terminal."""

from __future__ import annotations

import io

import pytest
from helpers import seeded
from rich.console import Console

from sdconv.analysis.anatomy import dissect
from sdconv.report.pieces import FittingTable
from sdconv.report.tables import anatomy_report


def printed(table: object, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return str(console.file.getvalue()).splitlines()  # type: ignore[attr-defined]


TABLE = FittingTable(["name", ">size", "kind"], [["conv_in", "12345", "conv"]], ["kind", "size"])


def test_all_columns_are_shown_where_they_fit() -> None:
    assert printed(TABLE, 40) == ["name      size  kind", "conv_in  12345  conv"]


@pytest.mark.parametrize(("width", "left"), [(18, ["kind"]), (10, ["kind", "size"])])
def test_columns_are_left_out_and_named(width: int, left: list[str]) -> None:
    head, row, *words = printed(TABLE, width)
    assert head.split() == ["name", "size"][: 3 - len(left)]
    assert row.split() == ["conv_in", "12345"][: 3 - len(left)]
    assert f"narrow: {', '.join(left)};" in " ".join(" ".join(words).split())


def test_the_anatomy_of_a_vae_fits_a_terminal_of_80_columns() -> None:
    config = seeded.kl((64, 64, 64, 64), 4, True)
    report = anatomy_report(dissect(config, (64, 64)), every=False)
    narrow, wide = printed(report, 80), printed(report, 200)
    assert max(map(len, narrow)) <= 80 < max(map(len, wide))
    rows = [line for line in narrow if line.startswith("down_blocks.0.resnets.0")]
    assert len(rows) == 1 and "302 M" in rows[0]  # in one line, with its MACs
    assert "left out" in " ".join(narrow) and "left out" not in " ".join(wide)
