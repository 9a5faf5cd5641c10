"""Fits the cost model's constants to convolutions timed on this machine, in less than a minute."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sdconv.errors import InputError
from sdconv.fast.cpu.conv import Epilogue, Prologue, run_plan
from sdconv.fast.cpu.cost_constants import (
    SHIPPED,
    Calibration,
    CostConstants,
    present_conditions,
)
from sdconv.fast.cpu.cost_model import Shape, plan_conv, terms_of
from sdconv.fast.cpu.group_stats import group_stats
from sdconv.fast.cpu.kernels import methods_for, numba_kernels

# (batch, input channels, output channels, height, width): of the VAE and the U-Nets, smaller where
# that does not change what is timed
SHAPES: tuple[Shape, ...] = (
    (1, 128, 128, 128, 128),
    (1, 256, 256, 64, 64),
    (1, 512, 512, 32, 32),
    (1, 320, 320, 48, 48),
    (1, 640, 640, 16, 16),
    (1, 1280, 1280, 8, 8),
    (1, 1280, 640, 16, 16),
    (1, 64, 64, 96, 96),
    (1, 32, 32, 64, 64),
    (1, 4, 320, 48, 48),
    (1, 128, 4, 96, 96),
)
_PASSES = 2


@dataclass(frozen=True)
class Case:
    """One convolution to time: its method, its shape, and whether GroupNorm and SiLU come first."""

    method: str
    shape: Shape
    normalised: bool


class _Fit(NamedTuple):
    constants: CostConstants
    error: float


def cases() -> list[Case]:
    """What is timed: each shape by each method, with and without a normalisation."""
    return [
        Case(method, shape, normalised)
        for shape in SHAPES
        for normalised in (False, True)
        for method in terms_of("conv3x3", shape, normalised)
        if method in ("direct", *methods_for(torch.float32))
    ]


def calibrate(
    measure: Callable[[Case], float] | None = None,
    on_case: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Times convolutions and fits the cost model's constants to them; keeps nothing.

    Args:
        measure: seconds of a case; None to run it. The least of two counts.
        on_case: called after each case with its method, the number of cases so far, and of all.

    Raises:
        InputError: the times cannot be explained by the model.
    """
    measure = Timer() if measure is None else measure
    # some passes over all cases, so that what disturbs one for a while does not spoil it
    every = cases() * _PASSES
    seconds: dict[Case, float] = {}
    for number, case in enumerate(every, 1):
        seconds[case] = min(measure(case), seconds.get(case, math.inf))
        if on_case is not None:
            on_case(case.method, number, len(every))
    fitted = fit(seconds)
    return Calibration(
        conditions=present_conditions(),
        constants=fitted.constants,
        day=datetime.datetime.now(datetime.UTC).date().isoformat(),
        error=fitted.error,
        shapes=len(seconds),
    )


def fit(seconds: Mapping[Case, float]) -> _Fit:
    """Constants that come nearest to measured seconds, in proportion, and the median of what the
    modelled seconds are off by.

    The model is linear in the seconds of a multiply-accumulate and in its products with the
    constants, which are not negative. Each row is divided by its measured seconds. What is least is
    the sum of the absolute errors, by least squares that are weighted anew some times, so that
    times that something else has disturbed count little.

    Raises:
        InputError: the times cannot be explained by the model.
    """
    rows = [[terms[name] for name in _COLUMNS] for terms in map(_terms, seconds)]
    matrix = torch.tensor(rows, dtype=torch.float64)
    matrix /= torch.tensor(list(seconds.values()), dtype=torch.float64)[:, None]
    if not matrix.isfinite().all():
        raise _impossible("seconds that are not above zero")
    weights = torch.ones(len(matrix), dtype=torch.float64)
    for _ in range(_ITERATIONS):
        solution = _non_negative(matrix, weights)
        off = (matrix @ torch.tensor(solution, dtype=torch.float64) - 1).abs()
        weights = off.clamp(min=1e-3).rsqrt()
    product = solution[_COLUMNS.index("product")]
    if product <= 0:
        raise _impossible("products that take no time")
    names = [name for name in _COLUMNS if name != "product"]
    found = dict(zip(_COLUMNS, solution, strict=True))
    # a constant that no case has, for want of Numba, stays as it ships
    known = dict(zip(_COLUMNS, matrix.any(0).tolist(), strict=True))
    constants = CostConstants(
        **{name: found[name] / product if known[name] else getattr(SHIPPED, name) for name in names}
    )
    return _Fit(constants, float(off.median()))


_ITERATIONS = 20
_COLUMNS = (
    "product",
    "reorder",
    "read",
    "kernel",
    "transform",
    "call",
    "normalise",
    "prologue",
    "direct",
)


def _terms(case: Case) -> dict[str, float]:
    found = dict.fromkeys(_COLUMNS, 0.0)
    return found | terms_of("conv3x3", case.shape, case.normalised)[case.method]


def _impossible(what: str) -> InputError:
    return InputError(
        "the measured times do not fit the cost model",
        where="calibration",
        expected="times that grow with the products",
        got=what,
        hint="calibrate again while nothing else runs on this machine",
    )


def _non_negative(matrix: Tensor, weights: Tensor) -> Sequence[float]:
    """The solution of ``matrix @ x = 1`` by weighted least squares with no ``x`` below zero: the
    columns whose share comes out negative are left out, one at a time."""
    matrix, right = matrix * weights[:, None], weights[:, None]
    kept = list(range(matrix.shape[1]))
    while True:
        part = matrix[:, kept]
        scale = part.square().sum(0).sqrt().clamp(min=1e-300)  # columns differ by ten powers of ten
        found = torch.linalg.lstsq(part / scale, right, driver="gelsd").solution[:, 0] / scale
        least = int((found * scale).argmin())
        if found[least] >= 0:
            break
        del kept[least]
        if not kept:
            raise _impossible("no positive solution")
    solution = [0.0] * matrix.shape[1]
    for column, value in zip(kept, found.tolist(), strict=True):
        solution[column] = value
    return solution


class Timer:
    """Seconds of a case on this machine: the least of some calls after the first, which packs the
    weight."""

    def __init__(self, calls: int = 3) -> None:
        self._calls = calls
        numba_kernels()

    @torch.inference_mode()
    def __call__(self, case: Case) -> float:
        batch, channels, out_channels, height, width = case.shape
        random = torch.Generator().manual_seed(0)
        x = torch.randn(batch, channels, height, width, generator=random)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(out_channels, channels, 3, 3, generator=random)
        weight /= (9 * channels) ** 0.5
        ones, zeros = torch.ones(channels), torch.zeros(channels)
        prologue = None
        if case.normalised:
            prologue = Prologue(group_stats(x, min(4, channels)), ones, zeros, 1e-6, True)
        plan = replace(plan_conv("conv3x3", *case.shape, case.normalised), method=case.method)
        epilogue = Epilogue(torch.zeros(out_channels))
        times = []
        for _ in range(self._calls + 1):
            begin = time.perf_counter()
            run_plan(plan, x, weight, prologue, epilogue, 1, in_place=False)
            times.append(time.perf_counter() - begin)
        return min(times[1:])
