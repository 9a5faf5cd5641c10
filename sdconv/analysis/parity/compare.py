"""Compare two networks with the same weights, module by module, while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.analysis.parity.stepwise import ModuleOutput, module_names, module_outputs
from sdconv.models.dummy_inputs import Inputs

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_HALF = 2**62 - 1


@dataclass(frozen=True)
class ModuleDifference:
    """How far a module's output is from the reference's.

    ``name``, ``call``: the module, and which of its calls in this run, from 1. ``encode`` and
    ``decode`` stand for the whole network. ``max_abs``: max|a-b|. ``relative``: max|a-b| / max|b|,
    where b is the reference's output. ``ulps``: the largest distance in representable numbers of
    the dtype. ``equal``: whether they are equal bit for bit. ``tolerance``: the largest
    ``relative`` that passes, 0 if only equality does.

    ``max_abs`` is infinite if the module ran on one side only or gave another shape or dtype, and
    NaN if both outputs contain values that are not finite.
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
        """The result in words."""
        if self.passed:
            return "equal" if self.equal else "within the tolerance"
        if isnan(self.max_abs):
            return "gives NaN or infinity on both sides"
        return "differs beyond the tolerance"

    @property
    def passed(self) -> bool:
        """Whether it is finite, and equal or within the tolerance."""
        within = self.equal or 0 < self.tolerance >= self.relative
        return isfinite(self.max_abs) and within


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: Inputs,
    *,
    truth: nn.Module | None = None,
    on_module: Callable[[str, int, int], None] | None = None,
) -> tuple[ModuleDifference, ...]:
    """Run both networks in lockstep and compare the outputs of modules of the same name.

    Args:
        ours, theirs: networks in eval mode, on one device and in one dtype.
        inputs: the methods to call on both, in this order, each with its arguments.
        truth: ``theirs`` in float64, on any device. Without it only equality passes. With it a
            difference passes if it is at most twice ``theirs``' own error at that module,
            ``max|theirs - truth| / max|truth|``, or twice the dtype's rounding unit if that is
            more: two results that each err by no more than this are no further apart.
        on_module: called after each module that has not run before, with its name, the number of
            them so far, and of all.

    Returns:
        A row for each call of each module that both have, in the order in which they finish. The
        methods' own results are among them, under the methods' names.
    """
    names = module_names(ours) & module_names(theirs)
    with ExitStack() as stack:

        def run(network: nn.Module, given: Inputs) -> Iterator[ModuleOutput]:
            return stack.enter_context(closing(module_outputs(network, given, names)))

        reference = _ReferenceOutputs(run(theirs, inputs))
        exact = (
            _ReferenceOutputs(run(truth, in_float64(inputs, truth))) if truth is not None else None
        )
        rows = []
        seen: set[str] = set()
        for own in run(ours, inputs):
            seen.add(own.name)
            if on_module is not None:
                on_module(own.name, min(len(seen), len(names)), len(names))
            expected = reference.matching(own)
            tolerance = 0.0
            if exact is not None and expected is not None:
                tolerance = _tolerance(expected, exact.matching(own))
            rows.append(_row(own, expected, tolerance))
        rows += [_row(one, None, 0.0) for one in reference.unmatched()]
    return tuple(rows)


class _ReferenceOutputs:
    """A reference's outputs, in the order in which the other side asks for them."""

    def __init__(self, outputs: Iterator[ModuleOutput]) -> None:
        self._outputs = outputs
        self._ahead: dict[tuple[str, int], ModuleOutput] = {}

    def matching(self, own: ModuleOutput) -> Tensor | None:
        """The output of the same call of the same module; None if there is none."""
        wanted = own.name, own.call
        while wanted not in self._ahead:
            one = next(self._outputs, None)
            if one is None:
                return None
            self._ahead[one.name, one.call] = one
        return self._ahead.pop(wanted).output

    def unmatched(self) -> Iterator[ModuleOutput]:
        """The outputs that nobody asked for."""
        yield from self._ahead.values()
        yield from self._outputs


def _row(own: ModuleOutput, theirs: Tensor | None, tolerance: float) -> ModuleDifference:
    name, call, ours = own.name, own.call, own.output
    shape = tuple(ours.shape)
    if theirs is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return ModuleDifference(name, call, shape, inf, inf, 2**63 - 1, False, tolerance)
    a, b = _bits(ours), _bits(theirs)
    if torch.equal(a, b) and bool(torch.isfinite(ours).all()):
        return ModuleDifference(name, call, shape, 0.0, 0.0, 0, True, tolerance)
    x, y = ours.double(), theirs.double()
    max_abs = float((x - y).abs().max())
    return ModuleDifference(
        name=name,
        call=call,
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
    """The bit patterns of floats as integers of the same size."""
    return x.detach().view(_INTEGERS[x.dtype.itemsize])


def _ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance between two tensors' values in units in the last place, from their bit
    patterns; at most 2^63 - 2."""
    magnitude = torch.iinfo(a.dtype).max
    (a, a_negative), (b, b_negative) = ((x.long() & magnitude, x < 0) for x in (a, b))
    # a distance across zero in float64 would overflow, so each side's part is capped
    across_zero = a.clamp(max=_HALF) + b.clamp(max=_HALF)
    return int(torch.where(a_negative == b_negative, (a - b).abs(), across_zero).max())


def in_float64(inputs: Inputs, network: nn.Module) -> Inputs:
    """The same inputs for a network in float64, on its device."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))

    def moved(given: Any) -> Any:
        match given:
            case Tensor():
                return given.to(device, torch.float64 if given.is_floating_point() else None)
            case tuple():
                return tuple(moved(value) for value in given)
            case Mapping():
                return {name: moved(value) for name, value in given.items()}
        return given

    return {method: moved(given) for method, given in inputs.items()}
