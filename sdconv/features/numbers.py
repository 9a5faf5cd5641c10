"""Whole numbers, in whatever the caller has them: Python's, numpy's, torch's."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any


def whole(value: Any) -> int | None:
    """A whole number as Python has it; None for anything else, truth values among them."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)
    except (TypeError, ValueError):
        return None


def wholes(values: Any) -> list[int] | None:
    """Several whole numbers in a list; None where one is none, or they are none."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        return None
    found = [whole(value) for value in values]
    return None if None in found else found  # type: ignore[return-value]
