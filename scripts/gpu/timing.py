"""Time and peak memory of a call, on a GPU or on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from scripts.bench.memory import Peak

Call = Callable[[], Any]
# runs before those that count; the first chooses algorithms and compiles kernels
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """``milliseconds``: the median of ``runs``; ``fastest``, ``slowest``: the extremes.
    ``peak``: bytes of the device above those that were allocated before."""

    milliseconds: float
    fastest: float
    slowest: float
    runs: int
    peak: int


def timed(call: Call, device: str, *, runs: int, seconds: float) -> Timing:
    """Times a call after warming up.

    On CUDA by events of the stream that it runs in, without a pause between the runs.

    Args:
        call: what to time; its result is dropped.
        device: "cuda" or "cpu".
        runs: how many runs count, at most; at least 3 do.
        seconds: about how long they may take.
    """
    seen: list[float] = []
    for _ in range(WARM_UP if runs > 3 else 1):
        seen.append(once(call, device))
    count = max(3, min(runs, int(seconds / max(seen[-1], 1e-6))))
    if device == "cuda":
        milliseconds, peak = _by_events(call, count)
    else:
        with Peak() as memory:
            milliseconds = [1e3 * once(call, device) for _ in range(count)]
        peak = memory.bytes
    middle = statistics.median(milliseconds)
    return Timing(middle, min(milliseconds), max(milliseconds), count, peak)


def once(call: Call, device: str) -> float:
    """Seconds of one run, as a caller sees it."""
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _by_events(call: Call, count: int) -> tuple[list[float], int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return [start.elapsed_time(end) for start, end in events], peak
