"""Questions that tests ask about a comparison's rows."""

from __future__ import annotations

from collections.abc import Iterable

from sdconv.analysis.parity import ModuleDifference


def first_failure(rows: Iterable[ModuleDifference]) -> str | None:
    """The name of the first module in which two networks differ."""
    return next((row.name for row in rows if not row.passed), None)
