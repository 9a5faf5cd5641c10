"""What stays in memory, what is spilled, and how many rows a strip has: from the steps and a
limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdconv.errors import InputError
from sdconv.sizes import in_words
from sdconv.streaming.maps import Layout, Map, lay_out
from sdconv.streaming.steps import Step

# what torch's kernels keep beside the tensors (generated code, thread stacks, buffers)
KERNELS = 24 << 20


@dataclass(frozen=True, eq=False)
class Plan:
    """How one picture will go through a network.

    Attributes:
        steps: in order. units: of a strip, for each step.
        layout: of the maps between what comes in and the result.
        pictures: that go through, one after the other.
    """

    steps: tuple[Step, ...]
    units: tuple[int, ...]
    layout: Layout
    pictures: int

    @property
    def peak(self) -> int:
        """Bytes of memory at most, weights and input apart, the result with it."""
        written: list[Map] = []
        most = 0
        for step, units in zip(self.steps, self.units, strict=True):
            most = max(most, self.layout.taken(written) + step.workspace(units))
            written.append(step.target)
            most = max(most, self.layout.taken(written) + step.remains(units))
        return most + KERNELS + self.pictures * self.steps[-1].target.bytes

    @property
    def spilled(self) -> int:
        """Bytes outside memory."""
        return self.layout.spilled

    @property
    def multiplies(self) -> int:
        """Multiplications of all pictures."""
        return self.pictures * sum(step.multiplies for step in self.steps)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the result, ``(B, C, H, W)``."""
        last = self.steps[-1].target
        return self.pictures, last.channels, last.height, last.width


def make_plan(
    steps: Sequence[Step],
    *,
    pictures: int,
    limit: int | None,
    can_spill: bool,
    parted: bool = False,
) -> Plan:
    """Puts as much of the maps into memory as the limit allows, and cuts strips to what is left.

    Args:
        steps: for one picture. pictures: that go through, one after the other.
        limit: bytes of memory, weights and input apart; None for no limit.
        can_spill: whether maps may go outside it. parted: see `sdconv.streaming.arena.is_parted`.

    Raises:
        InputError: the limit cannot be met; it says what the least is, with and without spilling.
    """
    steps = tuple(steps)
    result = pictures * steps[-1].target.bytes
    comfortable = [_fitting(step, step.comfort) for step in steps]
    for units in (comfortable, [1] * len(steps)):
        room = None if limit is None else limit - result - _most(steps, units)
        layout = lay_out(_inner(steps), room, parted=parted)
        fits = layout.keeps_whole if can_spill else not layout.spilled
        if fits and (room is None or room >= 0):
            break
    else:
        raise InputError(
            "the memory limit cannot be met",
            where="memory_limit",
            expected=enough_memory(steps, pictures=pictures, can_spill=can_spill),
            got=in_words(limit or 0),
        )
    if limit is not None:
        room = limit - result - KERNELS - layout.memory
        pairs = zip(steps, comfortable, strict=True)
        units = [min(most, _fitting(step, room)) for step, most in pairs]
    units = [_even(step.units, n) for step, n in zip(steps, units, strict=True)]
    return Plan(steps, tuple(units), layout, pictures)


def lifetimes(steps: Sequence[Step]) -> dict[Map, range]:
    """For every map the steps, by number, during which it is alive; in the order of birth."""
    spans: dict[Map, range] = {}
    for number, step in enumerate(steps):
        for key in (*step.reads, step.target):
            spans[key] = range(spans[key].start if key in spans else number, number + 1)
    return spans


def _inner(steps: Sequence[Step]) -> dict[Map, range]:
    """The lifetimes of the maps that no caller brings."""
    ends = (steps[0].source, steps[-1].target)
    return {key: span for key, span in lifetimes(steps).items() if key not in ends}


def _most(steps: Sequence[Step], units: Sequence[int]) -> int:
    """The most bytes that a step's strips take, and what kernels keep."""
    return KERNELS + max(step.workspace(n) for step, n in zip(steps, units, strict=True))


def _fitting(step: Step, room: int) -> int:
    """The most units, at least one, of which a strip takes no more than ``room`` bytes."""
    one = step.workspace(1)
    return max(1, min(step.units, 1 + (room - one) // (step.workspace(2) - one)))


def _even(whole: int, most: int) -> int:
    """Units of strips of nearly the same size: kernels are made for each size."""
    strips = -(-whole // most)
    return -(-whole // strips)


def least_memory(steps: Sequence[Step], *, pictures: int, spill: bool) -> int:
    """The smallest limit that can be met."""
    inner = {key: span for key, span in _inner(steps).items() if key.whole or not spill}
    maps = lay_out(inner, None, parted=False).size
    return maps + _most(steps, [1] * len(steps)) + pictures * steps[-1].target.bytes


def enough_memory(steps: Sequence[Step], *, pictures: int, can_spill: bool) -> str:
    """In words, which limits can be met."""
    least = {
        spill: in_words(least_memory(steps, pictures=pictures, spill=spill))
        for spill in (True, False)
    }
    if can_spill:
        return f"at least {least[True]}"
    return f"at least {least[False]}, or {least[True]} with spill=folder"
