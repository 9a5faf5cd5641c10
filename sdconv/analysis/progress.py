"""How much of a call is done: in multiply-accumulates, or in stages that report nothing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sdconv.analysis.anatomy import dissect
from sdconv.backends import observing
from sdconv.models.base import Network

Advance = Callable[[str, float, float], None]
"""Called with what runs now, the work done so far, and all of it."""

_TICK = 0.25  # seconds between two reports of a stage that reports nothing itself


@contextmanager
def following(
    network: Network, size: tuple[int, int], paths: Sequence[str], advance: Advance
) -> Iterator[None]:
    """Reports, with either backend, the multiply-accumulates that are done whenever a block of the
    network begins.

    Args:
        network: is called in the block.
        size: rows and columns of the image.
        paths: what is called, in this order: ``"encode"``, ``"decode"``, or ``"denoise"`` for each
            call of a U-Net.
        advance: is called when a block begins, and at the end.
    """
    anatomy = dissect(network.config, size)
    # by block: the work before it, for each time that it runs
    before: dict[str, list[int]] = {}
    total = 0
    for path in paths:
        for block in anatomy.blocks_of(path):
            before.setdefault(block.name, []).append(total)
            total += block.macs
    names = {id(module): name for name, module in network.named_modules()}
    done = 0

    def begins(module: Any) -> None:
        nonlocal done
        name = names.get(id(module), "")
        if name in before:
            done = next((one for one in before[name] if one >= done), done)
            advance(name, done, total)

    advance("", 0, total)
    with observing(begins):
        yield
    advance("", total, total)


class Stages:
    """Work in a number of stages, each the same share of it. A stage that reports nothing is
    advanced by the clock, at the pace of the stages before it, and never to its end.

    Used as a context manager; reports come from a thread of its own, too. ``name``: of the present
    stage.

    Args:
        advance: is called with the stage, the stages done (with a fraction) and their number.
        count: the number of stages.
    """

    def __init__(self, advance: Advance, count: int) -> None:
        self._advance, self._count = advance, count
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticks = threading.Thread(target=self._tick, daemon=True)
        self.name, self._share = "", 0.0
        self._begins: list[float] = []

    def __enter__(self) -> Stages:
        self._ticks.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._ticks.join()
        if kind is None:
            self._advance("", self._count, self._count)

    def begin(self, name: str) -> None:
        """The stage before has ended, and this one begins."""
        with self._lock:
            self._begins.append(time.perf_counter())
            self.name, self._share = name, 0.0
            self._report()

    def within(self, done: float, total: float) -> None:
        """This share of the present stage is done."""
        with self._lock:
            self._share = max(self._share, done / total if total else 0.0)
            self._report()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK):
            with self._lock:
                if len(self._begins) > 1:
                    first, *_, last = self._begins
                    pace = max((last - first) / (len(self._begins) - 1), _TICK)
                    elapsed = time.perf_counter() - last
                    self._share = max(self._share, 1 - math.exp(-elapsed / pace))
                    self._report()

    def _report(self) -> None:
        done = max(len(self._begins) - 1, 0) + min(self._share, 1.0)
        self._advance(self.name, done, self._count)
