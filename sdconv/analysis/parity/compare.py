"""Two networks with the same weights, compared module by module as they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.analysis.parity.stepwise import Step, module_names, steps
from sdconv.models.dummy_inputs import Inputs

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_HALF = 2**62 - 1


@dataclass(frozen=True)
class ModuleDifference:
    """How far a module's output lies from the reference's.

    ``name``, ``call``: the module, and which of its calls in this run (from 1); ``encode`` and
    ``decode`` are what the whole network gives. ``max_abs``: max|a-b|. ``relative``:
    max|a-b| / max|b|, b the reference's. ``ulps``: the largest distance in representable numbers
    of the dtype. ``equal``: bit for bit. ``tolerance``: the largest ``relative`` that passes, 0
    where nothing but equality does.

    Where a module ran on one side only or gave another shape or dtype, ``max_abs`` is infinite;
    where values are not finite on both sides, it is no number.
    """

    name: str
    call: int
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    ulps: int
    equal: bool
    tolerance: float

    @property
    def verdict(self) -> str:
        """What is wrong, or that nothing is."""
        if self.passed:
            return "equal" if self.equal else "within the tolerance"
        if isnan(self.max_abs):
            return "gives NaN or infinity on both sides"
        return "differs beyond the tolerance"

    @property
    def passed(self) -> bool:
        """Whether it is finite, and equal or within the tolerance."""
        near = self.equal or 0 < self.tolerance >= self.relative
        return isfinite(self.max_abs) and near


def compare(
    ours: nn.Module, theirs: nn.Module, inputs: Inputs, *, truth: nn.Module | None = None
) -> tuple[ModuleDifference, ...]:
    """Runs both networks in step and compares what each pair of modules of the same name gives.

    Args:
        ours, theirs: networks in eval mode, on one device and in one dtype.
        inputs: the methods to call on both, in this order, each with its arguments.
        truth: ``theirs`` in float64 on the CPU. Without it nothing but equality passes; with it a
            difference passes that is at most twice ``theirs``' own error, ``max|theirs - truth| /
            max|truth|`` at that module, or twice the dtype's rounding unit where that is more:
            two computations that err by no more than this from the truth lie no further apart.

    Returns:
        A row for each call of each module that both have, in the order in which they finish; what
        the methods give among them, under the methods' names.
    """
    names = module_names(ours) & module_names(theirs)
    with ExitStack() as stack:

        def walk(network: nn.Module, given: Inputs) -> Iterator[Step]:
            return stack.enter_context(closing(steps(network, given, names)))

        reference = _Reference(walk(theirs, inputs))
        exact = _Reference(walk(truth, _in_float64(inputs))) if truth is not None else None
        rows = []
        for step in walk(ours, inputs):
            output = reference.output(step)
            tolerance = 0.0
            if exact is not None and output is not None:
                tolerance = _tolerance(output, exact.output(step))
            rows.append(_row(step, output, tolerance))
        rows += [_row(step, None, 0.0) for step in reference.rest()]
    return tuple(rows)


class _Reference:
    """A reference's steps, taken in the order in which the other side asks for them."""

    def __init__(self, walk: Iterator[Step]) -> None:
        self._walk = walk
        self._ahead: dict[tuple[str, int], Step] = {}

    def output(self, asked: Step) -> Tensor | None:
        """The output of the same call of the same module; None if it never comes."""
        wanted = asked.name, asked.call
        while wanted not in self._ahead:
            step = next(self._walk, None)
            if step is None:
                return None
            self._ahead[step.name, step.call] = step
        return self._ahead.pop(wanted).output

    def rest(self) -> Iterator[Step]:
        """What nobody asked for."""
        yield from self._ahead.values()
        yield from self._walk


def _row(step: Step, theirs: Tensor | None, tolerance: float) -> ModuleDifference:
    ours = step.output
    shape = tuple(ours.shape)
    if theirs is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return ModuleDifference(step.name, step.call, shape, inf, inf, 2**63 - 1, False, tolerance)
    a, b = _bits(ours), _bits(theirs)
    if torch.equal(a, b) and bool(torch.isfinite(ours).all()):
        return ModuleDifference(step.name, step.call, shape, 0.0, 0.0, 0, True, tolerance)
    x, y = ours.double(), theirs.double()
    max_abs = float((x - y).abs().max())
    return ModuleDifference(
        name=step.name,
        call=step.call,
        shape=shape,
        max_abs=max_abs,
        relative=_ratio(max_abs, float(y.abs().max())),
        ulps=_ulps(a, b),
        equal=torch.equal(a, b),
        tolerance=tolerance,
    )


def _tolerance(theirs: Tensor, truth: Tensor | None) -> float:
    if truth is None:
        return 0.0
    truth = truth.to(theirs.device)
    error = _ratio(float((theirs.double() - truth).abs().max()), float(truth.abs().max()))
    return 2 * max(error, torch.finfo(theirs.dtype).eps / 2)


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size else inf


def _bits(x: Tensor) -> Tensor:
    """The bit patterns of floats, as integers of their size."""
    return x.detach().view(_INTEGERS[x.dtype.itemsize])


def _ulps(a: Tensor, b: Tensor) -> int:
    """The largest number of steps between neighbouring representable numbers that lie between two
    tensors, from their bit patterns; at most 2^63 - 2."""
    sign = torch.iinfo(a.dtype).max
    # sign and magnitude; distances of float64 across zero would not fit, so halves are capped
    (a, below), (b, other) = ((x.long() & sign, x < 0) for x in (a, b))
    apart = torch.where(below == other, (a - b).abs(), a.clamp(max=_HALF) + b.clamp(max=_HALF))
    return int(apart.max())


def _in_float64(given: Any) -> Any:
    """The same arguments for a network in float64 on the CPU."""
    match given:
        case Tensor():
            return given.double().cpu() if given.is_floating_point() else given.cpu()
        case tuple():
            return tuple(_in_float64(value) for value in given)
        case Mapping():
            return {name: _in_float64(value) for name, value in given.items()}
    return given
