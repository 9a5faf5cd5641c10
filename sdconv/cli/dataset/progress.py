"""Progress over many images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sdconv.cli.common import errors_console, say, shows_progress
from sdconv.cli.verbosity import is_quiet

Advance = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is."""

EVERY = 60.0
"""Seconds between two lines of progress where standard error is not a terminal."""


@contextmanager
def progress_of(unit: str) -> Iterator[Advance]:
    """Progress on standard error: a bar with the rate and the time left on a terminal, a line a
    minute elsewhere; none if the command is quiet."""
    if not shows_progress():
        yield (lambda words, done, total: None) if is_quiet() else _lines(unit)
        return
    console = errors_console()
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, tuple[Any, float]] = {}

        def show(words: str, done: int, total: int) -> None:
            if words not in tasks:
                tasks[words] = (bar.add_task(words, total=total, rate=""), time.monotonic())
            task, start = tasks[words]
            rate = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} {unit}/s")

        yield show


def _lines(unit: str) -> Advance:
    last = time.monotonic()
    starts: dict[str, tuple[float, int]] = {}

    def show(words: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        start, first = starts.setdefault(words, (now, done))
        if now - last < EVERY:
            return
        last = now
        rate = (done - first) / max(now - start, 1e-9)
        left = f", {(total - done) / rate / 60:.0f} min left" if rate else ""
        say(f"{words}: {done} of {total}, {rate:.1f} {unit}/s{left}", "progress")

    return show
