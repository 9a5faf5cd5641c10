"""Launches a Numba kernel on as many threads as torch's own operations use.

Where torch's thread pool is GNU OpenMP's, kernels run on that very pool: a second pool would
busy-wait and take its cores. Elsewhere Python threads call the kernel, which does not hold the GIL.
Either way any number of callers may run kernels at the same time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdconv.fast.cpu.buffer_pool import scratch

# (kernel, job, count): runs `kernel(job)` on `count` threads and returns when all have
Team = Callable[[int, int, int], None]


def launch(kernel: Any, kind: np.dtype[Any], **values: int) -> None:
    """Calls ``kernel`` from every thread with one job, whose fields are ``values``.

    All fields but the two counters must be given. ``scratch`` needs ``scratch_size`` floats for
    each of `threads()`.
    """
    job = _jobs.of(kernel, kind)
    fields, index = job.fields, job.index
    for name, value in values.items():
        fields[index[name]] = value
    fields[index["next_unit"]] = fields[index["next_thread"]] = 0
    team()(job.kernel, job.address, min(threads(), values["units"]))


def thread_jobs(
    kind: np.dtype[Any], count: int, values: Mapping[str, int], steps: Mapping[str, int]
) -> np.ndarray[Any, Any]:
    """A job for each of ``count`` threads: fields of these ``values``, each thread's ``steps``
    further than those of the thread before."""
    jobs = np.zeros(count, dtype=kind)
    for name, value in values.items():
        jobs[name] = value
    for name, step in steps.items():
        jobs[name] += step * np.arange(count)
    return jobs


def thread_scratch(floats: int) -> dict[str, int]:
    """Fields of a job: scratch memory of so many floats for each thread."""
    memory = scratch.block("threads", 4 * threads() * floats)
    return {"scratch": memory.data_ptr(), "scratch_size": floats}


class _Job:
    """A kernel's job, filled in for each call.

    It is kept from call to call: kernels evict Python's code and data from the caches, so as little
    Python as possible should run between them.
    """

    def __init__(self, kernel: Any, kind: np.dtype[Any]) -> None:
        job: Any = np.zeros(1, dtype=kind)
        self.kernel: int = kernel.address
        self.address: int = job.ctypes.data
        self.fields = memoryview(job.view(np.int64))
        self.index = {name: position for position, name in enumerate(kind.names or ())}


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
    """The number of threads that share a kernel's work: as many as torch's own operations use."""
    return torch.get_num_threads()


@cache
def team() -> Team:
    """The best way that this system has to run a kernel on several threads."""
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
    """A `Team` of Python threads."""
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)
    others = [_pool(count).submit(run, job) for _ in range(count - 1)]
    try:
        run(job)
        wait(others)
    finally:  # even after an interruption, no kernel may still write to memory that is freed
        wait(others)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=count, thread_name_prefix="sdconv")
