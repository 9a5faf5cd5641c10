"""What every table is made of: safe text, short numbers, columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

SHOWN = 8
"""Names in a line before "and n more"."""


def plain(value: object, style: str = "") -> Text:
    """Text as it is, whatever a file's names hold: no markup, nothing a terminal acts upon."""
    words = str(value)
    printable = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in words)
    return Text(printable.encode("utf-8", "backslashreplace").decode("utf-8"), style=style)


def count(number: int) -> str:
    """``83653863`` as ``83.65 M``: up to four digits."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.4g} {letter}"
    return str(number)


def in_bytes(number: int) -> str:
    """``334643268`` as ``334.6 MB``."""
    return f"{count(number)}B" if number >= 1000 else f"{number} B"


def table_of(*headings: str) -> Table:
    """A table without frame; headings that begin with ``>`` are of right-aligned columns."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        align, words = ("right", heading[1:]) if heading.startswith(">") else ("left", heading)
        table.add_column(words, justify=align, overflow="fold")  # type: ignore[arg-type]
    return table


def facts_of(facts: Mapping[str, object]) -> Table:
    """Names and what is said of them, side by side."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, fact if isinstance(fact, Text) else plain(fact))
    return table


def some(names: Iterable[str]) -> str:
    """Names in a line, at most ``SHOWN`` of them."""
    listed = list(names)
    rest = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
