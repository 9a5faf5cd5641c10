"""The comparison of two networks' modules itself, on networks of a few parts."""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from helpers.differences import first_failure
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv
from sdconv.analysis.parity import ModuleDifference, compare


class Chain(nn.Module):
    """A network of one method that calls a few modules in turn."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def encode(self, x: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.parts(x),)


class Plus(nn.Module):
    def __init__(self, addend: Tensor) -> None:
        super().__init__()
        self.addend = addend

    def forward(self, x: Tensor) -> Tensor:
        return x + self.addend


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise sdconv.InputError("no")


def difference(a: Tensor, b: Tensor) -> ModuleDifference:
    zero = {"encode": (torch.zeros((), dtype=a.dtype),)}
    return compare(Chain(Plus(a)), Chain(Plus(b)), zero)[0]


FORMATS = {torch.float16: torch.int16, torch.bfloat16: torch.int16}
FORMATS |= {torch.float32: torch.int32, torch.float64: torch.int64}


@given(st.sampled_from(list(FORMATS)), st.floats(0, 1), st.integers(0, 1000), st.booleans())
def test_ulps_count_representable_numbers(
    dtype: torch.dtype, where: float, count: int, negative: bool
) -> None:
    bits = FORMATS[dtype]
    largest = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(bits))
    start = min(int(where * largest), largest - count)
    a, b = torch.tensor([start, start + count], dtype=bits).view(dtype) * (-1) ** negative
    row = difference(a, b)
    assert row.ulps == count
    assert row.equal == row.passed == (count == 0)


def test_ulps_across_zero() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal * 2.0**-23
    assert difference(torch.tensor(-3 * tiny), torch.tensor(2 * tiny)).ulps == 5
    assert difference(torch.tensor(-1e300).double(), torch.tensor(1e300).double()).ulps > 2**62


def test_relative_difference_is_of_the_largest_values() -> None:
    row = difference(torch.tensor([1.0, -8.0]), torch.tensor([1.5, -8.0]))
    assert (row.max_abs, row.relative, row.passed) == (0.5, 0.0625, False)
    assert difference(torch.tensor([1.0]), torch.tensor([0.0])).relative == math.inf
    assert difference(torch.zeros(2), torch.zeros(2)).passed


def test_tolerance_is_twice_the_references_own_error() -> None:
    x = {"encode": (torch.zeros(1, dtype=torch.float16),)}
    truth, theirs = Chain(Plus(torch.tensor([1.0]).double())), Chain(Plus(torch.tensor([1.01])))

    def row(value: float) -> ModuleDifference:
        return compare(Chain(Plus(torch.tensor([value]))), theirs, x, truth=truth)[0]

    assert row(1.0).tolerance == pytest.approx(0.02, rel=1e-3)
    assert row(0.995).passed
    assert not row(0.98).passed
    assert replace(row(1.01), equal=False).passed  # -0.0 and 0.0: equality is not required


def test_a_module_on_one_side_only_is_a_difference() -> None:
    twice = Plus(torch.ones(1))
    once, both = Chain(twice), Chain(twice)
    once.spare, both.spare = nn.Identity(), nn.Identity()
    both.encode = lambda x, return_dict: (both.spare(both.parts(x)),)  # type: ignore[method-assign]
    zero = {"encode": (torch.zeros(1),)}
    assert first_failure(compare(once, once, zero)) is None
    for a, b in ((once, both), (both, once)):
        failed = [row.name for row in compare(a, b, zero) if not row.passed]
        assert failed == ["spare"]


def test_another_shape_is_a_difference() -> None:
    row = difference(torch.zeros(2), torch.zeros(3))
    assert (row.shape, row.max_abs, row.passed) == ((2,), math.inf, False)


def test_shared_modules_are_compared_at_each_use() -> None:
    """As in diffusers' tiny blocks, which use one activation twice."""
    relu = nn.ReLU()
    ours = Chain(nn.ReLU(), Plus(-torch.ones(1)), nn.ReLU())
    theirs = Chain(relu, Plus(-torch.ones(1)), relu)
    rows = compare(ours, theirs, {"encode": (torch.ones(1),)})
    names = ["parts.0", "parts.1", "parts.2", "parts", "encode"]
    assert [(row.name, row.call, row.passed) for row in rows] == [(n, 1, True) for n in names]


def test_an_error_in_a_network_is_raised_and_hooks_and_threads_are_removed() -> None:
    threads = threading.active_count()
    good, bad = Chain(nn.Identity(), nn.Identity()), Chain(nn.Identity(), Fails())
    for a, b in ((good, bad), (bad, good)):
        with pytest.raises(sdconv.InputError, match="no"):
            compare(a, b, {"encode": (torch.zeros(1),)})
    assert threading.active_count() == threads
    assert not any(m._forward_hooks for net in (good, bad) for m in net.modules())


def test_only_a_few_outputs_are_in_memory() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal most
            y = x + 1
            alive.append(weakref.ref(y))
            most = max(most, sum(ref() is not None for ref in alive))
            return y

    def network() -> Chain:
        return Chain(*(Counted() for _ in range(50)))

    assert first_failure(compare(network(), network(), {"encode": (torch.zeros(1),)})) is None
    assert len(alive) == 100
    assert most <= 6
