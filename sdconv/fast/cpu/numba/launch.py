"""Runs a compiled kernel on all of torch's threads.

Where torch's own pool is GNU OpenMP's, kernels run on that very pool: a second one would wait
actively beside it and take its cores. Elsewhere plain Python threads call the kernel, which holds
no lock of Python's. Either way any number of callers may run kernels at the same time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

# runs `kernel(job)` on some threads at once and returns when all have
Team = Callable[[int, int, int], None]


def launch(kernel: Any, kind: np.dtype[Any], **values: int) -> None:
    """Calls ``kernel`` from every thread with one job, whose numbers are ``values``, all of them.

    ``scratch`` must have room for ``scratch_size`` floats for each of `threads()`.
    """
    job = _jobs.of(kernel, kind)
    numbers, places = job.numbers, job.places
    for name, value in values.items():
        numbers[places[name]] = value
    numbers[places["next_unit"]] = numbers[places["next_thread"]] = 0
    team()(job.kernel, job.address, min(threads(), values["units"]))


class _Job:
    """A kernel's job, filled anew for each call: little Python has to run between kernels, which
    leave none of it in a cache."""

    def __init__(self, kernel: Any, kind: np.dtype[Any]) -> None:
        job: Any = np.zeros(1, dtype=kind)
        self.kernel: int = kernel.address
        self.address: int = job.ctypes.data
        self.numbers = memoryview(job.view(np.int64))
        self.places = {name: place for place, name in enumerate(kind.names or ())}


class _Jobs(threading.local):
    """A thread's jobs, one for each kernel."""

    def __init__(self) -> None:
        self._held: dict[int, _Job] = {}

    def of(self, kernel: Any, kind: np.dtype[Any]) -> _Job:
        job = self._held.get(id(kernel))
        if job is None:
            job = self._held[id(kernel)] = _Job(kernel, kind)
        return job


_jobs = _Jobs()


def threads() -> int:
    """How many threads share a kernel's work: as many as torch's own operations take."""
    return torch.get_num_threads()


@cache
def team() -> Team:
    """The best of the ways to run a kernel on several threads that there are here."""
    return _openmp() or python_threads


def _openmp() -> Team | None:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            parallel = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.restype = None
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        return lambda kernel, job, count: parallel(kernel, job, count, 0)
    return None


def python_threads(kernel: int, job: int, count: int) -> None:
    """The same with threads of Python's."""
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)
    others = [_pool(count).submit(run, job) for _ in range(count - 1)]
    try:
        run(job)
        wait(others)
    finally:  # an interruption, too, must not leave a kernel at work on memory that is given up
        wait(others)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=count, thread_name_prefix="sdconv")
