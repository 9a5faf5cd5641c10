"""Times a network's two backends against each other on a CPU, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sdconv.analysis.explain import dtype_name, method_inputs
from sdconv.backends import BACKENDS, backend
from sdconv.fast.cpu.kernels import numba_kernels
from sdconv.fast.cpu.weight_cache import prompt_cache, weight_cache
from sdconv.models.base import Network
from sdconv.models.dummy_inputs import Noise


@dataclass(frozen=True)
class Timing:
    """The times of one of a network's methods.

    ``work``: "encode", "decode" or "forward". ``reference``, ``fast``: seconds of each round.
    ``first``: seconds of the first fast call, which packs weights. ``difference``: the largest
    difference between the backends' outputs over the reference's largest value.
    """

    work: str
    reference: tuple[float, ...]
    fast: tuple[float, ...]
    first: float
    difference: float

    @property
    def ratio(self) -> float:
        """Median time of the reference over that of the fast backend."""
        return median(self.reference) / median(self.fast)


@dataclass(frozen=True)
class Timings:
    """The times of all methods of a network.

    ``dtype``: that of weights and feature maps, by torch's name.
    ``compiling``: seconds to compile the Numba kernels, or to read them from Numba's cache.
    ``memory``: bytes of packed weights; ``limit``: the most that they may take.
    ``prompt_memory``: bytes of a prompt's keys and values. ``threads``: torch's.
    """

    class_name: str
    size: tuple[int, int]
    dtype: str
    rows: tuple[Timing, ...]
    compiling: float
    memory: int
    limit: int
    prompt_memory: int
    threads: int


def time_backends(
    network: Network,
    size: tuple[int, int],
    rounds: int,
    on_run: Callable[[str, int, int], None] | None = None,
) -> Timings:
    """Times both backends in turn, round by round, on standard normal noise.

    Args:
        network: on a CPU, in eval mode.
        size: rows and columns of an image for an autoencoder, of latents for a U-Net.
        rounds: at least 1.
        on_run: called after each run with the method, the number of runs so far, and of all.

    Raises:
        InputError: the network does not take this size.
    """
    inputs = method_inputs(network, size, Noise(1, 0, network.dtype, network.device))
    compiling = numba_kernels()[1]
    runs, total = 0, len(inputs) * len(BACKENDS) * (rounds + 1)

    def ran(work: str) -> None:
        nonlocal runs
        runs += 1
        if on_run is not None:
            on_run(work, runs, total)

    with torch.inference_mode():
        rows = tuple(_timed(network, work, given, rounds, ran) for work, given in inputs.items())
    return Timings(
        class_name=network.config.class_name,
        size=size,
        dtype=dtype_name(network.dtype),
        rows=rows,
        compiling=compiling,
        memory=weight_cache.memory,
        limit=weight_cache.limit,
        prompt_memory=prompt_cache.memory,
        threads=torch.get_num_threads(),
    )


def _timed(
    network: Network,
    work: str,
    given: tuple[Any, ...],
    rounds: int,
    ran: Callable[[str], None],
) -> Timing:
    def call() -> Tensor:
        return _tensor(getattr(network, work)(*given))

    def clocked(name: str) -> tuple[float, Tensor]:
        timed = _clocked(call, name)
        ran(work)
        return timed

    # the reference's first call warms up too
    first = {name: clocked(name) for name in BACKENDS}
    seconds: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(rounds):
        for name in BACKENDS:
            seconds[name].append(clocked(name)[0])
    theirs, ours = (first[name][1].double() for name in BACKENDS)
    largest = float(theirs.abs().max())
    distance = float((ours - theirs).abs().max())
    return Timing(
        work=work,
        reference=tuple(seconds["reference"]),
        fast=tuple(seconds["fast"]),
        first=first["fast"][0],
        difference=distance / largest if largest else distance,
    )


def _clocked(call: Callable[[], Tensor], name: str) -> tuple[float, Tensor]:
    with backend(name):
        begin = time.perf_counter()
        out = call()
        return time.perf_counter() - begin, out


def _tensor(result: Any) -> Tensor:
    """The tensor in the output of a network's method."""
    if hasattr(result, "latent_dist"):
        result = result.latent_dist.mode()
    for name in ("latents", "sample"):
        result = result if isinstance(result, Tensor) else getattr(result, name, result)
    assert isinstance(result, Tensor)
    return result
