"""Processes that compute together over torch.distributed, and what they are given to do.

A pool of processes starts once and runs one job after the other; a job is a function of this module
or of a test's, which the processes import.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import seeded
from helpers.streamed import call, randn
from torch import Tensor

import sdconv
from sdconv import streaming
from sdconv.config import Config
from sdconv.streaming import Direction, make_plan, steps_of
from sdconv.streaming.buffers import AllocatedBuffers, FeatureBuffer
from sdconv.streaming.executor import make_runner
from sdconv.streaming.group_stats import RunningGroupStats
from sdconv.streaming.parallel import executor
from sdconv.streaming.parallel.bands import Bands, band_steps, strips_of
from sdconv.streaming.parallel.group import RankGroup

# seconds after which a job is given up
PATIENCE = 120


class Pool:
    """``size`` processes, ranks of one gloo group, each with one thread.

    Args:
        folder: for the file through which they find each other.
    """

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._answers = context.SimpleQueue()
        self._jobs = [context.SimpleQueue() for _ in range(size)]
        self.processes = [
            context.Process(
                target=_work,
                args=(rank, size, folder / "ranks", self._jobs[rank], self._answers),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def start(self, job: Callable[..., Any], ranks: int, **given: Any) -> None:
        """Lets the first ``ranks`` processes run ``job(rank, group, **given)``."""
        for rank in range(ranks):
            self._jobs[rank].put((job, ranks, given))

    def answers(self, ranks: int) -> list[Any]:
        """What ``ranks`` processes answer, by rank: the job's value, or its exception's text."""
        found: dict[int, Any] = {}
        while len(found) < ranks:
            assert self._answers._reader.poll(PATIENCE), f"only ranks {sorted(found)} answered"
            rank, answer = self._answers.get()
            found[rank] = answer
        return [found[rank] for rank in sorted(found)]

    def run(self, job: Callable[..., Any], ranks: int, **given: Any) -> list[Any]:
        """Runs a job on the first ``ranks`` processes; see `answers`."""
        self.start(job, ranks, **given)
        return self.answers(ranks)

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank: int, size: int, meeting: Path, jobs: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    # the first ranks, any number of them; None for all
    groups = {number: dist.new_group(list(range(number))) for number in range(1, size)}
    while True:
        job, ranks, given = jobs.get()
        try:
            answers.put((rank, job(rank, groups.get(ranks), **given)))
        except Exception as error:
            text = traceback.format_exc() if os.environ.get("SDCONV_TRACEBACK") else ""
            answers.put((rank, f"{type(error).__name__}: {error}{text}"))


# --- jobs


def compute(
    rank: int,
    group: Any,
    *,
    config: Config,
    direction: Direction,
    x: np.ndarray[Any, Any],
    backend: str = "reference",
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Any], Any] | None = None,
    fault: Callable[[pytest.MonkeyPatch], None] | None = None,
) -> np.ndarray[Any, Any]:
    """A network's output, computed over the ranks.

    Args:
        rows: units of every strip; None for the planner's choice.
        change: changes the network.
        fault: is injected meanwhile.
    """
    network: Any = seeded.network(config).to(dtype)
    if change is not None:
        change(network)
    with pytest.MonkeyPatch.context() as patch:
        if rows is not None:
            patch.setattr(streaming, "make_plan", planner_of(rows))
        if fault is not None:
            fault(patch)
        network.enable_parallel(group)
        try:
            out = call(network, direction, torch.from_numpy(x).to(dtype), backend)
        finally:
            network.disable_parallel()
    return as_numpy(out)


def planner_of(rows: int) -> Callable[..., Any]:
    """A planner whose strips all have this many units."""

    def planned(*args: Any, **options: Any) -> Any:
        plan = make_plan(*args, **options)
        return dataclasses.replace(plan, units=(rows,) * len(plan.steps))

    return planned


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor of any dtype as float32 or float64, which hold its values."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


# --- the same without ranks


@torch.no_grad()
def streamed_in_bands(
    network: Any, direction: Direction, x: Tensor, ranks: int, backend: str, rows: int | None
) -> Tensor:
    """One process's streaming pass over the strips of all ranks, from top to bottom."""
    with sdconv.backend(backend), one_thread():
        steps = steps_of(network, direction, *x.shape[2:])
        bands = Bands(steps, ranks)
        planned = planner_of(rows) if rows else make_plan
        options: Any = {"batch": 1, "limit": None, "can_spill": False}
        plans = [planned(band_steps(bands, rank), **options) for rank in range(ranks)]
        whole = make_plan(steps, **options)
        out = x.new_empty(len(x), *whole.shape[1:])
        for image, result in zip(x, out, strict=True):
            buffers = AllocatedBuffers(whole.layout, x.device, None)
            buffers.put(steps[0].source, image.permute(1, 2, 0))
            buffers.put(steps[-1].target, result.permute(1, 2, 0))
            stats: dict[FeatureBuffer, RunningGroupStats] = {}
            for number, step in enumerate(steps):
                units = [plan.units[number] for plan in plans]
                strips = [
                    strip
                    for rank in range(ranks)
                    for strip in strips_of(bands.units(step, rank), units[rank])
                ]
                wanted = step.collects_stats
                collected = RunningGroupStats(step.target.channels, x.device) if wanted else None
                known = stats.get(step.source)
                runner = make_runner(step, max(units), buffers, known, collected, x.device)
                for strip in strips:
                    runner.run_strip(strip.start, strip.stop)
                if collected is not None:
                    stats[step.target] = collected
    return out


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes with one thread, as the ranks do: rounding may depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- faults


