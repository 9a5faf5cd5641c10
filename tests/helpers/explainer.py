"""The explainer in a tab: when it is there, when it is idle, and the Python that it shows."""

from __future__ import annotations

from typing import Any

READY = "document.documentElement.dataset.ready === 'true'"
IDLE = "explainer.vae.version > 0 && !explainer.vae.running"


def python_of(figure: Any) -> str:
    """All lines of a figure with Python: the folded ones and the last statement."""
    return "".join(figure.locator("code").all_text_contents())
