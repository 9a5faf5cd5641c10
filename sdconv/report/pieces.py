"""Parts that every table is made of: safe text, columns, lists of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

SHOWN = 8
"""Names in a line before "and n more"."""


def plain(value: object, style: str = "") -> Text:
    """Text without markup, in which control characters are escaped: file names may hold any."""
    words = str(value)
    printable = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in words)
    return Text(printable.encode("utf-8", "backslashreplace").decode("utf-8"), style=style)


def table_of(*headings: str) -> Table:
    """A table without a frame; columns whose heading begins with ``>`` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        justify: JustifyMethod = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=justify, overflow="fold")
    return table


class FittingTable:
    """A table that leaves columns out where the terminal is too narrow for all, and says which.

    Args:
        headings: as ``table_of`` takes them.
        rows: with a cell for each.
        expendable: the headings that may be left out, the first one first, without ``>``.
    """

    def __init__(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], expendable: Sequence[str]
    ) -> None:
        self.headings, self.rows, self.expendable = headings, rows, expendable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update_width(10_000)
        for number in range(len(self.expendable) + 1):
            table = self._without(self.expendable[:number])
            if Measurement.get(console, unbounded, table).maximum <= options.max_width:
                break
        yield table
        if number:
            names = ", ".join(self.expendable[:number])
            words = f"left out, for the terminal is narrow: {names}; a file or a pipe gets them"
            yield Text(words, style="dim")

    def _without(self, names: Sequence[str]) -> Table:
        kept = [at for at, one in enumerate(self.headings) if one.removeprefix(">") not in names]
        table = table_of(*(self.headings[at] for at in kept))
        for row in self.rows:
            table.add_row(*(row[at] for at in kept))
        return table


def facts_of(facts: Mapping[str, object]) -> Table:
    """A table of two columns: labels and facts."""
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