def a_missing_row(patch: pytest.MonkeyPatch) -> None:
    """The last row that a rank receives before a step is zeros."""
    right = RankGroup.exchange

    def exchange(self: RankGroup, rows: Tensor, first: int, messages: Any) -> Any:
        wait = right(self, rows, first, messages)
        received = [m.places.stop - 1 - first for m in messages if m.receiver == self.rank]

        def late() -> None:
            wait()
            if received:
                rows[received[-1]] = 0

        return late

    patch.setattr(RankGroup, "exchange", exchange)


def local_statistics(patch: pytest.MonkeyPatch) -> None:
    """Each rank normalises by the statistics of its own band."""

    def gather(self: RankGroup, own: Any, strips: Any, channels: int, *, failed: bool) -> Any:
        stats = RunningGroupStats(channels, self.device)
        for one in own:
            stats.combine(*one)
        return stats

    patch.setattr(RankGroup, "gather_moments", gather)


def local_keys(patch: pytest.MonkeyPatch) -> None:
    """A rank has only its own keys and values, and zeros for the others."""
    right = RankGroup.spread

    def spread(self: RankGroup, rows: Tensor, owned: Any) -> Any:
        if rows.shape[2] == 3:  # the result
            return right(self, rows, owned)
        own = rows[owned[self.rank].start : owned[self.rank].stop].clone()
        rows.zero_()
        rows[owned[self.rank].start : owned[self.rank].stop] = own
        return lambda: None

    patch.setattr(RankGroup, "spread", spread)


# --- jobs that fail


