"""Which of a test's cases run in every run."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def first_of(values: Iterable[Any]) -> list[Any]:
    """The parameters of a test, all but the first marked ``slow``."""
    first, *rest = values
    return [first, *marked_slow(rest)]


def marked_slow(values: Iterable[Any], but: Container[Any] = ()) -> list[Any]:
    """The parameters of a test, all marked ``slow`` ``but`` these."""
    slow = pytest.mark.slow
    return [one if one in but else pytest.param(one, marks=slow) for one in values]
