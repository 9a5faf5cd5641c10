"""The explainer in a tab: when it is there, when it is idle, and the Python that it shows."""

from __future__ import annotations

from typing import Any

from scripts.bench.explainer import IDLE, READY

__all__ = ["IDLE", "READY", "python_of"]


def python_of(figure: Any) -> str:
    """All lines of a figure with Python: the folded ones and the last statement."""
    return "".join(figure.locator("code").all_text_contents())