def strips_and_waits(
    rank: int, group: Any, *, config: Config, x: np.ndarray[Any, Any], rows: int
) -> dict[str, list[str]]:
    """What happens in each step, by its name: rows are sent, strips run, a rank waits."""
    events: list[str] = []
    named: dict[str, list[str]] = {}
    exchange, call_step = RankGroup.exchange, executor._StepRun.__call__

    def logged_exchange(self: Any, *given: Any) -> Any:
        wait = exchange(self, *given)
        events.append("send")
        return lambda: (events.append("wait"), wait())

    def logged_step(self: Any, *given: Any) -> Any:
        events.clear()
        strip = self.on_strip
        object.__setattr__(self, "on_strip", lambda *a: (events.append("strip"), strip(*a)))
        found = call_step(self, *given)
        named[self.step.name] = list(events)
        return found

    def fault(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(RankGroup, "exchange", logged_exchange)
        patch.setattr(executor._StepRun, "__call__", logged_step)

    compute(rank, group, config=config, direction="decode", x=x, rows=rows, fault=fault)
    return named


def dilated(network: Any) -> None:
    """Changes a convolution so that it cannot be cut into strips."""
    conv = network.decoder.conv_in
    conv.dilation, conv.padding = (2, 2), (2, 2)


def different_weights(rank: int, group: Any, *, config: Config) -> None:
    """Connects networks with other weights on each rank."""
    network: Any = seeded.network(config, seed=rank)
    network.enable_parallel(group)


def differing(rank: int, group: Any, *, config: Config, change: dict[str, Any]) -> tuple[str, bool]:
    """Calls the network otherwise on rank 1; then alike on all."""
    network: Any = seeded.network(config)
    network.enable_parallel(group)
    usual: dict[str, Any] = {"shape": (1, 4, 9, 7), "seed": 3, "backend": "reference"}
    usual |= {"dtype": torch.float32, "direction": "decode", "gradients": False, "hook": False}
    given = usual | (change if rank == 1 else {})
    shape = (1, 3, 50, 41) if given["direction"] == "encode" else given["shape"]
    x = randn(*shape, seed=given["seed"]).to(given["dtype"])
    x.requires_grad_(given["gradients"])
    hook = network.decoder.conv_in.register_forward_hook(lambda *_: None)
    if not given["hook"]:
        hook.remove()
    message = "nothing was refused"
    with sdconv.backend(given["backend"]), torch.set_grad_enabled(given["gradients"]):
        try:
            getattr(network, given["direction"])(x)
        except sdconv.SdconvError as error:
            message = f"{type(error).__name__}: {error}"
    hook.remove()
    out = call(network, "decode", randn(1, 4, 12, 5))
    network.disable_parallel()
    return message, bool(out.isfinite().all())


def limited(rank: int, group: Any, *, config: Config, folder: str) -> tuple[str, bool, int]:
    """Decodes with a limit that only rank 0 can meet, and with one that all can meet by a file."""
    network: Any = seeded.network(config)
    z = randn(1, 4, 64, 60)
    whole = streamed_in_bands(network, "decode", z, 2, "reference", 1)
    network.enable_parallel(group, memory_limit="1MiB" if rank == 1 else None)
    message = ""
    try:
        network.decode(z)
    except sdconv.SdconvError as error:
        message = str(error)
    steps = band_steps(Bands(steps_of(network, "decode", 64, 60), 2), rank)
    least = streaming.least_memory(steps, batch=1, spill=True)
    network.enable_parallel(group, memory_limit=least, spill=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "make_plan", planner_of(1))
        spilled = network.streaming.plan(network, "decode", z).spilled
        equal = torch.equal(network.decode(z).sample, whole)
    return message, equal, spilled


def leaving(rank: int, group: Any, *, config: Config, times: int) -> tuple[list[str], list[bool]]:
    """Connects, is refused and leaves; returns the errors, and whether each time the process group
    was gone after that, while the error was still handled."""
    network: Any = seeded.network(config)
    errors, gone = [], []
    for _ in range(times):
        network.enable_parallel(group)
        connected = weakref.ref(network.streaming.group._group)
        try:
            network.decode(randn(1, 4, 3, 9))  # fewer rows than ranks
        except sdconv.SdconvError as error:
            errors.append(type(error).__name__)
            network.disable_parallel()
            gone.append(connected() is None)
    return errors, gone


def left_alone(rank: int, group: Any, *, config: Config) -> tuple[list[str], list[bool]]:
    """As `leaving`, for ranks that the last one leaves while they wait for it."""
    network: Any = seeded.network(config)
    network.enable_parallel(group)
    connected = weakref.ref(network.streaming.group._group)
    if rank == 3:
        network.disable_parallel()
        return ["closed"], [connected() is None]
    try:
        network.decode(randn(1, 4, 5, 9))
    except sdconv.SdconvError as error:
        return [type(error).__name__], [connected() is None]
    return [], []


def ending(rank: int, group: Any, *, config: Config, end: str) -> tuple[str, float, str]:
    """Decodes until rank 1 ends, in one of three ways; returns the error, the seconds that it took
    and the error of another call."""
    network: Any = seeded.network(config)
    network.enable_parallel(group, timeout=4)
    z = randn(1, 4, 24, 20)
    network.decode(z)
    if rank == 1:
        if end == "stopped":
            time.sleep(9)
            return "ended", 0.0, ""
        how = partial(os.kill, os.getpid(), signal.SIGKILL)
        if end == "failed":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError):
                patch.setattr(AllocatedBuffers, "put", _broken)
                network.decode(z)
            time.sleep(1)
            return "ended", 0.0, ""
        with pytest.MonkeyPatch.context() as patch:  # in the middle of a step
            patch.setattr(RunningGroupStats, "update", lambda *_: how())
            network.decode(z)
    start, text = time.monotonic(), ""
    try:
        network.decode(z)
    except sdconv.SdconvError as error:
        text = str(error)
    seconds = time.monotonic() - start
    try:
        network.decode(z)
    except sdconv.SdconvError as error:
        return text, seconds, str(error)
    return text, seconds, ""


def _broken(*_: Any) -> None:
    raise LookupError("a mistake")
